"""Where the time of the CPU kernels goes, per instruction set: ``python -m bench.phases``.

The phases of one loss with its gradient (N = 12,544 patches, A = 784 anchors, D = E = 384 channels, T = 2),
each by the op that consists of it, or as the difference of two ops; with the rate of its products and the
share of what ``torch.mm`` reaches on this machine in the same run. Every round times everything in turn, and
the best of each counts. The backward pass of the op recomputes the logits, which the loss does not: that much
is subtracted.
"""

import argparse
import os
from collections.abc import Callable, Sequence

import torch

from bench.machine import best_times, device_name
from bench.shapes import VITS16_CHUNK, Shape, loss_inputs
from ppap.kernels import (
    PropagationConfig,
    masked_log_softmax,
    native,
    ppap_loss,
    proxy_average,
    relation_masks,
)

CFG = PropagationConfig()
TAU = 0.8
PRODUCTS = {"cosines, bits": 1, "sums": 0, "logits, exponentials": 1, "gradient": 2, "rest": 0, "loss": 6}
"""Phase -> products of 2 N A D operations that it cannot do without; the loss has three times the first."""


def runs(shape: Shape, precision: str) -> dict[str, Callable[[], object]]:
    """What is timed."""
    features, z, anchors = loss_inputs(shape)
    queries, z_anchors = features[anchors], z[anchors]
    phi, psi = torch.full((shape.anchors,), CFG.phi0), torch.full((shape.anchors,), CFG.psi0)
    options = {"precision": precision, "impl": "cpp"}
    masks = relation_masks(queries, phi, features, psi, anchors, **options)[0]
    trained, leaf = z.clone().requires_grad_(), z_anchors.clone().requires_grad_()

    def softmax(gradient: bool) -> None:
        loss = masked_log_softmax(leaf, trained, masks, TAU, **options)
        if gradient:
            torch.autograd.grad(loss.sum(), (leaf, trained))

    def whole() -> None:
        trained.grad = None
        ppap_loss(features, trained, anchors, CFG, temperature=TAU, **options).backward()

    return {
        "masks": lambda: relation_masks(queries, phi, features, psi, anchors, **options),
        "average": lambda: proxy_average(queries, features, phi, **options),
        "forward": lambda: softmax(False),
        "both": lambda: softmax(True),
        "loss": whole,
    }


def product(shape: Shape, dtype: torch.dtype) -> Callable[[], object]:
    """``torch.mm`` of anchors and patches, the machine's own rate."""
    left = torch.ones(shape.anchors, shape.width, dtype=dtype)
    right = torch.ones(shape.width, shape.patches, dtype=dtype)
    out = left @ right
    return lambda: torch.mm(left, right, out=out)


def phases(seconds: dict[str, float]) -> dict[str, float]:
    """Seconds of each phase of one loss, from those of the ops."""
    cosines, sums = seconds["masks"], max(seconds["average"] - seconds["masks"], 0.0)
    gradient = seconds["both"] - 2 * seconds["forward"]
    parts = {"cosines, bits": cosines, "sums": sums, "logits, exponentials": seconds["forward"]}
    known = (CFG.steps + 1) * cosines + CFG.steps * sums + seconds["forward"] + gradient
    return {**parts, "gradient": gradient, "rest": seconds["loss"] - known, "loss": seconds["loss"]}


def table(shape: Shape, isa: str, precision: str, found: dict[str, float], rates: dict[str, float]) -> str:
    """Markdown; phases of a step of the walk stand once."""
    flops = 2 * shape.patches * shape.anchors * shape.width
    head = " | ".join(f"of mm {name} ({rate / 1e9:.0f})" for name, rate in rates.items())
    lines = [f"| {isa} {precision} | ms | GF/s | {head} |", "|---|---:|---:|" + "---:|" * len(rates)]
    for name, seconds in found.items():
        rate = PRODUCTS[name] * flops / seconds if PRODUCTS[name] and seconds > 0 else None
        cells = ["" if rate is None else f"{100 * rate / bound:.0f} %" for bound in rates.values()]
        shown = "" if rate is None else f"{rate / 1e9:.0f}"
        lines.append(f"| {name} | {1e3 * seconds:.0f} | {shown} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print, instruction set after instruction set."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.phases", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    here = list(native.available_isas())
    parser.add_argument("--isas", nargs="+", choices=here, default=here, help="instruction sets")
    parser.add_argument(
        "--precision", nargs="+", choices=["fp32", "bf16"], default=["fp32"], help="of products"
    )
    parser.add_argument("--rounds", type=int, default=5, help="the best of which counts")
    options = parser.parse_args(argv)
    shape = VITS16_CHUNK
    print(
        f"{device_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}; {shape}", flush=True
    )
    for isa in options.isas:
        os.environ["PPAP_CPU_ISA"] = isa
        for precision in options.precision:
            dtypes = {"fp32": torch.float32} | ({"bf16": torch.bfloat16} if isa == "avx512bf16" else {})
            products = {name: product(shape, dtype) for name, dtype in dtypes.items()}
            seconds = best_times({**runs(shape, precision), **products}, options.rounds)
            flops = 2 * shape.patches * shape.anchors * shape.width
            rates = {name: flops / seconds.pop(name) for name in dtypes}
            print(f"\n{table(shape, isa, precision, phases(seconds), rates)}", flush=True)


if __name__ == "__main__":
    main()
