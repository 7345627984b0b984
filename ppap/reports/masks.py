"""The files of ``ppap predict``: images found, masks refused or free to be written, and their legend."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ppap.data.scan import SUFFIXES, scan
from ppap.errors import DataError, UsageError
from ppap.evaluation.predictor import Predictor
from ppap.pictures.drawing import IGNORED_INDEX, IGNORED_INDEX_16, legend, save_whole
from ppap.reports.records import RANDOM_WARNING
from ppap.runs.disk import write_whole
from ppap.settings.plain import misfit, parse_json

_UNFINISHED = ".unfinished.json"


def find_images(paths: Sequence[str]) -> dict[str, Path]:
    """Stem in the output folder -> file, of image files and folders of images.

    Raises:
        UsageError: no paths.
        DataError: a path is missing, a folder has no images, or two files would give the same mask.
    """
    files: dict[str, Path] = {}
    if not paths:
        raise UsageError("no images are given; name image files or folders after the checkpoint")
    for given in map(Path, paths):
        if not given.exists():
            raise DataError(f"there is no image or folder {given}; check the path")
        found = _found_in(given)
        if not found:
            raise DataError(
                f"{given} has no images ({', '.join(sorted(SUFFIXES))}); give files or a folder of images"
            )
        for stem, path in found:
            if Path(stem).name.strip(". ") == "":
                raise DataError(f"{path} has no name before its suffix for a mask to take; rename the image")
            if stem == "legend":
                raise DataError(f"the mask of {path} would be named like the legend; rename the image")
            if stem in files and not path.samefile(files[stem]):
                raise DataError(
                    f"{files[stem]} and {path} would both become {stem}.png; predict them separately"
                )
            files[stem] = path
    return files


def _found_in(given: Path) -> list[tuple[str, Path]]:
    """(stem in the output folder, file) of one file, or of all images below a folder."""
    if not given.is_dir():
        return [(given.stem, given)]
    found = scan(given)
    for note in found.notes():
        print(f"{given}: {note}")
    return [(name, path) for name, paths in found.images.items() for path in paths]


def check_free(
    out: Path,
    files: dict[str, Path],
    overwrite: bool,
    going_on: bool = False,
    ends: Sequence[str] = (".png", "_overlay.jpg"),
) -> None:
    """Refuse to write over an image, or without `overwrite` over any file.

    Args:
        out: folder of the masks.
        files: stem -> image, of :func:`find_images`.
        overwrite: files may be replaced.
        going_on: overlays and the like may be replaced, which a stop before their masks has left.
        ends: of the files' names, behind the stem.

    Raises:
        UsageError: names the file.
    """
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file; give a folder")
    targets = [out / f"{stem}{end}" for stem in files for end in ends]
    inputs = {path.resolve() for path in files.values()}
    clash = [path for path in targets if path.resolve() in inputs]
    if clash:
        raise UsageError(f"{clash[0]} is one of the images; give another --out")
    taken = [path for path in targets if path.exists() and not (going_on and path.suffix != ".png")]
    if taken and not overwrite:
        raise UsageError(
            f"{taken[0]} exists already ({len(taken)} files); give another --out, or --overwrite, or "
            "--skip-existing to go on"
        )


def is_unfinished(out: Path, record: dict[str, Any]) -> bool:
    """Whether a command with this record was ended before it was done with the folder."""
    try:
        return parse_json((out / _UNFINISHED).read_bytes()) == record
    except (OSError, ValueError):
        return False


@contextmanager
def unfinished(out: Path, record: dict[str, Any]) -> Iterator[None]:
    """While masks are written the folder has a note of what they follow from, which an end by force leaves.

    Raises:
        DataError: the disk refuses.
    """
    note = out / _UNFINISHED
    try:
        write_whole(note, json.dumps(record) + "\n")
    except OSError as error:
        raise DataError(f"cannot write to {out} ({error.strerror or error}); give another --out") from None
    yield
    note.unlink(missing_ok=True)


def is_begun(out: Path) -> bool:
    """Whether masks were being written when a command was ended by force."""
    return (out / _UNFINISHED).exists()


def ignored_id(ids: Sequence[int]) -> int:
    """Pixel value of masks for pixels without a class: 255, or the largest below that is no class."""
    if max(ids) > 255:
        return IGNORED_INDEX_16
    return max({*range(IGNORED_INDEX + 1)} - {*ids}, default=IGNORED_INDEX)


def colours_by_id(ids: Sequence[int], colours: np.ndarray) -> np.ndarray:
    """(max id + 1, 3) uint8: the colour of each id; ids that are no class have the colour 0."""
    table = np.zeros((max(ids) + 1, 3), np.uint8)
    for i, colour in zip(ids, colours, strict=True):
        if i >= 0:
            table[i] = colour
    return table


def write_legend(out: Path, predictor: Predictor, probe: str, overwrite: bool) -> None:
    """Write the legend, unless that would give other names to the masks that are in the folder already.

    Raises:
        UsageError: it would.
        DataError: the disk refuses.
    """
    ids, names, colours = predictor.ids(probe), predictor.names(probe), predictor.colours(probe)
    named = predictor.named if probe == "cluster" else None
    clusters = {region.id: list(region.clusters) for region in named.regions} if named else {}
    record: dict[str, Any] = {
        "probe": probe,
        "backbone": predictor.origin,
        "warning": RANDOM_WARNING if predictor.engine.net.backbone.is_random else None,
        "ignored_id": ignored_id(ids),
        "classes": [
            {"id": i, "name": name, "rgb": [int(v) for v in colour]}
            | ({"clusters": clusters[i]} if named else {})
            for i, name, colour in zip(ids, names, colours, strict=True)
            if i >= 0
        ],
    }
    if named:
        record["named_by"] = named.record()
    text, path = json.dumps(record, indent=2) + "\n", out / "legend.json"
    if not overwrite:
        # As bytes: a damaged legend may be no text at all.
        if path.exists() and path.read_bytes() != text.encode():
            raise UsageError(
                f"{path} names the ids of other masks in that folder; give another --out, or --overwrite"
            )
        if (out / "legend.png").exists() and not path.exists():
            raise UsageError(f"{out / 'legend.png'} exists already; give another --out, or --overwrite")
    try:
        out.mkdir(parents=True, exist_ok=True)
        # The picture comes last: alone it would be taken for another's.
        write_whole(path, text)
        save_whole(legend(names, colours), out / "legend.png")
    except OSError as error:
        raise DataError(f"cannot write to {out} ({error.strerror or error}); give another --out") from None


def read_legend(folder: Path) -> dict[str, Any]:
    """What :func:`write_legend` wrote: ``ignored_id``, and ``classes``, each with id, name and rgb.

    Raises:
        DataError: there is none, or it is damaged.
    """
    path = folder / "legend.json"
    try:
        legend = parse_json(path.read_bytes())
    except OSError as error:
        raise DataError(
            f"{path} cannot be read ({error.strerror or error}); give a folder that `ppap predict` wrote"
        ) from None
    except ValueError as error:
        raise DataError(f"{path} is no JSON ({error}); predict the images again") from None
    entry = {"id": int, "name": str, "rgb": tuple[int, int, int]}
    if not _has(legend, {"ignored_id": int, "classes": list[Any]}) or not legend["classes"]:
        raise DataError(f"{path} is no legend of ppap predict; predict the images again")
    if not all(_has(one, entry) for one in legend["classes"]):
        raise DataError(f"{path}: a class lacks its id, name or rgb; predict the images again")
    return legend


def _has(values: Any, hints: dict[str, Any]) -> bool:
    return isinstance(values, dict) and {*hints} <= {*values} and misfit(values, hints) is None
