"""Pictures for people: colours, index PNGs, overlays, legends, strips; ``curves.py`` draws losses and scores.

Label maps hold class ids >= 0; negative ids are ignored pixels and are drawn as grey hatching.
"""

import contextlib
import functools
import math
import os
from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ppap.pictures.palette import MAX_COLOURS, palette

IGNORED_INDEX = 255
"""Value of ignored pixels in an index PNG of up to 256 classes."""
IGNORED_INDEX_16 = 65535
"""The same with more classes."""

_GREYS = ((150, 150, 150), (198, 198, 198))
_HATCH_PERIOD = 8  # pixels
_BACKGROUND = (255, 255, 255)
_INK = (32, 32, 32)
_TEXT_SIZE = 15  # pixels: readable at 100 % zoom and in a scaled-down README
_GAP = 8  # pixels
_LEGEND_LIMIT = 64  # classes
_ROWS = 256  # pixels mixed at a time


@contextlib.contextmanager
def replacing(path: str | PathLike) -> Iterator[Path]:
    """A file beside its place, to be written in the block and renamed after it: a stop leaves no half of it.

    Args:
        path: file, replaced if it is there.

    Raises:
        OSError: the disk refuses; what was there stays.
    """
    path = Path(path)
    aside = path.with_name(f".{path.stem}.new{path.suffix}")
    try:
        yield aside
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)
        raise


def save_whole(picture: Image.Image, path: str | PathLike, **options: Any) -> None:
    """Write a picture by :func:`replacing`.

    Args:
        picture: what to write.
        path: file, replaced if it is there.
        options: of Pillow's ``save``; without ``format`` the suffix decides.

    Raises:
        OSError: the disk refuses; what was there stays.
    """
    with replacing(path) as aside:
        picture.save(aside, **options)


def save_index_png(
    labels: Any, path: str | PathLike, colours: np.ndarray | None = None, ignored_index: int = IGNORED_INDEX
) -> None:
    """Write class ids as the pixel values of a mode P PNG; ignored pixels become `ignored_index` (grey).

    It is written whole or not at all. With more than 256 colours it is a 16-bit greyscale PNG instead, and
    ignored pixels become 65535.

    Args:
        labels: (H, W) integer class ids, numpy or torch; negative = ignored.
        path: file to write.
        colours: (n, 3) uint8; None = palette(256).
        ignored_index: 0 to 255, of a PNG with 8 bits.

    Raises:
        ValueError: wrong shape or dtype, an id that `colours` lacks, or `ignored_index` is a class's too.
    """
    labels = _as_labels(labels)
    colours = palette(256) if colours is None else _as_colours(colours)
    _check_ids(labels, len(colours))
    ignored = labels < 0
    if len(colours) <= 256 and ignored.any() and (labels == ignored_index).any():
        raise ValueError(
            f"save_index_png: class {ignored_index} and ignored pixels would share the value "
            f"{ignored_index}; write them apart"
        )
    kind = np.uint8 if len(colours) <= 256 else np.uint16
    value = ignored_index if len(colours) <= 256 else IGNORED_INDEX_16
    values = np.where(ignored, value, labels).astype(kind)
    save_values_png(values, path, colours, value if ignored.any() else None)


def save_values_png(
    values: np.ndarray, path: str | PathLike, colours: np.ndarray, ignored: int | None
) -> None:
    """Write pixel values as :func:`save_index_png` does, with no copy of them.

    Args:
        values: (H, W) uint8 or, with more than 256 colours, uint16.
        path: file to write.
        colours: (n, 3) uint8.
        ignored: the value of ignored pixels; None = there are none.
    """
    picture = Image.fromarray(values)
    if values.dtype == np.uint8:
        table = np.full((256, 3), _GREYS[0], dtype=np.uint8)
        table[: len(colours)] = colours
        if ignored is not None:
            table[ignored] = _GREYS[0]
        picture.putpalette(table.tobytes())  # turns mode L into P, values unchanged
    save_whole(picture, path, format="PNG")


def colourise(labels: Any, colours: np.ndarray | None = None) -> np.ndarray:
    """(H, W) integer class ids -> (H, W, 3) uint8 RGB; ignored pixels hatched in grey.

    Raises:
        ValueError: wrong shape or dtype, or an id that `colours` (None = palette(256)) lacks.
    """
    labels = _as_labels(labels)
    colours = palette(256) if colours is None else _as_colours(colours)
    _check_ids(labels, len(colours))
    if len(colours) == 0:
        return _hatching(*labels.shape)
    ignored = labels < 0
    picture = colours[np.maximum(labels, 0)]
    if ignored.any():
        picture[ignored] = _hatching(*labels.shape)[ignored]
    return picture


def overlay(image: Any, labels: Any, alpha: float = 0.5, colours: np.ndarray | None = None) -> Image.Image:
    """The image with class colours laid over it; ignored pixels show the image alone.

    Args:
        image: (H, W, 3) uint8 RGB, numpy or torch.
        labels: (H, W) integer class ids; negative = ignored.
        alpha: share of the class colour, 0 to 1.
        colours: (n, 3) uint8; None = palette(256).

    Returns:
        RGB picture of W x H pixels.

    Raises:
        ValueError: shapes or dtypes do not fit, an id that `colours` lacks, or `alpha` outside 0..1.
    """
    image, labels = _as_image(image), _as_labels(labels)
    if image.shape[:2] != labels.shape:
        raise ValueError(f"overlay: the image is {image.shape[:2]}, the labels are {labels.shape} (H, W)")
    if not 0 <= alpha <= 1:
        raise ValueError(f"overlay: alpha is {alpha}; give 0 to 1")
    colours = palette(256) if colours is None else _as_colours(colours)
    _check_ids(labels, len(colours))
    tint = np.append(alpha * colours + 0.5, np.zeros((1, 3)), axis=0).astype(np.float32)  # 0.5: to be cut off
    mixed = np.empty(image.shape, np.uint8)
    for top in range(0, len(labels), _ROWS):  # float32, several times the memory of the picture
        part = slice(top, top + _ROWS)
        mixed[part] = image[part] * np.float32(1 - alpha) + tint[np.maximum(labels[part], -1)]
    np.copyto(mixed, image, where=(labels < 0)[..., None])
    return Image.fromarray(mixed)


def legend(names: Sequence[str], colours: np.ndarray | None = None, width: int = 640) -> Image.Image:
    """Swatches with class names, in as many columns as fit.

    Args:
        names: one per class, in the order of the ids.
        colours: (n, 3) uint8, n >= len(names); None = palette(len(names)).
        width: of the picture [pixels]; a longer name makes it wider.

    Returns:
        RGB picture.

    Raises:
        ValueError: no names, or fewer colours than names.
    """
    colours = palette(len(names)) if colours is None else _as_colours(colours)
    if not names or len(colours) < len(names):
        raise ValueError(
            f"legend: {len(names)} names and {len(colours)} colours; give at least one of each per class"
        )
    side, line = _TEXT_SIZE, _TEXT_SIZE + _GAP
    cell = side + 3 * _GAP + max(_text_width(name) for name in names)
    columns = max(1, min(len(names), (width - _GAP) // cell))
    lines = math.ceil(len(names) / columns)
    picture = Image.new("RGB", (max(width, cell + _GAP), lines * line + _GAP), _BACKGROUND)
    draw = ImageDraw.Draw(picture)
    for i, name in enumerate(names):
        x, y = _GAP + i // lines * cell, _GAP + i % lines * line
        draw.rectangle((x, y, x + side, y + side), fill=tuple(map(int, colours[i])), outline=_INK)
        draw.text((x + side + _GAP, y + side / 2), name, fill=_INK, font=_font(), anchor="lm")
    return picture


def strip(
    rows: Sequence[Sequence[Any]],
    column_titles: Sequence[str],
    path: str | PathLike | None = None,
    *,
    colours: np.ndarray | None = None,
    names: Sequence[str] = (),
    cell: int = 200,
) -> Image.Image:
    """A grid to compare by eye: image | truth | clusters | linear, one row per image.

    Args:
        rows: cells per row, each a (H, W, 3) uint8 image or a (H, W) integer label map (negative = ignored,
            hatched).
        column_titles: one per column.
        path: file to write; None = none.
        colours: (n, 3) uint8; None = palette(256).
        names: class names for a legend below, of more than 64 only those that occur; empty = no legend.
        cell: longer side of a cell [pixels].

    Returns:
        RGB picture.

    Raises:
        ValueError: no rows, a row whose length differs from the titles', or a cell of another kind.
    """
    if not rows or any(len(row) != len(column_titles) for row in rows):
        raise ValueError(f"strip: give rows of {len(column_titles)} cells each, as many as column titles")
    pictures = [[_cell(values, colours, cell) for values in row] for row in rows]
    widths = [max(row[j].width for row in pictures) for j in range(len(column_titles))]
    widths = [max(w, _text_width(title)) for w, title in zip(widths, column_titles, strict=True)]
    heights = [max(picture.height for picture in row) for row in pictures]
    names, swatches = _occurring(names, colours, rows)
    below = legend(names, swatches, sum(widths) + _GAP * (len(widths) + 1)) if names else None
    title_height = _TEXT_SIZE + 2 * _GAP
    size = (
        max(sum(widths) + _GAP * (len(widths) + 1), below.width if below else 0),
        title_height + sum(heights) + _GAP * len(heights) + (below.height if below else 0),
    )
    sheet = Image.new("RGB", size, _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    x = _GAP
    for j, title in enumerate(column_titles):
        draw.text((x + widths[j] / 2, title_height / 2), title, fill=_INK, font=_font(), anchor="mm")
        y = title_height
        for i, row in enumerate(pictures):
            sheet.paste(row[j], (x + (widths[j] - row[j].width) // 2, y + (heights[i] - row[j].height) // 2))
            y += heights[i] + _GAP
        x += widths[j] + _GAP
    if below:
        sheet.paste(below, (0, size[1] - below.height))
    if path is not None:
        save_whole(sheet, path)
    return sheet


def _occurring(
    names: Sequence[str], colours: np.ndarray | None, rows: Sequence[Sequence[Any]]
) -> tuple[Sequence[str], np.ndarray | None]:
    """Names and colours of a legend: all of a few, of many those that the cells show."""
    if len(names) <= _LEGEND_LIMIT:
        return names, colours
    maps = [_as_labels(cell) for row in rows for cell in row if np.asarray(cell).ndim == 2]
    shown = sorted({int(i) for labels in maps for i in np.unique(labels) if 0 <= i < len(names)})
    colours = palette(len(names)) if colours is None else _as_colours(colours)
    return [names[i] for i in shown], colours[shown]


def _cell(values: Any, colours: np.ndarray | None, side: int) -> Image.Image:
    """An image or a coloured label map, scaled so that its longer side is `side` pixels."""
    is_labels = np.asarray(values).ndim == 2
    labels = _as_labels(values) if is_labels else None
    pixels = colourise(labels, colours) if is_labels else _as_image(values)
    scale = side / max(pixels.shape[:2])
    size = (max(1, round(pixels.shape[1] * scale)), max(1, round(pixels.shape[0] * scale)))
    # Nearest keeps labels pure and small images honest about their pixels; a reduced photograph is averaged
    # instead.
    smooth = not is_labels and scale < 1
    picture = Image.fromarray(pixels).resize(
        size, Image.Resampling.BOX if smooth else Image.Resampling.NEAREST
    )
    if is_labels and (labels < 0).any():
        # Hatched at the final scale, so that every cell shows the same hatching.
        ignored = Image.fromarray(((labels < 0) * 255).astype(np.uint8)).resize(
            size, Image.Resampling.NEAREST
        )
        picture.paste(Image.fromarray(_hatching(size[1], size[0])), mask=ignored)
    return picture


def _hatching(height: int, width: int) -> np.ndarray:
    """(height, width, 3) uint8: diagonal stripes of two greys."""
    diagonal = np.add.outer(np.arange(height), np.arange(width)) % _HATCH_PERIOD < _HATCH_PERIOD // 2
    return np.where(diagonal[..., None], *np.array(_GREYS, dtype=np.uint8))


@functools.cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size=_TEXT_SIZE)


def _text_width(text: str) -> int:
    return math.ceil(_font().getlength(text))


def _as_labels(labels: Any) -> np.ndarray:
    labels = np.asarray(labels.cpu() if hasattr(labels, "cpu") else labels)
    if labels.ndim != 2 or labels.size == 0 or labels.dtype.kind not in "iu":
        raise ValueError(f"labels have shape {labels.shape} and dtype {labels.dtype}; give (H, W) integers")
    return labels.astype(np.int64)


def _as_image(image: Any) -> np.ndarray:
    image = np.asarray(image.cpu() if hasattr(image, "cpu") else image)
    if image.ndim != 3 or image.shape[2] != 3 or image.size == 0 or image.dtype != np.uint8:
        raise ValueError(
            f"the image has shape {image.shape} and dtype {image.dtype}; give (H, W, 3) uint8 RGB"
        )
    return image


def _as_colours(colours: Any) -> np.ndarray:
    colours = np.asarray(colours)
    if colours.ndim != 2 or colours.shape[1] != 3 or len(colours) > MAX_COLOURS or colours.dtype != np.uint8:
        raise ValueError(
            f"colours have shape {colours.shape} and dtype {colours.dtype}; "
            f"give (n <= {MAX_COLOURS}, 3) uint8 RGB"
        )
    return colours


def _check_ids(labels: np.ndarray, colours: int) -> None:
    if labels.max() >= colours:
        raise ValueError(
            f"labels go up to {labels.max()}, but there are {colours} colours (ids 0..{colours - 1})"
        )
