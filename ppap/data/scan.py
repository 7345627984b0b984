"""Listing the images of a folder: formats that are read, what is left out, what ppap itself wrote there."""

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image, features

from ppap.settings.plain import parse_json

_ALWAYS = {
    "JPEG": (".jpg", ".jpeg"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "TIFF": (".tif", ".tiff"),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
}
_IF_BUILT = {"JPEG2000": ("jpg_2000", (".jp2", ".j2k", ".jpx")), "AVIF": ("avif", (".avif",))}
_PLUGINS = {"HEIF": ("pillow_heif", "register_heif_opener", (".heic", ".heif"))}
_LISTED = 6  # suffixes in one line
_SIDECARS = {"sets", "compare", "thresholds", "positives", "sweep", "ablation", "benchmark"}
"""Stems of the pictures that ``ppap analyze`` writes beside a JSON of the same name."""


def _formats() -> dict[str, tuple[str, ...]]:
    """Format of Pillow -> suffixes: what this installation decodes."""
    found = dict(_ALWAYS)
    for name, (codec, suffixes) in _IF_BUILT.items():
        if features.check(codec):
            found[name] = suffixes
    for name, (module, register, suffixes) in _PLUGINS.items():
        try:
            getattr(__import__(module), register)()
        except (ImportError, AttributeError):
            continue
        Image.init()
        found[name] = suffixes
    return found


_FOUND = _formats()
FORMATS = tuple(_FOUND)
SUFFIXES = tuple(suffix for suffixes in _FOUND.values() for suffix in suffixes)
_REMEDIES = {
    **dict.fromkeys((".heic", ".heif"), "pip install pillow-heif"),
    **dict.fromkeys((".avif", ".jp2", ".j2k", ".jpx"), "a newer Pillow reads them"),
}


@dataclass
class Scan:
    """What lies below a folder."""

    images: dict[str, list[Path]] = field(default_factory=dict)
    """name (path relative to the folder, '/' between folders, no suffix) -> its image files, normally one."""
    others: Counter = field(default_factory=Counter)
    """suffix -> number of files that are not read."""
    runs: list[Path] = field(default_factory=list)
    """Folders that a run of ppap made."""
    written: int = 0
    """Single files that ppap wrote: masks, overlays, legends and figures."""

    def notes(self) -> list[str]:
        """What is left out, each half a sentence for a user."""
        notes = []
        if self.runs:
            names = ", ".join(str(path) for path in self.runs[:3]) + (" ..." if len(self.runs) > 3 else "")
            notes.append(f"skipped what runs of ppap wrote: {names}")
        if self.written:
            notes.append(f"skipped {self.written} masks, overlays and figures that ppap wrote")
        if self.others:
            ranked = self.others.most_common()
            listed = ", ".join(f"{count} {suffix or 'without suffix'}" for suffix, count in ranked[:_LISTED])
            more = sum(count for _, count in ranked[_LISTED:])
            remedies = dict.fromkeys(
                _REMEDIES[s] for s in self.others if s in _REMEDIES and s not in SUFFIXES
            )
            remedy = f" ({'; '.join(remedies)})" if remedies else ""
            notes.append(f"not read: {listed}{f' and {more} others' if more else ''}{remedy}")
        return notes


@dataclass(frozen=True)
class SplitFiles:
    """The files of one split; ``labels`` is None where the split has no labels."""

    images: dict[str, list[Path]]
    """Name -> files, normally one."""
    labels: dict[str, list[Path]] | None = None
    """The same of the labels, by the name of their image."""
    label_dir: Path | None = None
    """Where labels are expected."""


def scan(folder: Path, masks_too: bool = False) -> Scan:
    """List the files below a folder, sorted, hidden files and folders left out, links followed.

    What ppap wrote is no image of the user's: run directories are not entered, and below a folder with a
    legend of ``ppap predict`` masks and overlays are passed over.

    Args:
        folder: where to look; sub-folders are searched too.
        masks_too: list masks of ``ppap predict`` (without their overlays): the folder holds labels.
    """
    found, visited, masks = Scan(), set(), []
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in visited:  # a link that points to one of its own parents
            folders.clear()
            continue
        visited.add(real)
        if is_run(Path(place), files):
            found.runs.append(Path(place).relative_to(folder))
            folders.clear()
            continue
        folders[:] = sorted(f for f in folders if not f.startswith((".", "__MACOSX")))
        if _is_legend(Path(place), files):
            masks.append(real + os.sep)
        own = _written(Path(place), files, any((real + os.sep).startswith(mask) for mask in masks))
        if masks_too:
            own -= {f"{file.removesuffix('_overlay.jpg')}.png" for file in own}
        found.written += len(own)
        for file in sorted(files):
            path = Path(place, file)
            if file.startswith(".") or file in own:
                continue
            if path.suffix.lower() in SUFFIXES:
                found.images.setdefault(path.relative_to(folder).with_suffix("").as_posix(), []).append(path)
            else:
                found.others[path.suffix.lower()] += 1
    found.images = dict(sorted(found.images.items()))
    return found


def find_images(folder: Path) -> dict[str, list[Path]]:
    """The images of :func:`scan`: name (relative path without suffix) -> files, normally one."""
    return scan(folder).images


def is_run(folder: Path, files: list[str]) -> bool:
    """Whether ppap made a folder: a run, a checkpoint, or a set of seeds."""
    if "manifest.json" in files and "model.safetensors" in files:
        return True
    if "config.json" in files and {"config", "hash"} <= _keys(folder / "config.json"):
        return True
    return "seeds.json" in files and {"seeds", "config"} <= _keys(folder / "seeds.json")


def _is_legend(folder: Path, files: list[str]) -> bool:
    return "legend.json" in files and {"probe", "classes", "ignored_id"} <= _keys(folder / "legend.json")


def _written(folder: Path, files: list[str], masks: bool) -> set[str]:
    """Files of ``ppap predict``, where the folder has its `masks`, and figures of ``ppap analyze``."""
    present, own = {*files}, set()
    if masks:
        for file in files:
            stem = file.removesuffix("_overlay.jpg")
            if stem != file:  # a stop before its mask leaves an overlay alone
                own |= {file, f"{stem}.png"} & present
                own |= {f"{stem}.tif"} & present if f"{stem}.png" in present else set()
        own |= {"legend.png", "legend.json"} & present if _is_legend(folder, files) else set()
    for stem in _SIDECARS:
        names = {f"{stem}.png", f"{stem}.json"}
        if names <= present and {"provenance", "runs", "images", "backbone"} & _keys(folder / f"{stem}.json"):
            own |= names
    return own


def _keys(path: Path) -> set[str]:
    if not path.is_file():  # a pipe would wait for ever
        return set()
    try:
        content: Any = parse_json(path.read_bytes())
    except (OSError, ValueError):
        return set()
    return {*content} if isinstance(content, dict) else set()
