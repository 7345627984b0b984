"""Pictures with more than 8 bits or more than three bands: which bands, and what becomes black and white.

Pillow keeps the high byte of 16 bits of colour; decoding once more in the other order of bytes gives the low
one. Files of bands that Pillow cannot decode are read by tifffile, where it is installed.
"""

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image, TiffImagePlugin

from ppap.data.limits import check_file, check_size
from ppap.data.scan import FORMATS
from ppap.errors import DataError

_SWAPPED = {"L": "B", "B": "L", "N": "B"}  # native order is little-endian on what we run on
_FULL = 65535
_SAMPLE = 32  # images whose values are looked at


@dataclass(frozen=True)
class Reading:
    """How pictures are read; the same in training, evaluation and prediction."""

    bands: tuple[int, ...] = ()
    """Numbers from 1 of the bands taken for red, green and blue, or of one for grey; empty = the first
    three."""
    value_range: tuple[float, ...] = ()
    """Values of more than 8 bits that become black and white; empty = 0 and 65535."""
    exif: Literal["apply", "ignore"] = "apply"
    """Whether EXIF rotation is applied."""

    def choose(self, values: np.ndarray, name: Any) -> np.ndarray:
        """(H, W, 1 or 3): the chosen bands of values (H, W, bands).

        Raises:
            DataError: there is no such band, or nobody said which of more than four.
        """
        count = values.shape[2]
        if not self.bands:
            if count == 2 or count > 4:
                raise DataError(
                    f"{name}: {count} bands; give --data.bands R G B, their numbers from 1, or one for grey"
                )
            return values[..., : 3 if count > 2 else 1]
        if max(self.bands) > count:
            raise DataError(f"{name}: it has {count} bands, no band {max(self.bands)}; change --data.bands")
        return values[..., [band - 1 for band in self.bands]]


@dataclass(frozen=True)
class TiffFacts:
    """What the header of a TIFF file says; zeros for other files."""

    bands: int = 0
    bits: int = 0
    floats: bool = False
    orientation: int = 1
    photometric: int = 0
    """How values become colours: 1 = grey, black is 0; 2 = RGB."""

    def special(self, reading: Reading) -> bool:
        """Whether Pillow cannot decode it, or leaves out a band that is asked for."""
        plain = self.bands in (0, 1, 3, 4) and not (self.floats and self.bands > 1) and self.bits <= 32
        return not plain or bool(reading.bands and self.bands and self.bands != 3)

    def values(self, source: Any, name: Any) -> np.ndarray:
        """(H, W, bands) as stored, by tifffile.

        Raises:
            DataError: it is not installed.
        """
        try:
            import tifffile
        except ImportError:
            what = "floating point" if self.floats else f"{self.bits}-bit"
            raise DataError(
                f"{name}: a TIFF of {self.bands} {what} bands, which Pillow does not read; "
                "pip install tifffile imagecodecs, and give --data.bands R G B (numbers from 1)"
            ) from None
        with tifffile.TiffFile(source) as file:
            page = file.pages[0]
            check_size((page.imagewidth, page.imagelength), name)
            values = page.asarray()
            planar = page.planarconfig == 2
        if values.ndim == 3 and planar:
            values = np.moveaxis(values, 0, -1)
        return values if values.ndim == 3 else values[..., None]


def tiff_facts(source: Any) -> TiffFacts:
    """Facts of a path or an open file, which stays where it is."""
    if not isinstance(source, str | os.PathLike):
        return _facts(source)
    with open(source, "rb") as file:
        return _facts(file)


def _facts(file: Any) -> TiffFacts:
    place = file.tell()
    try:
        head = file.read(8)
        if head[:4] in (b"II+\0", b"MM\0+"):  # BigTIFF
            head += file.read(8)
        elif head[:4] not in (b"II*\0", b"MM\0*"):
            return TiffFacts()
        tags = TiffImagePlugin.ImageFileDirectory_v2(head)
        file.seek(tags.next)
        tags.load(file)
        formats = tags.get(339, (1,))
        bits = tags.get(258, (1,))
        bands, turn, colours = int(tags.get(277, 1)), int(tags.get(274, 1)), int(tags.get(262, 0))
        return TiffFacts(bands, max(bits), 3 in formats, turn, colours)
    except Exception:  # damaged: the decoder says how
        return TiffFacts()
    finally:
        file.seek(place)


def deep_values(image: Image.Image, source: Any = None) -> np.ndarray | None:
    """(H, W, channels) uint16, or float, of an image with more than 8 bits; None where it has no more.

    Args:
        image: not decoded yet, if `source` is given.
        source: path or file it was opened from; without, 16 bits of colour are not to be had any more.
    """
    if image.mode.startswith("I") or image.mode == "F":
        image.load()
        values = np.array(image)[..., None]
        wide = image.mode == "F" or values.max(initial=0) > _FULL
        return values if wide else values.clip(0, _FULL).astype(np.uint16)
    raw = _raw_mode(image)
    if "RGBa" in raw:
        # Associated alpha, or a band of infrared that a program wrote as such: colours are taken as they are.
        _set_raw_mode(image, raw.replace("RGBa", "RGBA"))
        raw = raw.replace("RGBa", "RGBA")
    if ";16" not in raw or image.mode not in ("RGB", "RGBA") or source is None:
        return None
    image.load()
    high = np.array(image)
    if not isinstance(source, str | os.PathLike):
        source.seek(0)
        source = io.BytesIO(source.read())
    with Image.open(source, formats=(image.format,)) as again:
        _set_raw_mode(again, raw[:-1] + _SWAPPED[raw[-1]])
        low = np.array(again)
    return high.astype(np.uint16) << 8 | low


def sampled_range(paths: Sequence[Path], reading: Reading) -> tuple[float, float] | None:
    """Values that half a percent of the pixels of a sample lie below and above, for integers of more than 8
    bits that use less than a quarter of 16; None for other images, and where files cannot be read."""
    lows, highs = [], []
    for i in np.unique(np.linspace(0, len(paths) - 1, _SAMPLE).astype(int)) if paths else ():
        try:
            values = _values_of(paths[i], reading)
        except Exception:  # the check of the images says what is wrong
            continue
        if values is not None and values.dtype.kind in "iu" and values.dtype != np.uint8 and values.size:
            low, high = np.percentile(values, (0.5, 99.5))
            lows.append(low)
            highs.append(high)
    if not highs or max(highs) >= (_FULL + 1) / 4 or max(highs) <= min(lows):
        return None
    return float(np.floor(min(lows))), float(np.ceil(max(highs)))


def _values_of(path: Path, reading: Reading) -> np.ndarray | None:
    check_file(path)
    facts = tiff_facts(path)
    if facts.special(reading):
        return reading.choose(facts.values(path, path), path)
    with Image.open(path, formats=FORMATS) as image:
        check_size(image.size, path)
        values = deep_values(image, path)
        return None if values is None else reading.choose(values, path)


def _raw_mode(image: Image.Image) -> str:
    tile = getattr(image, "tile", None)
    if not tile:
        return ""
    args = tile[0][3]
    return args if isinstance(args, str) else str(args[0]) if isinstance(args, tuple) and args else ""


def _set_raw_mode(image: Image.Image, raw: str) -> None:
    def changed(args: Any) -> Any:
        return raw if isinstance(args, str) else (raw, *args[1:])

    image.tile = [tile._replace(args=changed(tile.args)) for tile in image.tile]


def to_uint8(values: np.ndarray, value_range: tuple[float, ...], name: Any) -> np.ndarray:
    """Values of any type to 8 bits: the range is cut into 256 equal parts; 8 bits stay as they are.

    Raises:
        DataError: floating point without a range.
    """
    if values.dtype == np.uint8:
        return values
    whole = values.dtype.kind in "iu"
    if not value_range and not whole:
        raise DataError(
            f"{name}: floating-point values have no fixed range; give --data.value-range LOW HIGH"
        )
    low, high = value_range or (0, _FULL)
    share = (np.nan_to_num(values.astype(np.float64)) - low) / (high - low + whole)
    return np.floor(share * 256).clip(0, 255).astype(np.uint8)
