"""What goes out with a model: its card, and the hub repository that takes it."""
