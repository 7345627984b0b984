"""Tests of the Triton kernels in its interpreter; ``tests/test_triton.py`` runs them in another process.

Triton decides on import whether it compiles or interprets, so these cannot share a process with anything that
compiles: without TRITON_INTERPRET=1 nothing here is collected.
"""

import os

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]
