"""STEGO's nearest images: a table computed once, and batches that bring a near image for every anchor.

Legend: n training images, K nearest of each that are kept, D channels.
"""

import hashlib
import io
import json
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ppap.data import EpochSampler, val_loader
from ppap.errors import DataError
from ppap.methods.base import Method, TrainingData
from ppap.nets.feature_cache import CachedFeatures, cache_root, weights_hash
from ppap.stopping import each

KEPT = 30
"""Images of a row of the table, the image itself included, as published."""
_DIGEST = 32  # bytes of a sha256
_TILE = 2**24  # cosines held at a time: 64 MiB


class NeighbourSampler(EpochSampler):
    """The batches of :class:`EpochSampler`, as pairs (image, near image).

    The rank of the near image is uniform over 1..`neighbours`, a pure function of (seed, epoch, image): it
    depends neither on the number of loader processes nor on a restart.
    """

    def __init__(self, table: np.ndarray, neighbours: int, *args: Any) -> None:
        """Args: (n, K) of :func:`neighbour_table`, how many of a row serve, and those of the base class."""
        self.table, self.neighbours = table, neighbours
        super().__init__(*args)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        # Counter words keep it apart from the order, which shares the key.
        key = np.array([self.seed % 2**64, self.epoch], np.uint64)
        bits = np.random.Philox(counter=[0, 0, 0, 3], key=key).random_raw(self.length)
        rank = 1 + (bits >> np.uint64(11)) % np.uint64(self.neighbours)
        for batch in super().__iter__():
            yield [(i, int(self.table[i, rank[i]])) for i in batch]


class Paired(Dataset[dict[str, Any]]):
    """A dataset asked for pairs: the samples of the first image, with the second one's as ``near_*``."""

    def __init__(self, dataset: Dataset[dict[str, Any]]) -> None:
        """Args: images, or their cached features."""
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, pair: tuple[int, int]) -> dict[str, Any]:
        """The sample of ``pair[0]``, and the input and index of ``pair[1]``."""
        near = self.dataset[pair[1]]
        inputs = {f"near_{name}": value for name, value in near.items() if name != "label"}
        return {**self.dataset[pair[0]], **inputs}


def paired_loader(data: TrainingData, table: np.ndarray, neighbours: int, start_step: int) -> DataLoader:
    """The run's batches, with a near image for every image."""
    paired = TrainingData(Paired(data.dataset), data.config, data.device)
    return paired.loader(start_step, sampler=partial(NeighbourSampler, table, neighbours))


def neighbour_table(method: Method, data: TrainingData) -> np.ndarray:
    """The nearest images of every training image, from disk where they are, computed where they are not.

    An image is described by the L2-normalised mean of its (conditioned) frozen features; nearness is the
    exact cosine. The published code leaves channel dropout on while it describes images; here it is off, so
    that a table depends on backbone, condition and images alone. The file's name is a hash of these.

    Returns:
        (n, min(KEPT, n)) int32, nearest first; rank 0 is the image itself.

    Raises:
        DataError: the folder of the cache cannot be written, or the file in it is damaged.
    """
    path = cache_root(data.config.data.cache_dir).parent / "neighbours" / f"{_hash(method, data)}.npy"
    if (table := _read(path)) is not None:
        print(f"nearest images: read from {path}")
        return table
    table = nearest_images(_descriptors(method, data)).numpy()
    content = io.BytesIO()
    np.save(content, table)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(f".{os.getpid()}.npy")  # another run may make it at the same time
        aside.write_bytes(content.getvalue() + hashlib.sha256(content.getvalue()).digest())
        aside.replace(path)
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"cannot write {path} ({reason}); give another --data.cache-dir") from None
    return table


def _read(path: Path) -> np.ndarray | None:
    """A table of the cache, whose checksum stands behind NumPy's bytes; None where there is none.

    Files of earlier versions have no checksum, and are made again.
    """
    if not path.exists():
        return None
    try:
        content = path.read_bytes()
        table = np.load(io.BytesIO(content))
    except Exception as error:  # NumPy reads the header with a parser that can fail anywhere
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{path} cannot be read ({reason}); delete it, and it is made again") from None
    if hashlib.sha256(content[:-_DIGEST]).digest() == content[-_DIGEST:]:
        return table
    plain = io.BytesIO()
    np.save(plain, table)
    if content == plain.getvalue():
        return None
    raise DataError(f"{path} differs from its checksum; delete it, and it is made again")


def nearest_images(descriptors: Tensor) -> Tensor:
    """Indices of the KEPT nearest rows of each row by product, itself first: (n, min(KEPT, n)) int32, CPU.

    Args:
        descriptors: (n, D) unit rows.
    """
    count = len(descriptors)
    rows, kept = max(_TILE // count, 1), min(KEPT, count)
    found = []
    for start in each(tqdm(range(0, count, rows), desc="nearest images", leave=False, disable=None)):
        cosine = descriptors[start : start + rows] @ descriptors.T
        # Above any cosine: of two equal images each is the nearest of itself.
        cosine.diagonal(start).fill_(2)
        found.append(cosine.topk(kept, dim=1).indices.int().cpu())
    return torch.cat(found)


@torch.no_grad()
def _descriptors(method: Method, data: TrainingData) -> Tensor:
    config = data.config
    loader = val_loader(data.dataset, config.eval.batch_size, config.data.workers)
    means = [
        method.net.compared(method.tokens(batch).guidance).mean(dim=(2, 3))
        for batch in each(tqdm(loader, desc="image descriptors", unit="batch", disable=None))
    ]
    return F.normalize(torch.cat(means), dim=1)


def _hash(method: Method, data: TrainingData) -> str:
    dataset = data.dataset
    if isinstance(dataset, CachedFeatures):
        meta: dict[str, Any] = {"features": dataset.meta["hash"]}
    else:
        backbone = method.net.backbone
        meta = {"backbone": backbone.spec, "weights": weights_hash(backbone), "data": dataset.fingerprint()}
    if method.net.condition is not None:
        meta["condition"] = weights_hash(method.net.condition)
    text = json.dumps({**meta, "kept": KEPT}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
