"""The machine: device, precision, memory, and a report of all three."""
