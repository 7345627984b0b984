"""The CRF over a validation set: order, laziness, errors and clean ends."""

import importlib.metadata
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from ppap.errors import UsageError
from ppap.evaluation import crf
from ppap.evaluation.crf import CRFTask, crf_implementation, native_crf_missing, require_crf, run_crf
from ppap.kernels import dense_crf, native
from ppap.kernels.dense_crf import native_impl, pydensecrf_impl

ROOT = Path(__file__).parents[1]
needs_library = pytest.mark.skipif(native.reason() is not None, reason=str(native.reason()))
needs_package = pytest.mark.skipif(
    pydensecrf_impl.unavailable_reason() is not None, reason="pydensecrf is missing: pip install pydensecrf2"
)
WAYS = [pytest.param("native", marks=needs_library), pytest.param("pydensecrf", marks=needs_package)]


def task(number: int) -> CRFTask:
    """The first is the largest, so that it would finish last."""
    height = 60 if number == 0 else 20
    rng = np.random.default_rng(number)
    image = torch.from_numpy(rng.integers(0, 256, (height, 24, 3), dtype=np.uint8))
    scores = tuple(torch.from_numpy(rng.normal(size=(classes, height, 24))).float() for classes in (3, 300))
    return CRFTask(image, scores, payload=number)


@pytest.mark.parametrize("name", WAYS)
def test_results_come_in_order_and_few_images_are_held(name):
    drawn = 0

    def tasks():
        nonlocal drawn
        for i in range(7):
            drawn += 1
            yield task(i)

    at_once = 2 * torch.get_num_threads()
    for i, result in enumerate(run_crf(tasks(), name)):
        assert result.payload == i and drawn <= i + 1 + at_once
        if i in (0, 6):
            for labels, scores in zip(result.labels, task(i).scores, strict=True):
                assert labels.dtype == torch.int64
                wanted = dense_crf(task(i).image, scores, impl=crf.IMPLS[name]).argmax(dim=0)
                assert torch.equal(labels, wanted)
    assert i == drawn - 1 == 6


@needs_library
def test_reads_every_float_type():
    image, (scores, _) = task(1).image, task(1).scores
    half = scores.bfloat16().requires_grad_()
    (result,) = run_crf([CRFTask(image, (half,))], "native")
    assert torch.equal(result.labels[0], dense_crf(image, half.detach()).argmax(dim=0))


@pytest.mark.parametrize("name", WAYS)
def test_an_error_is_raised(name):
    wrong = CRFTask(task(0).image, (task(0).scores[0] * torch.nan,))
    with pytest.raises(ValueError, match="NaN or infinite"):
        list(run_crf([wrong, task(1)], name))


@pytest.mark.parametrize("name", WAYS)
def test_an_error_of_the_tasks_is_passed_on(name):
    def tasks():
        yield task(0)
        raise InterruptedError

    with pytest.raises(InterruptedError):
        list(run_crf(tasks(), name))


MAIN = """
import torch
from ppap.evaluation.crf import CRFTask, run_crf

def tasks():
    for _ in range(10**6):
        yield CRFTask(torch.zeros(40, 40, 3, dtype=torch.uint8), (torch.zeros(3, 40, 40),))

if __name__ == "__main__":
    for result in run_crf(tasks(), NAME):
        print("one done", flush=True)
"""


@pytest.mark.parametrize("name", WAYS)
def test_ctrl_c_ends_it_without_noise(name, tmp_path):
    (tmp_path / "main.py").write_text(MAIN.replace("NAME", repr(name)))
    main = subprocess.Popen(
        [sys.executable, str(tmp_path / "main.py")],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert main.stdout.readline() == "one done\n"
    os.killpg(main.pid, signal.SIGINT)  # what a terminal does
    _, errors = main.communicate(timeout=60)
    assert main.returncode == -signal.SIGINT
    assert errors.count("Traceback") == 1 and errors.rstrip().endswith("KeyboardInterrupt")
    until = time.monotonic() + 10
    while _running(main.pid) and time.monotonic() < until:
        time.sleep(0.05)
    assert not _running(main.pid)


def _running(session: int) -> bool:
    """Whether any process of the session is left."""
    try:
        os.killpg(session, 0)
    except ProcessLookupError:
        return False
    return True


def test_what_is_missing_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setattr(
        pydensecrf_impl, "unavailable_reason", lambda: f"no module; {pydensecrf_impl.INSTALL}"
    )
    monkeypatch.setattr(native_impl, "unavailable_reason", lambda: "not built: install a C++ compiler")
    with pytest.raises(UsageError, match="pydensecrf cannot run here: no module; pip .*native or none"):
        require_crf("pydensecrf")
    with pytest.raises(UsageError, match="native cannot run here: not built: .*pydensecrf or none"):
        require_crf("native")
    assert "not built: install a C++ compiler" in native_crf_missing()
    require_crf("none")
    for module in (pydensecrf_impl, native_impl):
        monkeypatch.setattr(module, "unavailable_reason", lambda: None)
    for name in ("pydensecrf", "native"):
        require_crf(name)
    assert native_crf_missing() is None


@needs_library
def test_the_implementation_has_a_name(monkeypatch):
    monkeypatch.setenv("PPAP_CPU_ISA", "portable")
    assert crf_implementation("native").endswith("native library, portable")
    assert crf_implementation("none") == "none"


def test_the_package_is_named_by_whichever_distribution_brought_it(monkeypatch):
    there = {"pydensecrf": "1.0"}

    def version(name):
        if name not in there:
            raise importlib.metadata.PackageNotFoundError(name)
        return there[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert crf_implementation("pydensecrf") == "pydensecrf 1.0"
    there["pydensecrf2"] = "1.1"
    assert crf_implementation("pydensecrf") == "pydensecrf2 1.1"
    there.clear()
    assert crf_implementation("pydensecrf") == "pydensecrf of unknown version"
