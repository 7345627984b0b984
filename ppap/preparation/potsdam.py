"""Cut raw ISPRS Potsdam tiles into the blocks that ``ppap/data/potsdam.py`` reads.

A tile of 6000 x 6000 pixels is halved (image: mean of 2 x 2 pixels, which is OpenCV's bilinear resize by one
half; label: every second pixel, its nearest one) and cut into 15 x 15 blocks of 200 x 200, row by row. Tiles
are numbered in the order of their file names: block = 225 * tile + 15 * row + column. The published numbers
are an unseeded permutation of these and the published split an unseeded draw, so neither can be made again.
"""

import io
import re
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ppap.data.checks import Problems, read_list
from ppap.data.images import naming
from ppap.data.limits import check_size
from ppap.data.potsdam import LISTS
from ppap.errors import DataError
from ppap.preparation.folders import claim_folder, write_whole
from ppap.stopping import each

BLOCK = 200
TILE = 6000
LABELLED = tuple(
    f"{r}_{c}"
    for r, columns in ((2, (10, 11, 12)), (3, (10, 11, 12)), (4, (10, 11, 12)), (5, (10, 11, 12)))
    + ((6, range(7, 13)), (7, range(7, 13)))
    for c in columns
)
"""The 24 tiles whose labels are used."""
HELD_OUT = tuple("2_13 2_14 3_13 3_14 4_13 4_14 4_15 5_13 5_14 5_15 6_13 6_14 6_15 7_13".split())
"""The 14 others: their blocks are unlabelled even where labels are there."""
COLOURS = ((255, 255, 255), (0, 0, 255), (0, 255, 255), (0, 255, 0), (255, 255, 0), (255, 0, 0))
"""RGB of the ids 0..5; any other colour is 255, ignored."""
TEST_SHARE = 0.1  # of all blocks, drawn from the labelled ones
MANIFEST = "blocks.json"
UNLABELLED = "unlabelled_train.txt"

_EXTRA_SAMPLES = 338  # TIFF tag
_MAT_TEXT = b"MATLAB 5.0 MAT-file, a block of a Potsdam tile"
_IMAGE = re.compile(r"top_potsdam_(\d+_\d+)_RGBIR\.tif", re.I)
_LABEL = re.compile(r"top_potsdam_(\d+_\d+)_label\.tif", re.I)
_PROBLEMS = {
    "image": ("image tiles are missing", "unzip 4_Ortho_RGBIR.zip, or accept the rest with --partial"),
    "label": (
        "label tiles are missing",
        "unzip 5_Labels_for_participants.zip or 5_Labels_all.zip, or accept the rest with --partial",
    ),
    "double": ("tiles are there twice", "keep one of each"),
    "size": ("tiles have another size", f"tiles are {TILE}x{TILE} pixels; accept others with --partial"),
}


@dataclass(frozen=True)
class Tiles:
    """Raw tiles that were found."""

    images: dict[str, Path]
    """``{row}_{column}`` -> image file, in the order of the file names."""
    labels: dict[str, Path]
    """The same for label files of the 24 tiles."""


def has_raw_tiles(root: Path) -> bool:
    """Whether there is a raw image tile anywhere below a folder."""
    return any(_IMAGE.fullmatch(p.name) for p in root.rglob("*.tif"))


def find_tiles(root: Path, partial: bool = False) -> Tiles:
    """Find the tiles below a folder, at any depth.

    Raises:
        DataError: missing tiles, tiles that are there twice, or of another size.
    """
    problems = Problems(_PROBLEMS)
    found: list[dict[str, Path]] = []
    files = sorted(root.rglob("*.tif"), key=lambda p: (p.name, str(p)))
    for pattern in (_IMAGE, _LABEL):
        tiles: dict[str, Path] = {}
        for path in files:
            match = pattern.fullmatch(path.name)
            if match and match[1] in tiles:
                problems.add("double", f"{path} and {tiles[match[1]]}")
            elif match:
                tiles[match[1]] = path
        found.append(tiles)
    images, labels = found[0], {t: p for t, p in found[1].items() if t in LABELLED}
    if not partial:
        for tile in (*LABELLED, *HELD_OUT):
            if tile not in images:
                problems.add("image", f"top_potsdam_{tile}_RGBIR.tif")
        for tile in LABELLED:
            if tile not in labels:
                problems.add("label", f"top_potsdam_{tile}_label.tif")
    for tile, path in images.items():
        for what in filter(None, (path, labels.get(tile))):
            with naming(what, "a tile"), Image.open(what, formats=("TIFF",)) as image:
                size = image.size
            if size[0] % (2 * BLOCK) or size[1] % (2 * BLOCK) or (not partial and size != (TILE, TILE)):
                problems.add("size", f"{what}: {size[0]}x{size[1]}")
    problems.raise_if_any(f"{root} (raw tiles)")
    if not images:
        raise DataError(f"{root}: no top_potsdam_*_RGBIR.tif; unzip 4_Ortho_RGBIR.zip there")
    return Tiles(images, {t: labels[t] for t in images if t in labels})


def halve(pixels: np.ndarray) -> np.ndarray:
    """Half of each side by the mean of 2 x 2 pixels, halves rounded up, as OpenCV's bilinear resize.

    Args:
        pixels: (H, W, C) uint8, H and W even.

    Returns:
        (H / 2, W / 2, C) uint8.
    """
    total = sum(pixels[y::2, x::2].astype(np.uint16) for y in (0, 1) for x in (0, 1))
    return ((total + 2) >> 2).astype(np.uint8)


def colour_ids(pixels: np.ndarray) -> np.ndarray:
    """(H, W, 3) uint8 label colours -> (H, W) uint8 ids 0..5, 255 = another colour."""
    code = pixels[:, :, 0].astype(np.int32) << 16 | pixels[:, :, 1].astype(np.int32) << 8 | pixels[:, :, 2]
    ids = np.full(code.shape, 255, np.uint8)
    for i, (r, g, b) in enumerate(COLOURS):
        ids[code == (r << 16 | g << 8 | b)] = i
    return ids


def cut_tiles(tiles: Tiles, out: Path, seed: int = 0, lists: Path | None = None) -> str:
    """Write ``imgs``, ``gt`` and the lists; an interrupted call is gone on with.

    Args:
        tiles: from :func:`find_tiles`.
        out: new folder, or one that an equal call has begun.
        seed: of the drawn test blocks.
        lists: folder with ``labelled_train.txt`` and ``labelled_test.txt`` in this numbering; they decide
            instead of the seed.

    Returns:
        What was written, in one sentence.

    Raises:
        UsageError: the folder holds something else.
        DataError: unreadable tiles, labels without any of the six colours, or lists that do not fit.
    """
    from tqdm import tqdm

    sizes = []
    for path in tiles.images.values():
        with Image.open(path) as image:
            sizes.append((image.height // (2 * BLOCK)) * (image.width // (2 * BLOCK)))
    starts = np.cumsum([0, *sizes])
    labelled = [
        n for t, tile in enumerate(tiles.images) if tile in tiles.labels for n in range(*starts[t : t + 2])
    ]
    split = _draw(labelled, int(starts[-1]), seed) if lists is None else _given(lists, labelled)
    origin = f"drawn with seed {seed}" if lists is None else f"from {lists}"
    manifest = {"tiles": list(tiles.images), "labelled": list(tiles.labels), "split": origin}
    claim_folder(out, MANIFEST, manifest)
    for folder in ("imgs", "gt"):
        (out / folder).mkdir(exist_ok=True)
    bar = tqdm(tiles.images.items(), "cut", unit="tile", disable=not sys.stderr.isatty())
    unknown = sum(
        _cut(tile, path, tiles.labels.get(tile), out, int(starts[t]))
        for t, (tile, path) in enumerate(each(bar))
    )
    split[UNLABELLED] = sorted(set(range(int(starts[-1]))) - set(labelled))
    for name, numbers in split.items():
        write_whole(out / name, "".join(f"{n}\n" for n in numbers).encode())
    names = ", ".join(f"{name} {len(numbers):,}" for name, numbers in split.items())
    how = origin + (" (the published draw is not known)" if lists is None else "")
    note = f"; {unknown:,} label pixels of other colours are ignored" if unknown else ""
    return f"{out}: {starts[-1]:,} blocks of {len(sizes)} tiles; {names}; split {how}{note}"


def _draw(labelled: Sequence[int], total: int, seed: int) -> dict[str, list[int]]:
    if not labelled:
        raise DataError("no tile has labels, so no split can be drawn; add label tiles")
    # Sorting raw counter-based bits: NumPy promises these for good, but not what permutation() gives.
    bits = np.random.Philox(key=np.array([seed % 2**64, 0], np.uint64)).random_raw(len(labelled))
    order = np.array(labelled)[np.argsort(bits, kind="stable")].tolist()
    count = min(max(round(TEST_SHARE * total), 1), len(order) - 1)
    return {LISTS["train"][0]: sorted(order[count:]), LISTS["val"][0]: sorted(order[:count])}


def _given(folder: Path, labelled: Sequence[int]) -> dict[str, list[int]]:
    split, allowed = {}, set(labelled)
    for name, _ in LISTS.values():
        path = folder / name
        if not path.is_file():
            raise DataError(f"{path}: no such list; --lists needs {LISTS['train'][0]} and {LISTS['val'][0]}")
        words = read_list(path).split()
        wrong = [w for w in words if not (w.isascii() and w.isdigit()) or int(w) not in allowed][:1]
        if wrong:
            raise DataError(f"{path}: {wrong[0]} is no labelled block of these tiles (numbering: see --help)")
        split[name] = [int(w) for w in words]
    train, test = split.values()
    if not train or not test or len({*train, *test}) != len(train) + len(test):
        raise DataError(f"{folder}: a list is empty, or a block stands in both lists or twice")
    return split


def _cut(tile: str, image: Path, label: Path | None, out: Path, start: int) -> int:
    """Write the blocks of one tile unless they are there; label pixels of unknown colours."""
    pixels = halve(_read(image, 4))
    unknown, ids = 0, None
    if label is not None:
        colours = _read(label, 3)
        if colours.shape[:2] != (2 * pixels.shape[0], 2 * pixels.shape[1]):
            raise DataError(f"{label}: another size than {image}")
        # Nearest by OpenCV's rule: pixel 2 x of the tile, not Pillow's 2 x + 1.
        ids = colour_ids(colours[::2, ::2])
        unknown = int((ids == 255).sum())
        if unknown == ids.size:
            raise DataError(f"{label}: none of the six label colours; is it a label tile?")
    n = start
    for y in range(0, pixels.shape[0], BLOCK):
        for x in range(0, pixels.shape[1], BLOCK):
            _write_block(out / "imgs" / f"{n}.mat", "img", pixels[y : y + BLOCK, x : x + BLOCK])
            if ids is not None:
                block = ids[y : y + BLOCK, x : x + BLOCK].astype(np.int32)
                _write_block(out / "gt" / f"{n}.mat", "gt", block)
            n += 1
    return unknown


def _read(path: Path, channels: int) -> np.ndarray:
    """(H, W, channels) uint8 of a TIFF file."""
    with naming(path, "a tile"):
        data = _declare_fourth_channel(bytearray(path.read_bytes()))
        with Image.open(io.BytesIO(data), formats=("TIFF",)) as image:
            check_size(image.size, path)
            pixels = np.array(image)
    if pixels.ndim != 3 or pixels.shape[2] < channels or pixels.dtype != np.uint8:
        raise DataError(f"{path}: {pixels.dtype} {pixels.shape}; tiles are uint8 with {channels} channels")
    return pixels[:, :, :channels]


def _declare_fourth_channel(data: bytearray) -> bytearray:
    """Set the tag ExtraSamples of a TIFF file to 2 (plain alpha).

    Pillow drops a fourth channel of unspecified meaning (0), as infrared is written, and divides the colours
    by one that is declared as multiplied in (1); a plain one it leaves alone.
    """
    order = "<" if data[:2] == b"II" else ">"
    version, place = struct.unpack_from(f"{order}HI", data, 2)
    if version == 42:
        (entries,) = struct.unpack_from(f"{order}H", data, place)
        for entry in range(place + 2, place + 2 + 12 * entries, 12):
            tag, kind, count = struct.unpack_from(f"{order}HHI", data, entry)
            if (tag, kind, count) == (_EXTRA_SAMPLES, 3, 1):
                struct.pack_into(f"{order}H", data, entry + 8, 2)
    return data


def _write_block(path: Path, key: str, values: np.ndarray) -> None:
    from scipy.io import savemat

    if path.exists():
        return
    raw = io.BytesIO()
    savemat(raw, {key: values}, do_compression=True)
    # SciPy writes the time into the header's text; equal blocks shall be equal files.
    write_whole(path, _MAT_TEXT.ljust(116) + raw.getvalue()[116:])
