"""Dense CRF over a validation set: label maps from score maps, in order.

The native implementation runs on the GPU for scores that lie there, where the CUDA library was built, else on
threads, an image on each. The package pydensecrf, which holds Python's lock while it works, takes one image
after the other.
"""

import collections
import contextlib
import importlib.metadata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ppap import __version__
from ppap.errors import UsageError
from ppap.kernels import dense_crf_batch, native
from ppap.kernels.dense_crf import automatic, unavailable_reason

# --eval.crf -> impl of ppap.kernels.dense_crf.
IMPLS = {"native": None, "pydensecrf": "pydensecrf"}


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
    """(H, W) int64 for each score map, on the CPU; empty where probabilities were asked for."""
    payload: Any = None
    maps: tuple[Tensor, ...] = ()
    """(C, H, W) float32 probabilities for each score map, if asked for."""


def require_crf(crf: str, device: torch.device | str = "cpu", option: str = "--eval.crf") -> None:
    """Refuse a CRF of ``--eval.crf``, or of another `option`, that cannot run on `device`.

    Raises:
        UsageError: why not, and the remedy.
    """
    reason = None if crf == "none" else unavailable_reason(IMPLS[crf], device)
    if reason is not None:
        others = " or ".join(name for name in (*IMPLS, "none") if name != crf)
        raise UsageError(f"{option} {crf} cannot run here: {reason}; or give {option} {others}")


def native_crf_missing(device: torch.device | str = "cpu") -> str | None:
    """None if the native CRF can run in an evaluation on `device`; else one line: that there is none, why."""
    reason = unavailable_reason(IMPLS["native"], device)
    return None if reason is None else f"no scores with CRF, the native one cannot run here: {reason}"


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
    return "none" if crf == "none" else _pydensecrf()


def _pydensecrf() -> str:
    for distribution in ("pydensecrf2", "pydensecrf"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return f"{distribution} {importlib.metadata.version(distribution)}"
    return "pydensecrf of unknown version"


def run_crf(tasks: Iterable[CRFTask], crf: str, *, maps: bool = False) -> Iterator[CRFResult]:
    """Results in the order of `tasks`, which are drawn only as fast as they are worked on.

    Args:
        tasks: images with their score maps.
        crf: "native", on the GPU for scores that lie there if the CUDA library was built, else on as many
            threads as torch has, or "pydensecrf", on one.
        maps: give probabilities instead of labels.

    Raises:
        ValueError, RuntimeError, MemoryError: as :func:`ppap.kernels.dense_crf`.
    """
    held: collections.deque[CRFTask] = collections.deque()

    def pairs() -> Iterator[tuple[Tensor | np.ndarray, tuple[Tensor, ...]]]:
        for task in tasks:
            held.append(task)
            yield task.image, task.scores

    results = dense_crf_batch(pairs(), impl=IMPLS[crf])
    try:
        for found in results:
            labels = () if maps else tuple(q.argmax(dim=0).cpu() for q in found)
            yield CRFResult(labels, held.popleft().payload, found if maps else ())
    finally:
        results.close()
