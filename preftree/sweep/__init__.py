"""Sweeps: training runs over a grid of settings, which share token ids and reference log-probs, and their table."""
