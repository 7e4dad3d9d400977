"""Settings: dataclasses read from a command line or a YAML file. Reading them is pure; nothing is started here."""
