"""Shared by the implementations: precision of products, memory budget, number guards.

Shapes: N patches (keys), A anchors (queries), D guidance channels, E embedding channels.
"""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F

DEFAULT_BUDGET = 512 * 2**20
PRECISIONS = ("auto", "fp32", "fp16", "bf16")
_SIXTEEN_BIT = {"fp16": torch.float16, "bf16": torch.bfloat16}
_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}
# Asked on import: torch 2.11 cannot trace the question.
_WITH_AUTOCAST = frozenset(
    device for device in ("cpu", "cuda", "xpu", "mps", "hpu") if torch.amp.is_autocast_available(device)
)
# Softmax weights are at most 1 and about 1/N in the mean; this power of two centres them in fp16's range.
FP16_WEIGHT_SCALE = 2.0**14


class MemoryBudgetError(ValueError):
    """The memory budget is too small for a single anchor."""


class NonFiniteError(ValueError):
    """An input holds NaN or infinity."""


def resolve_precision(precision: str, *tensors: torch.Tensor) -> str:
    """The precision an op runs in: ``fp64 | fp32 | fp16 | bf16``.

    ``auto`` is the autocast type of the tensors' device where autocast is on, else the promoted type of the
    tensors. float64 tensors are always computed in float64.

    Raises:
        ValueError: an unknown name, or a 16-bit precision asked for on float64 tensors.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; valid: {', '.join(PRECISIONS)}")
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    if dtype == torch.float64:
        if precision in _SIXTEEN_BIT:
            raise ValueError(
                f"precision {precision!r} was asked for on float64 tensors; give float32 or use 'auto'"
            )
        return "fp64"
    if precision != "auto":
        return precision
    device = tensors[0].device.type
    if device in _WITH_AUTOCAST and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    return _NAMES[dtype]


def accumulator(precision: str) -> torch.dtype:
    """dtype of thresholds, proxies, losses and uncast gradients: float32, for ``fp64`` float64."""
    return torch.float64 if precision == "fp64" else torch.float32


def normalise(features: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows of `features` (N, D) divided by their L2 norm, in `dtype`; zero rows stay zero.

    Rows are first divided by their largest magnitude, so that no square over- or underflows.
    """
    features = features.detach().to(dtype)
    if features.shape[0] == 0:
        return features.clone()  # an op returns no alias of its input
    # A reduction over the channels propagates NaN and inf/inf becomes NaN: bad rows stay visible.
    scale = features.abs().amax(dim=1, keepdim=True)
    return F.normalize(features / torch.where(scale == 0, torch.ones_like(scale), scale), dim=1)


def operand(values: torch.Tensor, precision: str) -> torch.Tensor:
    """`values` rounded to the product's operand type.

    On CUDA a 16-bit tensor for :func:`product`; elsewhere the rounded values in float32, because a 16-bit
    product there would round its result too (and float16 products on CPUs are hundreds of times slower).
    """
    if precision not in _SIXTEEN_BIT:
        return values
    rounded = values.to(_SIXTEEN_BIT[precision])
    return rounded if values.device.type == "cuda" else rounded.float()


def product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """a @ b of operands, accumulated in and returned as float32 (float64 for float64), in `out` if any."""
    if a.dtype in (torch.float16, torch.bfloat16):
        if a.device.type == "cuda":
            return torch.mm(a, b, out_dtype=torch.float32, out=out)
        # Triton's interpreter alone brings 16 bits to a CPU; some rows at a time, as they double in size.
        right = b.float()
        return torch.cat([rows.float() @ right for rows in a.split(64)], out=out)
    return torch.mm(a, b, out=out)


def add_product(target: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """target += a @ b of two operands, accumulated in float32 by the product itself."""
    if a.device.type == "cuda" and a.dtype in (torch.float16, torch.bfloat16):
        torch.ops.aten.addmm.dtype_out(target, a, b, torch.float32, out=target)
    else:
        target += product(a, b)


def scaled_operand(values: torch.Tensor, precision: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(operand of values / s, s): s keeps 16-bit operands of any finite magnitude in range, 1 otherwise."""
    one = torch.ones((), dtype=values.dtype, device=values.device)
    if precision != "fp16" or values.numel() == 0:
        return operand(values, precision), one
    scale = values.abs().amax()
    scale = torch.where(scale == 0, one, scale)
    return operand(values / scale, precision), scale


def power_of_two_above(values: torch.Tensor) -> torch.Tensor:
    """Scalar: the power of two not below any magnitude, 1 for zeros. Scaling by it rounds nothing."""
    unit = torch.exp2(values.abs().amax().log2().ceil())
    return torch.where(unit > 0, unit, torch.ones_like(unit))


def weight_operand(weights: torch.Tensor, precision: str) -> tuple[torch.Tensor, float]:
    """(operand of weights * s, s) for gradient weights of magnitude at most 1."""
    if precision != "fp16":
        return operand(weights, precision), 1.0
    return operand(weights * FP16_WEIGHT_SCALE, precision), FP16_WEIGHT_SCALE


class _PlainProducts:
    """Torch's settings of products, as the ops want them while any thread is inside one.

    They belong to the process: of ops that overlap, the first saves them and the last puts them back. Were
    each to put back what it found, one would leave the other's settings behind for good.
    """

    def __init__(self) -> None:
        self._lock, self._inside = threading.RLock(), 0
        self._saved: tuple[list[str], bool] = ([], False)

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._saved = self._read()
            self._inside += 1
            try:
                self._set(["ieee"] * 2, False)  # each time: someone may have changed them since the first
            except BaseException:
                self.__exit__()
                raise

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0:
                self._set(*self._saved)

    @staticmethod
    def _knobs() -> tuple[Any, Any]:
        return torch.backends.cuda.matmul, torch.backends.mkldnn.matmul

    def _read(self) -> tuple[list[str], bool]:
        # A knob that was never set reads as the general setting: it goes back to following that.
        general, found = torch.backends.fp32_precision, [knob.fp32_precision for knob in self._knobs()]
        precisions = ["none" if precision == general else precision for precision in found]
        return precisions, torch.backends.cuda.matmul.allow_fp16_accumulation

    def _set(self, precisions: list[str], fp16_accumulation: bool) -> None:
        torch.backends.cuda.matmul.allow_fp16_accumulation = fp16_accumulation
        for knob, precision in zip(self._knobs(), precisions, strict=True):
            knob.fp32_precision = precision


_plain_products = _PlainProducts()


@contextlib.contextmanager
def computing_on(device: torch.device) -> Iterator[None]:
    """What surrounds every op: launches go to `device`, and products are as asked for.

    Triton and native launches take the current GPU, which need not be that of the tensors. Products follow no
    global setting: no autocast, no TF32, no bf16 in place of fp32, no fp16 accumulation. Torch keeps these
    settings for the process: another thread's products see them too while an op runs, and a change that it
    makes meanwhile is undone.
    """
    with contextlib.ExitStack() as stack:
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        if torch.amp.is_autocast_available(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(_plain_products)
        yield


def rows_within(memory_budget: int, bytes_per_row: int, multiple: int = 1) -> int:
    """How many anchor rows fit in the budget: a multiple of the rows that a backend computes at once.

    Raises:
        MemoryBudgetError: not even that many do.
    """
    bytes_per_block = max(bytes_per_row, 1) * multiple
    blocks = memory_budget // bytes_per_block
    if blocks < 1:
        needs = "one anchor needs" if multiple == 1 else f"a tile of {multiple} anchors needs"
        raise MemoryBudgetError(
            f"memory_budget is {memory_budget} bytes; {needs} {bytes_per_block}: give more"
        )
    return blocks * multiple


def row_chunks(total: int, rows: int) -> Iterator[slice]:
    """Consecutive slices of at most `rows` rows that cover 0..total-1."""
    for start in range(0, total, rows):
        yield slice(start, min(start + rows, total))


def guard(
    values: dict[str, torch.Tensor], anchors: torch.Tensor | None, num_patches: int
) -> torch.Tensor | None:
    """Refuse bad numbers: non-finite values, anchors out of range or repeated.

    On CPUs this raises. Elsewhere the host does not wait for the device: the return value is a scalar to
    multiply losses and gradients by, 1 if all is well and NaN if not, so that a bad input never looks like a
    loss of 0.

    Returns:
        None on CPUs, else a float32 scalar tensor (1 or NaN) on the device of the values.
    """
    device = next(iter(values.values())).device
    if not _host_waits_for(device):
        return _nan_if_bad(values, anchors, num_patches, device)
    for name, tensor in values.items():
        # The extremes show every NaN and infinity, without a mask as large as the tensor.
        if tensor.numel() and not all(torch.isfinite(extreme) for extreme in torch.aminmax(tensor)):
            raise NonFiniteError(
                f"{name} of shape {tuple(tensor.shape)} has non-finite values; look at their origin"
            )
    if anchors is not None and anchors.numel():
        _check_anchors(anchors, num_patches)
    return None


def refuse_on_cpu(values: dict[str, torch.Tensor], anchors: torch.Tensor | None, num_patches: int) -> None:
    """:func:`guard` for ops that find bad numbers on the device by themselves: on CPUs it still raises."""
    if _host_waits_for(next(iter(values.values())).device):
        guard(values, anchors, num_patches)


def _host_waits_for(device: torch.device) -> bool:
    return device.type == "cpu"


def _nan_if_bad(values, anchors, num_patches, device) -> torch.Tensor:
    good = torch.ones((), dtype=torch.bool, device=device)
    for tensor in values.values():
        good = good & torch.isfinite(tensor).all()
    if anchors is not None and anchors.numel():
        ordered = anchors.sort().values
        good = good & (ordered[0] >= 0) & (ordered[-1] < num_patches) & (ordered[1:] != ordered[:-1]).all()
    return torch.where(good, 1.0, float("nan"))


def _check_anchors(anchors: torch.Tensor, num_patches: int) -> None:
    low, high = int(anchors.min()), int(anchors.max())
    if low < 0 or high >= num_patches:
        raise ValueError(f"anchors range from {low} to {high}; valid: 0 to {num_patches - 1}")
    if anchors.unique().numel() != anchors.numel():
        raise ValueError(
            f"{anchors.numel()} anchors, {anchors.unique().numel()} of them different; each may occur once"
        )


def nan_if_any(values: torch.Tensor) -> torch.Tensor:
    """Scalar factor for :func:`poison`: NaN if `values` holds one, else 1; the host does not wait for it."""
    return torch.where(values.isnan().any(), float("nan"), 1.0)


def poison(factor: torch.Tensor | None, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """`tensors` times the factor of :func:`guard`, in place where there is one."""
    if factor is not None:
        for tensor in tensors:
            tensor.mul_(factor.to(tensor.dtype))
    return tensors


def in_range(anchors: torch.Tensor, num_patches: int) -> torch.Tensor:
    """`anchors` clamped into range: :func:`guard` poisons bad ones, which are never read out of bounds."""
    return anchors.clamp(0, max(num_patches - 1, 0))
