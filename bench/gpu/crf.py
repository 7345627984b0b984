"""The dense CRF's part of ``python -m bench.gpu``: the CUDA library against the native CPU one."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from bench.crf_pictures import CLASSES, SIDE, coloured_noise, logits_of, smooth_regions
from bench.gpu.clock import time_calls
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


def compare(done: Callable[["Comparison"], None], rounds: int) -> None:
    """Compare on every kind of picture; `done` gets each.

    Args:
        done: called with every comparison.
        rounds: calls timed per measurement.
    """
    for name, picture in (("regions", smooth_regions), ("coloured noise", coloured_noise)):
        row = Comparison(name)
        missing = unavailable_reason("cuda") or unavailable_reason("cpp")
        if missing is not None:
            row.note = f"not measured: {missing}"
        else:
            try:
                _measure(row, [picture(seed) for seed in range(IMAGES)], rounds)
            except RuntimeError as error:
                row.note = f"failed: {str(error).splitlines()[0][:160]}"
        done(row)


def _measure(row: Comparison, pictures: list[np.ndarray], rounds: int) -> None:
    blocks = (torch.arange(SIDE) // 24)[:, None] * 5 + torch.arange(SIDE) // 40
    logits = logits_of(blocks % CLASSES, CLASSES, 0)
    images = [torch.from_numpy(picture) for picture in pictures]
    on_gpu = [(image.cuda(), (logits.cuda(),)) for image in images]
    in_memory = [(image, (logits,)) for image in images]

    def run(pairs: list, impl: str) -> list[torch.Tensor]:
        return [q for (q,) in dense_crf_batch(pairs, impl=impl)]

    got, wanted = (torch.stack(run(*way)).cpu() for way in ((on_gpu, "cuda"), (in_memory, "cpp")))
    row.difference = (got - wanted).abs().max().item()
    row.equal = (got.argmax(dim=1) == wanted.argmax(dim=1)).double().mean().item()
    if not (row.difference <= DIFFERENCE_MAX and 1 - row.equal <= DIFFERENT_LABELS_MAX):
        row.note = f"WRONG, not timed: off by {row.difference:.1e}, {100 * row.equal:.3f} % of labels equal"
        return
    row.cuda_per_s = 1e3 * IMAGES / time_calls(lambda: run(on_gpu, "cuda"), rounds).ms
    row.cpp_per_s = 1e3 * IMAGES / time_calls(lambda: run(in_memory, "cpp"), min(rounds, 3)).ms
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
    if not rows:
        return [title, "", "Not run."]
    return [title, "", head, "|---|---:|---:|---:|---:|---:|"] + [
        f"| {r.picture} | {line(r)} |" for r in rows
    ]
