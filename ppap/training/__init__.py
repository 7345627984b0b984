"""A training run from its command line to its report, and sets of runs over seeds."""
