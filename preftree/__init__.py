"""preftree: preference optimization over token trees, every prompt computed once."""

__version__ = "0.1.0"
