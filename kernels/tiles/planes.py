"""Operands of tensor-core products: 16-bit planes of float32 values, padded to whole tiles.

``fp16`` and ``bf16`` have one plane. ``fp32`` has two of fp16, high and low, of values scaled to at most 2^15
in magnitude: together they hold 22 bits of mantissa of any value down to 2^-19 of the largest.
"""

from dataclasses import dataclass
from typing import Any

import torch

from ..precision import add_product, power_of_two_above, product
from . import rows as row_kernels
from .rows import SPLIT_SCALE
from .sizes import padded, padded_channels


@dataclass(frozen=True)
class Planes:
    """values = (high + low) * unit, zero in the padding.

    Attributes:
        high: (rows, width) 16-bit, both padded.
        low: like `high`, or None where one plane serves.
        constant: the unit's constant factor, a power of two.
        rows: number of rows without padding.
        width: number of channels without padding.
        divisor: the unit's other factor, a power of two as a scalar tensor, or None.
    """

    high: torch.Tensor
    low: torch.Tensor | None
    constant: float
    rows: int
    width: int
    divisor: torch.Tensor | None = None

    @classmethod
    def empty(
        cls,
        rows: int,
        width: int,
        precision: str,
        multiple: int,
        device: torch.device,
        divisor: torch.Tensor | None = None,
    ) -> "Planes":
        """Unwritten planes of values that are divided by `divisor`; rows padded to `multiple`."""
        shape = (padded(rows, multiple), padded_channels(width))
        dtype = torch.bfloat16 if precision == "bf16" else torch.float16
        split = precision == "fp32"
        high = torch.empty(shape, dtype=dtype, device=device)
        low = torch.empty_like(high) if split else None
        return cls(high, low, 1 / SPLIT_SCALE.value if split else 1.0, rows, width, divisor)

    @property
    def split(self) -> bool:
        """Whether there are two planes."""
        return self.low is not None

    @property
    def scaled(self) -> bool:
        """Whether the values were divided by their largest magnitude; those of unit rows need not be."""
        return self.divisor is not None

    @property
    def unit(self) -> torch.Tensor | float:
        """Factor of all values, a power of two: a float, or a scalar tensor on the device."""
        return self.constant if self.divisor is None else self.divisor * self.constant


def plane_count(precision: str) -> int:
    """Planes per operand: two in ``fp32``."""
    return 2 if precision == "fp32" else 1


def planes(values: torch.Tensor, precision: str, multiple: int, scaled: bool = False) -> Planes:
    """Planes of float values (rows, width).

    Args:
        values: magnitudes at most 1, or `scaled`.
        precision: ``fp32 | fp16 | bf16``.
        multiple: rows are padded to a multiple of this.
        scaled: divide by the largest magnitude first where fp16 needs it; `unit` holds it then.
    """
    unit = None
    if scaled and precision != "bf16" and values.numel():
        unit = power_of_two_above(values.float())
    return fill(values, precision, multiple, unit=unit)


def fill(
    values: torch.Tensor,
    precision: str,
    multiple: int,
    *,
    index: torch.Tensor | None = None,
    unit: torch.Tensor | None = None,
    **options: Any,
) -> Planes:
    """Planes of `values`, or of those of its rows that `index` (rows,) names; see :func:`.rows.run`.

    Args:
        values: (N, width) floating.
        precision: ``fp32 | fp16 | bf16``.
        multiple: rows are padded to a multiple of this.
        index: int64 rows in range, or None = all.
        unit: scalar tensor, a power of two that the values are divided by, or None.
        options: more of what :func:`.rows.run` does on the way.
    """
    count = values.shape[0] if index is None else index.shape[0]
    made = Planes.empty(count, values.shape[1], precision, multiple, values.device, unit)
    row_kernels.run(
        values,
        rows=count,
        padded_rows=made.high.shape[0],
        padded_width=made.high.shape[1],
        index=index,
        unit=unit,
        high=made.high,
        low=made.low,
        **options,
    )
    return made


def raw_product(
    left: Planes,
    right: Planes,
    transposed: bool = False,
    target: torch.Tensor | None = None,
    overwrite: bool = False,
) -> torch.Tensor:
    """left right, or left^T right, without the units, in float32 by the vendor's library.

    Args:
        left: (rows, width) without padding are used, rows of the product, or its columns if `transposed`.
        right: its padded width is that of the product.
        transposed: multiply with the transpose of `left`.
        target: contiguous, what the product is added to, or None.
        overwrite: the target holds nothing yet.
    """
    first, *others = _parts(left, right, transposed)
    if target is None or overwrite:
        target = product(*first, target)
    else:
        add_product(target, *first)
    for a, b in others:
        add_product(target, a, b)
    return target


def planes_product(left: Planes, right: Planes, transposed: bool = False) -> torch.Tensor:
    """left right, or left^T right, in float32; sizes without padding."""
    out = raw_product(left, right, transposed)
    out *= left.unit * right.unit
    return out[:, : right.width]


def _parts(left: Planes, right: Planes, transposed: bool) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs of planes whose products add up to the product; low times low is below fp32's rounding."""
    pairs = [(left.high, right.high)]
    if left.low is not None and right.low is not None:
        pairs += [(left.high, right.low), (left.low, right.high)]
    cut = [(a[: left.rows, : left.width], b[: right.rows]) for a, b in pairs]
    return [(a.T if transposed else a, b) for a, b in cut]
