"""What the system is worth under faults: ``python -m tests.stress --help``, or ``make stress``.

The suite runs a small share of every experiment (``tests/test_stress.py``); no file here is collected by it.
"""
