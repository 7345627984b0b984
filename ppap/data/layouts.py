"""How a folder of images, and perhaps of labels, is laid out: one table of names, patterns for the rest.

Tried in this order; names in any case, ``training`` for ``train``, ``valid`` or ``validation`` for ``val``:

- ``--data.images`` and ``--data.labels``: patterns below the root, ``{split}`` for train and val.
- ``images/{train,val}`` with ``labels/{train,val}``, or both without split folders; :data:`PAIRS` has the
  names. A label has the relative path of its image, with or without an ending of :data:`ENDINGS`. Without
  split folders, lists of names in ``ImageSets/Segmentation`` (Pascal VOC) divide them.
- ``{train,val}/images`` with ``{train,val}/labels``, by the same names.
- ``x.jpg`` with ``x_mask.png``, by :data:`ENDINGS`, or with an ``x.png`` that looks like a mask, side by side
  at any depth, below ``train`` and ``val`` or not.
- any other folder: its images, at any depth, without labels.
"""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ppap.data.base import SPLITS
from ppap.data.checks import SHOWN, existing_folder
from ppap.data.images import looks_like_mask
from ppap.data.lists import by_lists, split_lists
from ppap.data.scan import SUFFIXES, Scan, SplitFiles, scan
from ppap.errors import DataError, UsageError

PAIRS = (
    ("images", "labels"),
    ("imgs", "labels"),
    ("img_dir", "ann_dir"),
    ("images", "masks"),
    ("imgs", "masks"),
    ("JPEGImages", "SegmentationClass"),
    ("images", "annotations"),
    ("images", "segmentations"),
    ("images", "mask"),
    ("images", "label"),
    ("image", "label"),
    ("image", "mask"),
    ("image", "labels"),
    ("image", "masks"),
    ("img", "mask"),
    ("img", "masks"),
    ("img", "label"),
    ("img", "labels"),
    ("imagesTr", "labelsTr"),
)
"""Folder of images, folder of labels; the first three are taken for images even without labels."""
_ALONE = 3
ENDINGS = ("_mask", "_masks", "_label", "_labels", "_segmentation", "_seg", "_gt", "_annotation")
"""What the name of a label may have behind that of its image."""
_SPLIT_NAMES = {"train": ("train", "training"), "val": ("val", "valid", "validation")}
_LOSSY = (".jpg", ".jpeg")
_LOOKED_AT = 8  # files that are opened to see whether they look like masks


@dataclass(frozen=True)
class Layout:
    """What :func:`find_layout` found: the splits that exist and a few words about the folder."""

    root: Path
    splits: dict[str, SplitFiles]
    form: str
    unused: tuple[str, ...] = ()
    """Folders that are not read."""
    notes: tuple[str, ...] = field(default=())
    """What else is left out, each half a sentence."""


def find_layout(root: str | os.PathLike, images: str | None = None, labels: str | None = None) -> Layout:
    """Recognise the layout of a folder and list its files; a few are opened that may be masks.

    Args:
        root: the folder; ``~`` is expanded.
        images, labels: patterns of :func:`_by_patterns`.

    Returns:
        The splits that exist (``train``, ``val`` or both), and how the folder is laid out.

    Raises:
        DataError: no such folder, no images, labels without images, or pictures that look like the masks of
            others.
        UsageError: labels, and no pattern of their images.
    """
    root = existing_folder(root)
    if images or labels:
        return _by_patterns(root, images, labels)
    for number, (image_dir, label_dir) in enumerate(PAIRS):
        pictures, masks = _child(root, image_dir), _child(root, label_dir)
        alone = number < _ALONE and (masks.is_dir() or any(_child(pictures, s).is_dir() for s in SPLITS))
        if pictures.is_dir() and (alone or (masks.is_dir() and scan(masks, masks_too=True).images)):
            better = next((p for p in PAIRS if p[0] == image_dir and _labels_in(root, p[1])), None)
            return _paired_layout(root, pictures, _child(root, better[1]) if better else masks)
    for image_dir, label_dir in PAIRS:
        parts = {s: (_child(_child(root, s), image_dir), _child(_child(root, s), label_dir)) for s in SPLITS}
        if any(i.is_dir() and m.is_dir() for i, m in parts.values()):
            return _split_first(root, parts)
    for label_dir in dict.fromkeys(pair[1] for pair in PAIRS[:_ALONE]):
        if (root / label_dir).is_dir():
            image_dirs = " or ".join(f"{i}/" for i, label in PAIRS[:_ALONE] if label == label_dir)
            raise DataError(f"{root}: {label_dir}/ exists but its images do not; put them in {image_dirs}")
    return _any_folder(root)


def _labels_in(root: Path, name: str) -> bool:
    return bool((folder := _child(root, name)).is_dir() and scan(folder, masks_too=True).images)


def _child(folder: Path, name: str) -> Path:
    """A folder by its name, its aliases and any case; the plain path where there is none."""
    if (folder / name).is_dir() or not folder.is_dir():
        return folder / name
    wanted = _SPLIT_NAMES.get(name, (name.lower(),))
    found = [p for p in sorted(folder.iterdir()) if p.is_dir() and p.name.lower() in wanted]
    return found[0] if found else folder / name


def _paired_layout(root: Path, pictures: Path, labels: Path) -> Layout:
    folders = {s: (_child(pictures, s), _child(labels, s)) for s in SPLITS}
    present = [s for s in SPLITS if folders[s][0].is_dir()]
    label_splits = [s for s in SPLITS if folders[s][1].is_dir()]
    for split in label_splits:
        if split not in present:
            there, missing = f"{labels.name}/{split}", f"{pictures.name}/{split}"
            raise DataError(f"{root}: {there} exists but {missing} does not; add images or remove the labels")
    if not present:
        files, notes = _pair(root, pictures, labels)
        if lists := split_lists(root):
            splits, left_out = by_lists(files, lists)
            form = f"{pictures.name} with {labels.name}, splits of {lists['train'].parent.relative_to(root)}"
            return Layout(root, splits, form, (), (*notes, *left_out))
        return Layout(
            root, {"train": files}, f"{pictures.name} with {labels.name}, no split folders", (), notes
        )
    if labels.is_dir() and not label_splits and scan(labels, masks_too=True).images:
        wanted = " or ".join(f"{labels.name}/{s}" for s in present)
        raise DataError(
            f"{root}: {labels.name} has no split folders, {pictures.name} has; move them to {wanted}"
        )
    splits, notes = {}, []
    for split in present:
        splits[split], found = _pair(
            root, folders[split][0], folders[split][1] if split in label_splits else None
        )
        notes += found
    form = f"{pictures.name}/{{{','.join(folders[s][0].name for s in present)}}}"
    if label_splits:
        form += f" with {labels.name}/{{{','.join(folders[s][1].name for s in label_splits)}}}"
    elif any(files.labels is not None for files in splits.values()):
        form += " with labels beside them"
    used = {folders[s][0].name for s in SPLITS}
    others = sorted(p.name for p in pictures.iterdir() if p.is_dir() and not p.name.startswith("."))
    unused = tuple(f"{pictures.name}/{name}" for name in others if name not in used)
    return Layout(root, splits, form, unused, tuple(notes))


def _split_first(root: Path, parts: dict[str, tuple[Path, Path]]) -> Layout:
    """``train/images`` with ``train/labels``."""
    splits, notes, forms = {}, [], []
    for split, (pictures, labels) in parts.items():
        if pictures.is_dir():
            splits[split], found = _pair(root, pictures, labels if labels.is_dir() else None)
            notes += found
            form = pictures.relative_to(root).as_posix()
            forms.append(form + (f" with {labels.relative_to(root).as_posix()}" if labels.is_dir() else ""))
        elif labels.is_dir():
            missing = pictures.relative_to(root).as_posix()
            raise DataError(f"{labels} exists but {missing} does not; add images or remove the labels")
    used = {path.relative_to(root).parts[0] for pair in parts.values() for path in pair}
    others = sorted(p.name for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    unused = tuple(name for name in others if name not in used)
    return Layout(root, splits, ", ".join(forms), unused, tuple(notes))


def _any_folder(root: Path) -> Layout:
    found = scan(root)
    _require_images(root, found)
    files, beside = _side_by_side(found.images)
    if files.labels is not None:
        tops = {name.partition("/")[0] for name in files.images}
        by_top = {top: s for s, names in _SPLIT_NAMES.items() for top in tops if top.lower() in names}
        if tops == {*by_top} and "train" in by_top.values():
            splits = {s: _below(files, top) for top, s in by_top.items()}
            form = f"{{{','.join(by_top)}}}, {beside}"
            return Layout(root, splits, form, (), tuple(found.notes()))
        return Layout(root, {"train": files}, beside, (), tuple(found.notes()))
    _refuse_masks(root, found.images)
    return Layout(root, {"train": files}, "a folder of images", (), tuple(found.notes()))


def _below(files: SplitFiles, top: str) -> SplitFiles:
    def part(names: dict[str, list[Path]]) -> dict[str, list[Path]]:
        return {n.partition("/")[2]: p for n, p in names.items() if n.startswith(f"{top}/")}

    return SplitFiles(part(files.images), part(files.labels or {}), files.label_dir)


def _pair(root: Path, pictures: Path, labels: Path | None) -> tuple[SplitFiles, list[str]]:
    """The files of a folder of images and one of labels; without the latter, labels beside the images."""
    found = scan(pictures)
    _require_images(pictures, found)
    if labels is None:
        files = _side_by_side(found.images)[0]
        if files.labels is None:
            _refuse_masks(root, found.images)
        return files, found.notes()
    masks = scan(labels, masks_too=True)
    return SplitFiles(found.images, _by_image(masks.images, found.images), labels), found.notes()


def _by_image(labels: dict[str, list[Path]], images: dict[str, list[Path]]) -> dict[str, list[Path]]:
    """Labels by the names of their images: endings cut off, JPEG files last, or left out as previews."""
    lossless = {
        name: sorted((p for p in paths if p.suffix.lower() not in _LOSSY), key=_preference)
        for name, paths in labels.items()
    }
    lossless = {name: paths for name, paths in lossless.items() if paths}
    found: dict[str, list[Path]] = {}
    for name, paths in (lossless or labels).items():
        bare = _bare(name)
        key = bare if name not in images and bare in images else name
        found.setdefault(key, []).extend(paths)
    return found


def _preference(path: Path) -> tuple[bool, str]:
    return path.suffix.lower() != ".png", path.suffix.lower()


def _bare(name: str) -> str:
    """A name without an ending of :data:`ENDINGS`."""
    ending = next((e for e in ENDINGS if name.lower().endswith(e)), "")
    return name[: len(name) - len(ending)]


def _side_by_side(files: dict[str, list[Path]]) -> tuple[SplitFiles, str]:
    """Separate labels that lie beside their images, and say how they were told apart."""
    ends = {name: paths for name, paths in files.items() if _bare(name) != name and _bare(name) in files}
    if ends:
        images = {name: paths for name, paths in files.items() if name not in ends}
        endings = sorted({name[len(_bare(name)) :] for name in ends})
        form = f"images with labels beside them, NAME{' or NAME'.join(endings)}"
        return SplitFiles(images, {_bare(name): paths for name, paths in ends.items()}), form
    doubles = {
        name: png
        for name, paths in files.items()
        if len(paths) == 2 and (png := [p for p in paths if p.suffix.lower() not in _LOSSY])[1:] == []
        if png
    }
    if doubles and _look_like_masks([png[0] for png in doubles.values()]):
        images = {n: [p for p in paths if p not in doubles.get(n, [])] for n, paths in files.items()}
        return SplitFiles(images, doubles), "images with labels of the same name beside them"
    return SplitFiles(files), ""


def _look_like_masks(paths: list[Path]) -> bool:
    """Whether most of a sample of files look like masks."""
    chosen = np.unique(np.linspace(0, len(paths) - 1, _LOOKED_AT).astype(int))
    return sum(looks_like_mask(paths[i]) for i in chosen) > len(chosen) / 2


def _refuse_masks(root: Path, files: dict[str, list[Path]]) -> None:
    """Refuse a folder whose pictures pair up by their names, one of each pair looking like a mask."""
    by_stem: dict[str, list[Path]] = {}
    for paths in files.values():
        for path in paths:
            by_stem.setdefault(_bare(path.stem.lower()), []).append(path)
    pairs = [paths for paths in by_stem.values() if len(paths) > 1]
    suspects = [p for paths in pairs for p in paths if p.suffix.lower() not in _LOSSY]
    folders: dict[Path, list[Path]] = {}
    for path in suspects:
        folders.setdefault(path.parent, []).append(path)
    for folder, paths in sorted(folders.items()):
        partners = {p.parent for pair in pairs if any(q in pair for q in paths[:1]) for p in pair} - {folder}
        if not partners or not _look_like_masks(paths):
            continue
        partner = sorted(partners)[0]
        given = [f"'{path.relative_to(root).as_posix()}/*'".replace("./", "") for path in (partner, folder)]
        raise DataError(
            f"{root}: {paths[0]} and others of {folder} look like masks of the pictures of the same names in "
            f"{partner}; give --data.images {given[0]} --data.labels {given[1]}, or --data.images {given[0]} "
            "alone to go without them"
        )


def _by_patterns(root: Path, images: str | None, labels: str | None) -> Layout:
    """Files by patterns: ``*`` stands for part of a name, ``**/`` for any folders, ``{split}`` for train or
    val. What the stars stand for is the name, by which a label finds its image."""
    if images is None:
        raise UsageError("--data.labels is given without --data.images; give the pattern of the images too")
    splits: dict[str, SplitFiles] = {}
    by_split = "{split}" in images
    if labels is not None and by_split != ("{split}" in labels):
        raise UsageError(
            f"--data.images {images} and --data.labels {labels}: give {{split}} in both, or in neither"
        )
    for split in SPLITS if by_split else ("train",):
        found = _matching(root, images, split)
        if not found:
            continue
        masks = None if labels is None else _matching(root, labels, split)
        if masks is not None and not masks:
            if split == "train" or not by_split:
                raise DataError(
                    f"{root}: no file matches --data.labels {labels} ({split}); check the pattern"
                )
            masks = None
        splits[split] = SplitFiles(found, masks, root if masks else None)
    if not splits:
        raise DataError(f"{root}: no image matches --data.images {images}; check the pattern")
    form = f"--data.images {images}" + (f" with --data.labels {labels}" if labels else "")
    return Layout(root, splits, form)


def _matching(root: Path, pattern: str, split: str) -> dict[str, list[Path]]:
    """Name, of what the stars of a pattern stand for -> files below `root` that match it."""
    names = "|".join(_SPLIT_NAMES[split])
    parts = re.split(r"(\{split\}|\*\*/|\*)", pattern)
    forms = {"{split}": f"(?:{names})", "**/": "((?:[^/]+/)*)", "*": "([^/]*)"}
    whole = re.compile("".join(forms.get(part, re.escape(part)) for part in parts), re.IGNORECASE)
    found: dict[str, list[Path]] = {}
    for paths in scan(root, masks_too=True).images.values():
        for path in paths:
            match = whole.fullmatch(path.relative_to(root).as_posix())
            if match:
                name = "".join(match.groups())
                suffix = next((s for s in SUFFIXES if name.lower().endswith(s)), "")
                found.setdefault(name[: len(name) - len(suffix)] or path.stem, []).append(path)
    return dict(sorted(found.items()))


def _require_images(folder: Path, found: Scan) -> None:
    if found.images:
        return
    notes = "; ".join(found.notes())
    names = ", ".join(sorted({suffix or "no suffix" for suffix in found.others})[:SHOWN])
    hint = f" (it holds {names})" if names else ""
    hint += f" ({notes})" if notes else ""
    raise DataError(f"{folder}: no images{hint}; put files of type {', '.join(SUFFIXES)} there")
