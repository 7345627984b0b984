"""The names that others give to the tensors of a ViT, turned into timm's.

``sections`` finds the backbone in what a file held, ``official`` knows the names of DINOv2's and DINOv3's own
code, ``huggingface`` those of transformers and its ``config.json``, ``pixels`` what a source says of the
normalisation of images. Nothing here opens files of tensors (``ppap.nets.files`` does) or builds networks. A
new layout is one function from tensors to tensors, and one row in ``LAYOUTS``.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from ppap.nets.layouts import huggingface, official

# Classifiers, pooling, decoders and the mask token of masked-image training play no part in patch features.
_NOT_BACKBONE = ("head.", "head_dist.", "attn_pool.", "pre_logits.", "mask_token", "decoder_", "decoder.")


class Layout(NamedTuple):
    """One way to name the tensors of a ViT."""

    recognises: Callable[[dict[str, Tensor]], bool]
    """Whether backbone tensors, without a prefix, are named like this."""
    to_timm: Callable[[dict[str, Tensor], str], tuple[dict[str, Tensor], dict[str, Any]]]
    """The tensors under timm's names, and what the layout says of the architecture beyond their shapes."""


LAYOUTS = (
    Layout(official.is_dinov3, official.dinov3),
    Layout(official.is_dinov2, official.dinov2),
    Layout(huggingface.is_dinov3, huggingface.dinov3),
    Layout(huggingface.is_vit, huggingface.vit),
)


def to_timm(tensors: dict[str, Tensor], where: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Backbone tensors under timm's names: renamed where another layout is recognised, heads dropped.

    Args:
        tensors: of one backbone, without the prefix of a surrounding network.
        where: name of the file, for messages.

    Returns:
        The tensors, and details for the spec that no shape shows (norm_eps).

    Raises:
        DataError: a layout is recognised, and its tensors cannot be what timm computes.
    """
    details: dict[str, Any] = {}
    for layout in LAYOUTS:
        if layout.recognises(tensors):
            tensors, details = layout.to_timm(tensors, where)
            break
    tensors = {key: value for key, value in tensors.items() if not key.startswith(_NOT_BACKBONE)}
    if "norm.weight" not in tensors:
        # Averaging classifiers keep the final norm behind the pooling, under another name.
        tensors = {key.replace("fc_norm.", "norm.", 1): value for key, value in tensors.items()}
    return tensors, details
