"""Position embeddings in a graph: a constant of one grid, or resized by products for any grid.

Both take the place of ``ppap.nets.backbone.resize_position``, whose bicubic resizing with scale factors a
graph holds for one grid only. Legend: h w wanted patch grid, P prefix tokens, D channels.
"""

from typing import Literal

import torch
from torch import Tensor, nn

_REACH = 2  # a bicubic kernel is zero from here on
_SHARPNESS = {"dino": -0.75, "timm": -0.5}  # a of the kernel: torch's without and with antialiasing


class FixedPosition(nn.Module):
    """The embedding of one grid, formed beforehand."""

    def __init__(self, position: Tensor) -> None:
        """Args: (1, P + h w, D), of the grid of all images to come."""
        super().__init__()
        self.register_buffer("position", position.detach().clone(), persistent=False)

    def forward(
        self,
        position: Tensor,
        stored: tuple[int, int],
        grid: tuple[int, int],
        *,
        num_prefix: int,
        rule: Literal["dino", "timm"],
    ) -> Tensor:
        """(1, P + h w, D), whatever is asked for."""
        return self.position


def position_by_products(
    position: Tensor,
    stored: tuple[int, int],
    grid: tuple[int, int],
    *,
    num_prefix: int,
    rule: Literal["dino", "timm"],
) -> Tensor:
    """As ``resize_position``, same arguments and result, with sizes of the grid that may be symbols.

    Bicubic resizing is a matrix for the rows and one for the columns; nothing here asks what the sizes are.
    """
    prefix, patches = position[:, :num_prefix], position[0, num_prefix:].unflatten(0, stored)
    rows, columns = (
        _weights(wanted, have, rule, position) for wanted, have in zip(grid, stored, strict=True)
    )
    resized = torch.einsum("ih,hwd->iwd", rows, patches)
    resized = torch.einsum("jw,iwd->ijd", columns, resized).flatten(0, 1)
    if stored[0] == stored[1]:  # both rules leave that grid as it is
        same = (rows.new_ones(1) * grid[0] == stored[0]) & (rows.new_ones(1) * grid[1] == stored[1])
        resized = torch.where(same[:, None], _as_long(patches.flatten(0, 1), resized), resized)
    return torch.cat([prefix, resized[None]], dim=1)


def _as_long(rows: Tensor, like: Tensor) -> Tensor:
    """(n, D): `rows` (m, D), cut or repeated to the length of `like`."""
    places = torch.arange(like.shape[0], device=rows.device).clamp(max=rows.shape[0] - 1)
    return rows[places]


def _weights(wanted: int, have: int, rule: str, like: Tensor) -> Tensor:
    """(wanted, have) weights of one axis; each row sums to 1."""
    target = torch.arange(wanted, device=like.device, dtype=like.dtype)[:, None] + 0.5
    source = torch.arange(have, device=like.device, dtype=like.dtype)
    length = like.new_ones(1) * wanted
    if rule == "dino":
        middle = target * (have / (length + 0.1)) - 0.5
        taps = torch.arange(1 - _REACH, 1 + _REACH, device=like.device, dtype=like.dtype)
        place = middle.floor() + taps  # (wanted, 4); beyond the border its own value counts on
        hit = place.clamp(0, have - 1)[:, :, None] == source
        return (_cubic(middle - place, _SHARPNESS[rule])[:, :, None] * hit).sum(dim=1)
    scale = have / length
    weight = _cubic((source + 0.5 - target * scale) / scale.clamp(min=1), _SHARPNESS[rule])
    return weight / weight.sum(dim=1, keepdim=True)


def _cubic(distance: Tensor, a: float) -> Tensor:
    x = distance.abs()
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return torch.where(x <= 1, near, torch.where(x < _REACH, far, torch.zeros_like(x)))
