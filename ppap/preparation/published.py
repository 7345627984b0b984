"""Checkpoints that the codes of PPAP, HP and STEGO write, as runs of ours.

PPAP and HP save a dict of three state dicts, ``net_model_state_dict`` (``model.*``, the frozen ViT under
DINO's names; PPAP: ``decoder.*``, the trained block, and ``project_head.*``; HP: ``cluster1``, ``cluster2``,
the head, and ``ema_model1``, ``ema_model2``, its average), ``linear_model_state_dict`` and
``cluster_model_state_dict``. STEGO saves one of Lightning, whose ``state_dict`` has the same parts below
``net.``, ``linear_probe.`` and ``cluster_probe.``, and whose settings are pickled objects. No object of a
file is ever made: torch's reader of weights gets an empty dict in place of those of a few known modules, and
refuses all others.
"""

import re
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ppap import stopping
from ppap.data.cityscapes import NAMES as CITYSCAPES
from ppap.data.cocostuff import class_names
from ppap.data.potsdam import NAMES as POTSDAM
from ppap.errors import DataError, NumberError, PpapError, UsageError
from ppap.methods.engine import Engine, build_engine
from ppap.nets.architecture import infer_spec
from ppap.nets.backbone import Backbone, backbone_from_spec
from ppap.nets.files import one_line
from ppap.nets.layouts import to_timm
from ppap.nets.timm_vit import load_strictly
from ppap.runs.checkpoint import save_checkpoint
from ppap.runs.disk import sha256_of
from ppap.runs.lock import FolderLock
from ppap.runs.rundir import RunDir
from ppap.settings.config import Config, to_dict
from ppap.settings.methods import HEADS
from ppap.settings.presets import PRESETS, preset
from ppap.settings.published import with_method

CLASSES = {"cocostuff27": class_names("cocostuff27"), "cityscapes27": CITYSCAPES, "potsdam3": POTSDAM}
"""Data sets of the published checkpoints -> names of their classes."""

_FAMILIES = ("cocostuff", "cityscapes", "potsdam")
_PARTS = ("net_model_state_dict", "linear_model_state_dict", "cluster_model_state_dict")
_HARMLESS = re.compile(
    r"(omegaconf|pytorch_lightning|lightning|lightning_fabric|numpy|typing)\..*|collections\.defaultdict"
    r"|argparse\.Namespace|pathlib\.\w+|builtins\.(object|dict|list|set|tuple|int|float|str|bool)"
)
_HEAD = {"cluster1.0": "head.linear", "cluster2.0": "head.inner", "cluster2.2": "head.outer"}
_NAMES = {
    "ppap": {"decoder": "block", "project_head": "projection"},
    "hp": {
        **_HEAD,
        "ema_model1.0": "average.linear",
        "ema_model2.0": "average.inner",
        "ema_model2.2": "average.outer",
    },
    "stego": _HEAD,
}
"""Method -> prefix of the published net -> ours."""


class _Empty:
    """Stands for a class of a file: making one gives an empty dict, whatever the arguments."""

    def __new__(cls, *args: Any) -> Any:
        return OrderedDict()


class Published(NamedTuple):
    """What a published checkpoint holds."""

    method: str
    backbone: dict[str, Tensor]
    """Under DINO's names."""
    weights: dict[str, Tensor]
    """What is trained, and the probes, under our names."""
    facts: dict[str, Any]
    """epoch, iter, best, and of STEGO what its settings say, as far as they are numbers and text."""


def read_published(path: Path) -> Published:
    """Read a published checkpoint.

    Raises:
        DataError: it cannot be read, is refused, or is none of the three.
    """
    content = _load(path)
    if isinstance(content, Mapping) and all(isinstance(content.get(part), Mapping) for part in _PARTS):
        net, linear, cluster = ({k.removeprefix("module."): v for k, v in content[p].items()} for p in _PARTS)
        method = next(
            (m for m, key in (("ppap", "decoder."), ("hp", "ema_model1.")) if _any(net, key)), "stego"
        )
        facts = {key: content[key] for key in ("epoch", "iter", "best") if _is_plain(content.get(key))}
    elif isinstance(content, Mapping) and isinstance(content.get("state_dict"), Mapping):
        state, method = content["state_dict"], "stego"
        net, linear, cluster = (_below(state, p) for p in ("net.", "linear_probe.", "cluster_probe."))
        facts = {key: content[key] for key in ("epoch", "global_step") if _is_plain(content.get(key))}
        facts |= _settings(content.get("hyper_parameters"))
    else:
        found = (
            ", ".join(map(str, list(content)[:8])) if isinstance(content, Mapping) else type(content).__name__
        )
        raise DataError(
            f"{path} is no checkpoint of PPAP, HP or STEGO: it holds {found}; wanted {', '.join(_PARTS)}, or "
            "Lightning's state_dict. Weights of a backbone alone are given to --model.weights"
        )
    if facts.get("dino_feat_type", "feat") != "feat":
        raise DataError(f"{path} was trained on {facts['dino_feat_type']} of DINO; only feat is supported")
    weights, left = {}, dict(net)
    for theirs, ours in _NAMES[method].items():
        for key in [key for key in left if key.startswith(f"{theirs}.")]:
            weights[ours + key.removeprefix(theirs)] = left.pop(key)
    backbone = {key.removeprefix("model."): left.pop(key) for key in list(left) if key.startswith("model.")}
    weights |= {f"linear.classifier.{key}": value for key, value in linear.items()}
    weights |= {f"cluster.{key}": value for key, value in cluster.items()}
    strange = [*left, *(key for key, v in {**backbone, **weights}.items() if not isinstance(v, Tensor))]
    if strange or not backbone or "linear.classifier.weight" not in weights:
        what = (
            f"unknown or no tensor: {', '.join(strange[:4])}"
            if strange
            else "the frozen ViT or a probe is missing"
        )
        raise DataError(f"{path} is a checkpoint of {method} in a form of its own ({what})")
    return Published(method, backbone, weights, facts)


def _load(path: Path) -> Any:
    """All of a file of ``torch.save``; objects of harmless modules come as empty dicts."""
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
        refused = sorted(name for name in names if not _HARMLESS.fullmatch(name))
        if refused:
            raise DataError(
                f"{path} holds {', '.join(refused[:4])}, which no such checkpoint needs, and is refused for "
                "safety; get it again from where it was published"
            )
        with torch.serialization.safe_globals([(_Empty, name) for name in names]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except DataError:
        raise
    except Exception as error:  # a damaged file can fail anywhere in the reader
        raise DataError(
            f"cannot read the checkpoint {path} ({one_line(error)}); is the file complete, and of torch.save?"
        ) from None


def _any(names: Mapping[str, Any], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in names)


def _below(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _is_plain(value: Any) -> bool:
    return isinstance(value, int | float | str) and len(str(value)) < 200


def _settings(hyper: Any) -> dict[str, Any]:
    """Numbers and text of Lightning's settings: those of OmegaConf lie as nodes in their containers."""
    config = hyper.get("cfg", hyper) if isinstance(hyper, Mapping) else {}
    content = getattr(config, "__dict__", {}).get("_content", config)
    if not isinstance(content, Mapping):
        return {}
    values = {key: getattr(node, "__dict__", {}).get("_val", node) for key, node in content.items()}
    return {key: value for key, value in values.items() if isinstance(key, str) and _is_plain(value)}


def convert(path: Path, name: str, out: Path) -> Engine:
    """Write a published checkpoint as a run of ours, at step 0.

    Args:
        path: file of the published code.
        name: preset of the data set and backbone it was trained with.
        out: run directory, which does not exist yet.

    Returns:
        The network that was written.

    Raises:
        DataError: see :func:`read_published`; its weights do not fit, or the disk refuses.
        UsageError: no such preset, or one of another data set or backbone.
        NumberError: a weight is not finite.
    """
    base = preset(name)
    if base.data.kind not in CLASSES:
        known = ", ".join(key for key, make in PRESETS.items() if make().data.kind in CLASSES)
        raise UsageError(f"no checkpoint was published for the preset {name}; give one of {known}")
    published = read_published(path)
    checksum = sha256_of(path, lambda _: stopping.check())
    origin = f"{published.method} checkpoint {path.name}, sha256 {checksum[:12]}"
    backbone = _backbone(published.backbone, str(path), origin)
    stopping.check()
    config, engine = _engine(published, base, backbone, path)
    stopping.check()  # from here on the run is written, in full
    names = CLASSES[base.data.kind]
    info = {
        "config": to_dict(config),
        "backbone": backbone.spec,
        "origin": origin,
        "classes": len(names),
        "class_names": list(names),
        "label_ids": list(range(len(names))),
        "ignored_ids": [],
        "files": {},
        "labelled": True,
        "assignment": None,
        "step": 0,
        "choices": engine.choices.to_dict(),
        "converted": {"file": path.name, "sha256": checksum, **published.facts},
    }
    state = {"step": 0, "best": float("-inf"), "validated": -1, "engine": engine.training_state()}
    run, lock = RunDir(out), FolderLock(out, f"--out {out}")
    try:
        run.create(config, lock)
        save_checkpoint(run.checkpoints / "last", engine.weights(), info, state)
    finally:
        lock.release()
    return engine


def _backbone(tensors: dict[str, Tensor], where: str, origin: str) -> Backbone:
    try:
        named, details = to_timm(tensors, where)
        spec = {**details, **infer_spec(named, None, where)}
        backbone = backbone_from_spec(spec, origin)
        load_strictly(backbone.vit, named, where, backbone.name)
    except (UsageError, DataError, NumberError):
        raise
    except Exception as error:  # shapes of a damaged file can fail anywhere
        raise DataError(f"{where}: its frozen ViT cannot be built ({one_line(error)})") from None
    return backbone


def _engine(published: Published, base: Config, backbone: Backbone, path: Path) -> tuple[Config, Engine]:
    """Settings and network, with the weights of the file."""
    weights, kind = published.weights, base.data.kind
    classes, found = len(CLASSES[kind]), weights["linear.classifier.weight"].shape[0]
    if classes != found:
        raise UsageError(f"{path} has {found} classes, {base.preset} {classes}; give the preset of its data")
    said = str(published.facts.get("dataset_name", ""))
    if any(said.startswith(word) and not kind.startswith(word) for word in _FAMILIES):
        raise UsageError(
            f"{path} was trained on {said}, {base.preset} is {kind}; give the preset of its data"
        )
    patch = re.search(r"patch(\d+)", base.model.weights)
    if patch and int(patch[1]) != backbone.patch_size:
        raise UsageError(f"{path} has patches of {backbone.patch_size} pixels, {base.preset} of {patch[1]}")
    config = with_method(base, published.method)
    extra = max(weights.get("cluster.clusters", torch.zeros(classes, 1)).shape[0] - classes, 0)
    train = replace(config.train, selection="last", extra_clusters=extra, out=None)
    config = replace(config, train=train)
    if published.method in HEADS and "head.linear.weight" in weights:
        dim = weights["head.linear.weight"].shape[0]
        section = replace(getattr(config, published.method), dim=dim)
        config = replace(config, **{published.method: section})
    torch.manual_seed(config.train.seed)
    try:
        engine = build_engine(config, classes, torch.device("cpu"), backbone=backbone)
    except PpapError as error:
        raise type(error)(f"{path}: {error}") from None
    own = engine.weights()
    trained = [k for k in own if not k.startswith(("backbone.", "projection.", "agnostic_", "specific_"))]
    trained += [k for k in own if k.startswith("projection.") and published.method == "ppap"]
    if missing := [key for key in trained if key not in weights]:
        raise DataError(f"{path} lacks {missing[0]}, as it is called here; is it complete?")
    engine.load_weights({**own, **weights}, str(path))
    return config, engine
