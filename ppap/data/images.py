"""Reading pictures: what is accepted, what is converted, and how a bad file is reported.

One reader for files and for what Python has in hand. Only the decoders of ``scan.FORMATS`` are ever tried,
and those with more than ``--data.max-pixels`` are refused by their headers. Every failure is a ``DataError``
that names the file.
``ppap/data/deep.py`` reads more than 8 bits and more than three bands, ``ppap/data/label_files.py`` labels;
``ppap/data/transforms.py`` takes over from here.
"""

import contextlib
import io
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from ppap.data.deep import Reading, deep_values, tiff_facts, to_uint8
from ppap.data.limits import check_file, check_size
from ppap.data.scan import FORMATS, SUFFIXES
from ppap.data.scan import find_images as find_images  # listed beside what reads them
from ppap.errors import DataError, UsageError

__all__ = [
    "FORMATS",
    "SUFFIXES",
    "Reading",
    "find_images",
    "naming",
    "read_image",
    "read_label",
    "verify_image",
]

# EXIF orientation -> what makes the picture upright (1, or anything unknown: nothing to do).
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BACK = {**UPRIGHT, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
_PNG_ROTATION_KEYS = ("exif", "XML:com.adobe.xmp", "Raw profile type exif")
_FEW = 32  # values or colours that a mask has at most
AS_STORED = Reading()


def read_image(path: str | os.PathLike, reading: Reading = AS_STORED) -> Image.Image:
    """Read a picture as upright RGB with 8 bits per channel.

    EXIF rotation is applied. Greyscale, 1-bit, palette, CMYK and YCbCr are converted, alpha is dropped,
    16-bit values keep their high byte or are scaled as `reading` says, animations and multi-page files give
    their first frame.

    Args:
        path: a file of one of ``FORMATS`` (judged by its content, not by its name).
        reading: bands, range of values, rotation.

    Returns:
        A decoded PIL image of mode RGB.

    Raises:
        DataError: missing, empty, truncated, not one of these formats, more pixels than
            ``--data.max-pixels``,
            32-bit values without a range, or more than four bands of which none is chosen.
    """
    with naming(path):
        return _read(path, reading)


def as_picture(image: Any, reading: Reading = AS_STORED) -> Image.Image:
    """What :func:`read_image` gives, of a path or of an image in memory.

    Args:
        image: a path; a PIL image (EXIF rotation is applied); an array or tensor (H, W), (H, W, 3) or, of a
            tensor, (3, H, W), uint8 or uint16.
        reading: as for :func:`read_image`.

    Raises:
        DataError: as :func:`read_image`.
        UsageError: something else.
    """
    if isinstance(image, str | os.PathLike):
        return read_image(image, reading)
    if isinstance(image, Image.Image):
        with naming("the image given"):
            file = getattr(image, "fp", None)
            if getattr(image, "tile", None) and file is not None and image.format in FORMATS:
                place = file.tell()  # not decoded yet: the file holds more than Pillow would leave of it
                file.seek(0)
                content = file.read()
                file.seek(place)
                return _read(io.BytesIO(content), reading)
            return _convert(image, reading, "the image given")
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        channels_first = image.ndim == 3 and image.shape[0] == 3 and image.shape[2] != 3
        image = (image.movedim(0, -1) if channels_first else image).numpy()
    if isinstance(image, np.ndarray):
        grey = image[..., None] if image.ndim == 2 else image
        if grey.ndim == 3 and grey.shape[2] in (1, 3) and grey.size and grey.dtype in (np.uint8, np.uint16):
            return Image.fromarray(_rgb(to_uint8(grey, reading.value_range, "the image given")))
        got = f"an array of shape {image.shape} and dtype {image.dtype}"
    else:
        got = f"{type(image).__module__}.{type(image).__qualname__}"
    raise UsageError(
        f"the image is {got}; give a path, a PIL image, or an array or tensor (H, W, 3) of uint8 or uint16"
    )


def verify_image(path: str | os.PathLike, reading: Reading = AS_STORED) -> tuple[int, int]:
    """Check that a file will decode, without keeping its pixels, and give its upright size.

    PNG: checksums of all chunks, no decompression. JPEG: the whole bit stream is entropy-decoded but
    reconstructed at 1/8 scale, which finds a file whose pixels are cut off. Other formats: decoded in full.
    Flipped bits inside a complete JPEG stay unseen: the format has no checksum.

    Args:
        path, reading: as for :func:`read_image`.

    Returns:
        ``(width, height)`` in pixels after EXIF rotation.

    Raises:
        DataError: as :func:`read_image`.
    """
    with naming(path):
        if reading.bands or tiff_facts(path).special(reading):
            return _read(path, reading).size
        with Image.open(path, formats=FORMATS) as image:
            check_size(image.size, path)
            _refuse_unknown_range(image, path, reading)
            width, height = image.size
            turn = _orientation(image)
            if image.format == "PNG":
                image.verify()
            else:
                if image.format in ("JPEG", "MPO"):
                    image.draft("L", (1, 1))
                image.load()
            # Pillow gives the size of a TIFF file after rotation already.
            turned = turn >= 5 and (image.format == "TIFF") == (reading.exif == "ignore")
    return (height, width) if turned else (width, height)


def stored_size(path: str | os.PathLike) -> tuple[int, int]:
    """``(width, height)`` of an image file as its header says it, before EXIF rotation; no pixel is read.

    Raises:
        DataError: missing, empty, or none of the formats of :func:`read_image`.
    """
    with naming(path), Image.open(path, formats=FORMATS) as image:
        return image.size


def orientation(path: str | os.PathLike) -> int:
    """EXIF orientation 1..8 of a file, 1 where there is none.

    Raises:
        DataError: as :func:`stored_size`.
    """
    with naming(path), Image.open(path, formats=FORMATS) as image:
        return _orientation(image)


def looks_like_mask(path: str | os.PathLike) -> bool:
    """Whether a file may be a mask: a palette, one bit, or at most 32 values; False if unreadable."""
    try:
        check_file(path)
        with Image.open(path, formats=FORMATS) as image:
            check_size(image.size, path)
            if image.format in ("JPEG", "MPO"):
                return False
            return image.mode in ("1", "P") or image.getcolors(_FEW) is not None
    except Exception:  # damaged, or no image: the check of the pictures says so
        return False


def read_label(path: str | os.PathLike) -> np.ndarray:
    """(H, W) uint8 ids of a label file; see :func:`ppap.data.label_files.read_ids`."""
    from ppap.data.label_files import read_ids

    return read_ids(path)


@contextlib.contextmanager
def naming(path: Any, what: str = "an image", formats: Sequence[str] = FORMATS) -> Iterator[None]:
    """Turn whatever a decoder raises into a DataError with the file's name; pipes and devices are refused."""
    try:
        check_file(path)
        yield
    except (DataError, UsageError):
        raise
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except PermissionError:
        raise DataError(f"{path}: no permission to read it") from None
    except UnidentifiedImageError:
        empty = isinstance(path, str | os.PathLike) and os.path.exists(path) and os.path.getsize(path) == 0
        reason = "the file is empty" if empty else f"not {what} in a supported format ({', '.join(formats)})"
        raise DataError(f"{path}: {reason}; replace or remove the file") from None
    except Image.DecompressionBombError:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise DataError(f"{path}: more than {limit} pixels; make it smaller or remove it") from None
    except Exception as error:  # damaged input makes decoders raise nearly any type; only they run inside
        raise DataError(f"{path}: cannot be read as {what} ({error}); replace or remove the file") from None


def _read(source: Any, reading: Reading) -> Image.Image:
    """A picture from a path or an open file."""
    name = source if isinstance(source, str | os.PathLike) else "the image given"
    facts = tiff_facts(source)
    if facts.special(reading):
        values = facts.values(source, name)
        turn = facts.orientation if reading.exif == "apply" else 1
        picture = Image.fromarray(_rgb(to_uint8(reading.choose(values, name), reading.value_range, name)))
        return picture.transpose(UPRIGHT[turn]) if turn in UPRIGHT else picture
    with Image.open(source, formats=FORMATS) as image:
        return _convert(image, reading, name, source)


def _convert(image: Image.Image, reading: Reading, name: Any, source: Any = None) -> Image.Image:
    """RGB of a PIL image, decoded or not; `source` is its file, from which 16 bits a channel are read."""
    check_size(image.size, name)
    _refuse_unknown_range(image, name, reading)
    turn, tiff = _orientation(image), image.format == "TIFF"
    values = deep_values(image, source)
    if values is None and reading.bands:
        image.load()
        values = np.atleast_3d(np.array(image))
    if values is None:
        rgb = _to_rgb(image)
    else:
        chosen = reading.choose(values, name) if reading.bands else values[..., :3]
        rgb = Image.fromarray(_rgb(to_uint8(chosen, reading.value_range, name)))
    rgb.info = {}  # no orientation that the next reader would apply once more
    if tiff:  # Pillow turns TIFF files itself while it decodes them
        return rgb.transpose(_BACK[turn]) if turn in _BACK and reading.exif == "ignore" else rgb
    return rgb.transpose(UPRIGHT[turn]) if turn in UPRIGHT and reading.exif == "apply" else rgb


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1..8; 1 where there is none or the metadata is damaged. Call before decoding."""
    # Pillow would decode a PNG to look for metadata after the pixels; writers put it in front of them.
    if image.format == "PNG" and not any(key in image.info for key in _PNG_ROTATION_KEYS):
        return 1
    try:
        value = image.getexif().get(0x0112, 1)
    except Exception:  # unreadable metadata is no reason to refuse readable pixels
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _refuse_unknown_range(image: Image.Image, path: Any, reading: Reading) -> None:
    unknown = image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM"))
    if unknown and not reading.value_range:
        raise DataError(
            f"{path}: 32-bit values have no fixed range; give --data.value-range LOW HIGH, or save it with 8 "
            "or 16 bits per channel"
        )


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("P", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB warns when the palette has transparent entries
    return image.convert("RGB")


def _rgb(values: np.ndarray) -> np.ndarray:
    """(H, W, 3) of (H, W, 1 or 3)."""
    return np.ascontiguousarray(np.broadcast_to(values, (*values.shape[:2], 3)))
