"""Cross-entropy of pixels from scores of patches, what the linear probe learns by, in the native CPU library
(``csrc/cpu/pixel_cross_entropy.inc``). Other devices and float64 use torch, see ``ppap.nets.pixel_loss``.

Legend: B images, C classes, h w patch grid, H W pixels.
"""

import torch
from torch import Tensor

from . import native
from .dispatch import asked_for

_Arguments = native.structure(
    "logits target first_row row_weights columns loss grad",
    "images classes height width pixel_rows pixel_columns",
)


def runs_natively(logits: Tensor) -> bool:
    """Whether :func:`native_cross_entropy` takes these scores, and neither PPAP_BACKEND nor ``use_backend``
    asks for another backend."""
    fits = logits.device.type == "cpu" and logits.dtype == torch.float32 and logits.shape[1] > 0
    return fits and asked_for("cpp") and native.reason() is None


def native_cross_entropy(
    logits: Tensor, target: Tensor, rows: Tensor, columns: Tensor, gradient: bool
) -> tuple[Tensor, Tensor | None]:
    """Sum over labelled pixels of the cross-entropy of linearly resized scores, and its gradient.

    Args:
        logits: (B, C, h, w) float32, on the CPU.
        target: (B, H, W) int64 classes below C; negative = left out.
        rows, columns: (H, h) and (W, w) float32 weights of linear resizing: of a row of them two neighbours
            at most are not 0, and the first of these never moves back.
        gradient: whether it is wanted.

    Returns:
        float32 scalar and (B, C, h, w), or None.

    Raises:
        IndexError: a class that there is not.
    """
    images, classes, height, width = logits.shape
    if target.dtype != torch.int64 or target.shape != (images, len(rows), len(columns)):
        raise ValueError(f"target is {target.dtype} of shape {tuple(target.shape)}")
    if target.numel() and (largest := int(target.max())) >= classes:
        raise IndexError(f"target has class {largest}, scores have {classes} classes")
    first = (rows != 0).int().argmax(dim=1)
    after = (first + 1).clamp(max=height - 1)[:, None]
    beyond = (first + 1 >= height)[:, None]
    weights = torch.cat([rows.gather(1, first[:, None]), rows.gather(1, after).masked_fill(beyond, 0)], dim=1)
    loss = torch.empty(images, dtype=torch.float64)
    grad = torch.empty(logits.shape) if gradient else None
    native.run(
        "pixel_cross_entropy",
        _Arguments,
        logits=logits.contiguous(),
        target=target.contiguous(),
        first_row=first,
        row_weights=weights,
        columns=columns.contiguous(),
        loss=loss,
        grad=grad,
        images=images,
        classes=classes,
        height=height,
        width=width,
        pixel_rows=len(rows),
        pixel_columns=len(columns),
    )
    return loss.sum().float(), grad
