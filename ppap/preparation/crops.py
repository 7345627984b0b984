"""Cut the five-crop folders that training reads (``ppap/data/crops.py``), as the published code does.

Crops have the image's size times the ratio, cut off: ``int(ratio * side)``; the order is upper left, upper
right, lower left, lower right, centre. The published crops are JPEG files of Pillow's quality 75.
"""

import hashlib
import io
import math
import multiprocessing
import sys
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ppap.data.checks import Problems, in_threads
from ppap.data.crops import CROPS, MANIFEST, folder_name
from ppap.data.images import stored_size
from ppap.data.pairs import PROBLEMS, PairedDataset
from ppap.errors import DataError, UsageError
from ppap.preparation.folders import claim_folder, write_whole
from ppap.stopping import each, ignore

_CHUNK = 8  # images per job: an interruption waits for one job a process
_HEADERS = 256  # images whose header one job reads
# As in ppap/data/loading.py: processes only read and write files.
_CONTEXT = "fork" if sys.platform == "linux" else None


@dataclass(frozen=True)
class CropSettings:
    """How crops are made."""

    ratio: float = 0.5
    """Side of a crop as a share of the image's."""
    quality: int | None = 75
    """JPEG quality; None = PNG, without loss."""
    workers: int = 2
    """Processes; 0 = this one."""

    def __post_init__(self) -> None:
        if not 0 < self.ratio < 1:
            raise UsageError(f"--ratio is {self.ratio}; give a share between 0 and 1")
        if self.quality is not None and not 1 <= self.quality <= 100:
            raise UsageError(f"--quality is {self.quality}; give 1 to 100")
        if self.workers < 0:
            raise UsageError(f"--workers is {self.workers}; give 0 or more")

    @property
    def suffix(self) -> str:
        """Of image files."""
        return ".png" if self.quality is None else ".jpg"


def five_boxes(width: int, height: int, ratio: float) -> list[tuple[int, int, int, int]]:
    """(left, upper, right, lower) of the five crops [pixels], in the published order."""
    w, h = int(width * ratio), int(height * ratio)
    x, y = round((width - w) / 2), round((height - h) / 2)
    corners = [(0, 0), (width - w, 0), (0, height - h), (width - w, height - h), (x, y)]
    return [(left, top, left + w, top + h) for left, top in corners]


def make_crops(dataset: PairedDataset, out: Path, name: str, source: str, settings: CropSettings) -> Path:
    """Write the crops of all images of a training split; an interrupted call is gone on with.

    Args:
        dataset: whole images with the 27 classes.
        out: the crops go to ``{out}/cropped/{name}_five_crop_{ratio}``.
        name: ``cocostuff27`` or ``cityscapes``.
        source: what the images are, for the manifest.
        settings: how.

    Returns:
        The folder.

    Raises:
        UsageError: the folder is there already and was made by another program or with other settings.
        DataError: images too small for crops, of which nothing is written; images that cannot be read (the
            rest is written); or a disk that is full.
    """
    _check_sizes(dataset, settings.ratio)
    folder = out / "cropped" / folder_name(name, settings.ratio)
    _claim(folder, dataset, source, settings)
    problems = Problems(PROBLEMS)
    starts = range(0, len(dataset), _CHUNK)
    for texts in _in_processes(_crop_some, starts, (dataset, folder, settings), settings.workers):
        for text in texts:
            problems.add("content", text)
    problems.raise_if_any(str(dataset.files.image[0]))
    return folder


def _check_sizes(dataset: PairedDataset, ratio: float) -> None:
    """Refuse images of which a crop would have no pixels, by their headers."""
    least = math.ceil(1 / ratio)  # of fewer pixels a side, the crop's share is cut off to 0
    problems = Problems(
        {
            "damaged": PROBLEMS["damaged"],
            "small": (f"images are too small for crops of --ratio {ratio}", f"give sides of {least} or more"),
        }
    )

    def look(start: int) -> list[tuple[str, str]]:
        found = []
        for i in range(start, min(start + _HEADERS, len(dataset))):
            path = dataset.files.image_path(i)
            try:
                width, height = stored_size(path)
            except DataError as error:
                found.append(("damaged", str(error)))
                continue
            if min(five_boxes(width, height, ratio)[0][2:]) < 1:
                found.append(("small", f"{path}: {width}x{height} pixels"))
        return found

    starts = range(0, len(dataset), _HEADERS)
    for found in in_threads(look, starts, "check sizes", f"x{_HEADERS} images"):
        for kind, text in found:
            problems.add(kind, text)
    problems.raise_if_any(str(dataset.files.image[0]))


def _claim(folder: Path, dataset: PairedDataset, source: str, settings: CropSettings) -> None:
    """Write the manifest, or see that the one there is equal."""
    names = hashlib.sha256(b"\n".join(dataset.files.names.tolist())).hexdigest()
    manifest = {
        "source": source,
        "images": len(dataset),
        "names_sha256": names,
        "ratio": settings.ratio,
        "quality": settings.quality,
        "crops": CROPS * len(dataset),
    }
    claim_folder(folder, MANIFEST, manifest)
    for part in ("img", "label"):
        (folder / part / "train").mkdir(parents=True, exist_ok=True)


def _crop_some(start: int, dataset: PairedDataset, folder: Path, settings: CropSettings) -> list[str]:
    """Crop ``_CHUNK`` images, leaving out those that are done; the messages of what failed."""
    texts = []
    for i in range(start, min(start + _CHUNK, len(dataset))):
        numbers = range(CROPS * i, CROPS * (i + 1))
        images = [folder / "img" / "train" / f"{n}{settings.suffix}" for n in numbers]
        labels = [folder / "label" / "train" / f"{n}.png" for n in numbers]
        if all(path.exists() for path in (*images, *labels)):
            continue
        try:
            picture, ids = dataset.load(i)
        except DataError as error:
            texts.append(str(error))
            continue
        stored = Image.fromarray((ids + 1).astype(np.uint8))
        boxes = five_boxes(*picture.size, settings.ratio)
        options = {} if settings.quality is None else {"quality": settings.quality}
        for box, image, label in zip(boxes, images, labels, strict=True):
            _save(picture.crop(box), image, **options)
            _save(stored.crop(box), label)
    return texts


def _save(picture: Image.Image, path: Path, **options: Any) -> None:
    data = io.BytesIO()
    picture.save(data, format="PNG" if path.suffix == ".png" else "JPEG", **options)
    write_whole(path, data.getvalue())


def _in_processes(function: Any, starts: range, shared: tuple, workers: int) -> Iterator[Any]:
    """Results of ``function(start, *shared)`` as they come, with a progress bar on a terminal."""
    from tqdm import tqdm

    bar = tqdm(total=len(starts), desc="crop", unit=f"x{_CHUNK} images", disable=not sys.stderr.isatty())
    context = multiprocessing.get_context(_CONTEXT)
    with bar, ProcessPoolExecutor(workers, context, _ignore_interrupts) if workers else nullcontext() as pool:
        done = (
            _each(function, starts, shared)
            if pool is None
            else _queued(pool, function, starts, shared, workers)
        )
        for result in each(done):
            bar.update()
            yield result


def _ignore_interrupts() -> None:
    # Ctrl-C reaches every process of the terminal; the main one lets the others finish their images.
    ignore()


def _each(function: Any, starts: range, shared: tuple) -> Iterator[Any]:
    for start in starts:
        yield function(start, *shared)


def _queued(pool: Executor, function: Any, starts: range, shared: tuple, workers: int) -> Iterator[Any]:
    """At most a few jobs wait: a hundred thousand at once would take memory, and long to cancel."""
    waiting, left = set(), iter(starts)
    try:
        while True:
            for start in left:
                waiting.add(pool.submit(function, start, *shared))
                if len(waiting) >= 4 * workers:
                    break
            if not waiting:
                return
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                yield future.result()
    except BrokenProcessPool:
        raise DataError(
            "a process was ended from outside, perhaps for its memory; give the same command again with "
            "--workers 1, it goes on"
        ) from None
    finally:
        for future in waiting:
            future.cancel()
