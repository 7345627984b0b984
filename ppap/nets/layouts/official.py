"""DINOv2's and DINOv3's own files (facebookresearch) under timm's names.

DINO's own files have timm's names already. Sources: ``dinov2/models/vision_transformer.py`` and
``dinov3/models/vision_transformer.py`` of the two repositories, and timm's ``checkpoint_filter_fn``.
"""

import re
from typing import Any

import torch
from torch import Tensor

from ppap.errors import DataError

# Base of the rotary periods of every published DINOv3; timm's architectures have it fixed.
ROPE_BASE = 100.0
# Published files hold the periods rounded to bfloat16: 2^-9 relative.
_PERIOD_ERROR = 0.01
_DINOV2_NAMES = (
    (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),  # blocks in chunks, as training saves them
    (r"\.mlp\.w12\.", ".mlp.fc1."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
)
_DINOV3_NAMES = (
    (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),
    (r"\.ls([12])\.gamma$", r".gamma_\1"),
    (r"^storage_tokens$", "reg_token"),
    (r"\.mlp\.w1\.", ".mlp.fc1_g."),
    (r"\.mlp\.w2\.", ".mlp.fc1_x."),
    (r"\.mlp\.w3\.", ".mlp.fc2."),
)
# Norms of crops that only training has, and what is computed anew.
_DINOV3_DROPPED = ("local_cls_norm.", "cls_norm.", "rope_embed.", "mask_token")


def is_dinov2(tensors: dict[str, Tensor]) -> bool:
    """Registers, packed gated MLPs, or blocks in chunks, under DINOv2's names."""
    return "register_tokens" in tensors or any(
        re.match(r"blocks\.\d+\.(\d+\.norm1|mlp\.w12)\.", key) for key in tensors
    )


def dinov2(tensors: dict[str, Tensor], where: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """DINOv2 with or without registers, gated or not; see :class:`ppap.nets.layouts.Layout`."""
    renamed = {rename(key, _DINOV2_NAMES): value for key, value in tensors.items()}
    if "register_tokens" in renamed:
        renamed["reg_token"] = renamed.pop("register_tokens")
        fold_class_position(renamed)
    return renamed, {}


def is_dinov3(tensors: dict[str, Tensor]) -> bool:
    """Register tokens or rotary periods under DINOv3's names."""
    return "storage_tokens" in tensors or "rope_embed.periods" in tensors


def dinov3(tensors: dict[str, Tensor], where: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """DINOv3, gated or not; see :class:`ppap.nets.layouts.Layout`.

    Raises:
        DataError: rotary periods other than the published ones, or keys with a bias.
    """
    _check_periods(tensors.get("rope_embed.periods"), where)
    renamed = {}
    for key, value in tensors.items():
        if key.startswith(_DINOV3_DROPPED) or key.endswith(".bias_mask"):
            continue
        if key.endswith(".attn.qkv.bias"):
            # The mask, where there is one, is 1 for queries and values and 0 for keys.
            mask = tensors.get(f"{key}_mask")
            value = value if mask is None else torch.where(mask == 0, 0, value)
            renamed |= query_value_biases(rename(key, _DINOV3_NAMES), value, where)
        else:
            renamed[rename(key, _DINOV3_NAMES)] = value
    return renamed, {}


def rename(key: str, names: tuple[tuple[str, str], ...]) -> str:
    """A key after every substitution of a table of regular expressions."""
    for old, new in names:
        key = re.sub(old, new, key)
    return key


def fold_class_position(tensors: dict[str, Tensor]) -> None:
    """Add the class token's position entry to the token itself, in place.

    Beside registers, which get no position, timm embeds the patches alone.
    """
    if {"pos_embed", "cls_token"} <= tensors.keys() and tensors["pos_embed"].ndim == 3:
        tensors["cls_token"] = tensors["cls_token"] + tensors["pos_embed"][:, :1]
        tensors["pos_embed"] = tensors["pos_embed"][:, 1:]


def query_value_biases(key: str, bias: Tensor, where: str) -> dict[str, Tensor]:
    """The bias of fused q, k, v as timm's Eva has it: one of the queries, one of the values.

    Raises:
        DataError: the keys have a bias, which that class has not.
    """
    query, keys, value = bias.chunk(3)
    if keys.any():
        raise DataError(f"{where}: {key} has a bias for the keys, which timm's DINOv3 has not; not supported")
    return {key.replace("qkv.bias", "q_bias"): query, key.replace("qkv.bias", "v_bias"): value}


def _check_periods(periods: Tensor | None, where: str) -> None:
    if periods is None or not periods.numel():
        return
    exponents = torch.arange(len(periods), dtype=torch.float32) / len(periods)
    known = ROPE_BASE**exponents
    if not ((periods.float() / known - 1).abs() < _PERIOD_ERROR).all():
        raise DataError(
            f"{where}: rope_embed.periods are not those of a base of {ROPE_BASE:g}, from "
            f"{known[0]:.3g} to {known[-1]:.3g}; a DINOv3 with others is not supported"
        )
