"""Bad numbers: refused on CPUs, turned into NaN where the host does not wait for the device."""

import torch


class NonFiniteError(ValueError):
    """An input holds NaN or infinity.

    Attributes:
        everywhere: whether the call was one of several ranks, and all of them raise this.
    """

    everywhere = False


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


def _nan_if_bad(
    values: dict[str, torch.Tensor], anchors: torch.Tensor | None, num_patches: int, device: torch.device
) -> torch.Tensor:
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
    count, different = anchors.numel(), torch.unique(anchors).numel()
    if different != count:
        raise ValueError(f"{count} anchors, {different} of them different; each may occur once")


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
