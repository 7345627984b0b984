"""Which timm architecture a set of tensors, or of facts about them, is; and how timm is asked for it.

A spec is a dict: name, the sizes of :data:`SIZES`, and those of :data:`DETAILS` that are not the
architecture's own. It rebuilds a network without its weights, and is stored with every checkpoint.
"""

import difflib
import math
from typing import Any

import timm
from torch import Tensor

from ppap.errors import UsageError

# Our name of a size -> the argument of timm.create_model that sets it.
SIZES = {
    "patch_size": "patch_size",
    "width": "embed_dim",
    "depth": "depth",
    "heads": "num_heads",
    "image_size": "img_size",
}
DETAILS = {
    "mlp_ratio": float,
    "registers": int,
    "qkv_bias": bool,
    "norm_eps": float,
    "mean": list,
    "std": list,
}
"""What a spec may say beside name and sizes: hidden channels of the MLP per channel, register tokens, whether
q, k, v have a bias, what norms add to the variance, mean and deviation of the images (0..1, RGB)."""
_STEM = "patch_embed.proj.weight"
_FAMILY_WIDTHS = {192: "tiny", 384: "small", 768: "base", 1024: "large"}
_GATED_DINOV3 = {384: "small_plus", 1280: "huge_plus", 4096: "7b"}
_REGISTERS = 4  # of timm's architectures with registers


def nearest(name: str, known: list[str]) -> str:
    """``"; did you mean ..."`` with up to three of ``known``, or an empty string."""
    close = difflib.get_close_matches(name, known, n=3)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def timm_arguments(name: str, spec: dict[str, Any]) -> dict[str, Any]:
    """Arguments of ``timm.create_model`` that give the sizes and details of a spec."""
    arguments = {SIZES[key]: spec[key] for key in SIZES if spec.get(key) is not None}
    registers = "num_reg_tokens" if timm.models.is_model_in_modules(name, ["eva"]) else "reg_tokens"
    theirs = {"mlp_ratio": "mlp_ratio", "registers": registers, "qkv_bias": "qkv_bias"}
    return arguments | {theirs[key]: spec[key] for key in theirs if spec.get(key) is not None}


def complete(facts: dict[str, Any]) -> dict[str, Any]:
    """A spec of what is known of a network.

    Args:
        facts: sizes and details, and instead of the name ``family`` (vit, distilled, dinov2, dinov3),
            ``gated`` (whether the MLP is), ``hidden`` (channels inside it, both halves of a packed gated one;
            may be missing) and ``biased`` (whether q and v of DINOv3 have a bias).

    Returns:
        The sizes and details, with name, and without what is the architecture's own.
    """
    spec = dict(facts)
    family, gated = spec.pop("family"), spec.pop("gated", False)
    hidden, biased = spec.pop("hidden", None), spec.pop("biased", False)
    width, patch, registers = spec["width"], spec["patch_size"], spec.get("registers", 0)
    size, ratio = _FAMILY_WIDTHS.get(width, "small"), 4.0
    if family == "dinov3":
        gated_size = _GATED_DINOV3.get(width, "small_plus")
        # The largest one has no bias, and half the hidden channels.
        gated_size = "huge_plus" if gated_size == "7b" and biased else gated_size
        ratio = 2.0 if gated and gated_size == "7b" else 4.0
        size = gated_size if gated else size
        name, fallback = f"vit_{size}_patch16_dinov3{'_qkvb' if biased else ''}", "vit_small_patch16_dinov3"
        fallback += "_qkvb" if biased else ""
    elif family == "dinov2":
        size, ratio = ("giant", 2.66667 * 2) if gated else (size, ratio)
        reg = "reg4_" if registers else ""
        name, fallback = f"vit_{size}_patch14_{reg}dinov2", f"vit_small_patch14_{reg}dinov2"
    elif family == "distilled":
        name, fallback = f"deit_{size}_distilled_patch16_224", "deit_small_distilled_patch16_224"
    else:
        name, fallback = f"vit_{size}_patch{patch}_224", "vit_small_patch16_224"
    spec["name"] = name if timm.is_model(name) else fallback
    if registers == (_REGISTERS if family == "dinov3" or registers else 0):
        spec.pop("registers", None)
    if hidden is not None and int(width * ratio) != hidden:
        spec["mlp_ratio"] = _ratio(hidden, width)
    return spec


def infer_spec(tensors: dict[str, Tensor], heads: int | None, where: str) -> dict[str, Any]:
    """Architecture of a plain ViT, DINOv2 or DINOv3 from the shapes of its tensors.

    Args:
        tensors: backbone tensors under timm's names.
        heads: number of attention heads; None = width / 64, as in every DINO ViT (width / 128 in the largest
            DINOv3). No shape shows it.
        where: name of the file, for messages.

    Returns:
        All of name, patch_size, width, depth, heads, image_size (DINOv3, whose positions are rotary, has
        none), and details.

    Raises:
        UsageError: the shapes do not tell; the message asks for the flag that does.
    """
    ask = "give --model.backbone"
    blocks = {key.split(".")[1] for key in tensors if key.startswith("blocks.")}
    is_dinov3 = "blocks.0.gamma_1" in tensors and "pos_embed" not in tensors
    wanted = {"cls_token"} if is_dinov3 else {"cls_token", "pos_embed"}
    if not wanted <= tensors.keys() or not blocks:
        raise UsageError(
            f"{where} is no plain ViT with one class token ({len(tensors)} tensors, {len(blocks)} blocks), "
            f"so its architecture must be named, if it is complete: {ask}"
        )
    kernel = tensors[_STEM]
    if kernel.ndim != 4:
        raise UsageError(f"{where}: the patch kernel has the shape {tuple(kernel.shape)}; {ask}")
    width, patch = kernel.shape[0], kernel.shape[2]
    if heads is None and width % 64:
        raise UsageError(f"{where} has width {width}, no multiple of 64; give --model.heads")
    facts = {"patch_size": patch, "width": width, "depth": len(blocks), "heads": heads or width // 64}
    if "reg_token" in tensors:
        facts["registers"] = tensors["reg_token"].shape[1]
    first = next((key for key in ("fc1_g", "fc1") if f"blocks.0.mlp.{key}.weight" in tensors), None)
    if first is not None:
        facts["hidden"] = tensors[f"blocks.0.mlp.{first}.weight"].shape[0]
    if is_dinov3:
        facts["heads"] = heads or width // (128 if width == 4096 else 64)
        facts |= {"family": "dinov3", "gated": first == "fc1_g", "biased": "blocks.0.attn.q_bias" in tensors}
        return complete({"registers": 0, **facts})
    facts["image_size"] = _side(tensors, where, ask) * patch
    if "blocks.0.attn.qkv.weight" in tensors and "blocks.0.attn.qkv.bias" not in tensors:
        facts["qkv_bias"] = False
    if "dist_token" in tensors:
        return complete({**facts, "family": "distilled"})
    out = tensors.get("blocks.0.mlp.fc2.weight")
    packed = out is not None and out.ndim == 2 and facts.get("hidden") == 2 * out.shape[1]
    is_dinov2 = "blocks.0.ls1.gamma" in tensors or "reg_token" in tensors
    return complete({**facts, "family": "dinov2" if is_dinov2 else "vit", "gated": packed})


def _side(tensors: dict[str, Tensor], where: str, ask: str) -> int:
    """Rows, and columns, of the position embedding."""
    position = tensors["pos_embed"]
    if position.ndim != 3:
        raise UsageError(f"{where}: the position embedding has the shape {tuple(position.shape)}; {ask}")
    # Beside register tokens, timm stores the position embedding of the patches alone.
    prefix = 0 if "reg_token" in tensors else 1 + ("dist_token" in tensors)
    patches = position.shape[1] - prefix
    side = math.isqrt(max(patches, 0))
    if side * side != patches or side == 0:
        raise UsageError(
            f"{where} has position embeddings for {patches} patches, which is no square grid; {ask}"
        )
    return side


def _ratio(hidden: int, width: int) -> float:
    """A ratio of which timm's ``int(width * ratio)`` makes ``hidden``, whatever the rounding."""
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)
