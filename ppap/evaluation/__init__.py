"""Evaluation: ``evaluate.py`` runs a network over a set, ``metrics.py`` counts, ``crf.py`` smooths."""
