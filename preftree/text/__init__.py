"""What can be said of a text without a model: refusals, damage, language, duplicates, overlap with test sets.

Pure functions and small indexes over plain strings, shared by `prepare` and `check`.
"""
