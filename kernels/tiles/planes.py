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
        stack: (planes, rows, width) 16-bit, rows and width padded: high; high, low; or high, high, low, the
            right side of a product whose left side multiplies two of its own with the same high.
        constant: the unit's constant factor, a power of two.
        rows: number of rows without padding.
        width: number of channels without padding.
        divisor: the unit's other factor, a power of two as a scalar tensor, or None.
    """

    stack: torch.Tensor
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
        twice: bool = False,
    ) -> "Planes":
        """Unwritten planes of values that are divided by `divisor`; rows padded to `multiple`.

        With `twice` there is another high one where there are two.
        """
        split = precision == "fp32"
        count = 3 if twice and split else plane_count(precision)
        shape = (count, padded(rows, multiple), padded_channels(width))
        dtype = torch.bfloat16 if precision == "bf16" else torch.float16
        stack = torch.empty(shape, dtype=dtype, device=device)
        return cls(stack, 1 / SPLIT_SCALE.value if split else 1.0, rows, width, divisor)

    @property
    def high(self) -> torch.Tensor:
        """(rows, width), padded."""
        return self.stack[0]

    @property
    def low(self) -> torch.Tensor | None:
        """Like `high`, or None where one plane serves."""
        return self.stack[-1] if len(self.stack) > 1 else None

    @property
    def again(self) -> torch.Tensor | None:
        """The other high one, right behind it, or None."""
        return self.stack[1] if len(self.stack) > 2 else None

    @property
    def split(self) -> bool:
        """Whether there are two planes."""
        return len(self.stack) > 1

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


def planes(
    values: torch.Tensor, precision: str, multiple: int, scaled: bool = False, twice: bool = False
) -> Planes:
    """Planes of float values (rows, width).

    Args:
        values: magnitudes at most 1, or `scaled`.
        precision: ``fp32 | fp16 | bf16``.
        multiple: rows are padded to a multiple of this.
        scaled: divide by the largest magnitude first where fp16 needs it; `unit` holds it then.
        twice: see :meth:`Planes.empty`.
    """
    unit = None
    if scaled and precision != "bf16" and values.numel():
        unit = power_of_two_above(values.float())
    return fill(values, precision, multiple, unit=unit, twice=twice)


def fill(
    values: torch.Tensor,
    precision: str,
    multiple: int,
    *,
    index: torch.Tensor | None = None,
    unit: torch.Tensor | None = None,
    twice: bool = False,
    **options: Any,
) -> Planes:
    """Planes of `values`, or of those of its rows that `index` (rows,) names; see :func:`.rows.run`.

    Args:
        values: (N, width) floating.
        precision: ``fp32 | fp16 | bf16``.
        multiple: rows are padded to a multiple of this.
        index: int64 rows in range, or None = all.
        unit: scalar tensor, a power of two that the values are divided by, or None.
        twice: see :meth:`Planes.empty`.
        options: more of what :func:`.rows.run` does on the way.
    """
    count = values.shape[0] if index is None else index.shape[0]
    made = Planes.empty(count, values.shape[1], precision, multiple, values.device, unit, twice)
    row_kernels.run(
        values,
        rows=count,
        padded_rows=made.high.shape[0],
        padded_width=made.high.shape[1],
        index=index,
        unit=unit,
        high=made.high,
        again=made.again,
        low=made.low,
        **options,
    )
    return made


def raw_product(left: Planes, right: Planes) -> torch.Tensor:
    """left right without the units, in float32 by the vendor's library: (parts, rows, width), both padded.

    The sum of the parts is the product: two planes of `left` are multiplied with the high one of `right` as
    one matrix. Rows past those of `left` hold anything.
    """
    columns = slice(left.width)
    out = product(left.stack.flatten(0, 1)[:, columns], right.high[: right.rows])
    if right.low is not None:
        add_product(out[: left.rows], left.high[: left.rows, columns], right.low[: right.rows])
    return out.view(*left.stack.shape[:2], -1)


def add_transposed_product(
    left: Planes, right: Planes, target: torch.Tensor | None = None, overwrite: bool = False
) -> torch.Tensor:
    """target + left^T right without the units, in float32 by the vendor's library; also returned.

    Args:
        left: its width without padding is the rows of the product.
        right: of as many padded rows, and where there are two planes with its high one twice: both of `left`
            are multiplied with it as one matrix of twice the depth. Its padded width is that of the product.
        target: contiguous, or None = zeros.
        overwrite: the target holds nothing yet.
    """
    columns = slice(left.width)
    both, same = left.stack.flatten(0, 1)[:, columns], right.stack[: len(left.stack)].flatten(0, 1)
    if target is None or overwrite:
        target = product(both.T, same, target)
    else:
        add_product(target, both.T, same)
    if right.low is not None:
        add_product(target, left.high[:, columns].T, right.low)
    return target
