"""What the method is worth on labelled photographs: every method, several data sets and seeds, one command.

``settings`` says what is run, ``report`` what is written; ``python -m bench.quality --help``.
"""
