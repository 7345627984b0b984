"""Precision of products: its names, the operands it makes of values, and the products themselves.

Shapes: N patches (keys), A anchors (queries), D guidance channels, E embedding channels.
"""

import torch
import torch.nn.functional as F

PRECISIONS = ("auto", "fp32", "fp16", "bf16")
_SIXTEEN_BIT = {"fp16": torch.float16, "bf16": torch.bfloat16}
_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}
# Asked on import: torch 2.11 cannot trace the question.
_WITH_AUTOCAST = frozenset(
    device for device in ("cpu", "cuda", "xpu", "mps", "hpu") if torch.amp.is_autocast_available(device)
)
# Softmax weights are at most 1 and about 1/N in the mean; this power of two centres them in fp16's range.
FP16_WEIGHT_SCALE = 2.0**14


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
        return torch.cat([rows.float() @ right for rows in torch.split(a, 64)], out=out)
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
