"""Worker processes of the CRF: order, time-outs, deaths and clean ends, with a stub in place of the CRF."""

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from ppap.evaluation.crf import CRFPool, CRFTask, crf_available
from ppap.kernels import dense_crf

ROOT = Path(__file__).parents[1]

# The first pixel of the image says how to behave. The answer is the negated scores, so that labels with "CRF"
# differ from those without. Only the file system is shared with the workers, hence the marker file.
STUB = """
import os, signal, time
from pathlib import Path

OK, SLEEP, DIE, DIE_ONCE, RAISE, SLOW = range(6)
MARKER = Path(__file__).with_name("died")

def crf(image, scores):
    mode = image[0, 0, 0]
    if mode == SLEEP:
        time.sleep(600)
    if mode == SLOW:
        time.sleep(0.5)
    if mode == DIE or (mode == DIE_ONCE and not MARKER.exists()):
        MARKER.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == RAISE:
        raise ValueError("scores are odd")
    return -scores
"""

BROKEN = """
import sys

if any("spawn_main" in argument for argument in sys.orig_argv):
    raise ImportError("not in a worker")

def crf(image, scores):
    return scores
"""


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """The stub as a module that workers can import."""
    return importable(STUB, "crf_stub", tmp_path, monkeypatch)


def importable(source, name, folder, monkeypatch):
    (folder / f"{name}.py").write_text(source)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module(name)


def task(number: int, mode: int = 0) -> CRFTask:
    rng = np.random.default_rng(number)
    image = np.full((6, 5, 3), mode, dtype=np.uint8)
    scores = tuple(rng.normal(size=(classes, 6, 5)).astype(np.float32) for classes in (4, 300))
    return CRFTask(f"{number}.png", image, scores, payload=number)


def check(result, number: int, applied: bool = True):
    """The labels are the stub's, or those of the scores alone."""
    assert (result.name, result.payload) == (f"{number}.png", number)
    assert (result.failure is None) == applied
    for labels, scores in zip(result.labels, task(number).scores, strict=True):
        assert labels.dtype == np.int64
        assert np.array_equal(labels, (-scores if applied else scores).argmax(axis=0))


@pytest.mark.parametrize("workers", [0, 2])
def test_results_come_in_order(stub, workers):
    modes = [stub.SLOW] + [stub.OK] * 6  # the first is the last to finish
    with CRFPool(workers, timeout=60, impl=stub.crf) as pool:
        results = list(pool.run(task(i, mode) for i, mode in enumerate(modes)))
    for i, result in enumerate(results):
        check(result, i)
    assert len(results) == 7 and pool.failures == [] and pool.report() is None


def test_few_images_are_held_at_once(stub):
    drawn = 0

    def tasks():
        nonlocal drawn
        for i in range(12):
            drawn += 1
            yield task(i)

    with CRFPool(1, timeout=60, impl=stub.crf) as pool:
        for i, result in enumerate(pool.run(tasks())):
            check(result, i)
            assert drawn <= i + 2


def test_reads_torch_tensors(stub):
    image, scores = torch.zeros(6, 5, 3, dtype=torch.uint8), torch.randn(4, 6, 5, requires_grad=True)
    with CRFPool(0, timeout=60, impl=stub.crf) as pool:
        (result,) = pool.run([CRFTask("a", image, (scores.bfloat16(),))])
    assert np.array_equal(result.labels[0], scores.bfloat16().float().argmin(dim=0).numpy())


def test_a_hang_costs_one_image_its_crf(stub):
    with CRFPool(2, timeout=1.0, impl=stub.crf) as pool:
        results = list(pool.run(task(i, stub.SLEEP if i == 1 else stub.OK) for i in range(5)))
    for i, result in enumerate(results):
        check(result, i, applied=i != 1)
    assert pool.failures == [("1.png", "over 1 s")]
    report = "dense CRF: 1 of 5 images kept their labels without CRF: 1.png (over 1 s)"
    assert pool.report() == report


def test_a_death_is_retried_once(stub):
    with CRFPool(1, timeout=60, impl=stub.crf) as pool:
        for i, result in enumerate(pool.run(task(i, stub.DIE_ONCE if i == 1 else stub.OK) for i in range(3))):
            check(result, i)
    assert stub.MARKER.exists() and pool.failures == []


def test_a_second_death_costs_the_image_its_crf(stub):
    with CRFPool(1, timeout=60, impl=stub.crf) as pool:
        for i, result in enumerate(pool.run(task(i, stub.DIE if i == 0 else stub.OK) for i in range(2))):
            check(result, i, applied=i != 0)
    assert pool.failures == [("0.png", "its worker died twice, by signal 9")]


def test_a_long_report_is_cut():
    pool = CRFPool(0, timeout=1)
    pool.failures = [(f"{i}.png", "over 1 s") for i in range(13)]
    assert pool.report().endswith("9.png (over 1 s) and 3 more")


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_of_the_implementation_is_raised(stub, workers):
    with (
        pytest.raises(ValueError, match="scores are odd"),
        CRFPool(workers, timeout=60, impl=stub.crf) as pool,
    ):
        list(pool.run([task(0, stub.RAISE)]))


def test_a_worker_that_cannot_start_is_explained(tmp_path, monkeypatch):
    broken = importable(BROKEN, "crf_broken", tmp_path, monkeypatch)
    with (
        pytest.raises(RuntimeError, match=r"cannot start \(exit code 1\).*__main__"),
        CRFPool(1, timeout=60, impl=broken.crf) as pool,
    ):
        list(pool.run([task(0)]))


def test_leaving_early_ends_a_busy_worker(stub):
    start = time.monotonic()
    with CRFPool(1, timeout=600, impl=stub.crf) as pool:
        check(next(pool.run([task(0), task(1, stub.SLEEP)])), 0)
        processes = [worker.process for worker in pool._live]
    assert processes and not any(process.is_alive() for process in processes)
    assert time.monotonic() - start < 60


@pytest.mark.parametrize("workers", [0, 1])
def test_refuses_use_after_the_end(stub, workers):
    with CRFPool(workers, timeout=1, impl=stub.crf) as pool:
        pass
    with pytest.raises(RuntimeError, match="inside its with block"):
        next(pool.run([task(0)]))


@pytest.mark.parametrize(("workers", "timeout"), [(-1, 1), (1, 0), (1, float("nan"))])
def test_refuses_wrong_arguments(workers, timeout):
    with pytest.raises(ValueError, match="CRFPool"):
        CRFPool(workers, timeout)


MAIN = """
import numpy as np
import crf_stub
from ppap.evaluation.crf import CRFPool, CRFTask

def tasks():
    for mode in (crf_stub.OK, crf_stub.OK, crf_stub.SLEEP, crf_stub.SLEEP):
        yield CRFTask("a", np.full((4, 4, 3), mode, np.uint8), (np.zeros((2, 4, 4)),))

if __name__ == "__main__":
    with CRFPool(2, timeout=600, impl=crf_stub.crf) as pool:
        for result in pool.run(tasks()):
            print("one done", flush=True)
"""


@pytest.mark.skipif(
    not Path("/proc/self/stat").exists(), reason="needs /proc to find the processes of a session"
)
def test_ctrl_c_leaves_no_process_and_no_noise(stub, tmp_path):
    (tmp_path / "main.py").write_text(MAIN)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    main = subprocess.Popen(
        [sys.executable, str(tmp_path / "main.py")],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert main.stdout.readline() == "one done\n"
    assert len(session(main.pid)) >= 2  # the main process and at least one worker
    os.killpg(main.pid, signal.SIGINT)  # what a terminal does
    _, errors = main.communicate(timeout=30)
    assert main.returncode == -signal.SIGINT
    assert errors.count("Traceback") == 1 and errors.rstrip().endswith("KeyboardInterrupt")
    until = time.monotonic() + 10
    while session(main.pid) and time.monotonic() < until:
        time.sleep(0.05)
    assert session(main.pid) == []


def session(leader: int) -> list[int]:
    """Ids of the running processes in the session of `leader`."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session_id = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:  # it ended meanwhile
            continue
        if int(session_id) == leader and state != "Z":
            found.append(int(stat.parent.name))
    return found


def test_availability_names_the_remedy(monkeypatch):
    impl = importlib.import_module("ppap.kernels.dense_crf.pydensecrf_impl")
    monkeypatch.setattr(impl, "unavailable_reason", lambda: f"no module; {impl.INSTALL}")
    assert crf_available().startswith("dense CRF skipped: no module; pip install pydensecrf2")
    monkeypatch.setattr(impl, "unavailable_reason", lambda: None)
    assert crf_available() is None


@pytest.mark.skipif(crf_available() is not None, reason="pydensecrf is missing: pip install pydensecrf2")
def test_a_worker_runs_the_real_crf():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)
    maps = tuple(rng.normal(size=(classes, 20, 24)).astype(np.float32) for classes in (3, 5))
    with CRFPool(1, timeout=60) as pool:
        (result,) = pool.run([CRFTask("a", image, maps)])
    for labels, scores in zip(result.labels, maps, strict=True):
        assert np.array_equal(labels, dense_crf(image, scores).numpy().argmax(axis=0))
