"""One pass over the rows of a tensor: norms, unit rows, and the 16-bit planes that tensor cores multiply.

In torch each of these steps is a pass of its own over (N, D), and together they take longer than the
products.
"""

import torch
import triton
import triton.language as tl

from .launch import ROW_OPTIONS, interpreted, rows_per_program

# Split planes hold values of magnitude at most 2^15: high + low have 22 bits of mantissa from there to 2^-4.
SPLIT_SCALE = tl.constexpr(2.0**15)
_LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def store_planes(p_high, p_again, p_low, o_entry, b_value, m_entry, SPLIT: tl.constexpr, ROUND: tl.constexpr):
    """Store fp32 values as one 16-bit plane, or as high and low of values times SPLIT_SCALE.

    With `p_again` the high one is stored there, too. ROUND serves the interpreter, which cuts bf16 off where
    the hardware rounds to the nearest.
    """
    if SPLIT:
        b_value = b_value * SPLIT_SCALE
    if ROUND:
        b_bits = b_value.to(tl.int32, bitcast=True)
        b_bits += 0x7FFF + ((b_bits >> 16) & 1)
        b_value = (b_bits & -65536).to(tl.float32, bitcast=True)
    b_high = b_value.to(p_high.dtype.element_ty)
    tl.store(p_high + o_entry, b_high, m_entry)
    if p_again is not None:
        tl.store(p_again + o_entry, b_high, m_entry)
    if SPLIT:
        tl.store(p_low + o_entry, (b_value - b_high.to(tl.float32)).to(p_low.dtype.element_ty), m_entry)


@triton.jit
def rows_kernel(
    p_in,
    p_index,
    p_unit,
    p_factor,
    p_norm_scale,
    p_out,
    p_high,
    p_again,
    p_low,
    p_norm,
    p_largest,
    rows,
    out_rows,
    width,
    scale,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    NORMALISE: tl.constexpr,
    SPLIT: tl.constexpr,
    ROUND: tl.constexpr,
):
    """x = row [/ |row|] [/ unit] [* factor of the row] * scale; a program owns ROWS whole rows.

    Row i is row `p_index`[i] of the input. Each output may be None: `p_out` x in fp32, planes of x (zero in
    rows past `rows` and channels past `width`; the high one twice with `p_again`), `p_norm` |row|
    [* norm_scale], NaN where an entry is not finite, and `p_largest` the largest magnitude of the row. Rows
    are divided by a power of two near it: no square over- or underflows.
    """
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_channel = tl.arange(0, BLOCK)
    m_row = o_row < rows
    m_in = m_row[:, None] & (o_channel < width)[None, :]
    o_source = o_row
    if p_index is not None:
        o_source = tl.load(p_index + o_row, m_row, other=0)
    b_x = tl.load(p_in + o_source[:, None] * width + o_channel[None, :], m_in, other=0.0).to(tl.float32)
    if NORMALISE or p_norm is not None:
        b_largest = tl.max(tl.abs(b_x), 1)
        b_exponent = tl.minimum(tl.maximum(b_largest.to(tl.int32, bitcast=True) >> 23, 1), 253)
        b_ratio = b_x * ((254 - b_exponent) << 23).to(tl.float32, bitcast=True)[:, None]
        # The difference is NaN where an entry is infinite, else 0.
        b_length = tl.sqrt_rn(tl.sum(b_ratio * b_ratio + (b_ratio - b_ratio), 1))
    if p_norm is not None:
        b_norm = b_length * (b_exponent << 23).to(tl.float32, bitcast=True)
        # Finite rows keep a finite norm: infinity times 0 would make them look bad.
        b_norm = tl.where(b_norm == float("inf"), _LARGEST, b_norm)
        if p_norm_scale is not None:
            b_norm = b_norm * tl.load(p_norm_scale)
        tl.store(p_norm + o_row, b_norm, m_row)
    if p_largest is not None:
        tl.store(p_largest + o_row, b_largest, m_row)
    if NORMALISE:
        b_x = b_ratio * tl.div_rn(1.0, tl.maximum(b_length, 1e-12))[:, None]
    if p_unit is not None:
        b_x = b_x * tl.div_rn(1.0, tl.load(p_unit))
    if p_factor is not None:
        b_x = b_x * tl.load(p_factor + o_row, m_row, other=0.0)[:, None]
    b_x = b_x * scale
    if p_out is not None:
        tl.store(p_out + o_row[:, None] * width + o_channel[None, :], b_x, m_in)
    if p_high is not None:
        m_out = (o_row < out_rows)[:, None] & (o_channel < WIDTH)[None, :]
        o_out = o_row[:, None] * WIDTH + o_channel[None, :]
        store_planes(p_high, p_again, p_low, o_out, b_x, m_out, SPLIT, ROUND)


def rounding(plane: torch.Tensor | None) -> bool:
    """Whether kernels must round by themselves what they store in `plane`, see :func:`store_planes`."""
    return interpreted() and plane is not None and plane.dtype == torch.bfloat16


def run(
    values: torch.Tensor,
    *,
    rows: int,
    padded_rows: int,
    padded_width: int,
    index: torch.Tensor | None = None,
    unit: torch.Tensor | None = None,
    factor: torch.Tensor | None = None,
    scale: float = 1.0,
    normalise: bool = False,
    norm_scale: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    high: torch.Tensor | None = None,
    again: torch.Tensor | None = None,
    low: torch.Tensor | None = None,
    norm: torch.Tensor | None = None,
    largest: torch.Tensor | None = None,
) -> None:
    """Launch :func:`rows_kernel` on (N, width) floating `values`; what is None is left out."""
    width, per_program = values.shape[1], rows_per_program()
    if padded_rows == 0:
        return
    rows_kernel[(triton.cdiv(padded_rows, per_program),)](
        values.contiguous(),
        index,
        unit,
        factor,
        norm_scale,
        out,
        high,
        again,
        low,
        norm,
        largest,
        rows,
        padded_rows,
        width,
        scale,
        WIDTH=padded_width,
        ROWS=per_program,
        BLOCK=triton.next_power_of_2(padded_width),
        NORMALISE=normalise,
        SPLIT=low is not None,
        ROUND=rounding(high),
        **ROW_OPTIONS,
    )
