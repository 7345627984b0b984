"""The native CPU library built with address and undefined-behaviour sanitizers, on its own tests."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.shapes import clustered
from ppap.kernels import native, relation_masks
from tests.helpers import isas_to_build

ROOT = Path(__file__).parents[1]
FLAGS = [
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=undefined",
    "-fno-omit-frame-pointer",
    "-O1",
    "-g1",
    "-DPPAP_EMULATE_PAIRS",
]
TESTS = (
    "(fused and published) or softmax or proxy or relation or layout or chunks or past or sixteen "
    "or (direct and cpp) or (counts and cpp) or (pictures and noise and cpp) or (limit and not refuses)"
)
# The tests run against the library of this path in the place of the installed one. Triton stays out: imported
# under the preloaded sanitizer, Triton 3.8 ends the process (real___cxa_throw), and nothing here needs it.
RUN = """
import sys
sys.modules["triton"] = None
from pathlib import Path
import pytest
from ppap.kernels import native
from tests.test_native_sanitized import check_screened_masks
check_screened_masks(native.FILE, Path(sys.argv[1]))
native.FILE = Path(sys.argv[1])
native.library.cache_clear()
files = ["tests/test_native.py", "tests/test_dense_crf.py"]
sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *files, "-k", sys.argv[2]]))
"""


def masks_by(library: Path, precision: str = "fp32") -> list[torch.Tensor]:
    """Masks and counts of some data in the portable form of a library; thresholds among the similarities."""
    native.FILE = library
    native.library.cache_clear()
    found = []
    for rows, width, norm in [(700, 384, 1.0), (300, 33, 1e-12), (300, 64, 1e12)]:
        keys = clustered(rows, width, seed=rows, clusters=5)
        anchors = torch.arange(0, rows, 5)
        phi, psi = torch.linspace(0, 0.9, len(anchors)) * norm, torch.linspace(-0.2, 0.5, len(anchors)) * norm
        arguments = (keys[anchors], phi, keys * norm, psi, anchors)
        masks, *counts = relation_masks(*arguments, precision=precision, impl="cpp")
        found += [masks.positive, masks.kept, *counts]
    # Rows whose every entry lies midway between two bf16, where rounding errs most and in one direction.
    entry = 0.25 * (1 + 2.0**-8)
    worst = torch.full((2, 16), entry)
    worst[:, 15] = (1 - 15 * entry**2) ** 0.5
    for phi in (0.9999, 0.998, 0.994):
        arguments = (worst, torch.full((2,), phi), worst, torch.zeros(2), torch.arange(2))
        masks, *counts = relation_masks(*arguments, precision=precision, impl="cpp")
        found += [masks.positive, masks.kept, *counts]
    return found


def check_screened_masks(library: Path, with_pairs: Path) -> None:
    """Masks of float32, bit by bit, where cosines are formed in bf16 first: the form of avx512bf16, emulated.

    At norms far from 1 too, of which the bound of the rounding error must keep track.
    """
    os.environ["PPAP_CPU_ISA"] = "portable"
    try:
        wanted = masks_by(library)
        assert native.Keys.of(torch.ones(2, 3), "fp32").pairs is None
        screened = masks_by(with_pairs)
        assert native.Keys.of(torch.ones(2, 3), "fp32").pairs.shape == (2, 2), "packed once for all calls"
        assert all(torch.equal(a, b) for a, b in zip(screened, wanted, strict=True))
        rounded = masks_by(with_pairs, "bf16")
        assert not all(torch.equal(a, b) for a, b in zip(rounded, wanted, strict=True)), "rounding flips some"
    finally:
        del os.environ["PPAP_CPU_ISA"]


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
    build = [sys.executable, "csrc/build.py", "--out", str(library), "--isas", *isas_to_build(), "--", *FLAGS]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True, env={**os.environ, "CXX": "g++"})
    options = "detect_leaks=0:verify_asan_link_order=0:log_path=" + str(tmp_path / "report")
    environment = {**os.environ, "LD_PRELOAD": sanitizer(), "ASAN_OPTIONS": options, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", RUN, str(library), TESTS]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    reports = "\n".join(path.read_text()[:4000] for path in tmp_path.glob("report*"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:] + reports
    assert " passed" in done.stdout and not reports
