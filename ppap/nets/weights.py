"""Where a backbone's weights come from: files, directories and downloads, all read as flat dicts of tensors.

Nothing here computes features; ``ppap.nets.backbone`` builds the network that the tensors go into. What
``--model.weights`` may be, besides the word ``random``:

- a ``.pth`` file (or any other file of ``torch.save``): a flat state dict, or a full DINO checkpoint, of
  which the teacher's backbone is taken; read with ``weights_only=True``;
- a ``.safetensors`` file;
- a directory with ``model.safetensors`` (or ``pytorch_model.bin``, ``pytorch_model.pth``, ``model.pth``) and,
  if the architecture is not to be inferred from the tensors, ``config.json`` with either ``{"backbone":
  {"name", "patch_size", "width", "depth", "heads", "image_size"}}`` (ours, and that of our checkpoints) or
  ``{"architecture": ...}`` (timm's);
- the word ``embedded``: the small ViT that comes with the package, pretrained on generated scenes;
- a timm pretrained name, such as ``vit_small_patch16_224.dino``.

Keys may carry the prefix of a surrounding network, such as ``module.backbone.``; heads are left out.
"""

import argparse
import difflib
import json
import logging
import math
import pickle
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import timm
import torch
from torch import Tensor

from ppap.errors import DataError, UsageError
from ppap.nets import hub
from ppap.runs.checkpoint import standing

EMBEDDED = Path(__file__).parent.parent / "assets" / "scenes-vit"
"""Folder of the weights that come with the package."""
RANDOM_ORIGIN = "random weights; results are meaningless"

# Our name of a size -> the argument of timm.create_model that sets it.
SIZES = {
    "patch_size": "patch_size",
    "width": "embed_dim",
    "depth": "depth",
    "heads": "num_heads",
    "image_size": "img_size",
}
_STEM = "patch_embed.proj.weight"
_FILES = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")
_FILE_SUFFIXES = {".pth", ".pt", ".bin", ".ckpt", ".tar", ".safetensors", ".npz"}
# Classifiers, pooling and the mask token of masked-image training play no part in patch features.
_NOT_BACKBONE = ("head.", "head_dist.", "attn_pool.", "pre_logits.", "mask_token")
# Arguments of timm's saved models that change nothing about the tokens.
_HARMLESS = {"num_classes", "global_pool", "dynamic_img_size", "dynamic_img_pad", "pretrained_strict"}
_FAMILY_WIDTHS = {192: "tiny", 384: "small", 768: "base", 1024: "large"}


class Source(NamedTuple):
    """One place that weights come from."""

    spec: dict[str, Any]
    """What the source says of the architecture: part of name, patch_size, width, depth, heads, image_size."""
    tensors: dict[str, Tensor] | None
    """Backbone tensors under timm's names, or None if they are still to be downloaded."""
    origin: str
    """One line for people: where the weights came from."""


def open_source(weights: str) -> Source:
    """Find out what ``weights`` names, and read it unless it must be downloaded.

    Args:
        weights: a file, a directory, the word embedded or a timm pretrained name; the module's docstring
            lists the forms. A path that exists wins over a timm name, the
            word embedded over both.

    Raises:
        DataError: a missing, damaged or refused file, or a file without backbone tensors.
        UsageError: neither a path nor a timm pretrained name.
    """
    if weights == "embedded":
        found = _open_directory(EMBEDDED)
        return found._replace(origin="embedded weights" + found.origin.removeprefix(f"directory {EMBEDDED}"))
    path = standing(Path(weights).expanduser())  # a pretraining run replaces its RUN/backbone
    if path.is_dir():
        return _open_directory(path)
    if path.is_file():
        return Source({}, read_tensors(path), f"file {path}")
    if timm.models.is_model_pretrained(weights):
        return Source({"name": weights}, None, f"timm pretrained {weights}")
    if len(path.parts) > 1 or path.suffix.lower() in _FILE_SUFFIXES:
        # Where ppap pretrain puts what it makes: RUN/backbone.
        command = f"python -m ppap.pretrain folder --data.root DIR --train.out {path.parent}"
        how = f"make it of your images first: {command}; or " if path.name == "backbone" else ""
        raise DataError(
            f"--model.weights: {path} does not exist; {how}give a .pth or .safetensors file, or a directory"
        )
    known = ["random", "embedded", *timm.list_pretrained(["vit_*", "deit_*"])]
    raise UsageError(
        f"--model.weights {weights!r} is neither a file or directory nor a pretrained model of timm"
        f"{nearest(weights, known)}"
    )


def nearest(name: str, known: list[str]) -> str:
    """``"; did you mean ..."`` with up to three of ``known``, or an empty string."""
    close = difflib.get_close_matches(name, known, n=3)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def one_line(error: BaseException, limit: int = 300) -> str:
    """Kind and text of an error on one line of at most about ``limit`` characters."""
    text = " ".join(str(error).split())
    text = text if len(text) <= limit else text[:limit] + "..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def download(name: str, arguments: dict[str, Any]) -> dict[str, Tensor]:
    """Weights of a timm pretrained model, from the network or the hub's cache.

    Without a network, and with ``--offline``, the cache alone serves.

    Args:
        name: timm pretrained name.
        arguments: sizes for ``timm.create_model``; timm resamples the position embedding and the patch kernel
            to them.

    Raises:
        DataError: no network, offline, the download failed, or the weights cannot take these sizes.
    """
    cached = hub.cached_file(name)
    reason = "--offline, or HF_HUB_OFFLINE, forbids downloads" if hub.offline() else hub.unreachable(name)
    if reason is not None and cached is None:
        raise _not_to_be_had(name, f"{reason}, and the hub's cache {hub.constants.HF_HUB_CACHE} lacks them")
    if reason is not None:
        print(f"weights: {name} from the hub's cache: {reason}", flush=True)
        # The hub's client would ask for a newer version first.
        arguments = {**arguments, "pretrained_cfg_overlay": {"file": str(cached), "custom_load": False}}
    else:
        print(f"weights: getting {name} through timm (a network is needed the first time)", flush=True)
    # The hub reports every retry of every file; one error at the end says enough.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    logging.getLogger("timm").setLevel(logging.ERROR)
    try:
        # With its own classifier timm loads strictly; with num_classes=0 it would let missing tensors pass.
        model = timm.create_model(name, pretrained=True, **arguments)
    except Exception as error:  # network, hub, cache and shape errors share no base class
        raise _not_to_be_had(name, one_line(error)) from error
    return backbone_tensors(model.state_dict(), name)


def _not_to_be_had(name: str, reason: str) -> DataError:
    return DataError(
        f"cannot get the weights {name} through timm ({reason}); with no network, copy the file "
        "here and give its path: --model.weights FILE.pth (or .safetensors, or a directory), or take the "
        "small ViT of this package: --model.weights embedded. Only to try "
        "the program: --model.backbone vit_small_patch16_224 --model.weights random"
    )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Backbone tensors of one file, on the CPU, in the file's dtypes.

    Raises:
        DataError: the file cannot be read, is refused, or holds no tensors of a backbone.
    """
    try:
        if path.suffix.lower() == ".safetensors":
            content = safetensors.torch.load_file(path)
        else:
            # DINO's full checkpoints hold their command line as a Namespace: plain data, allowed for this
            # read alone.
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{path} is damaged, or holds Python objects other than tensors and is refused for safety "
            f"({one_line(error)}); save the network's state dict alone with torch.save"
        ) from error
    except Exception as error:  # a damaged file can fail anywhere in the reader
        raise DataError(
            f"cannot read weights from {path} ({one_line(error)}); is the file complete?"
        ) from error
    return backbone_tensors(content, str(path))


def backbone_tensors(content: Any, where: str) -> dict[str, Tensor]:
    """The tensors of a ViT under timm's names: sections opened, prefixes stripped, heads dropped.

    Args:
        content: what a file held; a dict of tensors, or of sections of which teacher, state_dict or model is
            taken.
        where: name of the file, for messages.

    Raises:
        DataError: no tensors of a backbone in there.
    """
    if not isinstance(content, dict):
        raise DataError(f"{where} holds a {type(content).__name__}, not a state dict")
    for section in ("teacher", "state_dict", "model"):
        if isinstance(content.get(section), dict):
            content = content[section]
            break
    tensors = {
        key: value for key, value in content.items() if isinstance(key, str) and isinstance(value, Tensor)
    }
    stems = [key.removesuffix(_STEM) for key in tensors if key == _STEM or key.endswith(f".{_STEM}")]
    if len(stems) != 1:
        found = ", ".join([str(key) for key in content][:4]) or "nothing"
        raise DataError(f"{where} holds {len(stems)} ViT backbones ({_STEM}), wanted one; found {found}, ...")
    # Whatever stands around the backbone (module., backbone., vit., ...) shows before its first tensor.
    tensors = {
        key.removeprefix(stems[0]): value for key, value in tensors.items() if key.startswith(stems[0])
    }
    tensors = {key: value for key, value in tensors.items() if not key.startswith(_NOT_BACKBONE)}
    if "norm.weight" not in tensors:
        # Averaging classifiers keep the final norm behind the pooling, under another name.
        tensors = {key.replace("fc_norm.", "norm.", 1): value for key, value in tensors.items()}
    return tensors


def infer_spec(tensors: dict[str, Tensor], heads: int | None, where: str) -> dict[str, Any]:
    """Architecture of a plain DINO or DINOv2 ViT from the shapes of its tensors.

    Args:
        tensors: backbone tensors under timm's names.
        heads: number of attention heads; None = width / 64, as in every DINO ViT. No shape shows it.
        where: name of the file, for messages.

    Returns:
        All of name, patch_size, width, depth, heads, image_size.

    Raises:
        UsageError: the shapes do not tell; the message asks for the flag that does.
    """
    ask = "give --model.backbone"
    blocks = {key.split(".")[1] for key in tensors if key.startswith("blocks.")}
    if not {"cls_token", "pos_embed"} <= tensors.keys() or "dist_token" in tensors or not blocks:
        raise UsageError(
            f"{where} is no plain ViT with one class token, so its architecture must be named: {ask}"
        )
    kernel, position = tensors[_STEM], tensors["pos_embed"]
    if kernel.ndim != 4 or position.ndim != 3:
        shapes = f"{tuple(kernel.shape)} and {tuple(position.shape)}"
        raise UsageError(f"{where}: patch kernel and position embedding have the shapes {shapes}; {ask}")
    width, patch = kernel.shape[0], kernel.shape[2]
    has_registers = "reg_token" in tensors
    # Beside register tokens, timm stores the position embedding of the patches alone.
    patches = position.shape[1] - (0 if has_registers else 1)
    side = math.isqrt(max(patches, 0))
    if side * side != patches or side == 0:
        raise UsageError(
            f"{where} has position embeddings for {patches} patches, which is no square grid; {ask}"
        )
    if heads is None and width % 64:
        raise UsageError(f"{where} has width {width}, no multiple of 64; give --model.heads")
    family = _FAMILY_WIDTHS.get(width, "small")
    if "blocks.0.ls1.gamma" in tensors or has_registers:
        name = f"vit_{family}_patch14_{'reg4_' if has_registers else ''}dinov2"
        name = name if timm.is_model(name) else name.replace(family, "small", 1)
    else:
        name = f"vit_{family}_patch{patch}_224"
        name = name if timm.is_model(name) else "vit_small_patch16_224"
    sizes = {"patch_size": patch, "width": width, "depth": len(blocks), "heads": heads or width // 64}
    return {"name": name, **sizes, "image_size": side * patch}


def _open_directory(path: Path) -> Source:
    spec, origin = {}, f"directory {path}"
    config_file = path / "config.json"
    if config_file.is_file():
        config = _read_json(config_file)
        spec = _directory_spec(config, config_file)
        if isinstance(config.get("origin"), str):
            origin = f"{origin} ({config['origin']})"
    for name in _FILES:
        if (path / name).is_file():
            return Source(spec, read_tensors(path / name), origin)
    raise DataError(
        f"--model.weights: the directory {path} has no weights; wanted one of {', '.join(_FILES)}"
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path} ({one_line(error)})") from error
    if not isinstance(config, dict):
        raise DataError(f"{path} holds a {type(config).__name__}; wanted an object")
    return config


def _directory_spec(config: dict[str, Any], path: Path) -> dict[str, Any]:
    if isinstance(config.get("backbone"), dict):
        spec = {key: config["backbone"].get(key) for key in ("name", *SIZES)}
    elif isinstance(config.get("architecture"), str):
        spec = {"name": config["architecture"], **_timm_sizes(config, path)}
    else:
        raise DataError(
            f'{path} does not name the architecture; wanted {{"backbone": {{"name": ...}}}} or "architecture"'
        )
    if not isinstance(spec["name"], str):
        raise DataError(f"{path}: the backbone's name is {spec['name']!r}; wanted a timm architecture")
    for key in SIZES:
        value = spec.get(key)
        if value is not None and (type(value) is not int or value < 1):
            raise DataError(f"{path}: the backbone's {key} is {value!r}; wanted a positive whole number")
    return {key: value for key, value in spec.items() if value is not None}


def _timm_sizes(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """Sizes out of timm's config.json; arguments that we could not store again are refused."""
    arguments = config.get("model_args") or {}
    other = sorted(set(arguments) - set(SIZES.values()) - _HARMLESS)
    if other:
        raise DataError(
            f"{path}: model_args {', '.join(other)} are not supported; give the weights file instead"
        )
    sizes = {ours: _side(arguments.get(theirs)) for ours, theirs in SIZES.items()}
    pretrained = config.get("pretrained_cfg") or config
    if sizes["image_size"] is None and pretrained.get("fixed_input_size"):
        sizes["image_size"] = _side((pretrained.get("input_size") or (None,))[-1])
    return sizes


def _side(value: Any) -> Any:
    """timm stores a square size as one number or as two equal ones."""
    return value[0] if isinstance(value, list | tuple) and len(value) == 2 and value[0] == value[1] else value
