"""Tensors and ``config.json`` of Hugging Face's transformers, as timm has them.

Source: ``models/{vit,deit,dinov2,dinov2_with_registers,dinov3_vit}/modeling_*.py`` of transformers and the
configurations beside them. Queries, keys and values are three layers there and one here.
"""

import math
import re
from typing import Any

import torch
from torch import Tensor

from ppap.errors import DataError
from ppap.nets.layouts.official import ROPE_BASE, fold_class_position, query_value_biases, rename

MODEL_TYPES = ("dinov2", "dinov2_with_registers", "dinov3_vit", "vit", "deit", "vit_mae", "vit_msn")
"""Values of ``model_type`` that are read; others are refused by name."""
VIT_EPS = 1e-12
"""What transformers adds to the variance in ViT and DeiT, unless a config says otherwise."""
_EPS = {"dinov3_vit": 1e-5, "dinov2": 1e-6, "dinov2_with_registers": 1e-6, "vit_msn": 1e-6}
_BLOCK = r"^(?:model\.)?(?:encoder\.)?layers?\.(\d+)\."
_NAMES = (
    (_BLOCK, r"blocks.\1."),
    (r"^embeddings\.patch_embeddings\.(?:projection\.)?", "patch_embed.proj."),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.distillation_token$", "dist_token"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.", ""),
    (r"^layernorm\.", "norm."),
    (r"\.layernorm_before\.", ".norm1."),
    (r"\.layernorm_after\.", ".norm2."),
    (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
    (r"\.attention\.([qkvo])_proj\.", r".attn.\1."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"^(blocks\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
    (r"\.mlp\.weights_in\.", ".mlp.fc1."),
    (r"\.mlp\.weights_out\.", ".mlp.fc2."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.attn\.o\.", ".attn.proj."),
    (r"\.attn\.(q|query)\.", ".attn.0."),
    (r"\.attn\.(k|key)\.", ".attn.1."),
    (r"\.attn\.(v|value)\.", ".attn.2."),
)
_DINOV3_NAMES = (
    (r"\.ls([12])\.gamma$", r".gamma_\1"),
    (r"\.mlp\.gate_proj\.", ".mlp.fc1_g."),
    (r"\.mlp\.down_proj\.", ".mlp.fc2."),
)
_POOLERS = ("pooler.", "classifier.", "cls_classifier.", "distillation_classifier.")


def is_vit(tensors: dict[str, Tensor]) -> bool:
    """Patch kernel of ViT, DeiT and DINOv2 under the names of transformers."""
    return "embeddings.patch_embeddings.projection.weight" in tensors


def vit(tensors: dict[str, Tensor], where: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """ViT, DeiT, MAE, MSN, DINOv2 with or without registers; see :class:`ppap.nets.layouts.Layout`."""
    renamed = _fused(_renamed(tensors, _NAMES))
    is_dino = any(key.endswith(".ls1.gamma") for key in renamed)
    if "reg_token" in renamed:
        fold_class_position(renamed)
    return renamed, {} if is_dino else {"norm_eps": VIT_EPS}


def is_dinov3(tensors: dict[str, Tensor]) -> bool:
    """Patch kernel of DINOv3 under the names of transformers."""
    return "embeddings.patch_embeddings.weight" in tensors


def dinov3(tensors: dict[str, Tensor], where: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """DINOv3, gated or not; see :class:`ppap.nets.layouts.Layout`.

    Raises:
        DataError: keys with a bias.
    """
    gated = any(".mlp.gate_proj." in key for key in tensors)
    up = ((r"\.mlp\.up_proj\.", ".mlp.fc1_x." if gated else ".mlp.fc1."),)
    renamed = {}
    for key, value in _fused(_renamed(tensors, _NAMES + _DINOV3_NAMES + up)).items():
        if key.endswith(".attn.qkv.bias"):
            renamed |= query_value_biases(key, value, where)
        elif value.numel():  # without registers there is a tensor of none
            renamed[key] = value
    return renamed, {}


def _renamed(tensors: dict[str, Tensor], names: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    return {rename(key, names): value for key, value in tensors.items() if not key.startswith(_POOLERS)}


def _fused(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Queries, keys and values (``attn.0``, ``attn.1``, ``attn.2``) in one layer, rows one after another.

    A bias that one of them lacks is zero. A weight that is missing stays so: the parts keep their names, and
    whoever loads them finds them at fault.
    """
    fused = {}
    for key, value in tensors.items():
        part = re.match(r"(.*\.attn)\.([012])\.(weight|bias)$", key)
        if part is None:
            fused[key] = value
            continue
        block, _, kind = part.groups()
        parts = [tensors.get(f"{block}.{i}.{kind}") for i in range(3)]
        if kind == "bias":
            parts = [torch.zeros_like(value) if bias is None else bias for bias in parts]
        if any(p is None or p.shape[1:] != value.shape[1:] for p in parts):
            fused[key] = value
        else:
            fused.setdefault(f"{block}.qkv.{kind}", torch.cat(parts))
    return fused


def config_spec(config: dict[str, Any], where: str) -> dict[str, Any]:
    """The architecture that a ``config.json`` of transformers describes: timm's name, sizes and details.

    Args:
        config: its content.
        where: its name, for messages.

    Returns:
        name, patch_size, width, depth, heads, image_size, norm_eps, and where they are not the architecture's
        own mlp_ratio, registers, qkv_bias.

    Raises:
        DataError: a model_type or a setting that is not supported, or one that is missing.
    """
    kind = config.get("model_type")
    if kind not in MODEL_TYPES:
        raise DataError(
            f"{where}: model_type {kind!r} is not supported; "
            f"give a plain ViT: {', '.join(MODEL_TYPES)}, or a model of timm"
        )
    read = _Reader(config, where)
    gated = bool(config.get("use_gated_mlp" if kind == "dinov3_vit" else "use_swiglu_ffn", False))
    read.want("num_channels", (3,), 3)
    read.want(
        "hidden_act", ("silu",) if gated and kind == "dinov3_vit" else ("gelu", "silu")[: 1 + gated], "gelu"
    )
    spec = {
        "patch_size": read.size("patch_size", 16),
        "width": read.size("hidden_size"),
        "depth": read.size("num_hidden_layers"),
        "heads": read.size("num_attention_heads"),
        "image_size": read.size("image_size", 224),
        "norm_eps": read.number("layer_norm_eps", _EPS.get(kind, VIT_EPS)),
    }
    if kind == "dinov3_vit":
        return {**spec, **_dinov3_details(read, spec["width"], gated)}
    hidden = config.get("intermediate_size")
    if kind.startswith("dinov2"):
        hidden = int(spec["width"] * read.number("mlp_ratio", 4))
        if gated:  # packed: both halves in one layer
            hidden = 2 * ((int(hidden * 2 / 3) + 7) // 8 * 8)
    details = {} if config.get("qkv_bias", True) else {"qkv_bias": False}
    if kind == "dinov2_with_registers":
        details["registers"] = read.size("num_register_tokens", 4)
    from_hidden = {} if hidden is None else {"hidden": hidden}
    family = {"deit": "distilled"}.get(kind, "dinov2" if kind.startswith("dinov2") else "vit")
    return {**spec, **details, **from_hidden, "family": family, "gated": gated}


def _dinov3_details(read: "_Reader", width: int, gated: bool) -> dict[str, Any]:
    for name, wanted in (("key_bias", False), ("proj_bias", True), ("mlp_bias", True)):
        read.want(name, (wanted,), wanted)
    rope = read.config.get("rope_parameters") or {}
    base = rope.get("rope_theta", read.config.get("rope_theta", ROPE_BASE))
    if base != ROPE_BASE:
        raise DataError(f"{read.where}: rope_theta {base!r} is not supported; DINOv3 has {ROPE_BASE:g}")
    biased = bool(read.config.get("query_bias", True) or read.config.get("value_bias", True))
    hidden = read.size("intermediate_size")
    registers = read.config.get("num_register_tokens", 0)
    return {"family": "dinov3", "gated": gated, "hidden": hidden, "registers": registers, "biased": biased}


class _Reader:
    """Values of a config, checked; an error names the file, the key, the value and what is wanted."""

    def __init__(self, config: dict[str, Any], where: str) -> None:
        self.config, self.where = config, where

    def size(self, key: str, default: int | None = None) -> int:
        value = self.config.get(key, default)
        if isinstance(value, list | tuple) and len({*value}) == 1:
            value = value[0]  # height and width
        if type(value) is not int or value < 1:
            raise DataError(f"{self.where}: {key} is {value!r}; wanted a positive whole number")
        return value

    def number(self, key: str, default: float) -> float:
        value = self.config.get(key, default)
        if type(value) not in (int, float) or not (math.isfinite(value) and value > 0):
            raise DataError(f"{self.where}: {key} is {value!r}; wanted a positive number")
        return float(value)

    def want(self, key: str, wanted: tuple[Any, ...], default: Any) -> None:
        value = self.config.get(key, default)
        if value not in wanted:
            names = " or ".join(repr(name) for name in wanted)
            raise DataError(f"{self.where}: {key} {value!r} is not supported; wanted {names}")
