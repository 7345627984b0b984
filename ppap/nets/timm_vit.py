"""A network of timm without its head, and tensors put into it, strictly.

What is asked for must be a plain ViT: square patches, one final norm, blocks in a row, and positions that are
added to the patches or rotate queries and keys alike in every block. ``ppap.nets.backbone`` runs it.
"""

import math
from typing import Any

import timm
import torch
from timm.layers import PatchEmbed
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ppap.errors import DataError, NumberError, UsageError
from ppap.nets.architecture import nearest, timm_arguments
from ppap.nets.files import one_line

# The modules of timm that build plain ViTs (among others, refused by class).
_VIT_MODULES = ["vision_transformer", "deit", "eva"]


def architecture(name: str) -> str:
    """A timm name without its pretrained tag."""
    return name.partition(".")[0]


def create_vit(name: str, spec: dict[str, Any], initialise: bool) -> VisionTransformer | Eva:
    """A timm ViT whose only part after the blocks is its final norm in ``norm``; no weights are loaded.

    Args:
        name: of timm, with or without a pretrained tag.
        spec: sizes and details (:mod:`ppap.nets.architecture`); None or missing = the architecture's own.
        initialise: draw initial weights; otherwise parameters are undefined.

    Raises:
        UsageError: unknown or unsuitable architecture, impossible sizes.
    """
    if not timm.is_model(name):
        near = nearest(architecture(name), timm.list_models(["vit_*", "deit_*"]))
        raise UsageError(f"--model.backbone: timm knows no architecture {name!r}{near}")
    if not timm.models.is_model_in_modules(name, _VIT_MODULES):
        raise _not_plain(name)
    arguments = timm_arguments(name, spec)
    if timm.models.is_model_in_modules(name, ["eva"]):
        init = {"dynamic_img_size": True}  # or rotary positions would be fixed to one grid
    else:
        # Truncated normal values, about to be overwritten, would take most of the time of a start. Older timm
        # refuses the word for distilled networks.
        init = {} if initialise or "distilled" in name else {"weight_init": "skip"}
    try:
        vit = timm.create_model(name, pretrained=False, num_classes=0, **arguments, **init)
    except (TypeError, ValueError, AssertionError, RuntimeError, ArithmeticError) as error:
        asked = ", ".join(f"{key}={value}" for key, value in arguments.items()) or "its own sizes"
        raise UsageError(
            f"--model.backbone: timm cannot build {name} with {asked} ({one_line(error)})"
        ) from error
    _check_vit(vit, name)
    if isinstance(vit.norm, nn.Identity):
        # Networks that average their patches keep the final norm behind the average; per patch it is the same
        # norm.
        vit.norm = vit.fc_norm
    vit.fc_norm, vit.attn_pool = nn.Identity(), None
    for module in vit.modules():
        if isinstance(module, nn.LayerNorm) and spec.get("norm_eps") is not None:
            module.eps = spec["norm_eps"]
    return vit


def _not_plain(name: str) -> UsageError:
    return UsageError(
        f"--model.backbone {name} is no plain VisionTransformer of timm; give one, such as "
        "vit_small_patch16_224, vit_small_patch14_dinov2 or vit_small_patch16_dinov3"
    )


def _check_vit(vit: nn.Module, name: str) -> None:
    if not isinstance(vit, VisionTransformer | Eva) or not isinstance(vit.patch_embed, PatchEmbed):
        raise _not_plain(name)
    if getattr(vit, "rope_mixed", False):  # other rotary positions for every block
        raise _not_plain(name)
    embed = vit.patch_embed
    if len({*embed.patch_size}) > 1 or len({*embed.img_size}) > 1 or embed.proj.in_channels != 3:
        raise UsageError(
            f"--model.backbone {name}: only square patches and images with three channels are supported"
        )
    if 0 in embed.grid_size:
        raise UsageError(
            f"--model.image-size {embed.img_size[0]} is smaller than a patch of {embed.patch_size[0]} pixels"
        )


def load_strictly(vit: VisionTransformer | Eva, tensors: dict[str, Tensor], where: str, name: str) -> None:
    """Put every tensor into the network: none may be missing, left over, of another shape or not finite.

    Args:
        vit: of :func:`create_vit`.
        tensors: under timm's names, any float type.
        where: the weights, for messages.
        name: the architecture, for messages.

    Raises:
        DataError: they do not fit; the message counts and names what is wrong.
        NumberError: a value is not finite.
    """
    wanted = vit.state_dict()
    problems = [f"{key} is missing" for key in wanted if key not in tensors]
    for key, value in tensors.items():
        if key not in wanted:
            problems.append(f"{key} is not part of the network")
        elif value.shape != wanted[key].shape:
            problems.append(f"{key} is {tuple(value.shape)}, wanted {tuple(wanted[key].shape)}")
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        fit = sum(key in tensors and tensors[key].shape == value.shape for key, value in wanted.items())
        raise DataError(
            f"--model.weights {where} does not fit {name} ({fit} of its {len(wanted)} tensors do): "
            f"{'; '.join(problems[:3])}{more}. Leave "
            "--model.backbone at auto, or give the architecture (and sizes) that the weights were saved from"
        )
    vit.load_state_dict(tensors, strict=True)
    for key, value in vit.state_dict().items():
        if not math.isfinite(value.sum()) and not torch.isfinite(value).all():
            raise NumberError(f"--model.weights {where}: tensor {key} holds values that are not finite")
