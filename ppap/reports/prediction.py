"""Masks of many pictures: decoded ahead on threads, several at once through the network, written whole."""

import collections
import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ppap.data.images import read_image, verify_image
from ppap.data.rasters import (
    GEO_REMEDY,
    by_parts,
    can_georeference,
    has_georeference,
    open_picture,
    save_georeferenced,
)
from ppap.errors import DataError, PpapError, UsageError
from ppap.evaluation.predictor import MAX_TOKENS, Predictor
from ppap.evaluation.tiles import OVERLAP, Tiling, label_tiles, labels_of
from ppap.evaluation.views import Seen
from ppap.parallel import own_cores
from ppap.pictures.drawing import overlay, replacing, save_index_png, save_values_png, save_whole
from ppap.reports.masks import colours_by_id, ignored_id
from ppap.stopping import check, each

_AHEAD = 50_000_000  # pixels that are decoded ahead at most
_OVERLAY = 4096  # longer side of the overlay of a picture seen by tiles [pixels]
_DETAIL = 4  # a picture reduced by more than this gets the hint at tiles


@dataclass(frozen=True, kw_only=True)
class MaskOptions:
    """How masks are made."""

    probe: Literal["cluster", "linear"] = "cluster"
    """cluster = found without labels; linear = trained with labels."""
    resolution: int = 320
    """Shorter side that the network sees, of the image, or with --tile of a tile [pixels]; masks have the
    size of the image."""
    tile: int | None = None
    """The network sees overlapping tiles with a side of so many pixels of the image, each at --resolution, in
    place of the whole image: for images whose regions are too small there. As many as --resolution = the
    image's own pixels; None = the whole image."""
    tile_overlap: float = OVERLAP
    """Least share of a tile that its neighbour covers too; scores are blended there [0 to 0.5]."""
    crf: Literal["native", "pydensecrf", "none"] = "none"
    """Dense CRF, as `ppap eval` runs it, at the pixels that the network sees: edges follow the image's."""
    smooth: int = 1
    """Probabilities are means over so many frames, the frame's own and those before it in its folder, in the
    order of their numbers: for the frames of a film [frames]."""
    probabilities: bool = False
    """Also write NAME_probabilities.npz: probabilities (regions, height, width) in fp16 at the pixels that
    the network saw, after --smooth and --crf, and ids of the regions (-1 = none). Those of clusters are the
    softmax of twice the cosine, not calibrated."""
    features: bool = False
    """Also write NAME_features.npz: the code (channels, rows, columns) of the patches in fp16, and their
    side."""
    max_tokens: int = MAX_TOKENS
    """Most patches per image, or per tile; memory grows with their square."""
    batch_size: int = 4
    """Images, or tiles, that go through the network at once, if they have one size there."""
    workers: int | None = None
    """Threads that decode images ahead; None = one per core of the machine."""

    def __post_init__(self) -> None:
        for name, least in (("resolution", 1), ("smooth", 1), ("batch_size", 1), ("workers", 0), ("tile", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UsageError(f"--{name.replace('_', '-')} is {value}; give at least {least}")
        whole = {"smooth": self.smooth > 1, "probabilities": self.probabilities, "features": self.features}
        for name, asked in whole.items():
            if asked and self.tile is not None:
                raise UsageError(f"--{name} is for images that are seen whole; leave out --tile")

    def record(self) -> dict[str, Any]:
        """What masks follow from."""
        names = {field.name for field in dataclasses.fields(MaskOptions)} - {"batch_size", "workers"}
        return {name: value for name, value in dataclasses.asdict(self).items() if name in names}

    def ends(self) -> tuple[str, ...]:
        """What the names of an image's files end in, behind its stem; the mask comes last."""
        more = [end for end in ("probabilities", "features") if getattr(self, end)]
        return (*(f"_{end}.npz" for end in more), "_overlay.jpg", ".tif", ".png")


Sizes = dict[Path, tuple[int, int]]
"""(width, height) of images that can be read."""


def check_images(
    files: Iterable[Path], predictor: Predictor, options: MaskOptions
) -> tuple[Sizes, dict[Path, str]]:
    """Look at all images before the first mask: their sizes, and what is wrong with those that have none.

    Raises:
        UsageError: an image has more patches than the limit; a wrong tiling.
    """
    sizes: Sizes = {}
    bad: dict[Path, str] = {}
    if options.tile is not None:
        _tiling(predictor, options)

    def size_of(path: Path) -> tuple[int, int]:
        if options.tile is not None and by_parts(path):
            with open_picture(path, predictor.reading) as picture:
                return picture.size
        return verify_image(path, predictor.reading)

    for path, size in _ahead(files, size_of, _threads(options), lambda path: 0):
        try:
            sizes[path] = size.result()
            if options.tile is None:
                predictor.seen_size(*sizes[path], options.resolution, options.max_tokens)
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from None
        except DataError as error:
            bad[path] = str(error)
    return sizes, bad


def hints(sizes: Sizes, options: MaskOptions) -> list[str]:
    """What a user should know before the masks are made."""
    found = []
    reduced = [path for path, size in sizes.items() if min(size) > _DETAIL * options.resolution]
    if reduced and options.tile is None:
        found.append(
            f"hint: {len(reduced)} images are reduced to less than 1/{_DETAIL} of their size, such as "
            f"{reduced[0]}; --tile {_DETAIL * options.resolution} keeps more detail"
        )
    placed = [] if can_georeference() else [path for path in sizes if has_georeference(path)]
    if placed:
        found.append(
            f"hint: {len(placed)} images have a georeference, such as {placed[0]}, which masks lose without "
            f"rasterio: {GEO_REMEDY}"
        )
    return found


def write_masks(
    out: Path,
    files: dict[str, Path],
    sizes: Sizes,
    predictor: Predictor,
    options: MaskOptions,
    done: set[str],
) -> dict[Path, str]:
    """Masks and what goes with them of all images; the files whose pixels cannot be decoded, and why.

    Args:
        out: folder for them.
        files: stem -> image; done ones too, which frames after them may need.
        sizes: of :func:`check_images`.
        predictor: what makes them.
        options: how.
        done: stems whose mask is there.
    """
    writer = _Writer(out, predictor, options)
    if options.tile is not None:
        return _by_tiles(files, done, predictor, options, writer)
    lookout = predictor.lookout(
        options.probe,
        crf=options.crf,
        smooth=options.smooth,
        probabilities=options.probabilities,
        code=options.features,
    )
    table, bad = predictor.table(lookout), {}
    geometry = dataclasses.replace(predictor.geometry, resolution=options.resolution)
    ordered = [stem for stem in _in_order(files, options.smooth) if files[stem] in sizes]
    needed = _needed(ordered, done, options.smooth)

    def decode(stem: str) -> tuple[Image.Image, np.ndarray]:
        image = read_image(files[stem], predictor.reading)
        return image, geometry.whole(image)

    pixels = {stem: sizes[files[stem]][0] * sizes[files[stem]][1] for stem in needed}
    pending: list[tuple[str, Image.Image, np.ndarray]] = []

    def flush() -> None:
        if not pending:
            return
        found = lookout.look([seen for _, _, seen in pending], _folder(pending[0][0]))
        for (stem, image, _), one in zip(pending, found, strict=True):
            if stem not in done:
                labels = table[one.view.best((image.height, image.width)).cpu()]
                writer.write(stem, files[stem], image, labels, one)
        pending.clear()

    bar = tqdm(needed, unit="image", disable=None)
    for stem, result in _ahead(bar, decode, _threads(options), pixels.__getitem__):
        try:
            image, seen = result.result()
        except DataError as error:  # pixels that the look at the file did not decode
            bad[files[stem]] = str(error)
            continue
        if pending and (pending[0][2].shape != seen.shape or _folder(pending[0][0]) != _folder(stem)):
            flush()
        pending.append((stem, image, seen))
        held = sum(one.width * one.height for _, one, _ in pending)
        if len(pending) == options.batch_size or held > _AHEAD:
            flush()
    flush()
    return bad


def _by_tiles(
    files: dict[str, Path], done: set[str], predictor: Predictor, options: MaskOptions, writer: "_Writer"
) -> dict[Path, str]:
    lookout, tiling = predictor.lookout(options.probe, crf=options.crf), _tiling(predictor, options)
    table = predictor.table(lookout)
    bad: dict[Path, str] = {}
    geometry = predictor.geometry
    for stem in each(tqdm([stem for stem in files if stem not in done], unit="image", disable=None)):
        try:
            with open_picture(files[stem], predictor.reading) as picture:
                bands = label_tiles(picture, lookout, tiling, geometry, options.batch_size)
                rows = len(tiling.starts(picture.size[1]))
                bar = tqdm(bands, total=rows, unit="row", desc="tiles", leave=False, disable=None)
                values = labels_of(bar, picture.size, torch.from_numpy(writer.values(table)))
                small = picture.reduced(_OVERLAY)
        except DataError as error:
            bad[files[stem]] = str(error)
            continue
        writer.write_large(stem, files[stem], small, values)
    return bad


class _Writer:
    """Writes the files of an image, its mask last: where that is there, the image is done."""

    def __init__(self, out: Path, predictor: Predictor, options: MaskOptions) -> None:
        self.out, self.options = out, options
        self.patch = predictor.engine.net.backbone.patch_size
        ids = predictor.ids(options.probe)
        self.colours = colours_by_id(ids, predictor.colours(options.probe))
        self.ignored = ignored_id(ids)
        self.is_free = self.ignored not in ids  # not so with all of 256 ids
        self.group_ids = np.array(predictor.grouping(options.probe)[1])

    def write(self, stem: str, path: Path, image: Image.Image, labels: Tensor, seen: Seen) -> None:
        with self._writing(stem) as target:
            if seen.probabilities is not None:
                kept = {"probabilities": seen.probabilities.half().numpy(), "ids": self.group_ids}
                _save_arrays(Path(f"{target}_probabilities.npz"), kept)
            if seen.code is not None:
                size = np.array([image.height, image.width])
                kept = {"features": seen.code.half().numpy(), "patch": np.array(self.patch), "size": size}
                _save_arrays(Path(f"{target}_features.npz"), kept)
            save_whole(overlay(image, labels, colours=self.colours), f"{target}_overlay.jpg", quality=92)
            self._georeferenced(self.values(labels), path, target)
            save_index_png(labels, f"{target}.png", self.colours, self.ignored)

    def write_large(self, stem: str, path: Path, small: Image.Image, values: np.ndarray) -> None:
        """Args: the picture reduced to the size of its overlay, and the mask's values in full."""
        with self._writing(stem) as target:
            rows, columns = (
                np.arange(count) * length // count
                for count, length in zip((small.height, small.width), values.shape, strict=True)
            )
            shown = values[np.ix_(rows, columns)].astype(np.int64)
            shown[(shown == self.ignored) & self.is_free] = -1
            save_whole(overlay(small, shown, colours=self.colours), f"{target}_overlay.jpg", quality=92)
            self._georeferenced(values, path, target)
            save_values_png(values, f"{target}.png", self.colours, self.ignored if self.is_free else None)

    def values(self, labels: Tensor) -> np.ndarray:
        """Ids as masks store them."""
        kind = np.uint8 if len(self.colours) <= 256 else np.uint16
        if not self.is_free and (labels < 0).any():
            raise UsageError(
                f"masks of 256 classes leave no value for pixels without one, {self.ignored} is a class's too"
            )
        return np.where(labels.numpy() < 0, self.ignored, labels.numpy()).astype(kind)

    def _georeferenced(self, values: np.ndarray, path: Path, target: Path) -> None:
        if can_georeference() and has_georeference(path):
            save_georeferenced(values, self.colours, self.ignored, path, Path(f"{target}.tif"))

    @contextlib.contextmanager
    def _writing(self, stem: str) -> Iterator[Path]:
        target = self.out / stem
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            yield target
        except OSError as error:
            reason = error.strerror or error
            raise DataError(
                f"cannot write {target}.png ({reason}); make room and give the same command again"
            ) from None


def _save_arrays(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with replacing(path) as aside:
        np.savez_compressed(aside, **arrays)


def _tiling(predictor: Predictor, options: MaskOptions) -> Tiling:
    return predictor.tiling(options.tile, options.resolution, options.max_tokens, options.tile_overlap)


def _threads(options: MaskOptions) -> int:
    return own_cores() if options.workers is None else options.workers


def _folder(stem: str) -> str:
    return str(Path(stem).parent)


def _in_order(files: dict[str, Path], smooth: int) -> list[str]:
    """Stems; of frames folder after folder, 9 before 10."""
    if smooth == 1:
        return list(files)

    def parts(stem: str) -> tuple[str, list[tuple[bool, int, str]]]:
        pieces = [piece for piece in re.split(r"(\d+)", Path(stem).name) if piece]
        return _folder(stem), [(p.isdecimal(), int(p) if p.isdecimal() else 0, p) for p in pieces]

    return sorted(files, key=parts)


def _needed(ordered: Sequence[str], done: set[str], smooth: int) -> list[str]:
    """Stems to look at: those to do, and the done frames that means over `smooth` frames take in."""
    needed = set()
    for i, stem in enumerate(ordered):
        if stem not in done:
            needed.update(s for s in ordered[max(0, i - smooth + 1) : i + 1] if _folder(s) == _folder(stem))
    return [stem for stem in ordered if stem in needed]


Item = TypeVar("Item")
Result = TypeVar("Result")


def _ahead(
    items: Iterable[Item], work: Callable[[Item], Result], threads: int, pixels: Callable[[Item], int]
) -> Iterator[tuple[Item, Future[Result]]]:
    """Items in their order with what `work` makes of them, begun ahead on threads as far as memory allows."""
    if threads == 0:
        for item in each(items):
            one: Future[Result] = Future()
            try:
                one.set_result(work(item))
            except PpapError as error:
                one.set_exception(error)
            yield item, one
        return
    waiting: collections.deque[tuple[Item, Future[Result]]] = collections.deque()
    pool, held = ThreadPoolExecutor(threads, "ppap-images"), 0
    try:
        for item in items:
            check()
            while waiting and (len(waiting) > 2 * threads or held + pixels(item) > _AHEAD):
                held -= pixels(waiting[0][0])
                yield waiting.popleft()
                check()
            held += pixels(item)
            waiting.append((item, pool.submit(work, item)))
        while waiting:
            yield waiting.popleft()
            check()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
