"""Splits by lists of names, as Pascal VOC has them: ``ImageSets/Segmentation/{train,val}.txt``."""

from pathlib import Path

from ppap.data.base import SPLITS
from ppap.data.scan import SplitFiles
from ppap.errors import DataError

FOLDERS = ("ImageSets/Segmentation", "ImageSets")
_SHOWN = 3  # names in a message


def split_lists(root: Path) -> dict[str, Path]:
    """Split -> list of names, from the first folder of :data:`FOLDERS` that has one of training images."""
    for folder in (root / name for name in FOLDERS):
        found = {split: folder / f"{split}.txt" for split in SPLITS}
        if found["train"].is_file():
            return {split: path for split, path in found.items() if path.is_file()}
    return {}


def by_lists(files: SplitFiles, lists: dict[str, Path]) -> tuple[dict[str, SplitFiles], list[str]]:
    """The splits that the lists make of all files, and what is left out, each half a sentence.

    Raises:
        DataError: a list is empty, or has a name without an image or one that another list has.
    """
    names = {split: _read(path) for split, path in lists.items()}
    for split, listed in names.items():
        if missing := [name for name in listed if name not in files.images]:
            raise DataError(
                f"{lists[split]}: no image for {len(missing)} of {len(listed)} names "
                f"({', '.join(missing[:_SHOWN])}); add them or take the names out"
            )
    if both := sorted({*names["train"]} & {*names.get("val", ())}):
        raise DataError(f"{lists['val']}: {both[0]} is in {lists['train'].name} too; take it out of one")
    splits = {split: _part(files, listed) for split, listed in names.items()}
    rest = len(files.images) - sum(map(len, names.values()))
    listed = ", ".join(path.name for path in lists.values())
    return splits, [f"{rest} images are in none of {listed}"] if rest else []


def _read(path: Path) -> list[str]:
    """Names of a list, the first word of each line."""
    lines = path.read_text(encoding="utf-8-sig", errors="replace").splitlines()
    names = list(dict.fromkeys(line.split()[0] for line in lines if line.strip()))
    if not names:
        raise DataError(f"{path}: an empty list; write the names of the images into it, or remove it")
    return names


def _part(files: SplitFiles, names: list[str]) -> SplitFiles:
    labels = files.labels
    chosen = None if labels is None else {name: labels[name] for name in names if name in labels}
    return SplitFiles({name: files.images[name] for name in sorted(names)}, chosen, files.label_dir)
