"""Reading image and label files: what is accepted, what is converted, and how a bad file is reported.

Only the decoders of ``FORMATS`` are ever tried, and Pillow's limit on pixels stays in force. Every failure is
a ``DataError`` that names the file. ``ppap/data/transforms.py`` takes over from here.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from ppap.errors import DataError

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP")
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp")

# EXIF orientation -> what makes the picture upright (1, or anything unknown: nothing to do).
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_PNG_ROTATION_KEYS = ("exif", "XML:com.adobe.xmp", "Raw profile type exif")


def read_image(path: str | os.PathLike) -> Image.Image:
    """Read a picture as upright RGB with 8 bits per channel.

    EXIF rotation is applied. Greyscale, 1-bit, palette, CMYK and YCbCr are converted, alpha is dropped,
    16-bit values keep their high byte, animations and multi-page files give their first frame.

    Args:
        path: a JPEG, PNG, WebP, TIFF or BMP file (judged by its content, not by its name).

    Returns:
        A decoded PIL image of mode RGB.

    Raises:
        DataError: missing, empty, truncated, not one of these formats, more pixels than Pillow's limit, or
            32-bit values, whose range nobody knows.
    """
    with naming(path), Image.open(path, formats=FORMATS) as image:
        _refuse_unknown_range(image, path)
        turn = _orientation(image)
        image.load()
        rgb = _to_rgb(image)
        # Pillow turns TIFF files itself while it decodes them.
        if turn in _UPRIGHT and image.format != "TIFF":
            rgb = rgb.transpose(_UPRIGHT[turn])
    return rgb


def verify_image(path: str | os.PathLike) -> tuple[int, int]:
    """Check that a file will decode, without keeping its pixels, and give its upright size.

    PNG: checksums of all chunks, no decompression. JPEG: the whole bit stream is entropy-decoded but
    reconstructed at 1/8 scale, which finds a file whose pixels are cut off. Other formats: decoded in full.
    Flipped bits inside a complete JPEG stay unseen: the format has no checksum.

    Args:
        path: as for :func:`read_image`.

    Returns:
        ``(width, height)`` in pixels after EXIF rotation.

    Raises:
        DataError: as :func:`read_image`.
    """
    with naming(path), Image.open(path, formats=FORMATS) as image:
        _refuse_unknown_range(image, path)
        width, height = image.size
        # Pillow gives the size of a TIFF file after rotation already.
        turned = image.format != "TIFF" and _orientation(image) >= 5
        if image.format == "PNG":
            image.verify()
        else:
            if image.format in ("JPEG", "MPO"):
                image.draft("L", (1, 1))
            image.load()
    return (height, width) if turned else (width, height)


def stored_size(path: str | os.PathLike) -> tuple[int, int]:
    """``(width, height)`` of an image file as its header says it, before EXIF rotation; no pixel is read.

    Raises:
        DataError: missing, empty, or none of the formats of :func:`read_image`.
    """
    with naming(path), Image.open(path, formats=FORMATS) as image:
        return image.size


def read_label(path: str | os.PathLike) -> np.ndarray:
    """Read class ids from a PNG: 8-bit greyscale values or palette indices.

    A 1-bit PNG gives ids 0 and 1. A 16-bit one is accepted while no id is above 255.

    Args:
        path: a PNG file.

    Returns:
        (H, W) uint8 ids as stored, ignored ones included.

    Raises:
        DataError: unreadable; colour or alpha channels; 2- or 4-bit greyscale, whose stored values viewers
            rescale, so that ids are ambiguous; ids above 255.
    """
    with naming(path, "a PNG label"), Image.open(path, formats=("PNG",)) as image:
        packed = str(image.tile[0][3]) if image.tile else ""
        image.load()
        mode, ids = image.mode, np.array(image)
    remedy = "labels must be index images: one class id per pixel, 8-bit greyscale or palette PNG"
    if mode not in ("1", "L", "P", "I", "I;16", "I;16B"):
        raise DataError(f"{path}: this label has {mode} channels; {remedy}")
    if packed in ("L;2", "L;4"):
        raise DataError(f"{path}: ids in {packed[-1]}-bit greyscale are ambiguous; {remedy}")
    if ids.dtype != np.uint8 and ids.size and ids.max() > 255:
        raise DataError(f"{path}: id {ids.max()} is above 255; {remedy}")
    return ids.astype(np.uint8)


def find_images(folder: Path) -> dict[str, list[Path]]:
    """Files below a folder by name, sorted, hidden files and folders left out, links followed.

    Args:
        folder: where to look; sub-folders are searched too.

    Returns:
        name (path relative to ``folder``, '/' between folders, no suffix) -> its image files, normally one.
    """
    found: dict[str, list[Path]] = {}
    visited = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(place)
        if real in visited:  # a link that points to one of its own parents
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(f for f in folders if not f.startswith((".", "__MACOSX")))
        for file in sorted(files):
            path = Path(place, file)
            if path.suffix.lower() in SUFFIXES and not file.startswith("."):
                found.setdefault(path.relative_to(folder).with_suffix("").as_posix(), []).append(path)
    return dict(sorted(found.items()))


@contextlib.contextmanager
def naming(path: str | os.PathLike, what: str = "an image") -> Iterator[None]:
    """Turn whatever a decoder raises into a DataError with the file's name."""
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except PermissionError:
        raise DataError(f"{path}: no permission to read it") from None
    except UnidentifiedImageError:
        empty = os.path.getsize(path) == 0
        reason = "the file is empty" if empty else f"not {what} in a supported format ({', '.join(FORMATS)})"
        raise DataError(f"{path}: {reason}; replace or remove the file") from None
    except Image.DecompressionBombError:
        limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
        raise DataError(f"{path}: more than {limit} pixels; make it smaller or remove it") from None
    except Exception as error:  # damaged input makes decoders raise nearly any type; only they run inside
        raise DataError(f"{path}: cannot be read as {what} ({error}); replace or remove the file") from None


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


def _refuse_unknown_range(image: Image.Image, path: str | os.PathLike) -> None:
    if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
        raise DataError(f"{path}: 32-bit values have no fixed range; save it with 8 or 16 bits per channel")


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits; Pillow's own conversion would clip instead of scale
        high = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
        return Image.fromarray(high).convert("RGB")
    if image.mode in ("P", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB warns when the palette has transparent entries
    return image.convert("RGB")
