"""The training loss of a batch: which patches are anchors, and the PPAP loss over them."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ppap import parallel
from ppap.kernels import PropagationConfig, ppap_loss
from ppap.settings.config import LossConfig


class Switches(NamedTuple):
    """Parts of PPAP's loss (Table 5), each on or off."""

    trustworthy_positives: bool = True
    """TPS: propagate the positives; off = those above phi0 around the anchor itself."""
    ambiguity_excluded: bool = True
    """ANS: leave ambiguous patches out of the denominator; off = every non-positive is a negative."""
    shuffled: bool = False
    """A control: every anchor gets the sets of a random other patch. Nothing can be learned from them."""


class ContrastResult(NamedTuple):
    """Loss of a batch and what it was formed from."""

    loss: Tensor
    """Scalar, fp32."""
    positives: Tensor
    """Mean number of positives per anchor, without the anchor itself; scalar, fp32."""
    negatives: Tensor
    """Mean number of negatives per anchor; scalar, fp32."""


def chunk_anchors(patches: int, chunk: int, divisor: int) -> tuple[int, int]:
    """(patches per chunk, anchors per full chunk) for a batch of `patches`.

    The published code draws floor(784 / divisor) anchors from every 784 consecutive patches; a batch with
    fewer patches is one chunk, and a chunk has at least one anchor.
    """
    chunk = min(chunk, patches)
    return chunk, max(chunk // divisor, 1)


def anchors_text(patches: int, chunk: int, divisor: int) -> str:
    """How many of a batch's patches are anchors, in words; arguments as :func:`chunk_anchors` has them."""
    chunk, per_chunk = chunk_anchors(patches, chunk, divisor)
    return "every patch an anchor" if per_chunk == chunk else f"{per_chunk} anchors per {chunk} patches"


def draw_anchors(patches: int, chunk: int, divisor: int, seed: int, step: int) -> tuple[Tensor, int]:
    """Anchors of one step, drawn from every chunk of consecutive patches; a pure function of its arguments.

    Args:
        patches: number N of patches in the batch.
        chunk: patches per chunk; a last, smaller chunk is kept.
        divisor: one patch in this many is an anchor.
        seed: of the run.
        step: of the run.

    Returns:
        (A,) int64, ascending within each chunk, and the number of anchors per full chunk.
    """
    chunk, per_chunk = chunk_anchors(patches, chunk, divisor)
    full, rest = divmod(patches, chunk)
    # Raw counter-based bits, which NumPy promises to keep: the keys (seed, step) share no stream, and the
    # high bit keeps them apart from those of the sample order. (A torch generator on a CPU would read only 32
    # bits of a seed.)
    key = np.array([seed, 2**63 | step], dtype=np.uint64)
    bits = np.random.Philox(key=key).random_raw(patches)
    order = np.sort(bits[: full * chunk].reshape(full, chunk).argsort(axis=1)[:, :per_chunk], axis=1)
    anchors = [(order + chunk * np.arange(full)[:, None]).reshape(-1)]
    if rest:
        last = np.sort(bits[full * chunk :].argsort()[: max(rest // divisor, 1)])
        anchors.append(last + chunk * full)
    return torch.from_numpy(np.concatenate(anchors)), per_chunk


class PPAPLoss:
    """Contrastive loss over propagated proxies (paper section 3, published code's averaging)."""

    def __init__(
        self, config: LossConfig, seed: int, switches: Switches | None = None, exchange: str = "auto"
    ) -> None:
        """Args: settings of the loss, the seed of the anchors, parts to leave out (default: none), and how
        ranks see each other's patches, see :func:`ppap.kernels.ppap_loss`."""
        self.config = config
        self.exchange = exchange
        self.seed = seed
        self.switches = switches or Switches()
        self.propagation = PropagationConfig(
            phi0=config.phi0,
            psi0=config.psi0,
            steps=config.steps,
            sigma_pos=config.sigma_pos,
            sigma_amb=config.sigma_amb,
            trustworthy_positives=self.switches.trustworthy_positives,
            ambiguity_excluded=self.switches.ambiguity_excluded,
        )

    def __call__(self, guidance: Tensor, z: Tensor, step: int) -> ContrastResult:
        """Loss of one batch.

        Args:
            guidance: frozen features (N, D), rows in (image, row, column) order, any norm.
            z: embeddings (N, E) of the same patches, unit norm; receives the gradient.
            step: number of the training step, which decides the anchors.
        """
        config, counts = self.config, [len(z)]
        own, group = slice(0, len(z)), None
        if parallel.in_step():
            counts, group = parallel.counts_of(len(z)), parallel.world().group
            first = sum(counts[: parallel.world().rank])
            own = slice(first, first + len(z))
        patches = sum(counts)
        if self.switches.shuffled:
            order = _shuffled(patches, self.seed, step).to(guidance.device)
            guidance = (guidance if group is None else parallel.gather(guidance, counts))[order[own]]
        anchors, per_chunk = draw_anchors(patches, config.chunk, config.anchor_divisor, self.seed, step)
        drawn = len(anchors)
        if group is not None:
            anchors = anchors[(anchors >= own.start) & (anchors < own.stop)] - own.start
        loss, positives, negatives = ppap_loss(
            guidance,
            z,
            anchors.to(z.device),
            self.propagation,
            temperature=config.temperature,
            base_temperature=config.base_temperature or config.temperature,
            group_size=per_chunk,
            precision=config.precision,
            memory_budget=config.memory_budget_mib * 2**20,
            return_counts=True,
            group=group,
            exchange=self.exchange,
        )
        if group is None:
            return ContrastResult(loss, positives.float().mean(), negatives.float().mean())
        sums = torch.stack([positives.float().sum(), negatives.float().sum()])
        parallel.add_(sums)
        return ContrastResult(loss, *(sums / drawn))


def _shuffled(patches: int, seed: int, step: int) -> Tensor:
    """A permutation of the patches, a pure function of its arguments."""
    # Counter words keep it apart from the anchors, which share the key.
    bits = np.random.Philox(counter=[0, 0, 0, 1], key=np.array([seed, 2**63 | step], dtype=np.uint64))
    return torch.from_numpy(bits.random_raw(patches).argsort())
