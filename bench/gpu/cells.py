"""The cells of the table of the loss: shapes, forms, parts, and how one of them is checked and timed."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from bench import baselines
from bench.gpu.clock import Timing, time_calls
from bench.shapes import VITB8, VITS8, VITS8_CHUNK, Shape, anchors_of, clustered
from ppap.kernels import PropagationConfig, available_backends, ppap_loss, propagate

CFG = PropagationConfig()
TAU = 0.1
BUDGET = 512 * 2**20
SHAPES = (
    VITS8_CHUNK,
    VITS8,
    Shape("ViT-S/8, every patch an anchor", VITS8.patches, VITS8.patches, 384, 384),
    VITB8,
    Shape("ViT-B/8, every patch an anchor", VITB8.patches, VITB8.patches, 768, 768),
)
TINY = (Shape("tiny", 260, 70, 64, 64),)
PROPAGATE, FORWARD, STEP = PARTS = ("propagate", "loss forward", "forward + backward")
# Form -> how many of the shapes it is timed on. Ours first: what takes longest, and what may fail, comes when
# the rest is on disk.
FORMS = {
    "triton fp16": 5,
    "triton fp32": 5,
    "graph fp16": 5,
    "triton bf16": 3,
    "graph fp32": 3,
    "cuda fp16": 3,
    "torch fp16": 3,
    "compiled fp16": 3,
    "cuda fp32": 3,
    "torch fp32": 3,
    "published fp32": 2,
}
BACKENDS = ("triton", "cuda", "torch")
# Rounding to 16 bits and flips at thresholds explain less than this (relative, of loss and gradient).
LOSS_MAX, GRADIENT_MAX = 0.02, 0.05


class Key(NamedTuple):
    """What a cell is about: names out of SHAPES or TINY, FORMS and PARTS."""

    shape: str
    form: str
    part: str


@dataclass
class Cell:
    """One measurement, or in `note` why there is none.

    Attributes:
        ms: time of a call on the device, calls back to back [ms].
        host_ms: time until a call returns [ms].
        peak_mib: memory above the inputs [MiB].
        rounds: calls timed.
    """

    shape: str
    form: str
    part: str
    ms: float | None = None
    host_ms: float | None = None
    peak_mib: float | None = None
    rounds: int = 0
    note: str = "not measured"

    @property
    def key(self) -> Key:
        """What it is about."""
        return Key(self.shape, self.form, self.part)

    def __str__(self) -> str:
        if self.ms is None or self.host_ms is None:
            return self.note
        peak = "" if self.peak_mib is None else f", {self.peak_mib:,.0f} MiB"
        return f"{self.ms:,.2f} ms ({self.host_ms:,.2f}){peak}"


def all_keys(shapes: tuple[Shape, ...], forms: tuple[str, ...] = tuple(FORMS)) -> list[Key]:
    """Every cell there is, in the order in which they are measured: form by form, small shapes first."""
    return [
        Key(shape.name, form, part)
        for form in forms
        for shape in shapes[: FORMS[form]]
        for part in PARTS
        if part == STEP or form.split()[0] in BACKENDS
    ]


def dense_flops(shape: Shape, steps: int) -> float:
    """2 T + 5 products of (A, D) and (D, N): T + 1 similarities, T sums, logits twice, gradient twice."""
    return (2 * steps + 5) * 2.0 * shape.anchors * shape.patches * shape.width


@functools.cache
def _rows(patches: int, width: int, seed: int) -> Tensor:
    return clustered(patches, width, seed)


def _inputs(shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`bench.shapes.loss_inputs`; shapes with the same patches share them."""
    features, z = (_rows(shape.patches, shape.width, 0), _rows(shape.patches, shape.code_width, 2))
    return features, z, anchors_of(shape)


@dataclass
class Inputs:
    """A shape's tensors on the device, and the true step of some of its anchors.

    Attributes:
        some: (64,) or fewer anchors, for the check.
        loss: scalar, of the anchors `some`.
        dz: (N, E) its gradient.
    """

    features: Tensor
    z: Tensor
    anchors: Tensor
    some: Tensor
    loss: Tensor
    dz: Tensor

    @classmethod
    def of(cls, shape: Shape, device: torch.device) -> "Inputs":
        """Inputs of a shape."""
        features, z, anchors = (tensor.to(device) for tensor in _inputs(shape))
        z.requires_grad_()
        some = anchors[:: max(len(anchors) // 64, 1)]
        loss = baselines.published(features, z, some, CFG, TAU)
        return cls(features, z, anchors, some, loss.detach(), torch.autograd.grad(loss, z)[0])


def runner(form: str, part: str, inputs: Inputs, anchors: Tensor) -> Callable[[], object]:
    """What one cell times: a call that returns something of the gradient where `part` has one."""
    name, precision = form.split()
    features, z = inputs.features, inputs.z
    if name in BACKENDS:
        options = {"precision": precision, "memory_budget": BUDGET, "impl": name}
        if part == PROPAGATE:
            return lambda: propagate(features, anchors, CFG, **options)
        if part == FORWARD:
            return lambda: ppap_loss(features, z.detach(), anchors, CFG, temperature=TAU, **options)
        return lambda: _step(ppap_loss(features, z, anchors, CFG, temperature=TAU, **options), z)
    if name == "graph":
        return _captured(runner(f"triton {precision}", part, inputs, anchors))
    if name == "published":
        return lambda: _step(baselines.published(features, z, anchors, CFG, TAU), z)
    run = baselines.compiled_chunks(TAU, CFG, precision, BUDGET)
    return lambda: run(features, z.detach(), anchors)


def _captured(run: Callable[[], object]) -> Callable[[], object]:
    """`run` as a CUDA graph: its launches are replayed without the host."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def replay() -> object:
        graph.replay()
        return result

    return replay


def _step(loss: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
    return loss.detach(), torch.autograd.grad(loss, z)[0]


def error(form: str, inputs: Inputs) -> tuple[float, float]:
    """Relative errors of loss and gradient on some anchors."""
    loss, dz = runner(form, STEP, inputs, inputs.some)()
    off = (loss - inputs.loss).abs() / inputs.loss.abs()
    return off.item(), ((dz - inputs.dz).norm() / inputs.dz.norm()).item()


def wrong(form: str, inputs: Inputs) -> str | None:
    """What is wrong with a form on a shape, or None; NaN is wrong."""
    loss, dz = error(form, inputs)
    if loss <= LOSS_MAX and dz <= GRADIENT_MAX:
        return None
    return f"WRONG, not timed: loss off by {loss:.1e}, gradient by {dz:.1e}"


def missing(form: str) -> str | None:
    """Why a form cannot run here, or None."""
    name = form.split()[0]
    if name == "graph" and not torch.cuda.is_available():
        return "no GPU"
    name = "triton" if name == "graph" else name
    return available_backends()[name] if name in BACKENDS else None


def measure(key: Key, inputs: Inputs, rounds: int) -> Cell:
    """Time one cell; memory that does not suffice is a finding, not a failure."""
    cell = Cell(*key)
    try:
        timing: Timing = time_calls(runner(key.form, key.part, inputs, inputs.anchors), rounds)
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        cell.note = "out of memory"
        return cell
    cell.ms, cell.host_ms, cell.peak_mib, cell.rounds = timing
    if key.form.startswith("graph"):
        cell.peak_mib = None  # a graph took its memory when it was captured
    cell.note = ""
    return cell
