"""``propagate`` in Triton: the sets of a chunk are those of ``ppap_loss/triton_impl.py``, counted."""

import torch

from ..budget import row_chunks
from ..ppap_loss.triton_impl import first_thresholds, form_sets, sets_bytes
from ..ppap_loss.triton_kernels import POISON, Claims, find_scalars
from ..tiles import bits, launch
from ..tiles.planes import fill
from ..tiles.sizes import COLUMN_BLOCK
from .config import PropagationConfig


def guarded_propagate(
    features_ND: torch.Tensor,
    anchors_A: torch.Tensor,
    cfg: PropagationConfig,
    precision: str,
    memory_budget: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Unit features (N, D), proxies (A, D), phi, psi, numbers of positives and negatives (A,).

    NaN, and counts of -1, where features or anchors were bad; one anchor at least.
    """
    (patches, width), device, count = features_ND.shape, anchors_A.device, anchors_A.shape[0]
    block, features_ND = launch.row_block(device), features_ND.contiguous()
    unit_ND, norms = torch.empty((patches, width), device=device), torch.empty((3, patches), device=device)
    keys = fill(features_ND, precision, COLUMN_BLOCK, normalise=True, norm=norms[0], out=unit_ND)
    claims = Claims.of(anchors_A, patches)
    poison = find_scalars(norms, claims)[POISON]
    proxies_AD, thresholds = (
        torch.empty((count, width), device=device),
        torch.empty((2, count), device=device),
    )
    counts = torch.empty((2, count), dtype=torch.int64, device=device)
    per_anchor = max(sets_bytes(patches, width, precision, block))
    rows = launch.rows_within(memory_budget, per_anchor, device)
    first = first_thresholds(cfg, min(rows, count), device)
    for chunk in row_chunks(count, rows):
        sets = form_sets(features_ND, keys, claims.clamped_A[chunk], cfg, precision, first)
        proxies_AD[chunk], thresholds[0, chunk], thresholds[1, chunk] = sets.proxies, sets.phi, sets.psi
        counts[0, chunk], counts[1, chunk] = bits.sizes(sets.positive, sets.kept)
        del sets
    proxies_AD *= poison
    thresholds *= poison
    counts.masked_fill_(poison.isnan(), -1)
    return (
        unit_ND,
        proxies_AD,
        thresholds[0].clone(),
        thresholds[1].clone(),
        counts[0].clone(),
        counts[1].clone(),
    )
