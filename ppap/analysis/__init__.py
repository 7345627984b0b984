"""Analyses behind ``python -m ppap.analyze``: one file each."""
