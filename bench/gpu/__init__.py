"""Everything that only a GPU can show, in one command: ``python -m bench.gpu``; start at ``__main__.py``.

``cells``: what is timed. ``worker``: times it, in a process that may die. ``checks``: libraries, tests,
sanitizer. ``profile``: time by kernel. ``tiles``: launch configurations. ``crf``: the dense CRF. ``results``:
the files that are written after every finding.
"""
