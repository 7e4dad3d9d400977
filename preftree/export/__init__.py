"""A trained model for other runtimes, written by their own converters and read back."""
