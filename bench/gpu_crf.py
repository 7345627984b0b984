"""The dense CRF's part of ``python -m bench.gpu``: the CUDA library against the native CPU one."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from bench.crf_parity import logits_of
from bench.test_dense_crf import CLASSES, SIDE, coloured_noise, pictures
from ppap.kernels import dense_crf_batch
from ppap.kernels.dense_crf import unavailable_reason

IMAGES = 8
"""Images of one measurement."""
# Above these a result is wrong.
DIFFERENCE_MAX, DIFFERENT_LABELS_MAX = 5e-4, 1e-4


@dataclass
class Comparison:
    """One kind of picture, or why it was not measured."""

    picture: str
    cuda_per_s: float | None = None
    """Images per second of the CUDA library, images and scores on the GPU before."""
    cpp_per_s: float | None = None
    """Images per second of the CPU library on all threads, both in memory before."""
    threads: int = 0
    difference: float = 0.0
    """Largest of a probability."""
    equal: float = 0.0
    """Share of pixels with the same label."""
    note: str = "not measured"


def compare(deadline: float, rounds: int, milliseconds: Callable) -> list[Comparison]:
    """All comparisons; those that the time does not reach, or that cannot run, stay as they are.

    Args:
        deadline: of ``time.monotonic()``.
        rounds: calls timed per measurement.
        milliseconds: call and rounds -> median time of a call [ms] and how many were timed.

    Raises:
        SystemExit: a result is wrong; it is not timed.
    """
    found = [Comparison("scenes"), Comparison("coloured noise")]
    for row in found:
        if time.monotonic() >= deadline:
            continue
        missing = unavailable_reason("cuda") or unavailable_reason("cpp")
        if missing is not None:
            row.note = f"not measured: {missing}"
        else:
            _measure(row, rounds, milliseconds)
            print(f"dense CRF, {row.picture}: {line(row)}", flush=True)
    return found


def _measure(row: Comparison, rounds: int, milliseconds: Callable) -> None:
    chosen = list(pictures(None)) if row.picture == "scenes" else [coloured_noise()]
    blocks = (torch.arange(SIDE) // 24)[:, None] * 5 + torch.arange(SIDE) // 40
    logits = logits_of(blocks % CLASSES, CLASSES, 0)
    images = [torch.from_numpy(np.ascontiguousarray(chosen[i % len(chosen)])) for i in range(IMAGES)]
    on_gpu = [(image.cuda(), (logits.cuda(),)) for image in images]
    in_memory = [(image, (logits,)) for image in images]

    def run(pairs: list, impl: str) -> list[torch.Tensor]:
        return [q for (q,) in dense_crf_batch(pairs, impl=impl)]

    got, wanted = (torch.stack(run(*way)).cpu() for way in ((on_gpu, "cuda"), (in_memory, "cpp")))
    row.difference = (got - wanted).abs().max().item()
    row.equal = (got.argmax(dim=1) == wanted.argmax(dim=1)).double().mean().item()
    if not (row.difference <= DIFFERENCE_MAX and 1 - row.equal <= DIFFERENT_LABELS_MAX):
        raise SystemExit(f"bench.gpu: the dense CRF is wrong on {row.picture}; run tests/test_gpu.py")
    row.cuda_per_s = 1e3 * IMAGES / milliseconds(lambda: run(on_gpu, "cuda"), rounds)[0]
    row.cpp_per_s = 1e3 * IMAGES / milliseconds(lambda: run(in_memory, "cpp"), min(rounds, 3))[0]
    row.threads, row.note = torch.get_num_threads(), ""


def line(row: Comparison) -> str:
    """A row's cells but the first, as markdown."""
    if row.cuda_per_s is None or row.cpp_per_s is None:
        return " | ".join([row.note] + ["not measured"] * 4)
    return (
        f"{row.cuda_per_s:,.0f} | {row.cpp_per_s:,.1f} ({row.threads} threads) | "
        f"{row.cuda_per_s / row.cpp_per_s:,.1f} | {row.difference:.1e} | {100 * row.equal:.4f} %"
    )


def report(rows: list[Comparison]) -> list[str]:
    """The table as lines of markdown."""
    head = "| picture | cuda [images/s] | cpp [images/s] | ratio | largest difference | equal labels |"
    title = f"## Dense CRF: {SIDE} x {SIDE} pixels, {CLASSES} classes, 10 iterations"
    return [title, "", head, "|---|---:|---:|---:|---:|---:|"] + [
        f"| {r.picture} | {line(r)} |" for r in rows
    ]
