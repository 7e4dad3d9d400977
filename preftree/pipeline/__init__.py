"""Pipelines: the stages of one file, each a command of its own, run where its inputs or settings have changed."""
