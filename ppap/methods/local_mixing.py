"""HP's local mixing: every patch's code averaged over its 3x3 neighbourhood, weighted by attention.

Legend: B images, h w patch grid, n = h w, P prefix tokens, E channels of the code, K = 9 neighbours in
row-major order around the patch. Nothing here has a gradient but the codes.
"""

import math

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

_LOW, _HIGH = 0.1, 0.9  # quantiles that a row of logits is clipped to
# Entries of the attention that are held at a time: 64 MiB in fp32.
_TILE = 2**24


def has_plain_attention(vit: VisionTransformer) -> bool:
    """Whether :func:`attention_logits` knows the last block's attention."""
    attention = getattr(vit.blocks[-1], "attn", None)
    if getattr(vit, "rope", None) is not None or hasattr(
        attention, "q_bias"
    ):  # rotary positions, parted bias
        return False
    return all(hasattr(attention, name) for name in ("qkv", "q_norm", "k_norm", "num_heads", "scale"))


@torch.no_grad()
def attention_logits(vit: VisionTransformer, before: Tensor) -> Tensor:
    """Last block's attention between patches before its softmax, the mean over the heads: (B, n, n), fp32.

    The mean over H heads of q_h . k_h is the product of the whole rows, divided by H.

    Args:
        vit: the backbone.
        before: tokens before its last block, (B, P + n, D).
    """
    block, attention = vit.blocks[-1], vit.blocks[-1].attn
    with torch.autocast(before.device.type, enabled=False):
        tokens = block.norm1(before.float())[:, vit.num_prefix_tokens :]
        q, k, _ = attention.qkv(tokens).unflatten(2, (3, attention.num_heads, -1)).unbind(dim=2)
        q, k = (norm(x).flatten(2) for norm, x in ((attention.q_norm, q), (attention.k_norm, k)))
        return q @ k.transpose(1, 2) * (attention.scale / attention.num_heads)


def neighbours(grid: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """The 3x3 neighbourhoods of a grid, the centre included.

    Returns:
        index (n, 9) int64 of the neighbours, the patch itself where there is none; there (n, 9) bool.
    """
    rows, cols = (torch.arange(size, device=device) for size in grid)
    step = torch.arange(-1, 2, device=device)
    row = (rows.view(-1, 1, 1, 1) + step.view(1, 1, 3, 1)).expand(-1, grid[1], -1, 3)
    col = (cols.view(1, -1, 1, 1) + step.view(1, 1, 1, 3)).expand(grid[0], -1, 3, -1)
    there = (row >= 0) & (row < grid[0]) & (col >= 0) & (col < grid[1])
    index = torch.where(there, row * grid[1] + col, (rows[:, None] * grid[1] + cols).view(*grid, 1, 1))
    return index.reshape(-1, 9), there.reshape(-1, 9)


@torch.no_grad()
def mixing_weights(logits: Tensor, grid: tuple[int, int]) -> Tensor:
    """Weights of the neighbours: (B, n, 9), 0 where there is none.

    A row of logits is clipped to its own quantiles at 10 and 90 %, softmaxed over all n patches and
    multiplied by the grid's side; entries below the row's mean become 0. The published code knows one grid,
    28 x 28, and multiplies by 28; here the side of any grid is sqrt(n), so that the mean is 1 / sqrt(n).

    Args:
        logits: (B, n, n) of :func:`attention_logits`.
        grid: (h, w) with h w = n.
    """
    index, there = neighbours(grid, logits.device)
    count = logits.shape[2]
    parts = []
    for part in logits.split(max(_TILE // count**2, 1)):
        # Sorted by hand: torch.quantile refuses more than 2^24 entries.
        ranked = part.sort(dim=2).values
        low, high = (_quantile(ranked, q)[:, :, None] for q in (_LOW, _HIGH))
        weight = part.clamp(low, high).softmax(dim=2) * math.sqrt(count)
        weight = torch.where(weight < weight.mean(dim=2, keepdim=True), 0, weight)
        parts.append(weight.gather(2, index.expand(len(part), -1, -1)) * there)
    return torch.cat(parts)


def _quantile(ranked: Tensor, q: float) -> Tensor:
    """Quantile of sorted rows, linear between neighbours."""
    place = q * (ranked.shape[2] - 1)
    low = math.floor(place)
    high = min(low + 1, ranked.shape[2] - 1)
    return torch.lerp(ranked[:, :, low], ranked[:, :, high], place - low)


def mix(code: Tensor, weights: Tensor) -> Tensor:
    """Codes averaged over their neighbourhoods: (1 / n_i) sum_j a_ij s_j, n_i = 4, 6 or 9 existing cells.

    The weights are not normalised; n_i counts cells whose weight is 0 as well.

    Args:
        code: (B, E, h, w); receives the gradient.
        weights: (B, h w, 9) of :func:`mixing_weights`.
    """
    grid = (code.shape[2], code.shape[3])
    cells = neighbours(grid, code.device)[1].sum(dim=1)
    weights = (weights / cells[:, None]).transpose(1, 2).unflatten(2, grid)  # (B, 9, h, w)
    padded = F.pad(code, (1, 1, 1, 1))
    mixed = torch.zeros_like(code)
    for k in range(9):
        row, col = divmod(k, 3)
        shifted = padded[:, :, row : row + grid[0], col : col + grid[1]]
        mixed = mixed + weights[:, k : k + 1] * shifted
    return mixed
