"""Fixtures of the whole suite."""

import ctypes
import os
import shutil
import signal

import pytest
import torch


def pytest_collection_modifyitems(items):
    """What takes longest starts first, so that no worker is left with it in the end."""
    items.sort(key=lambda item: not item.nodeid.startswith("tests/test_triton.py"))


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Fill uninitialised tensors with NaN or the largest integer, so that an unwritten output fails."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


# Deterministic products on a GPU need this before CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# With pytest -n: the workers share the cores, and so do the processes that their tests start.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    share = max((os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]), 1)
    torch.set_num_threads(share)
    os.environ.setdefault("OMP_NUM_THREADS", str(share))
    # Workers ignore Ctrl-C, and so would every process that a test starts to interrupt it.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    """No test depends on the caller's backend or on a network."""
    for name in [key for key in os.environ if key.startswith("PPAP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def generator() -> torch.Generator:
    """A seeded random source."""
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A tiny run of three steps, for tests that only read it."""
    from tests.runs import tiny_run

    return tiny_run(tmp_path_factory.mktemp("finished") / "run", "--train.steps=3")


@pytest.fixture(scope="session")
def predictor(finished):
    """What that run has learned."""
    import ppap

    return ppap.load(finished, device="cpu")


@pytest.fixture(scope="session")
def emulated_cuda(tmp_path_factory) -> ctypes.CDLL:
    """The CUDA library's kernels compiled for the CPU."""
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    from ppap.kernels import native_cuda

    out = tmp_path_factory.mktemp("emulated") / "cuda.so"
    native_cuda.builder().build_emulated_cuda(out)
    return native_cuda.with_sizes(ctypes.CDLL(str(out)))


@pytest.fixture(scope="session")
def pool():
    """Four processes of a gloo group, started once."""
    from tests.gloo_ranks import Pool

    made = Pool(4)
    yield made
    made.close()
