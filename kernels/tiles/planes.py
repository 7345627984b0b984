"""Operands of tensor-core products: 16-bit planes of float32 values, padded to whole tiles.

``fp16`` and ``bf16`` have one plane. ``fp32`` has two of fp16, high and low, of values scaled to at most 2^15
in magnitude: together they hold 22 bits of mantissa of any value down to 2^-19 of the largest.
"""

from dataclasses import dataclass

import torch

from ..common import power_of_two_above, product

# Widths are padded to this many channels, patches to this many columns (the widest tile).
WIDTH_BLOCK = 64
COLUMN_BLOCK = 256
_SPLIT_SCALE = 2.0**15


@dataclass(frozen=True)
class Planes:
    """values = (high + low) * unit, zero in the padding.

    Attributes:
        high: (rows, width) 16-bit, both padded.
        low: like `high`, or None where one plane serves.
        unit: factor of all values: a float, or a scalar tensor on the device.
        rows: number of rows without padding.
        width: number of channels without padding.
    """

    high: torch.Tensor
    low: torch.Tensor | None
    unit: torch.Tensor | float
    rows: int
    width: int

    @property
    def split(self) -> bool:
        """Whether there are two planes."""
        return self.low is not None

    @property
    def scaled(self) -> bool:
        """Whether the values were divided by their largest magnitude; those of unit rows need not be."""
        return isinstance(self.unit, torch.Tensor)

    def gather(self, index: torch.Tensor, multiple: int) -> "Planes":
        """Planes of some rows, padded to a multiple of rows."""
        parts = [None if plane is None else _pad(plane[index], multiple) for plane in (self.high, self.low)]
        return Planes(parts[0], parts[1], self.unit, index.shape[0], self.width)


def padded(count: int, multiple: int) -> int:
    """`count` rounded up to a multiple."""
    return -(-count // multiple) * multiple


def plane_count(precision: str) -> int:
    """Planes per operand: two in ``fp32``."""
    return 2 if precision == "fp32" else 1


def planes(values: torch.Tensor, precision: str, multiple: int, scaled: bool = False) -> Planes:
    """Planes of float32 values (rows, width).

    Args:
        values: magnitudes at most 1, or `scaled`.
        precision: ``fp32 | fp16 | bf16``.
        multiple: rows are padded to a multiple of this.
        scaled: divide by the largest magnitude first where fp16 needs it; `unit` holds it then.
    """
    unit = 1.0
    if scaled and precision != "bf16" and values.numel():
        unit = power_of_two_above(values)
        values = values / unit
    rows, width = values.shape
    if precision != "fp32":
        dtype = torch.float16 if precision == "fp16" else torch.bfloat16
        return Planes(_pad(values.to(dtype), multiple), None, unit, rows, width)
    values = values * _SPLIT_SCALE
    high = values.to(torch.float16)
    low = values.sub(high).to(torch.float16)
    return Planes(_pad(high, multiple), _pad(low, multiple), unit / _SPLIT_SCALE, rows, width)


def _pad(plane: torch.Tensor, multiple: int) -> torch.Tensor:
    rows, width = plane.shape
    bottom, right = padded(rows, multiple) - rows, padded(width, WIDTH_BLOCK) - width
    return torch.nn.functional.pad(plane, (0, right, 0, bottom)) if bottom or right else plane.contiguous()


def planes_product(left: Planes, right: Planes, transposed: bool = False) -> torch.Tensor:
    """left right, or left^T right, in float32 by the vendor's library; sizes without padding."""

    def part(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        a = a[: left.rows, : left.width]
        return product(a.T if transposed else a, b[: right.rows])

    out = part(left.high, right.high)
    if left.split:
        out += part(left.high, right.low)
        out += part(left.low, right.high)
    out *= left.unit * right.unit
    return out[:, : right.width]
