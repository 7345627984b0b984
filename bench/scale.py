"""One global batch on 1 to 1,024 GPUs: bytes, memory and time per rank, gathered and in a ring.

    python -m bench.scale --images 64 --width 384
    python -m bench.scale --weak --nvlink 450 --infiniband 50 --flops 400

The bytes are counts, checked against what the operating system counted in runs of several processes
(``tests/test_ppap_loss_ranks.py``). The times are a model: products at a rate that is given, messages at the
speed of the slowest link that they pass, and nothing else. Legend: N patches of all ranks, b of a rank, A
anchors of a rank, D guidance and E embedding channels, T steps of the walk, n ranks.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass

RANKS = (1, 2, 4, 8, 16, 64, 256, 1024)


@dataclass(frozen=True)
class Load:
    """A batch, and how it is shared.

    Attributes:
        patches: N, of all ranks.
        anchors: of all ranks.
        width: D.
        code_width: E.
        steps: T.
        ranks: n; each has N / n patches.
        size: bytes of a number of the guidance and of z.
        weights: trained parameters, whose gradients are added up.
    """

    patches: int
    anchors: int
    width: int
    code_width: int
    steps: int
    ranks: int
    size: int = 4
    weights: int = 0

    @property
    def block(self) -> float:
        """b: patches of a rank."""
        return self.patches / self.ranks


def sent_bytes(load: Load, exchange: str) -> float:
    """Bytes that a rank sends in one call of the loss (it receives as many), gradient included."""
    others, row = load.ranks - 1, load.size * (load.width + load.code_width)
    gradient = 4 * load.code_width
    if not others:
        return 0.0
    if exchange == "gather":  # rows of all to all, and everyone's gradients home
        return others * load.block * (row + gradient)
    walk = load.steps * load.size * load.width
    # Losses and gradient take a turn each; a gradient goes all the way round.
    return load.block * (others * (walk + 2 * row) + load.ranks * gradient)


def weight_bytes(load: Load) -> float:
    """Bytes that a rank sends to add up the gradients of the weights, in a ring's all-reduce."""
    return 2 * (load.ranks - 1) / load.ranks * 4 * load.weights


def held_bytes(load: Load, exchange: str) -> float:
    """Bytes of rows and gradients that a rank holds in the loss, beside the memory budget of its chunks."""
    row, gradient = load.size * (load.width + load.code_width), 4 * load.code_width
    unit = 4 * (load.width + load.code_width)  # normalised rows and prepared embeddings
    if load.ranks == 1 or exchange == "gather":
        return load.patches * (row + unit + 3 * gradient)
    # Its own rows and their gradient; two blocks, one prepared; a part, what arrived, and what leaves.
    return load.block * (row + 4 * load.code_width + gradient + 2 * row + unit + 3 * gradient)


def products(load: Load, exchange: str) -> float:
    """Floating-point operations of a rank's products, the sums of selected keys at a tenth (sparse tiles)."""
    pairs = 2.0 * load.anchors / load.ranks * load.patches
    # A similarity for every step and one for the sets, which the ring forms again for the gradient.
    similarities = load.steps * 1.1 + (1 if exchange == "gather" or load.ranks == 1 else 2)
    return pairs * (load.width * similarities + load.code_width * 4)


def seconds(load: Load, exchange: str, links: "Links") -> tuple[float, float, float]:
    """(products, messages, both): the ring's messages pass while products run, gathering waits for them."""
    work = products(load, exchange) / links.flops
    slowest = links.within if load.ranks <= links.per_node else links.between
    latency = links.latency * (load.ranks - 1) * (1 if exchange == "gather" else load.steps + 3)
    sent = sent_bytes(load, exchange) / slowest + (latency if load.ranks > 1 else 0.0)
    after = weight_bytes(load) / slowest
    return work, sent + after, (max(work, sent) if exchange == "ring" else work + sent) + after


@dataclass(frozen=True)
class Links:
    """Machines: bytes per second in one direction and rank, seconds per message, operations per second."""

    within: float
    between: float
    per_node: int
    latency: float
    flops: float


def table(options: argparse.Namespace) -> list[str]:
    """Lines of Markdown."""
    links = Links(
        options.nvlink * 1e9,
        options.infiniband * 1e9,
        options.per_node,
        options.latency * 1e-6,
        options.flops * 1e12,
    )
    lines = [
        "| GPUs | patches | exchange | sent per rank | held per rank | products | messages | step |",
        "|---:|---:|---|---:|---:|---:|---:|---:|",
    ]
    for ranks in RANKS:
        images = options.images * (ranks if options.weak else 1)
        if images < ranks:
            break
        patches = images * options.patches
        load = Load(
            patches,
            patches // options.divisor,
            options.width,
            options.width,
            options.steps,
            ranks,
            weights=12 * options.width**2 + options.width**2,
        )
        for exchange in ("gather", "ring") if ranks > 1 else ("gather",):
            work, sent, both = seconds(load, exchange, links)
            name = exchange if ranks > 1 else "-"
            sent_mib = (sent_bytes(load, exchange) + weight_bytes(load)) / 2**20
            lines.append(
                f"| {ranks:,} | {patches:,} | {name} | {sent_mib:,.0f} MiB "
                f"| {held_bytes(load, exchange) / 2**20:,.0f} MiB | {1e3 * work:,.2f} ms "
                f"| {1e3 * sent:,.2f} ms | {1e3 * both:,.2f} ms |"
            )
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.scale", description=__doc__)
    add = parser.add_argument
    add("--images", type=int, default=64, help="images of the batch; with --weak, of a rank (default: 64)")
    add("--weak", action="store_true", help="the batch grows with the ranks")
    add("--patches", type=int, default=784, help="patches of an image (default: 784)")
    add("--divisor", type=int, default=16, help="one patch in this many is an anchor (default: 16)")
    add("--width", type=int, default=384, help="channels of guidance and embedding (default: 384)")
    add("--steps", type=int, default=2, help="steps of the walk (default: 2)")
    add("--nvlink", type=float, default=450, help="GB/s of a GPU to its node, one direction (default: 450)")
    add("--infiniband", type=float, default=50, help="GB/s of a GPU to other nodes (default: 50)")
    add("--per-node", type=int, default=8, help="GPUs of a node (default: 8)")
    add("--latency", type=float, default=10, help="microseconds of a message (default: 10)")
    add("--flops", type=float, default=400, help="TFLOP/s that products reach (default: 400)")
    print("\n".join(table(parser.parse_args(argv))))


if __name__ == "__main__":
    main()
