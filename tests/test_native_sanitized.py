"""The native CPU library built with address and undefined-behaviour sanitizers, on its own tests."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLAGS = [
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
    "-fno-omit-frame-pointer",
    "-O1",
    "-g",
]
TESTS = "(fused and published) or softmax or proxy or relation or layout or chunks or past"
# The tests run against the library of this path in the place of the installed one.
RUN = """
import sys
from pathlib import Path
import pytest
from ppap.kernels import native
native._FILE = Path(sys.argv[1])
native.library.cache_clear()
sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "tests/test_native.py", "-k", sys.argv[2]]))
"""


def sanitizer() -> str | None:
    """The run-time library of gcc's address sanitizer."""
    if shutil.which("g++") is None:
        return None
    found = subprocess.run(
        ["g++", "-print-file-name=libasan.so"], capture_output=True, text=True
    ).stdout.strip()
    return found if Path(found).is_absolute() and Path(found).exists() else None


@pytest.mark.skipif(sanitizer() is None, reason="g++ with libasan is not installed")
def test_clean_under_sanitizers(tmp_path):
    library = tmp_path / "sanitized.so"
    build = [sys.executable, "csrc/build.py", "--out", str(library), "--", *FLAGS]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, env={**os.environ, "CXX": "g++"})
    options = "detect_leaks=0:verify_asan_link_order=0:log_path=" + str(tmp_path / "report")
    environment = {**os.environ, "LD_PRELOAD": sanitizer(), "ASAN_OPTIONS": options, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", RUN, str(library), TESTS]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    reports = "\n".join(path.read_text()[:4000] for path in tmp_path.glob("report*"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:] + reports
    assert " passed" in done.stdout and not reports
