"""Pictures read part by part, and where on the ground they lie: GeoTIFF, through rasterio if it is here.

Any other picture is decoded as a whole and parts are cut from it: then it is in memory, with three bytes a
pixel.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from PIL import Image

from ppap.data.deep import Reading, tiff_facts, to_uint8
from ppap.data.images import naming, read_image
from ppap.data.limits import check_size
from ppap.errors import DataError
from ppap.pictures.drawing import replacing

GEO_REMEDY = "pip install rasterio"
# ModelPixelScale, ModelTiepoint, ModelTransformation, GeoKeyDirectory.
_GEO_TAGS = (33550, 33922, 34264, 34735)
_TIFF = (".tif", ".tiff")
_BLOCK = 512  # side of the blocks of a written mask [pixels]
_CACHE = 128 << 20  # bytes of blocks that GDAL keeps; its own limit follows the machine's memory


class Source(Protocol):
    """A picture that parts are read of."""

    size: tuple[int, int]
    """(width, height) [pixels]."""

    def region(self, left: int, top: int, width: int, height: int) -> Image.Image:
        """A part of it, RGB [pixels]."""
        ...

    def reduced(self, side: int) -> Image.Image:
        """All of it, with a longer side of at most `side` pixels."""
        ...


class Whole:
    """A picture in memory."""

    def __init__(self, image: Image.Image) -> None:
        """Args: an RGB picture."""
        self.image, self.size = image, image.size

    def region(self, left: int, top: int, width: int, height: int) -> Image.Image:
        """See :class:`Source`."""
        return self.image.crop((left, top, left + width, top + height))

    def reduced(self, side: int) -> Image.Image:
        """See :class:`Source`."""
        width, height = _reduced_size(self.size, side)
        return self.image.resize((width, height), Image.Resampling.BOX)


class Raster:
    """A TIFF file on the disk, whose pixels are read as :func:`ppap.data.images.read_image` reads them."""

    def __init__(self, file: Any, path: Path, reading: Reading) -> None:
        """Args: a dataset that rasterio has opened, its path, and how pictures are read."""
        self.file, self.path, self.reading = file, path, reading
        self.size: tuple[int, int] = (file.width, file.height)

    def region(self, left: int, top: int, width: int, height: int) -> Image.Image:
        """See :class:`Source`.

        Raises:
            DataError: the file is damaged there, or its bands are not chosen.
        """
        return self._read(window=((top, top + height), (left, left + width)))

    def reduced(self, side: int) -> Image.Image:
        """See :class:`Source`."""
        width, height = _reduced_size(self.size, side)
        return self._read(out_shape=(self.file.count, height, width))

    def _read(self, **part: Any) -> Image.Image:
        with naming(self.path):
            values = np.moveaxis(self.file.read(**part), 0, -1)
        if values.shape[2] == 2 and not self.reading.bands:
            values = values[..., :1]  # grey with alpha
        pixels = to_uint8(self.reading.choose(values, self.path), self.reading.value_range, self.path)
        return Image.fromarray(np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], 3))))


@contextmanager
def open_picture(path: Path, reading: Reading) -> Iterator[Source]:
    """A picture to read parts of, for the time of a ``with`` block.

    Raises:
        DataError: as :func:`ppap.data.images.read_image`.
    """
    if not by_parts(path):
        yield Whole(read_image(path, reading))
        return
    rasterio = _rasterio()
    with rasterio.Env(GDAL_CACHEMAX=_CACHE), naming(path):  # type: ignore[union-attr]
        file = rasterio.open(path)  # type: ignore[union-attr]
    with rasterio.Env(GDAL_CACHEMAX=_CACHE), file:  # type: ignore[union-attr]
        check_size((file.width, file.height), path)
        yield Raster(file, path, reading)


def by_parts(path: Path) -> bool:
    """Whether :func:`open_picture` reads a file part by part: a TIFF of plain bands, and rasterio is here."""
    if path.suffix.lower() not in _TIFF or _rasterio() is None:
        return False
    with naming(path):
        facts = tiff_facts(path)
    plain = facts.bits in (8, 16) and not facts.floats and facts.photometric in (1, 2)
    return plain and facts.bands > 0 and facts.orientation == 1


def has_georeference(path: Path) -> bool:
    """Whether a file says where on the ground it lies, in tags of GeoTIFF."""
    if path.suffix.lower() not in _TIFF:
        return False
    try:
        with Image.open(path, formats=("TIFF",)) as image:
            return any(tag in image.tag_v2 for tag in _GEO_TAGS)  # type: ignore[attr-defined]
    except Exception:  # whoever reads its pixels says what is wrong
        return False


def can_georeference() -> bool:
    """Whether :func:`save_georeferenced` can be called."""
    return _rasterio() is not None


def save_georeferenced(values: np.ndarray, colours: np.ndarray, ignored: int, like: Path, path: Path) -> None:
    """Write a mask as GeoTIFF that lies where a picture does, compressed without loss.

    Args:
        values: (H, W) uint8 or uint16 ids, of the size of the picture.
        colours: (n, 3) uint8: the colour of each id, kept in a table where ids have 8 bits.
        ignored: the id of pixels without a class: no data.
        like: the picture.
        path: file to write, replaced if it is there.

    Raises:
        DataError: the picture cannot be read, or the disk refuses.
    """
    rasterio = _rasterio()
    with naming(like):
        with rasterio.open(like) as picture:  # type: ignore[union-attr]
            place = {"crs": picture.crs, "transform": picture.transform}
            points, tags = picture.gcps, picture.tags()
        if points[0]:  # tie points in place of an affine map
            place = {"gcps": points[0], "crs": points[1]}
    shape = {"height": values.shape[0], "width": values.shape[1], "count": 1, "dtype": values.dtype.name}
    layout = {"tiled": True, "blockxsize": _BLOCK, "blockysize": _BLOCK, "compress": "deflate"}
    try:
        with (
            replacing(path) as aside,
            rasterio.Env(GDAL_CACHEMAX=_CACHE),  # type: ignore[union-attr]
            rasterio.open(  # type: ignore[union-attr]
                aside, "w", driver="GTiff", nodata=ignored, bigtiff="if_safer", **shape, **layout, **place
            ) as file,
        ):
            file.write(values, 1)
            if values.dtype == np.uint8:
                file.write_colormap(1, {i: (*map(int, rgb), 255) for i, rgb in enumerate(colours[:256])})
            if "AREA_OR_POINT" in tags:
                file.update_tags(AREA_OR_POINT=tags["AREA_OR_POINT"])
    except (OSError, rasterio.errors.RasterioError) as error:  # type: ignore[union-attr]
        raise DataError(f"cannot write {path} ({error}); make room and give the same command again") from None


def _reduced_size(size: tuple[int, int], side: int) -> tuple[int, int]:
    scale = min(1.0, side / max(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _rasterio() -> ModuleType | None:
    try:
        import rasterio
        import rasterio.errors
    except ImportError:
        return None
    return rasterio
