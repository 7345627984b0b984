"""Where caches are kept. Imports nothing of the package: setup.py runs this file too."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """``PPAP_CACHE_DIR``, by default ``~/.cache/ppap``; each cache has a folder below it."""
    return Path(os.environ.get("PPAP_CACHE_DIR") or Path.home() / ".cache" / "ppap")
