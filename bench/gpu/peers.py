"""Contrastive losses of other packages beside Eq. 8, in the same run: ``python -m bench.gpu --only peers``.

What they have in common is the cross-entropy of N queries against N keys, the one of the same row being
right (InfoNCE): one step, gradients of both included. Ours reads masks for it, as Eq. 8 wants; the whole loss
of the method, which finds these sets first, stands below. Packages that are not installed are passed over:
``pip install cut-cross-entropy inf-cl memeff``.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module, metadata

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu.cells import BUDGET, CFG, GRADIENT_MAX, LOSS_MAX
from bench.gpu.clock import time_calls
from bench.shapes import clustered
from ppap.kernels import PackedMasks, available_backends, masked_log_softmax, pack_masks, ppap_loss

TAU = 0.1
WIDTH = 384


@dataclass(frozen=True)
class Problem:
    """Queries and keys, and what is true of them.

    Attributes:
        queries: (N, D) float32 unit rows that need a gradient.
        keys: (N, D), likewise.
        masks: every key is kept, the one of a query's row is its positive.
        right: (N,) int64, that row.
        truth: one-sided, then mean of both sides: loss and the gradients of queries and keys, by float64.
    """

    queries: Tensor
    keys: Tensor
    masks: PackedMasks
    right: Tensor
    truth: tuple[tuple[Tensor, Tensor, Tensor], ...]

    @classmethod
    def of(cls, rows: int, device: torch.device) -> "Problem":
        """Rows of clusters: queries are keys with noise."""
        keys = clustered(rows, WIDTH, 0).to(device)
        noise = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(1)).to(device)
        queries = F.normalize(keys + noise / WIDTH**0.5, dim=1)
        eye = torch.eye(rows, dtype=torch.bool, device=device)
        masks = PackedMasks(pack_masks(eye), pack_masks(torch.ones_like(eye)))
        exact = queries.double(), keys.double()
        one, other = _one_sided(*exact), _one_sided(*exact[::-1])
        both = (one[0] + other[0]) / 2, (one[1] + other[2]) / 2, (one[2] + other[1]) / 2
        right = torch.arange(rows, device=device)
        return cls(queries.requires_grad_(), keys.requires_grad_(), masks, right, (one, both))


def _one_sided(queries: Tensor, keys: Tensor, step: int = 1024) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and gradients in the type of the inputs, some queries at a time."""
    loss, dqueries, dkeys = queries.new_zeros(()), torch.empty_like(queries), torch.zeros_like(keys)
    for first in range(0, len(queries), step):
        part = slice(first, first + step)
        logits = queries[part] @ keys.T / TAU
        own = torch.arange(len(logits), device=logits.device)
        lse = logits.logsumexp(dim=1)
        loss += (lse - logits[own, first + own]).sum()
        weights = (logits - lse[:, None]).exp()
        weights[own, first + own] -= 1
        weights /= TAU * len(queries)
        dqueries[part] = weights @ keys
        dkeys += weights.T @ queries[part]
    return loss / len(queries), dqueries, dkeys


def _ours(precision: str) -> Callable[[Problem], Tensor]:
    options = {"precision": precision, "memory_budget": BUDGET, "impl": "triton"}
    return lambda p: masked_log_softmax(p.queries, p.keys, p.masks, TAU, **options).mean()


def _materialised(p: Problem) -> Tensor:
    return F.cross_entropy(p.queries @ p.keys.T / TAU, p.right)


def _cut_cross_entropy(p: Problem) -> Tensor:
    loss = import_module("cut_cross_entropy").linear_cross_entropy
    return loss((p.queries / TAU).half(), p.keys.half(), p.right)


def _inf_cl(p: Problem) -> Tensor:
    # Channels are taken in parts of a power of two that divides them.
    return import_module("inf_cl").cal_flash_loss(p.queries, p.keys, p.right, 1 / TAU, head_dim=128).mean()


def _memeff(p: Problem) -> Tensor:
    kind = import_module("memeff").MemoryEfficientCLIPLoss
    return kind(temperature=TAU, normalized_inputs=True, stable=False)(p.queries, p.keys)


@dataclass(frozen=True)
class Peer:
    """A form of the loss.

    Attributes:
        title: in the table.
        package: that has it, as pip names it, or None: this one, or torch.
        loss: forms it.
        both: it is the mean of both sides.
        backend: of this package, that it needs.
    """

    title: str
    package: str | None
    loss: Callable[[Problem], Tensor]
    both: bool = False
    backend: str | None = None


PEERS = (
    Peer("triton fp16, masked", None, _ours("fp16"), backend="triton"),
    Peer("triton fp32, masked", None, _ours("fp32"), backend="triton"),
    Peer("torch fp32, materialised", None, _materialised),
    Peer("Cut Cross-Entropy fp16, small gradients left out", "cut-cross-entropy", _cut_cross_entropy),
    Peer("Inf-CL tf32", "inf-cl", _inf_cl),
    Peer("memeff tf32, both sides", "memeff", _memeff, both=True),
)


@dataclass
class Row:
    """One form's time, or why there is none.

    Attributes:
        ms: of a step [ms].
        peak_mib: memory above the inputs [MiB].
        loss: relative error.
        gradient: relative error of both gradients together.
    """

    title: str
    ms: float | None = None
    peak_mib: float | None = None
    loss: float | None = None
    gradient: float | None = None
    note: str = "not measured"


def compare(
    rows: int, device: torch.device, done: Callable[[Row], None], rounds: int, deadline: float
) -> str:
    """Check and time every form that is installed, until `deadline` of ``time.monotonic()``.

    Args:
        rows: queries, and keys.
        device: where.
        done: gets every row.
        rounds: calls timed.
        deadline: no form is begun after it.

    Returns:
        What came of it in words, this package's forms that are wrong or failed among them.
    """
    problem, found = Problem.of(rows, device), []
    for peer in PEERS:
        if time.monotonic() > deadline:
            return "not finished: no time"
        try:
            row = _measure(peer, problem, rounds)
        except Exception as error:  # another package's: whatever it is, the others are measured
            row = Row(peer.title, note=f"failed: {type(error).__name__}: {str(error).strip()[:120]}")
        done(row)
        if peer.package is None and row.note.startswith(("WRONG", "failed")):
            found.append(f"{peer.title}: {row.note}")
    done(_whole_loss(problem, rounds))
    return "; ".join(found) or "done"


def _measure(peer: Peer, problem: Problem, rounds: int) -> Row:
    row = Row(_titled(peer))
    row.note = _missing(peer) or ""
    if row.note:
        return row

    def step() -> tuple[Tensor, ...]:
        loss = peer.loss(problem)
        return (loss.detach(), *torch.autograd.grad(loss, (problem.queries, problem.keys)))

    row.loss, row.gradient = _errors(step(), problem.truth[peer.both])
    if not (row.loss <= LOSS_MAX and row.gradient <= GRADIENT_MAX):
        row.note = f"WRONG, not timed: loss off by {row.loss:.1e}, gradient by {row.gradient:.1e}"
        return row
    row.ms, _, row.peak_mib, _ = time_calls(step, rounds)
    return row


def _whole_loss(problem: Problem, rounds: int) -> Row:
    """The loss of the method with every row an anchor: sets found, then the same products."""
    row = Row(
        "triton fp16, the whole loss of the method, sets found too", note=available_backends()["triton"] or ""
    )
    if row.note:
        return row
    features, z = problem.keys.detach(), problem.queries

    def step() -> Tensor:
        options = {"precision": "fp16", "memory_budget": BUDGET, "impl": "triton"}
        return torch.autograd.grad(ppap_loss(features, z, None, CFG, temperature=TAU, **options), z)[0]

    row.ms, _, row.peak_mib, _ = time_calls(step, rounds)
    return row


def _titled(peer: Peer) -> str:
    try:
        return f"{peer.title} ({metadata.version(peer.package)})" if peer.package else peer.title
    except metadata.PackageNotFoundError:
        return peer.title


def _missing(peer: Peer) -> str | None:
    """Why a form cannot run here, or None."""
    if peer.package is None:
        return available_backends()[peer.backend] if peer.backend else None
    try:
        import_module(peer.package.replace("-", "_"))
    except ImportError as error:
        return f"not measured: {error}"
    return None


def _errors(found: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> tuple[float, float]:
    """Relative errors of the loss, and of the gradients."""
    loss, *gradients = (value.double() for value in found)
    off = sum(((a - b) ** 2).sum() for a, b in zip(gradients, truth[1:], strict=True))
    size = sum((b**2).sum() for b in truth[1:])
    return ((loss - truth[0]).abs() / truth[0].abs()).item(), float((off / size) ** 0.5)


def report(rows: list[Row], count: int) -> list[str]:
    """The table as lines of markdown."""
    title = (
        f"## InfoNCE of {count:,} queries and as many keys, D = {WIDTH}, temperature {TAU}, with gradients"
    )
    if not rows:
        return [title, "", "Not run."]
    head = [
        "| form | time | memory above the inputs | error of loss | of gradients |",
        "|---|---:|---:|---:|---:|",
    ]
    return [title, "", *head, *(f"| {row.title} | {_cells(row)} |" for row in rows)]


def _cells(row: Row) -> str:
    if row.ms is None:
        return " | ".join([row.note, "-", "-", "-"])
    memory = "-" if row.peak_mib is None else f"{row.peak_mib:,.0f} MiB"
    errors = ("-" if value is None else f"{value:.1e}" for value in (row.loss, row.gradient))
    return " | ".join([f"{row.ms:,.2f} ms", memory, *errors])
