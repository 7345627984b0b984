"""``masked_log_softmax`` in the native CPU library; ``csrc/cpu/masked_log_softmax.inc`` has the formulas."""

import functools
import math
from dataclasses import dataclass

import torch

from .. import native
from ..budget import MemoryBudgetError
from ..precision import operand, scaled_operand
from ..relation_masks.native_impl import from_words
from ..relation_masks.sets import Sets
from .chunks import Settings, Target

__all__ = [
    "OVERWRITES",
    "UNIT",
    "Embeddings",
    "bytes_per_anchor",
    "chunk",
    "chunk_rows",
    "from_words",
    "prepare",
    "split_budget",
]

# Of log-sum-exps [nats].
UNIT = 1.0

# A chunk can write a gradient that holds nothing yet.
OVERWRITES = True

# Below this bound of the logits, in powers of two, the bound itself serves as the shift of the exponentials.
_TIGHT_BOUND = 50.0

_Arguments = native.structure(
    "z_anchors z z_pairs positive kept num_positive shift row_weight loss lse dz_anchors dz workspace "
    "known_lse",
    "C N E stride group fresh",
    "temperature",
)


@dataclass(frozen=True)
class Embeddings:
    """Rows of z with the operands' rounding, as the library reads them.

    Attributes:
        values: (rows, E) float32, contiguous, E padded to whole panels by zeros; not rounded yet where they
            become pairs.
        bf16: whether the rows are bf16 numbers.
    """

    values: torch.Tensor
    bf16: bool

    @property
    def width(self) -> int:
        """Channels, padding included."""
        return self.values.shape[1]

    def take(self, rows: torch.Tensor | slice) -> "Embeddings":
        """Some rows as anchors."""
        values = self.values[rows]
        return Embeddings(operand(values, "bf16") if self.bf16 else values, self.bf16)

    @functools.cached_property
    def as_patches(self) -> tuple[torch.Tensor | None, float]:
        """Pairs of bf16 (rows, E / 2) int32, or None; the largest norm of a row. Made on first use."""
        if self.bf16 and native.uses_pairs():
            norm_N = self.values.new_empty(len(self.values))
            pairs = native.pack_pairs(self.values, None, norm_N)
        else:
            norm_N, pairs = self.values.norm(dim=1), None
        return pairs, float(norm_N.amax()) if len(norm_N) else 0.0


def prepare(z: torch.Tensor, precision: str) -> Embeddings:
    """Embeddings (rows, E) float32 as the library reads them."""
    in_pairs = precision == "bf16" and native.uses_pairs()
    values, scale = (z, 1.0) if in_pairs else scaled_operand(z, precision)
    values = values * scale if precision == "fp16" else values
    missing = -z.shape[1] % native.PANEL
    values = torch.nn.functional.pad(values, (0, missing)) if missing else values.contiguous()
    return Embeddings(values, precision == "bf16")


def chunk_rows(z_NE: torch.Tensor, settings: Settings, with_gradient: bool) -> int:
    """Anchors per chunk."""
    per_anchor = bytes_per_anchor(*z_NE.shape)
    return split_budget(settings.memory_budget, z_NE.shape[0], per_anchor, with_gradient)[0]


def split_budget(
    memory_budget: int, num_patches: int, bytes_per_anchor: int, gradient: bool
) -> tuple[int, int]:
    """(anchors per chunk, anchors per group of exponentials), which with a gradient get half of the budget.

    Raises:
        MemoryBudgetError: one anchor and the smallest group do not fit.
    """
    if not gradient:
        rows = native.chunk_rows(memory_budget, bytes_per_anchor)
        return rows, -(-rows // native.PANEL) * native.PANEL
    smallest, group = 4 * native.PANEL * max(num_patches, 1), _group(memory_budget, num_patches)
    if memory_budget < smallest + bytes_per_anchor:
        raise MemoryBudgetError(
            f"memory_budget is {memory_budget} bytes; one anchor needs {smallest + bytes_per_anchor}: "
            "give more"
        )
    return native.chunk_rows(memory_budget - group // native.PANEL * smallest, bytes_per_anchor), group


def _group(memory_budget: int, num_patches: int) -> int:
    """Anchors whose exponentials are kept at once with a gradient: those of half of the budget.

    An odd number of panels: rows of the workspace 1,024 bytes apart would share few places of a cache.
    """
    panels = max(memory_budget // 2 // (4 * native.PANEL * max(num_patches, 1)), 1)
    return min((panels - 1) // 2 * 2 + 1, native.GROUP // native.PANEL) * native.PANEL


def bytes_per_anchor(num_patches: int, width: int) -> int:
    """Bytes of temporaries that one anchor needs: two bits a patch, rows of embeddings, packed and not.

    Not counted, since a budget must not depend on threads: what each of them packs for the gradient, 512
    bytes of an anchor and of a channel, or of pairs 160 KiB and up to 2,560 bytes of a channel.
    """
    tiles = native.tile_bytes(num_patches, width + native.PANEL)
    return 2 * (num_patches // 8 + 1) + tiles + 24 * (width + native.PANEL) + 64


def chunk(
    own: Embeddings,
    patches: Embeddings,
    sets: Sets[torch.Tensor],
    settings: Settings,
    lse_C: torch.Tensor | None = None,
    target: Target | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses and log-sum-exp [nats], (C,) each: always formed, of these patches.

    A log-sum-exp that is given is needed only where these patches are not all.
    """
    known_C = None if target is None or target.of_all or lse_C is None else lse_C.contiguous()
    z_CE, (num_patches, width) = own.values, patches.values.shape
    pairs, longest = patches.as_patches
    bound_C = z_CE.norm(dim=1) * (longest * (1.01 * math.log2(math.e) / settings.temperature))
    tight = bool(bound_C.amax() < _TIGHT_BOUND)
    loss_C, lse_C = torch.empty_like(bound_C), torch.empty_like(bound_C)
    whole = -(-z_CE.shape[0] // native.PANEL) * native.PANEL
    group = whole if target is None else _group(settings.memory_budget, num_patches)
    own_CE = None if target is None else torch.empty_like(z_CE)
    native.run(
        "masked_log_softmax",
        _Arguments,
        z_anchors=z_CE,
        z=patches.values,
        z_pairs=pairs,
        positive=sets.positive,
        kept=sets.kept,
        num_positive=sets.num_positive,
        shift=bound_C if tight else None,
        row_weight=None if target is None else target.row_C,
        loss=loss_C,
        lse=lse_C,
        dz_anchors=own_CE,
        dz=None if target is None else target.dz_NE,
        workspace=None if target is None else z_CE.new_empty((num_patches, group)),
        known_lse=known_C,
        C=z_CE.shape[0],
        N=num_patches,
        E=width,
        stride=native.stride(z_CE.shape[0]),
        group=group,
        fresh=target is not None and target.fresh,
        temperature=settings.temperature,
    )
    if target is not None and own_CE is not None:
        target.own[target.rows] += own_CE
    return loss_C, lse_C
