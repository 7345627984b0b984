"""Reading label files: class ids by value or by colour, and the legends that name them."""

import csv
import io
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ppap.data.checks import in_threads
from ppap.data.images import naming
from ppap.data.limits import check_file, check_size
from ppap.data.png import SIGNATURE, without_damage
from ppap.errors import DataError

LOSSLESS = ("PNG", "TIFF", "BMP", "GIF")
REMEDY = "labels must be index images: one class id per pixel, 8-bit greyscale or palette PNG"
_BY_COLOUR = "or give the colours: a legend file (labelmap.txt of CVAT, or NAME,R,G,B in a .csv) beside them"
_TABLES = ("labelmap.txt", "class_dict.csv", "classes.csv", "label_colors.csv", "labels.csv", "legend.csv")

Colour = tuple[int, int, int]


@dataclass(frozen=True)
class LabelReader:
    """Reads label files; picklable, and the same for the same settings."""

    colours: tuple[Colour, ...] = ()
    """Colour of the ids 0, 1, ...; empty = files hold ids."""

    def __call__(self, path: str | os.PathLike) -> np.ndarray:
        """(H, W) uint8 ids.

        Raises:
            DataError: as :func:`read_ids`, or a colour that is none of the legend's.
        """
        if not self.colours:
            return read_ids(path)
        packed = read_colours(path)
        known = np.array([_pack(colour) for colour in self.colours])
        order = np.argsort(known, kind="stable")
        place = np.searchsorted(known[order], packed).clip(max=len(known) - 1)
        ids = order[place]
        wrong = known[ids] != packed
        if wrong.any():
            value = int(packed[wrong][0])
            colour = (value >> 16, value >> 8 & 255, value & 255)
            raise DataError(
                f"{path}: the colour {colour} is none of the {len(known)} of the legend; add it there, or to "
                "--data.label-colours"
            )
        return ids.astype(np.uint8)


def read_ids(path: str | os.PathLike) -> np.ndarray:
    """Read class ids from a PNG, TIFF, BMP or GIF: 8-bit greyscale values or palette indices.

    A 1-bit file gives ids 0 and 1. A 16-bit one is accepted while no id is above 255, and so are three equal
    channels.

    Args:
        path: the file, judged by its content.

    Returns:
        (H, W) uint8 ids as stored, ignored ones included.

    Raises:
        DataError: unreadable; JPEG, which changes ids; colour or alpha channels; 2- or 4-bit greyscale, whose
            stored values viewers rescale, so that ids are ambiguous; ids above 255.
    """
    image = _open(path)
    packed, mode, ids = image.info.pop("packed"), image.mode, np.array(image)
    if mode in ("RGB", "RGBA") and (ids[..., :3] == ids[..., :1]).all():
        return ids[..., 0]
    if mode not in ("1", "L", "P", "I", "I;16", "I;16B"):
        raise DataError(f"{path}: this label has {mode} channels; {REMEDY}, {_BY_COLOUR}")
    if packed in ("L;2", "L;4"):
        raise DataError(f"{path}: ids in {packed[-1]}-bit greyscale are ambiguous; {REMEDY}")
    if ids.dtype != np.uint8 and ids.size and ids.max() > 255:
        raise DataError(f"{path}: id {ids.max()} is above 255; {REMEDY}")
    return ids.astype(np.uint8)


def read_colours(path: str | os.PathLike) -> np.ndarray:
    """(H, W) int64 colours, R * 65536 + G * 256 + B, of a label file; alpha is dropped.

    Raises:
        DataError: unreadable, or JPEG.
    """
    image = _open(path)
    if image.mode == "P" or image.mode == "PA":
        image = image.convert("RGBA")
    rgb = np.array(image.convert("RGB")).astype(np.int64)
    return rgb[..., 0] << 16 | rgb[..., 1] << 8 | rgb[..., 2]


def _open(path: str | os.PathLike) -> Image.Image:
    """A decoded label; ``info["packed"]`` has how its bits were packed."""
    with naming(path, "a label", LOSSLESS), _opened(path) as image:
        if image.format not in LOSSLESS:
            raise DataError(
                f"{path}: a {image.format} file, no PNG label: compression changes ids; write it as PNG"
            )
        check_size(image.size, path)
        tile = image.tile[0][3] if image.tile else ""
        image.load()
        copied = image.copy()
        copied.info["packed"] = tile if isinstance(tile, str) else ""
        return copied


def _opened(path: str | os.PathLike) -> Image.Image:
    """A label that is not decoded yet; of a PNG, whose pixels have checksums, these are verified."""
    check_file(path)
    with open(path, "rb") as file:
        start = file.read(len(SIGNATURE))
        source = io.BytesIO(without_damage(start + file.read())) if start == SIGNATURE else path
    return Image.open(source, formats=(*LOSSLESS, "JPEG", "WEBP"))


def used_palette(path: str | os.PathLike) -> dict[int, Colour] | None:
    """Index -> colour of the indices that occur in a palette file; None for other files.

    Raises:
        DataError: as :func:`read_ids`.
    """
    image = _open(path)
    if image.mode != "P":
        return None
    palette = image.getpalette("RGB") or []
    used = [i for i, count in enumerate(image.histogram()) if count and 3 * i + 2 < len(palette)]
    return {i: tuple(palette[3 * i : 3 * i + 3]) for i in used}


def disagreeing(palettes: Sequence[Mapping[int, Colour]]) -> tuple[Colour, ...]:
    """Colours of the ids 0, 1, ... where palettes of several files give one colour several indices.

    Args:
        palettes: of :func:`used_palette`, in the order of their names.

    Returns:
        Empty where indices mean the same in every file, or colours do not tell classes apart. Else the
        colours in the order of the first file's indices, those of the next files behind them.
    """
    places: dict[Colour, set[int]] = {}
    meanings: dict[int, set[Colour]] = {}
    for palette in palettes:
        if len({*palette.values()}) < len(palette):
            return ()  # one colour for two classes: only the index tells them apart
        for index, colour in palette.items():
            places.setdefault(colour, set()).add(index)
            meanings.setdefault(index, set()).add(colour)
    if not any(len(found) > 1 for found in places.values()) or all(len(m) == 1 for m in meanings.values()):
        return ()
    return tuple(dict.fromkeys(colour for palette in palettes for _, colour in sorted(palette.items())))


def find_legend(folders: Sequence[Path]) -> tuple[Path, tuple[str, ...], tuple[Colour, ...]] | None:
    """The first legend file in `folders`: its path, names and colours in its order.

    CVAT's ``labelmap.txt`` (``name:R,G,B:parts:actions``), or a table ``name,r,g,b``.

    Raises:
        DataError: it names a colour or a class twice.
    """
    for path in [folder / name for folder in dict.fromkeys(folders) for name in _TABLES]:
        if path.is_file() and (rows := _legend_rows(path)):
            names, colours = zip(*rows, strict=True)
            if len({*colours}) < len(colours):
                raise DataError(f"{path}: two classes have one colour; give each its own")
            return path, names, colours
    return None


def _legend_rows(path: Path) -> list[tuple[str, Colour]]:
    rows = []
    for line in path.read_text(encoding="utf-8-sig", errors="replace").splitlines():
        if path.suffix == ".txt":
            match = re.fullmatch(r"\s*([^#:][^:]*):\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*(:.*)?", line)
            cells = list(match.groups()[:4]) if match else []
        else:
            separator = ";" if ";" in line else "\t" if "\t" in line else ","
            cells = [cell.strip() for cell in next(csv.reader([line], delimiter=separator), [])]
        if len(cells) >= 4 and all(cell.isdecimal() and int(cell) < 256 for cell in cells[-3:]):
            rows.append((cells[0] if len(cells) == 4 else cells[-4], tuple(int(cell) for cell in cells[-3:])))
    return rows


def choose_colours(
    root: Path, labels: Sequence[Path], given: Sequence[str] = ()
) -> tuple[tuple[Colour, ...], tuple[str, ...], str | None]:
    """Colours of the ids, where labels are to be read by colour, the names of a legend, and what to say.

    Args:
        root: folder of the data; a legend lies there, beside the labels, or in between.
        labels: all label files.
        given: ``--data.label-colours``.

    Raises:
        DataError: an unreadable label among those that have palettes, or a legend that is not clear.
    """
    if given or not labels:
        return parse_colours(given), (), None
    sample = [labels[i] for i in np.unique(np.linspace(0, len(labels) - 1, 8).astype(int))]
    modes = [_mode(path) for path in sample]
    folders = dict.fromkeys(p for path in sample for p in path.parents if p == root or root in p.parents)
    legend = find_legend(list(folders)) if {"RGB", "RGBA", "P"} & {*modes} else None
    found = in_threads(_palette, labels, "palettes") if "P" in modes else ()
    palettes = [palette for palette in found if palette is not None]
    if legend is not None:
        path, names, colours = legend
        if not palettes or all({*palette.values()} <= {*colours} for palette in palettes):
            return colours, names, f"labels by colour, {len(colours)} of {path.name}"
    colours = disagreeing(palettes)
    if colours:
        listed = " ".join(hex_colours(colours[:8])) + (" ..." if len(colours) > 8 else "")
        return colours, (), f"palettes differ from file to file: labels by colour, ids 0, 1, ... = {listed}"
    return (), (), None


def _mode(path: Path) -> str:
    try:
        with _opened(path) as image:
            return image.mode if image.format in LOSSLESS else ""
    except Exception:  # the check of the labels says what is wrong
        return ""


def _palette(path: Path) -> dict[int, Colour] | None:
    try:
        return used_palette(path)
    except DataError:  # as above
        return None


def parse_colours(texts: Sequence[str]) -> tuple[Colour, ...]:
    """Colours of ``#rrggbb``."""
    return tuple((int(t[1:3], 16), int(t[3:5], 16), int(t[5:7], 16)) for t in texts)


def hex_colours(colours: Sequence[Colour]) -> list[str]:
    """The inverse of :func:`parse_colours`."""
    return ["#{:02x}{:02x}{:02x}".format(*colour) for colour in colours]


def _pack(colour: Colour) -> int:
    return colour[0] << 16 | colour[1] << 8 | colour[2]
