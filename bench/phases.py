"""Where the time of the CPU kernels goes, per instruction set: ``python -m bench.phases``.

The phases of one loss with its gradient (N = 12,544 patches, A = 784 anchors, D = E = 384 channels, T = 2),
each by the call of the library that the loss makes, or as the difference of two; with the rate of its
products, and the time that ``torch.mm`` takes for them on this machine in the same run as a share of the
phase's. The products are of the precision asked for, if the instruction set has it; cosines of float32
that are screened count as bf16's. Every round times everything in turn, and the best of each counts. What is
left of the loss is torch's: checks, norms, thresholds, rows.
"""

import argparse
import os
from collections.abc import Callable, Sequence

import torch

from bench.machine import best_times, device_name
from bench.shapes import VITS16_CHUNK, Shape, loss_inputs
from ppap.kernels import PropagationConfig, native, ppap_loss
from ppap.kernels.masked_log_softmax import native_impl as contrast
from ppap.kernels.masked_log_softmax.chunks import Settings, Target
from ppap.kernels.precision import operand
from ppap.kernels.proxy_average import native_impl as averages
from ppap.kernels.relation_masks import native_impl as relations
from ppap.kernels.relation_masks.sets import Sets

CFG = PropagationConfig()
TAU = 0.8
PRODUCTS = {
    "cosines, one set": (1, 0),
    "sums": (0, 0),
    "cosines, both sets": (1, 0),
    "logits, exponentials": (0, 1),
    "gradient": (0, 2),
    "rest": (0, 0),
    "loss": (CFG.steps + 1, 3),
}
"""Phase -> products of 2 N A D operations that it needs, of cosines and others; the first two once per step
of the walk."""


def runs(shape: Shape, precision: str) -> dict[str, Callable[[], object]]:
    """What is timed."""
    features, z, anchors = loss_inputs(shape)
    phi, psi = torch.full((shape.anchors,), CFG.phi0), torch.full((shape.anchors,), CFG.psi0)
    keys = averages.prepare_features(features, precision)
    queries = operand(features[anchors], precision)
    positive, kept = (native.empty_bits(shape.patches, shape.anchors) for _ in range(2))
    sets = Sets(positive, kept, relations.similarity(queries, keys, positive, kept, phi, psi)[0])
    bits = torch.empty_like(positive)
    patches = contrast.prepare(z, precision)
    own, settings = patches.take(anchors), Settings(TAU, precision, 2**30)
    target = Target(
        torch.full((shape.anchors,), 1 / shape.anchors),
        torch.zeros_like(patches.values),
        torch.zeros_like(own.values),
        slice(None),
        fresh=True,
    )
    trained = z.clone().requires_grad_()

    def whole() -> None:
        trained.grad = None
        ppap_loss(
            features, trained, anchors, CFG, temperature=TAU, precision=precision, impl="cpp"
        ).backward()

    return {
        "step": lambda: relations.similarity(queries, keys, bits, phi_C=phi),
        "average": lambda: averages.sums(keys, precision, queries, phi),
        "masks": lambda: relations.similarity(queries, keys, positive, kept, phi, psi, anchors),
        "forward": lambda: contrast.chunk(own, patches, sets, settings),
        "both": lambda: contrast.chunk(own, patches, sets, settings, target=target),
        "loss": whole,
    }


def product(shape: Shape, dtype: torch.dtype) -> Callable[[], object]:
    """``torch.mm`` of anchors and patches, the machine's own rate."""
    left = torch.ones(shape.anchors, shape.width, dtype=dtype)
    right = torch.ones(shape.width, shape.patches, dtype=dtype)
    out = left @ right
    return lambda: torch.mm(left, right, out=out)


def phases(seconds: dict[str, float]) -> dict[str, float]:
    """Seconds of each phase of one loss, from those of the calls."""
    known = CFG.steps * seconds["average"] + seconds["masks"] + seconds["both"]
    return {
        "cosines, one set": seconds["step"],
        "sums": max(seconds["average"] - seconds["step"], 0.0),
        "cosines, both sets": seconds["masks"],
        "logits, exponentials": seconds["forward"],
        "gradient": seconds["both"] - seconds["forward"],
        "rest": seconds["loss"] - known,
        "loss": seconds["loss"],
    }


def table(shape: Shape, title: str, found: dict[str, float], mm: tuple[float, float]) -> str:
    """Markdown; what a step of the walk does stands there once.

    Args:
        shape: of the loss.
        title: of the column of phases.
        found: seconds of each phase.
        mm: seconds of one product of cosines, and of one of the others, by ``torch.mm``.
    """
    flops = 2 * shape.patches * shape.anchors * shape.width
    lines = [f"| {title} | ms | GF/s | torch.mm |", "|---|---:|---:|---:|"]
    for name, seconds in found.items():
        least = sum(count * each for count, each in zip(PRODUCTS[name], mm, strict=True))
        shown = f"{sum(PRODUCTS[name]) * flops / seconds / 1e9:.0f} | {100 * least / seconds:.0f} %"
        lines.append(f"| {name} | {1e3 * seconds:.0f} | {shown if least and seconds > 0 else ' |'} |")
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
            kinds = {"fp32": torch.float32} | ({"bf16": torch.bfloat16} if isa == "avx512bf16" else {})
            products = {name: product(shape, dtype) for name, dtype in kinds.items()}
            seconds = best_times({**runs(shape, precision), **products}, options.rounds)
            mm = {name: seconds.pop(name) for name in kinds}
            each = mm.get("bf16", mm["fp32"]), mm.get(precision, mm["fp32"])
            flops = 2 * shape.patches * shape.anchors * shape.width
            rates = ", ".join(f"{name} {flops / one / 1e9:.0f}" for name, one in mm.items())
            title = f"{isa} {precision}, torch.mm [GF/s] {rates}"
            print(f"\n{table(shape, title, phases(seconds), each)}", flush=True)


if __name__ == "__main__":
    main()
