"""Decode every file of a data set and count its labels."""

from collections.abc import Sequence

import numpy as np

from ppap.data.checks import Problems, in_threads
from ppap.data.pairs import PROBLEMS, PairedDataset
from ppap.errors import DataError

_CHUNK = 32  # images per job


def decode_all(dataset: PairedDataset, what: str) -> np.ndarray:
    """Read every image and label.

    Args:
        dataset: one split, its files there and complete.
        what: names it in the progress bar and in messages.

    Returns:
        (C + 1,) int64 pixels per class at original size; the last one counts ignored pixels.

    Raises:
        DataError: all pairs that cannot be decoded, differ in size or hold ids that must not occur.
    """
    counts = np.zeros(dataset.classes + 1, np.int64)
    problems = Problems(PROBLEMS)

    def decode(start: int) -> tuple[np.ndarray, list[str]]:
        found, texts = np.zeros_like(counts), []
        for i in range(start, min(start + _CHUNK, len(dataset))):
            try:
                ids = dataset.load(i)[1]
            except DataError as error:
                texts.append(str(error))
                continue
            if ids is not None:
                ids = np.where(ids < 0, dataset.classes, ids)
                found += np.bincount(ids.ravel(), minlength=len(counts))
        return found, texts

    for found, texts in in_threads(decode, range(0, len(dataset), _CHUNK), f"decode {what}", "x32 images"):
        counts += found
        for text in texts:
            problems.add("content", text)
    problems.raise_if_any(what)
    return counts


def class_table(names: Sequence[str], counts: dict[str, np.ndarray]) -> str:
    """Share of each class in the labelled pixels of each split, and of ignored ones in all [%]."""
    width = max(map(len, (*names, "ignored")))
    lines = [f"{'class':<{width}}  " + "  ".join(f"{split:>9}" for split in counts)]
    for c, name in enumerate(names):
        cells = [_share(pixels[c], pixels[:-1].sum()) for pixels in counts.values()]
        lines.append(f"{name:<{width}}  " + "  ".join(cells))
    cells = [_share(pixels[-1], pixels.sum()) for pixels in counts.values()]
    return "\n".join([*lines, f"{'ignored':<{width}}  " + "  ".join(cells)])


def _share(part: int, whole: int) -> str:
    return f"{100 * part / whole:>7.2f} %" if whole else f"{'none':>9}"
