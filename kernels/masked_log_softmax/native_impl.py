"""``masked_log_softmax`` in the native CPU library: see ``csrc/cpu/contrast.h`` for the mathematics."""

import math
from dataclasses import dataclass

import torch

from .. import native
from ..budget import MemoryBudgetError, row_chunks
from ..precision import scaled_operand

# Below this bound of the logits, in powers of two, the bound itself serves as the shift of the exponentials.
_TIGHT_BOUND = 50.0


_Arguments = native.structure(
    "z_anchors z positive kept num_positive shift row_weight loss lse dz_anchors dz workspace",
    "C N E stride group bf16",
    "temperature",
)


@dataclass(frozen=True)
class Sets:
    """Bits (N, stride) of positives and kept patches of some anchors, and the number of positives (C,)."""

    positive: torch.Tensor
    kept: torch.Tensor
    num_positive: torch.Tensor


@dataclass(frozen=True)
class Embeddings:
    """Rows of z with the operands' rounding, as the library reads them.

    Attributes:
        values: (rows, E) float32, contiguous, E padded to whole panels by zeros.
        longest: the largest norm of a row.
        bf16: whether `values` are bf16 numbers.
    """

    values: torch.Tensor
    longest: float
    bf16: bool

    @classmethod
    def of(cls, z: torch.Tensor, precision: str) -> "Embeddings":
        """Of embeddings (rows, E) float32, one row at least."""
        values, scale = scaled_operand(z, precision)
        values = values * scale if precision == "fp16" else values
        missing = -z.shape[1] % native.PANEL
        values = torch.nn.functional.pad(values, (0, missing)) if missing else values.contiguous()
        longest = float(values.norm(dim=1).amax()) if len(values) else 0.0
        return cls(values, longest, precision == "bf16")


def contrast_chunk(
    z_CE: torch.Tensor,
    patches: Embeddings,
    sets: Sets,
    temperature: float,
    group: int,
    row_weight_C: torch.Tensor | None = None,
    dz_NE: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Loss (C,), log-sum-exp (C,) and gradient (C, E) of some anchors; adds the patches' gradient to `dz_NE`.

    The anchors' rows are those of :class:`Embeddings`; gradients are those of sum(row_weight * temperature *
    loss), and None without `row_weight_C`.
    """
    bound_C = z_CE.norm(dim=1) * (patches.longest * (1.01 * math.log2(math.e) / temperature))
    tight = bool(bound_C.amax() < _TIGHT_BOUND)
    own_CE = None if row_weight_C is None else torch.empty_like(z_CE)
    loss_C, lse_C = torch.empty_like(bound_C), torch.empty_like(bound_C)
    (rows, width), num_patches = z_CE.shape, patches.values.shape[0]
    native.run(
        "contrast",
        _Arguments,
        z_anchors=z_CE,
        z=patches.values,
        positive=sets.positive,
        kept=sets.kept,
        num_positive=sets.num_positive,
        shift=bound_C if tight else None,
        row_weight=row_weight_C,
        loss=loss_C,
        lse=lse_C,
        dz_anchors=own_CE,
        dz=dz_NE,
        workspace=None if row_weight_C is None else z_CE.new_empty((num_patches, group)),
        C=rows,
        N=num_patches,
        E=width,
        stride=native.stride(rows),
        group=group,
        bf16=patches.bf16,
        temperature=temperature,
    )
    return loss_C, lse_C, own_CE


def split_budget(
    memory_budget: int, num_patches: int, bytes_per_anchor: int, gradient: bool
) -> tuple[int, int]:
    """(anchors per chunk, anchors per group of exponentials): about half of the budget for the latter.

    Raises:
        MemoryBudgetError: one anchor and the smallest group do not fit.
    """
    if not gradient:
        return native.chunk_rows(memory_budget, bytes_per_anchor), native.GROUP
    smallest = 4 * native.PANEL * max(num_patches, 1)
    if memory_budget < smallest + bytes_per_anchor:
        raise MemoryBudgetError(
            f"memory_budget is {memory_budget} bytes; one anchor needs {smallest + bytes_per_anchor}: "
            "give more"
        )
    groups = max(memory_budget // 2 // smallest, 1)
    group = min(groups * native.PANEL, native.GROUP)
    return native.chunk_rows(memory_budget - group // native.PANEL * smallest, bytes_per_anchor), group


def bytes_per_anchor(num_patches: int, width: int) -> int:
    """Bytes of temporaries that one anchor needs: two bits a patch, rows of embeddings, packed and not."""
    tiles = native.tile_bytes(num_patches, width + native.PANEL)
    return 2 * (num_patches // 8 + 1) + tiles + 24 * (width + native.PANEL) + 64


def masked_log_softmax(
    z_AE: torch.Tensor,
    z_NE: torch.Tensor,
    positive_AW: torch.Tensor,
    kept_AW: torch.Tensor,
    temperature: float,
    precision: str,
    memory_budget: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and log-sum-exp [nats] of every anchor; embeddings are float32."""
    loss_A, lse_A = z_AE.new_zeros(z_AE.shape[0]), z_AE.new_full((z_AE.shape[0],), -torch.inf)
    num_patches, width = z_NE.shape
    if num_patches == 0:
        return loss_A, lse_A
    anchors, patches = Embeddings.of(z_AE, precision).values, Embeddings.of(z_NE, precision)
    rows, group = split_budget(memory_budget, num_patches, bytes_per_anchor(num_patches, width), False)
    for chunk in row_chunks(z_AE.shape[0], rows):
        sets = _sets(positive_AW[chunk], kept_AW[chunk], num_patches)
        loss_A[chunk], lse_A[chunk], _ = contrast_chunk(anchors[chunk], patches, sets, temperature, group)
        del sets  # before the next chunk's are made
    return loss_A, lse_A


def masked_log_softmax_backward(
    dloss_A: torch.Tensor,
    z_AE: torch.Tensor,
    z_NE: torch.Tensor,
    positive_AW: torch.Tensor,
    kept_AW: torch.Tensor,
    lse_A: torch.Tensor,
    temperature: float,
    precision: str,
    memory_budget: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients (A, E) and (N, E) in float32; logits and their sums are formed again."""
    num_patches, width = z_NE.shape
    if num_patches == 0:
        return torch.zeros_like(z_AE), torch.zeros_like(z_NE)
    anchors, patches = Embeddings.of(z_AE, precision).values, Embeddings.of(z_NE, precision)
    dz_AE, dz_NE = torch.zeros_like(z_AE), torch.zeros_like(patches.values)
    rows, group = split_budget(memory_budget, num_patches, bytes_per_anchor(num_patches, width), True)
    for chunk in row_chunks(z_AE.shape[0], rows):
        sets = _sets(positive_AW[chunk], kept_AW[chunk], num_patches)
        weight_C = (dloss_A[chunk] / temperature).contiguous()
        _, _, own_CE = contrast_chunk(anchors[chunk], patches, sets, temperature, group, weight_C, dz_NE)
        dz_AE[chunk] = own_CE[:, :width]
        del sets, own_CE  # before the next chunk's are made
    return dz_AE, dz_NE[:, :width].contiguous()


def _sets(positive_CW: torch.Tensor, kept_CW: torch.Tensor, num_patches: int) -> Sets:
    """The library's form of public words."""
    rows = positive_CW.shape[0]
    bits = [native.empty_bits(num_patches, rows) for _ in range(2)]
    counts = torch.empty((2, rows), dtype=torch.int64)
    for words, out, count in zip((positive_CW, kept_CW), bits, counts, strict=True):
        native.call("from_public", words.contiguous(), rows, num_patches, out, native.stride(rows), count)
    return Sets(bits[0], bits[1], counts[0])
