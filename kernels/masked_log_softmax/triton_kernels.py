"""The Triton kernels of ``masked_log_softmax`` and their launches; ``triton_impl.py`` has the mathematics."""

from dataclasses import dataclass
from functools import partial

import torch
import triton
import triton.language as tl

from ..precision import FP16_WEIGHT_SCALE
from ..tiles import device, launch
from ..tiles.bits import Bits
from ..tiles.planes import Planes

WEIGHT_SCALE = tl.constexpr(FP16_WEIGHT_SCALE)
# Below this bound of |x|, in powers of two, the bound itself serves as the shift: no exponential of a
# difference of logits leaves float32's normal range, and no maximum is taken. The price is the rounding of
# the shift in the last bits of a loss that is exactly 0.
TIGHT_BOUND = 50.0
# Rounding of the operands may lengthen rows a little.
SLACK = 1.01


@triton.jit
def log_sum_exp_kernel(
    p_left,
    p_left_low,
    p_right,
    p_right_low,
    p_positive,
    p_kept,
    p_occupied,
    p_scale,
    p_tight,
    p_bound,
    p_top,
    p_total,
    p_hit,
    rows,
    groups,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
    SPLIT: tl.constexpr,
    TMA: tl.constexpr,
    UPCAST: tl.constexpr,
    PERSISTENT: tl.constexpr,
):
    """Per row and column tile: top = shift, total = sum of 2^(x - top) [kept], hit = sum of x [P].

    The shift is the row's bound if `tight`, else the tile's largest kept x, -inf where nothing is kept. A
    program owns a tile, and one entry per row of the partial results: bitwise repeatable.
    """
    GROUPS: tl.constexpr = BLOCK_N // 128
    first, last, step = device.own_tiles(rows, groups * 128, BLOCK_M, BLOCK_N, PERSISTENT)
    for i_tile in range(first, last, step):
        i_m, i_n = device.tile_index(i_tile, rows, groups * 128, BLOCK_M, BLOCK_N, BAND)
        i_row = i_m * BLOCK_M
        b_x = device.tile_product(
            p_left,
            p_left_low,
            p_right,
            p_right_low,
            i_row,
            i_n * BLOCK_N,
            WIDTH,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            SPLIT,
            TMA,
            UPCAST,
        )
        b_x = device.grouped(b_x * tl.load(p_scale), BLOCK_M, GROUPS)
        o_row = i_row + tl.arange(0, BLOCK_M)
        o_words = device.word_offsets(i_row, i_n * GROUPS, groups, BLOCK_M, GROUPS)
        b_hit = tl.zeros((BLOCK_M,), tl.float32)
        if device.any_occupied(p_occupied + i_m * groups + i_n * GROUPS, GROUPS):
            m_positive = device.expand(tl.load(p_positive + o_words).to(tl.int32))
            b_hit = device.row_sum(tl.where(m_positive, b_x, 0.0))
        b_x = tl.where(device.expand(tl.load(p_kept + o_words).to(tl.int32)), b_x, float("-inf"))
        if tl.load(p_tight) != 0:
            b_top = tl.load(p_bound + o_row, o_row < rows, other=0.0)
        else:
            b_top = tl.max(tl.max(tl.max(b_x, 3), 2), 1)
        b_base = tl.where(b_top == float("-inf"), 0.0, b_top)
        b_total = device.row_sum(tl.exp2(b_x - b_base[:, None, None, None]))
        o_partial = o_row.to(tl.int64) * (groups // GROUPS) + i_n
        tl.store(p_top + o_partial, b_top)
        tl.store(p_total + o_partial, b_total)
        tl.store(p_hit + o_partial, b_hit)


@triton.jit
def combine_kernel(
    p_top,
    p_total,
    p_hit,
    p_count,
    p_loss,
    p_lse,
    rows,
    tiles,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """loss [nats] and log-sum-exp [powers of two] from the column tiles; a program owns ROWS whole rows."""
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < rows
    b_top = tl.full((ROWS, BLOCK), float("-inf"), tl.float32)
    for i in range(0, tiles, BLOCK):
        o_tile = i + tl.arange(0, BLOCK)
        m_tile = m_row[:, None] & (o_tile < tiles)[None, :]
        p_tile = p_top + o_row[:, None] * tiles + o_tile[None, :]
        b_top = tl.maximum(b_top, tl.load(p_tile, m_tile, other=float("-inf")))
    b_base = tl.max(b_top, 1)
    b_base = tl.where(b_base == float("-inf"), 0.0, b_base)
    b_total = tl.zeros((ROWS, BLOCK), tl.float32)
    b_hit = tl.zeros((ROWS, BLOCK), tl.float32)
    for i in range(0, tiles, BLOCK):
        o_tile = i + tl.arange(0, BLOCK)
        m_tile = m_row[:, None] & (o_tile < tiles)[None, :]
        o_partial = o_row[:, None] * tiles + o_tile[None, :]
        b_top = tl.load(p_top + o_partial, m_tile, other=float("-inf"))
        b_part = tl.load(p_total + o_partial, m_tile, other=0.0)
        # A NaN is not 0 and stays.
        b_total += tl.where(b_part == 0, 0.0, b_part * tl.exp2(b_top - b_base[:, None]))
        b_hit += tl.load(p_hit + o_partial, m_tile, other=0.0)
    b_sum = tl.sum(b_total, 1)
    b_log = tl.where(b_sum == 0, float("-inf"), tl.log2(tl.where(b_sum == 0, 1.0, b_sum)))
    b_num = tl.load(p_count + o_row, m_row, other=0).to(tl.int32)
    ln2: tl.constexpr = 0.6931471805599453
    b_lse = b_base + b_log
    b_loss = (b_lse - tl.sum(b_hit, 1) / tl.maximum(b_num, 1)) * ln2
    tl.store(p_loss + o_row, tl.where(b_num > 0, b_loss, 0.0), m_row)
    tl.store(p_lse + o_row, b_lse, m_row)


@triton.jit
def weights_kernel(
    p_left,
    p_left_low,
    p_right,
    p_right_low,
    p_positive,
    p_kept,
    p_occupied,
    p_scale,
    p_tight,
    p_lse,
    p_count,
    p_weights,
    p_weights_low,
    rows,
    groups,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BAND: tl.constexpr,
    SPLIT: tl.constexpr,
    TMA: tl.constexpr,
    UPCAST: tl.constexpr,
    PERSISTENT: tl.constexpr,
):
    """weights = (2^(x - lse) [kept] - [P] / |P|) 2^14 in 16 bits; 0 in rows without positives.

    A program owns a tile. The logits are formed again: two passes over z cost less than keeping them.
    """
    GROUPS: tl.constexpr = BLOCK_N // 128
    first, last, step = device.own_tiles(rows, groups * 128, BLOCK_M, BLOCK_N, PERSISTENT)
    for i_tile in range(first, last, step):
        i_m, i_n = device.tile_index(i_tile, rows, groups * 128, BLOCK_M, BLOCK_N, BAND)
        i_row = i_m * BLOCK_M
        b_x = device.tile_product(
            p_left,
            p_left_low,
            p_right,
            p_right_low,
            i_row,
            i_n * BLOCK_N,
            WIDTH,
            BLOCK_M,
            BLOCK_N,
            BLOCK_K,
            SPLIT,
            TMA,
            UPCAST,
        )
        o_row = i_row + tl.arange(0, BLOCK_M)
        b_count = tl.load(p_count + o_row, o_row < rows, other=0)
        b_lse = tl.load(p_lse + o_row, o_row < rows, other=float("inf"))
        b_lse = tl.where(b_count > 0, b_lse, float("inf"))
        b_x = b_x * tl.load(p_scale) - b_lse[:, None]
        if tl.load(p_tight) == 0:
            # No kept logit exceeds the log-sum-exp, but one of huge magnitude may seem to by its rounding.
            b_x = tl.minimum(b_x, 0.0)
        b_x = device.grouped(b_x, BLOCK_M, GROUPS)
        o_words = device.word_offsets(i_row, i_n * GROUPS, groups, BLOCK_M, GROUPS)
        m_kept = device.expand(tl.load(p_kept + o_words).to(tl.int32))
        b_weight = tl.where(m_kept, tl.exp2(b_x), 0.0)
        if device.any_occupied(p_occupied + i_m * groups + i_n * GROUPS, GROUPS):
            b_share = tl.div_rn(1.0, tl.maximum(b_count, 1).to(tl.float32))
            m_positive = device.expand(tl.load(p_positive + o_words).to(tl.int32))
            b_weight -= tl.where(m_positive, b_share[:, None, None, None], 0.0)
        b_weight = tl.reshape(b_weight * WEIGHT_SCALE, (BLOCK_M, BLOCK_N))
        o_weight = device.entry_offsets(i_row, i_n * BLOCK_N, groups * 128, BLOCK_M, BLOCK_N)
        b_high = b_weight.to(p_weights.dtype.element_ty)
        tl.store(p_weights + o_weight, b_high)
        if SPLIT:
            b_low = (b_weight - b_high.to(tl.float32)).to(p_weights.dtype.element_ty)
            tl.store(p_weights_low + o_weight, b_low)


@triton.jit
def group_kernel(p_count, p_loss, p_row, p_mean, rows, group, BLOCK: tl.constexpr):
    """Of a group of consecutive anchors, n of which have positives: rows = group / n, mean = loss sum / n.

    Either output may be None. A program owns a group; 1 stands for n = 0.
    """
    i_first = tl.program_id(0).to(tl.int64) * group
    i_end = tl.minimum(i_first + group, rows)
    b_valid = tl.zeros((BLOCK,), tl.int32)
    b_loss = tl.zeros((BLOCK,), tl.float32)
    for i in range(0, group, BLOCK):
        o_row = i_first + i + tl.arange(0, BLOCK)
        b_valid += (tl.load(p_count + o_row, o_row < i_end, other=0) > 0).to(tl.int32)
        if p_mean is not None:
            b_loss += tl.load(p_loss + o_row, o_row < i_end, other=0.0)
    valid = tl.maximum(tl.sum(b_valid, 0), 1).to(tl.float32)
    if p_mean is not None:
        tl.store(p_mean + tl.program_id(0), tl.sum(b_loss, 0) / valid)
    if p_row is not None:
        for i in range(0, group, BLOCK):
            o_row = i_first + i + tl.arange(0, BLOCK)
            tl.store(p_row + o_row, tl.zeros((BLOCK,), tl.float32) + group / valid, o_row < i_end)


@triton.jit
def add_rows_kernel(
    p_source,
    p_second,
    p_index,
    p_factor,
    p_target,
    rows,
    width,
    scale,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """target[index[i]] += (source[i] + second[i]) factor[i] scale; indices differ. Owns ROWS whole rows."""
    o_row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    o_channel = tl.arange(0, BLOCK)
    m_row = o_row < rows
    m_entry = m_row[:, None] & (o_channel < width)[None, :]
    b_factor = tl.zeros((ROWS,), tl.float32) + scale
    if p_factor is not None:
        b_factor = b_factor * tl.load(p_factor + o_row, m_row, other=0.0)
    o_target = tl.load(p_index + o_row, m_row, other=0)[:, None] * width + o_channel[None, :]
    o_own = o_row[:, None] * width + o_channel[None, :]
    b_own = tl.load(p_source + o_own, m_entry, other=0.0)
    if p_second is not None:
        b_own += tl.load(p_second + o_own, m_entry, other=0.0)
    b_sum = tl.load(p_target + o_target, m_entry, other=0.0) + b_own * b_factor[:, None]
    tl.store(p_target + o_target, b_sum, m_entry)


@dataclass(frozen=True)
class Logits:
    """x = z_i . z_j log2(e) / temperature of some anchors (one at least) and all patches: never stored.

    Attributes:
        left: embeddings of the anchors.
        right: embeddings of the patches.
        scale: scalar, turns products of planes into x.
        bound: (C,) float32, no |x| of a row is larger.
        tight: scalar, not 0 where all bounds are below TIGHT_BOUND.
        positive: positives of the anchors.
        kept: kept patches of the anchors.
        flags: tiles with positives, see :func:`.occupancy.flags`.
        count_C: (C,) int64, numbers of positives.
    """

    left: Planes
    right: Planes
    scale: torch.Tensor
    bound: torch.Tensor
    tight: torch.Tensor
    positive: Bits
    kept: Bits
    flags: torch.Tensor
    count_C: torch.Tensor


def _over_tiles(
    kernel: triton.JITFunction,
    name: str,
    logits: Logits,
    arguments: tuple[object, ...],
    config: launch.Launch | None = None,
) -> launch.Launch:
    """Launch a kernel over all tiles, in the configuration returned; `arguments` stand before the sizes."""
    bits, left, right = logits.positive, logits.left, logits.right
    if config is None:
        again = partial(_over_tiles, kernel, name, logits, arguments)
        config = launch.choose(name, right, (bits.rows, bits.columns), again)
    kernel[launch.tiles(bits.rows, bits.groups * 128, config, bits.words.device)](
        launch.source(left.high, config.block_m, config.block_k, config.tma),
        launch.source(left.low, config.block_m, config.block_k, config.tma),
        launch.source(right.high, config.block_n, config.block_k, config.tma),
        launch.source(right.low, config.block_n, config.block_k, config.tma),
        bits.words,
        logits.kept.words,
        logits.flags,
        logits.scale,
        logits.tight,
        *arguments,
        bits.rows,
        bits.groups,
        BLOCK_N=config.block_n,
        BLOCK_K=config.block_k,
        BAND=launch.BAND,
        PERSISTENT=config.persistent,
        **config.options(right),
    )
    return config


def log_sum_exp(logits: Logits) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses (C,) [nats] and log-sum-exp (C,) [powers of two] over the kept patches."""
    rows, per_program = logits.positive.rows, launch.rows_per_program()
    parts = [torch.empty(logits.positive.counts.shape, device=logits.scale.device) for _ in range(3)]
    config = _over_tiles(log_sum_exp_kernel, "log_sum_exp", logits, (logits.bound, *parts))
    loss_C, lse_C = torch.empty_like(logits.bound), torch.empty_like(logits.bound)
    combine_kernel[(triton.cdiv(rows, per_program),)](
        *parts,
        logits.count_C,
        loss_C,
        lse_C,
        rows,
        logits.positive.groups // (config.block_n // 128),
        ROWS=per_program,
        BLOCK=256,
        **launch.ROW_OPTIONS,
    )
    return loss_C, lse_C


def weights(logits: Logits, lse_C: torch.Tensor) -> Planes:
    """d loss / d logits (C, N) of every anchor as operands, 0 in rows without positives."""
    bits = logits.positive
    shape = (2 if logits.right.split else 1, bits.counts.shape[0], bits.groups * 128)
    stack = torch.empty(shape, dtype=logits.right.high.dtype, device=logits.scale.device)
    found = Planes(stack, 1 / FP16_WEIGHT_SCALE, bits.rows, bits.columns)
    _over_tiles(weights_kernel, "weights", logits, (lse_C, logits.count_C, found.high, found.low))
    return found


def group_weights(count_C: torch.Tensor, group: int) -> torch.Tensor:
    """group / (anchors of the group that have positives), (C,), of a chunk of whole groups."""
    rows = count_C.shape[0]
    weight_C = torch.empty(rows, device=count_C.device)
    group_kernel[(triton.cdiv(rows, group),)](count_C, None, weight_C, None, rows, group, BLOCK=1024)
    return weight_C


def group_means(loss_A: torch.Tensor, count_A: torch.Tensor, group: int) -> torch.Tensor:
    """Mean of the losses of every group's anchors that have positives, (groups,)."""
    mean = torch.empty(triton.cdiv(loss_A.shape[0], group), device=loss_A.device)
    group_kernel[mean.shape](count_A, loss_A, None, mean, loss_A.shape[0], group, BLOCK=1024)
    return mean


def add_rows(
    source_PCE: torch.Tensor,
    index_C: torch.Tensor,
    factor_C: torch.Tensor | None,
    target_NE: torch.Tensor,
    scale: float,
) -> None:
    """target[index] += (sum of the one or two parts of source) factor scale; indices differ."""
    rows, width, per_program = index_C.shape[0], target_NE.shape[1], launch.rows_per_program()
    add_rows_kernel[(triton.cdiv(rows, per_program),)](
        source_PCE[0],
        source_PCE[1] if len(source_PCE) > 1 else None,
        index_C,
        factor_C,
        target_NE,
        rows,
        width,
        scale,
        ROWS=per_program,
        BLOCK=triton.next_power_of_2(width),
        **launch.ROW_OPTIONS,
    )
