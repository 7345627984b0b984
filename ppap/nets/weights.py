"""Where a backbone's weights come from: files, directories and downloads, all read as flat dicts of tensors.

Nothing here computes features; ``ppap.nets.backbone`` builds the network that the tensors go into. What
``--model.weights`` may be, besides the word ``random`` (docs/backbones.md has the families):

- a ``.pth`` file (or any other file of ``torch.save``, read with ``weights_only=True``), a ``.safetensors``
  file, or the index of its shards: a flat state dict, or a training checkpoint, of which one backbone is
  taken: the one that ``--model.weights-key`` names, the only one there is, or the teacher;
- a directory with ``model.safetensors`` (or its index and shards, ``pytorch_model.bin``,
  ``pytorch_model.pth``, ``model.pth``) and, if the architecture is not to be inferred from the tensors,
  ``config.json`` with ``{"backbone": {"name", "patch_size", "width", "depth", "heads", "image_size"}}``
  (ours, and that of our checkpoints), ``{"architecture": ...}`` (timm's) or ``{"model_type": ...}``
  (transformers');
- the word ``embedded``: the small ViT that comes with the package, pretrained on generated scenes;
- a timm pretrained name, such as ``vit_small_patch16_224.dino`` or ``timm/vit_small_patch14_dinov2.lvd142m``;
- a repository of the hub: ``facebook/dinov2-small``, ``hf-hub:OWNER/NAME``, with ``@REVISION`` if need be.

Names of tensors may be timm's, those of DINOv2's and DINOv3's own code, or transformers'
(``ppap.nets.layouts``). Keys may carry the prefix of a surrounding network, such as ``module.backbone.``;
heads and decoders are left out.
"""

import logging
from pathlib import Path
from typing import Any, NamedTuple

import timm
from torch import Tensor

from ppap.errors import DataError, UsageError
from ppap.nets import hub
from ppap.nets.architecture import DETAILS, SIZES, complete, nearest
from ppap.nets.files import (
    FILES,
    INDICES,
    compare_checksums,
    one_line,
    read_file,
    read_json,
    shards,
    weights_file,
)
from ppap.nets.layouts import huggingface, pixels, to_timm
from ppap.nets.layouts.sections import find_backbone
from ppap.runs.checkpoint import standing

EMBEDDED = Path(__file__).parent.parent / "assets" / "scenes-vit"
"""Folder of the weights that come with the package."""
RANDOM_ORIGIN = "random weights; results are meaningless"

# Arguments of timm's saved models that change nothing about the tokens.
_HARMLESS = {"num_classes", "global_pool", "dynamic_img_size", "dynamic_img_pad", "pretrained_strict"}
_PREPROCESSOR = "preprocessor_config.json"


class Source(NamedTuple):
    """One place that weights come from."""

    spec: dict[str, Any]
    """What the source says of the architecture: part of name, patch_size, width, depth, heads, image_size,
    and details (:data:`ppap.nets.architecture.DETAILS`)."""
    tensors: dict[str, Tensor] | None
    """Backbone tensors under timm's names, or None if they are still to be downloaded."""
    origin: str
    """One line for people: where the weights came from."""


def open_source(weights: str, key: str | None = None) -> Source:
    """Find out what ``weights`` names, and read it unless timm must download it.

    Args:
        weights: a file, a directory, the word embedded, a timm pretrained name or a repository of the hub;
            the module's docstring lists the forms. A path that exists wins over a name, the word embedded
            over all.
        key: section or prefix of the backbone in a file that holds several.

    Raises:
        DataError: a missing, damaged or refused file, or a file without backbone tensors.
        UsageError: neither a path nor a pretrained model, or ``key`` names nothing.
    """
    if weights == "embedded":
        found = _open_directory(EMBEDDED, key)
        return found._replace(origin="embedded weights" + found.origin.removeprefix(f"directory {EMBEDDED}"))
    path = standing(Path(weights).expanduser())  # a pretraining run replaces its RUN/backbone
    if path.is_dir():
        return _open_directory(path, key)
    if path.is_file():
        return _open_file(path, {}, f"file {path}", key)
    repository = hub.repository_name(weights)
    name = repository[0].removeprefix("timm/") if repository and not repository[1] else weights
    if timm.models.is_model_pretrained(name):
        if key is not None:
            raise UsageError(f"--model.weights-key {key!r}: {weights} is one network; leave the option out")
        config = timm.get_pretrained_cfg(name)
        stated = pixels.stated(config.mean, config.std, f"timm's {name}")
        return Source({"name": name, **stated}, None, f"timm pretrained {name}")
    if repository is not None:
        return _open_repository(hub.Repository(*repository), key)
    raise _no_such(weights, path)


def _no_such(weights: str, path: Path) -> DataError | UsageError:
    if len(path.parts) > 1 or path.suffix.lower() in hub.SUFFIXES:
        # Where ppap pretrain puts what it makes: RUN/backbone.
        command = f"python -m ppap.pretrain folder --data.root DIR --train.out {path.parent}"
        how = f"make it of your images first: {command}; or " if path.name == "backbone" else ""
        hint = (
            f", or hf-hub:{weights} for a repository of the hub" if len(path.parts) == 2 and not how else ""
        )
        return DataError(
            f"--model.weights: {path} does not exist; {how}give a .pth or .safetensors file, or a directory"
            f"{hint}"
        )
    known = ["random", "embedded", *timm.list_pretrained(["vit_*", "deit_*"])]
    return UsageError(
        f"--model.weights {weights!r} is neither a file or directory nor a pretrained model of timm"
        f"{nearest(weights, known)}; a repository of the hub is given as OWNER/NAME"
    )


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
    return to_timm(find_backbone(model.state_dict(), name, None)[0], name)[0]


def _not_to_be_had(name: str, reason: str) -> DataError:
    return DataError(
        f"cannot get the weights {name} through timm ({reason}); with no network, copy the file "
        "here and give its path: --model.weights FILE.pth (or .safetensors, or a directory), or take the "
        "small ViT of this package: --model.weights embedded. Only to try "
        "the program: --model.backbone vit_small_patch16_224 --model.weights random"
    )


def _open_file(path: Path, spec: dict[str, Any], origin: str, key: str | None) -> Source:
    """One file of weights; what it says itself of the architecture stands behind `spec`."""
    content = read_file(path)
    inside, label = find_backbone(content, str(path), key)
    tensors, details = to_timm(inside, str(path))
    if "sat493m" in path.name and "mean" not in spec:
        print(f"weights: {path.name} is of satellite images: normalised with their mean and deviation")
        details |= pixels.SATELLITE
    elif not spec and "norm_eps" in details:  # transformers' ViT: many were trained with 0.5
        _assumed(path.name)
    return Source({**details, **spec}, tensors, f"{origin}, {label}" if label else origin)


def _open_directory(path: Path, key: str | None) -> Source:
    spec, origin = {}, f"directory {path}"
    compare_checksums(path)
    config_file = path / "config.json"
    if config_file.is_file():
        config = read_json(config_file)
        spec = _directory_spec(config, config_file)
        if isinstance(config.get("origin"), str):
            origin = f"{origin} ({config['origin']})"
    file = weights_file(path)
    if file is None:
        raise DataError(
            f"--model.weights: the directory {path} has no weights; wanted one of "
            f"{', '.join((*FILES, *INDICES))}"
        )
    return _open_file(file, spec, origin, key)


def _open_repository(repository: hub.Repository, key: str | None) -> Source:
    """A repository of the hub, its config first: what is unsuitable is refused before it is fetched."""
    config = repository.get("config.json")
    if config is None:
        raise repository.lacks("config.json")
    repository.get(_PREPROCESSOR)
    _directory_spec(read_json(config), config)
    for name in (FILES[0], INDICES[0], FILES[1], INDICES[1]):
        file = repository.get(name)
        if file is not None:
            break
    else:
        raise repository.lacks(f"{FILES[0]} (nor {FILES[1]}, nor an index of their shards)")
    if name in INDICES:
        for shard in shards(file):
            if repository.get(shard) is None:
                raise repository.lacks(shard)
    revision = f"@{repository.revision}" if repository.revision else ""
    return _open_directory(config.parent, key)._replace(origin=f"hub {repository.name}{revision}")


def _directory_spec(config: dict[str, Any], path: Path) -> dict[str, Any]:
    if isinstance(config.get("backbone"), dict):
        spec = {key: config["backbone"].get(key) for key in ("name", *SIZES, *DETAILS)}
        spec |= pixels.stated(spec.pop("mean"), spec.pop("std"), str(path))
    elif isinstance(config.get("architecture"), str):
        spec = {"name": config["architecture"], **_timm_sizes(config, path)}
    elif "model_type" in config:
        spec = complete(huggingface.config_spec(config, str(path)))
        spec |= _preprocessing(path.with_name(_PREPROCESSOR), config["model_type"])
    else:
        raise DataError(
            f'{path} does not name the architecture; wanted {{"backbone": {{"name": ...}}}}, "architecture" '
            'or "model_type"'
        )
    if not isinstance(spec["name"], str):
        raise DataError(f"{path}: the backbone's name is {spec['name']!r}; wanted a timm architecture")
    for key in SIZES:
        value = spec.get(key)
        if value is not None and (type(value) is not int or value < 1):
            raise DataError(f"{path}: the backbone's {key} is {value!r}; wanted a positive whole number")
    for key, kind in DETAILS.items():
        value = spec.get(key)
        ok = type(value) is kind or (kind is float and type(value) is int)
        if value is not None and not (ok and (kind in (bool, list) or value >= 0)):
            raise DataError(
                f"{path}: the backbone's {key} is {value!r}; wanted {kind.__name__}, not negative"
            )
    return {key: value for key, value in spec.items() if value is not None}


def _preprocessing(path: Path, model_type: str) -> dict[str, list[float]]:
    """Mean and deviation of the images of a model of transformers, where they are not ImageNet's."""
    if path.is_file():
        return pixels.of_preprocessor(read_json(path), str(path))
    if not model_type.startswith("dino"):  # of those all public ones have ImageNet's
        _assumed(f"no {path}")
    return {}


def _assumed(where: str) -> None:
    """Say that a source does not state how images are to be normalised, and what is done."""
    print(
        f"weights: {where}: images get ImageNet's mean and deviation; if the model was trained with others "
        f"(many ViTs: 0.5), give its directory with config.json and {_PREPROCESSOR}",
        flush=True,
    )


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
    return sizes | pixels.stated(pretrained.get("mean"), pretrained.get("std"), str(path))


def _side(value: Any) -> Any:
    """timm stores a square size as one number or as two equal ones."""
    return value[0] if isinstance(value, list | tuple) and len(value) == 2 and value[0] == value[1] else value
