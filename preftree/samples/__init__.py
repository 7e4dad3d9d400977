"""Answers of a base model beside those of what was trained: opening a run, asking it, showing what differs."""
