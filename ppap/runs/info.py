"""What a checkpoint says of itself, compared with what it can mean before anything is built of it.

A checkpoint may be another person's: its checksums only say that it is whole.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ppap.errors import DataError
from ppap.settings.plain import misfit

_ANY = {"config": dict[str, Any], "backbone": dict[str, Any], "origin": str, "step": int}
"""In every checkpoint."""
_TRAINED = {
    "classes": int,
    "class_names": list[str],
    "labelled": bool,
    "assignment": list[int | None] | None,
}
"""In those of a training, beside what pretraining has too."""
_OPTIONAL = {
    "choices": dict[str, Any] | None,
    "data": dict[str, Any] | None,
    "label_ids": list[int] | None,
    "ignored_ids": list[int],
    "files": dict[str, Any],
}
"""Missing where an earlier version wrote it."""
_CHOICES = {name: float | None for name in ("phi0", "psi0", "fixed_phi0", "lr")} | {
    "condition": str | None,
    "reasons": list[str],
}
_DATA = {"train": str, "images": int}
_READING = {
    "label_colours": list[list[int]],
    "bands": list[int],
    "value_range": list[float],
    "exif": str,
}
_SPEC = {
    "name": str,
    "mean": list[float] | None,
    "std": list[float] | None,
    "pos_interp": str,
    "mlp_ratio": float | None,
    "registers": int | None,
    "qkv_bias": bool | None,
    "norm_eps": float | None,
    **{name: int | None for name in ("patch_size", "width", "depth", "heads", "image_size")},
}
_LARGEST_SIZE = 1 << 16


class Info(dict[str, Any]):
    """What ``config.json`` of a checkpoint holds; what it lacks is an error of the file."""

    def __init__(self, values: Mapping[str, Any], file: Path) -> None:
        super().__init__(values)
        self.file = file

    def __missing__(self, key: str) -> Any:
        raise DataError(f"{self.file} lacks {key}; copy the whole folder again")


def wrong_info(info: Mapping[str, Any], tensors: Mapping[str, Any]) -> str | None:
    """What is impossible in ``config.json`` of a checkpoint; None where nothing is.

    Args:
        info: its content; what is missing is left to :class:`Info`.
        tensors: weights by name: a network has no more blocks than weights.
    """
    wrong = misfit(info, {**_ANY, **_TRAINED, **_OPTIONAL})
    return wrong or _wrong_parts(info) or _wrong_numbers(info, tensors) or _wrong_classes(info)


def _wrong_parts(info: Mapping[str, Any]) -> str | None:
    """Of the objects in it."""
    parts = {"backbone": _SPEC, "choices": _CHOICES, "data": _DATA, "files": _READING}
    for name, hints in parts.items():
        part = info.get(name)
        if not part:
            continue
        if wrong := misfit(part, hints):
            return f"{name}.{wrong}"
        whole = [key for key in hints if key not in part] if name in ("data", "files") else []
        unknown = [key for key in part if key not in hints] if name == "choices" else []
        if whole or unknown:
            return f"{name} lacks {whole[0]}" if whole else f"{name} has no {unknown[0]}"
    return "backbone lacks name" if "name" not in info.get("backbone", {"name": ""}) else None


def _wrong_numbers(info: Mapping[str, Any], tensors: Mapping[str, Any]) -> str | None:
    if info.get("step", 0) < 0:
        return f"step is {info['step']}; wanted 0 or more"
    for name in ("patch_size", "width", "depth", "heads", "image_size"):
        value = info.get("backbone", {}).get(name)
        limit = len(tensors) if name == "depth" else _LARGEST_SIZE
        if value is not None and not 1 <= value <= limit:
            return f"backbone.{name} is {value}; wanted 1 to {limit}"
    return None


def _wrong_classes(info: Mapping[str, Any]) -> str | None:
    if "classes" not in info:
        return None
    classes, names = info["classes"], info.get("class_names", ())
    if not 1 <= classes < 1 << 16 or len(names) != classes:
        return f"classes is {classes} for {len(names)} names; wanted 1 to 65535, and a name for each"
    ids = info.get("label_ids")
    if ids and (len(ids) != classes or not all(-1 <= i < 1 << 16 for i in ids)):
        return f"label_ids are {len(ids)} for {classes} classes; wanted one for each, -1 to 65535"
    matched = info.get("assignment") or []
    if not all(c is None or 0 <= c < classes for c in matched):
        return f"assignment names classes that are not there; wanted 0 to {classes - 1}"
    return None
