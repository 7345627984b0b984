"""Cross-entropy of pixels whose class scores are those of patches, resized bilinearly.

Resizing is two small products, one per side, whose gradient is two more; torch's own resizing adds up the
gradient of every pixel atomically on GPUs, which took 61 % of the GPU's time of a training step (NVIDIA
H200, 32 images of 224 pixels, 21 classes). On CPUs the resized scores of a batch, C values for every pixel,
are not kept either: pixels are resized, turned into their gradient where they lie, and added up to their
patches again, in the cache, by the native library a few at a time, by torch (float64, or without the
library) an image at a time. Half of a training step on a CPU went into passing over them.

Legend: B images, C classes, h w patch grid, H W pixels.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ppap.kernels.pixel_cross_entropy import native_cross_entropy, runs_natively


def pixel_cross_entropy(
    logits: Tensor, target: Tensor, patch_size: int | None = None, *, blocked: bool | None = None
) -> Tensor:
    """Sum over labelled pixels of the cross-entropy of bilinearly resized class scores.

    Args:
        logits: (B, C, h, w) float32 or float64 scores of patches.
        target: (B, H, W) int64 classes below C; negative = left out, though scores there must be finite.
        patch_size: side p of a patch [pixels]: scores are resized to (h p, w p) and cut to (H, W). None = to
            (H, W) at once.
        blocked: with the gradient formed at once; its backward pass has no backward pass of its own. None =
            on CPUs.

    Returns:
        Scalar of the logits' type, differentiable in them.

    Raises:
        TypeError: targets of another type.
        ValueError: another number of images.
    """
    if target.dtype != torch.int64:
        raise TypeError(f"target is {target.dtype}; give torch.int64")
    if len(target) != len(logits):
        raise ValueError(f"target has {len(target)} images, logits have {len(logits)}")
    size = (target.shape[1], target.shape[2])
    full = size if patch_size is None else (logits.shape[2] * patch_size, logits.shape[3] * patch_size)
    rows, columns = (
        interpolation(patches, pixels, logits)[:kept]
        for patches, pixels, kept in zip(logits.shape[2:], full, size, strict=True)
    )
    if blocked if blocked is not None else logits.device.type == "cpu":
        return _Blocked.apply(logits, target, rows, columns)
    resized = rows @ (logits @ columns.T)
    return F.cross_entropy(resized, target.clamp(min=-1), ignore_index=-1, reduction="sum")


def interpolation(patches: int, pixels: int, like: Tensor) -> Tensor:
    """Weights (pixels, patches) of linear resizing along one side (align_corners=False)."""
    eye = torch.eye(patches, dtype=like.dtype, device=like.device)
    return F.interpolate(eye[None], size=pixels, mode="linear", align_corners=False)[0].T.contiguous()


def by_image(
    logits: Tensor, target: Tensor, rows: Tensor, columns: Tensor, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """As ``ppap.kernels.pixel_cross_entropy.native_cross_entropy``, of any float type and any weights."""
    total, grad = logits.new_zeros(()), torch.empty_like(logits) if gradient else None
    for i in range(len(logits)):
        scores = rows @ (logits[i] @ columns.T)  # (C, H, W)
        known = target[i] >= 0
        own = target[i].clamp(min=0)[None]
        scores -= scores.amax(dim=0)
        of_target = scores.gather(0, own)[0]
        weights = scores.exp_()
        sums = weights.sum(dim=0)
        total += torch.where(known, sums.log() - of_target, 0.0).sum()
        if grad is not None:
            weights *= torch.where(known, sums.reciprocal(), 0.0)
            weights.scatter_add_(0, own, -known[None].to(weights.dtype))
            grad[i] = (rows.T @ weights) @ columns
    return total, grad


class _Blocked(torch.autograd.Function):
    """The sum, and its gradient for the patches formed on the way."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        form = native_cross_entropy if runs_natively(logits) else by_image
        total, grad = form(logits, target, rows, columns, ctx.needs_input_grad[0])
        if grad is not None:
            ctx.save_for_backward(grad)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad * upstream, None, None, None
