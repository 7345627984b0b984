"""Dense CRF over a validation set: label maps from score maps, in order, images across threads or processes.

The native implementation runs on the GPU for scores that lie there, where the CUDA library was built, else on
threads. The package pydensecrf holds Python's lock while it works, so it gets worker processes.
"""

import collections
import importlib.metadata
import multiprocessing
import signal
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppap import __version__
from ppap.errors import UsageError
from ppap.kernels import dense_crf, dense_crf_batch, native
from ppap.kernels.dense_crf import automatic, unavailable_reason

# --eval.crf -> impl of ppap.kernels.dense_crf.
IMPLS = {"native": None, "pydensecrf": "pydensecrf"}
# Images held at once per worker process: one under way, one ready to follow.
_HELD_PER_WORKER = 2


@dataclass(frozen=True)
class CRFTask:
    """One image for the CRF; its tensors must not be changed before its result arrives."""

    image: Tensor | np.ndarray
    """(H, W, 3) uint8 RGB."""
    scores: tuple[Tensor, ...]
    """Score maps (C, H, W), logits or log-probabilities; C may differ between maps."""
    payload: Any = None
    """Anything that should come back with the result."""


@dataclass(frozen=True)
class CRFResult:
    """Labels of one image."""

    labels: tuple[Tensor, ...]
    """(H, W) int64 for each score map, on the CPU."""
    payload: Any = None


def crf_missing(crf: str, device: torch.device | str = "cpu") -> str | None:
    """None if the CRF of ``--eval.crf`` can run, or is none; else one line: why it is skipped, the remedy.

    `device` is that of the evaluation.
    """
    reason = None if crf == "none" else unavailable_reason(IMPLS[crf], device)
    return None if reason is None else f"dense CRF ({crf}) skipped: {reason}"


def crf_device(crf: str, device: torch.device | str) -> torch.device:
    """Where an evaluation on `device` leaves the score maps for its CRF."""
    return torch.device(device if crf == "native" and automatic(device) == "cuda" else "cpu")


def crf_implementation(crf: str, device: torch.device | str = "cpu") -> str:
    """What computes the CRF of ``--eval.crf`` in an evaluation on `device`, for the record; it can run."""
    if crf == "native" and crf_device(crf, device).type != "cpu":
        return f"ppap {__version__}, CUDA library, {torch.cuda.get_device_name(device)}"
    if crf == "native":
        name = next(name for name, index in native.available_isas().items() if index == native.isa())
        return f"ppap {__version__}, native library, {name}"
    return "none" if crf == "none" else f"pydensecrf2 {importlib.metadata.version('pydensecrf2')}"


def run_crf(tasks: Iterable[CRFTask], crf: str, workers: int = 0) -> Iterator[CRFResult]:
    """Results in the order of `tasks`, which are drawn only as fast as they are worked on.

    Args:
        tasks: images with their score maps.
        crf: "native", on the GPU for scores that lie there if the CUDA library was built, else on as many
            threads as torch has, or "pydensecrf".
        workers: processes for "pydensecrf"; 0 = none, in this one. They are spawned, so a script of your own
            needs the usual ``if __name__ == "__main__":`` guard.

    Raises:
        UsageError: a worker process died.
        ValueError, RuntimeError, MemoryError: as :func:`ppap.kernels.dense_crf`.
    """
    held: collections.deque[CRFTask] = collections.deque()

    def pairs() -> Iterator[tuple[Tensor | np.ndarray, tuple[Tensor, ...]]]:
        for task in tasks:
            held.append(task)
            yield task.image, task.scores

    if crf == "native" or workers == 0:
        results = dense_crf_batch(pairs(), impl=IMPLS[crf])
        labels = (tuple(q.argmax(dim=0).cpu() for q in maps) for maps in results)
    else:
        results = labels = _in_processes(pairs(), IMPLS[crf], workers)
    try:
        for maps in labels:
            yield CRFResult(maps, held.popleft().payload)
    finally:
        results.close()


def _in_processes(pairs: Iterable, impl: str, workers: int) -> Iterator[tuple[Tensor, ...]]:
    """Label maps of every pair of an image and its score maps."""
    waiting: collections.deque[Future] = collections.deque()
    # Never fork: torch's threads do not survive it.
    spawning = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, spawning, initializer=_start_worker)
    try:
        for image, scores in pairs:
            arrays = [part.detach().float().cpu().numpy() for part in scores]
            waiting.append(pool.submit(_labels, np.asarray(image), arrays, impl))
            while len(waiting) >= _HELD_PER_WORKER * workers or (waiting and waiting[0].done()):
                yield tuple(map(torch.from_numpy, waiting.popleft().result()))
        while waiting:
            yield tuple(map(torch.from_numpy, waiting.popleft().result()))
    except BrokenProcessPool:
        raise UsageError(
            "a dense CRF worker process died or could not start: there may be too little memory; if a script "
            'of your own starts the evaluation, guard it with `if __name__ == "__main__":`; or set '
            "--eval.crf-workers 0, or --eval.crf native"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _start_worker() -> None:
    # Ctrl-C reaches the whole process group; the main process ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def _labels(image: np.ndarray, scores: list[np.ndarray], impl: str) -> list[np.ndarray]:
    return [dense_crf(image, part, impl=impl).numpy().argmax(axis=0) for part in scores]
