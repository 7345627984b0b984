"""Batches: a seeded order that can start anywhere, and loader processes that leave Ctrl-C to the main one.

Which images stand in batch k of epoch e depends on seed, e and k alone: not on the number of processes, and
not on whether the run was restarted in between.
"""

import functools
import io
import logging
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate, default_convert

from ppap.data.base import SegmentationDataset
from ppap.data.limits import max_pixels, set_max_pixels
from ppap.errors import DataError
from ppap.parallel import own_cores
from ppap.stopping import ignore

logger = logging.getLogger(__name__)
_ROOMY = 2 << 30  # bytes of /dev/shm that suffice for some processes with two large batches each
# Loader processes are forked where that is the platform's habit: no second import of torch, and no need for a
# main guard in the caller's script. It is safe because they only read files and compute on one thread; they
# never touch a GPU, and datasets hold no open files, locks or threads. Elsewhere the platform's default
# applies.
_CONTEXT = "fork" if sys.platform == "linux" else None


class EpochSampler(Sampler[list[int]]):
    """Batches of indices of one epoch, shuffled, the incomplete last batch dropped.

    The order of epoch e is a pure function of (seed, e). The sampler keeps its place only between passes: an
    iteration starts at ``(epoch, start_step)`` and ends with the epoch; :meth:`move_to` sets the next one.
    """

    def __init__(self, length: int, batch_size: int, seed: int, epoch: int = 0, start_step: int = 0):
        """Args: number of images, images per batch, seed, and the place to start as for :meth:`move_to`.

        Raises:
            DataError: fewer images than one batch.
        """
        if length < batch_size:
            raise DataError(
                f"the training set has {length} images, fewer than one batch of {batch_size}; "
                f"give --train.batch-size {max(length, 1)} or less, or add images"
            )
        self.length = length
        self.batch_size = batch_size
        self.seed = seed
        self.steps_per_epoch = length // batch_size
        self.move_to(epoch, start_step)

    def move_to(self, epoch: int, start_step: int = 0) -> None:
        """Start the next iteration at batch ``start_step`` of ``epoch``; steps beyond it run into later ones.

        So ``move_to(0, k)`` is the place after k training steps.
        """
        if epoch < 0 or start_step < 0:
            raise ValueError(f"epoch {epoch}, step {start_step}; give 0 or more")
        self.epoch = epoch + start_step // self.steps_per_epoch
        self.start_step = start_step % self.steps_per_epoch

    def order(self, epoch: int) -> np.ndarray:
        """(length,) int64: every index once, in the order of that epoch."""
        # Sorting raw counter-based bits: NumPy promises these for good, but not what permutation() gives.
        key = np.array([self.seed % 2**64, epoch], np.uint64)
        bits = np.random.Philox(key=key).random_raw(self.length)
        return np.argsort(bits, kind="stable")

    def __iter__(self) -> Iterator[list[int]]:
        order = self.order(self.epoch)
        for step in range(self.start_step, self.steps_per_epoch):
            yield order[step * self.batch_size : (step + 1) * self.batch_size].tolist()

    def __len__(self) -> int:
        """Batches left in this epoch."""
        return self.steps_per_epoch - self.start_step


def train_loader(
    dataset: SegmentationDataset,
    batch_size: int,
    seed: int,
    workers: int | None = 0,
    epoch: int = 0,
    start_step: int = 0,
    *,
    pin_memory: bool = False,
    sampler: Callable[..., EpochSampler] = EpochSampler,
) -> DataLoader:
    """Loader of one epoch of training batches; :func:`stream` goes on through the following ones.

    Args:
        dataset: the training images.
        batch_size: images per batch; an incomplete last batch is dropped.
        seed: of the order.
        workers: loader processes, kept alive between epochs; 0 = load in this process, None = as
            :func:`processes` says.
        epoch, start_step: where to begin, as for :meth:`EpochSampler.move_to`.
        pin_memory: page-locked batches; only for training on a CUDA device.
        sampler: takes the arguments of :class:`EpochSampler`; another one may give the dataset other keys.

    Returns:
        A DataLoader of dicts: image (B, 3, H, W) float32, label (B, H, W) int64, index (B,) int64.

    Raises:
        DataError: fewer images than one batch.
    """
    batches = sampler(len(dataset), batch_size, seed, epoch, start_step)
    workers = processes(workers)
    keep = workers > 0
    return _loader(dataset, workers, pin_memory, seed=seed, batch_sampler=batches, persistent_workers=keep)


def val_loader(
    dataset: SegmentationDataset, batch_size: int, workers: int | None = 0, *, pin_memory: bool = False
) -> DataLoader:
    """Loader of all validation images in order; the last batch may be smaller. The rest as ``train_loader``.

    Its processes end with each pass: between validations they would only hold memory.
    """
    workers = min(processes(workers), -(-len(dataset) // batch_size))
    return _loader(dataset, workers, pin_memory, seed=0, batch_size=batch_size, shuffle=False)


def steps_loader(
    dataset: Dataset, batch_size: int, steps: range, workers: int | None = 0, *, pin_memory: bool = False
) -> DataLoader:
    """Loader of a data set without epochs: batch k holds items k * batch_size to (k + 1) * batch_size - 1.

    Args:
        dataset: its items are taken by number; it need not have a length.
        batch_size: items per batch.
        steps: the batches wanted.
        workers, pin_memory: as for :func:`train_loader`.
    """
    batches = [range(k * batch_size, (k + 1) * batch_size) for k in steps]
    return _loader(dataset, min(processes(workers), len(batches)), pin_memory, seed=0, batch_sampler=batches)


def whole_loader(dataset: Dataset, workers: int | None = 0) -> DataLoader:
    """Loader of single items in order, of any size, without a batch dimension."""
    return _loader(
        dataset, min(processes(workers), len(dataset)), False, seed=0, batch_size=None, shuffle=False
    )


def stream(loader: DataLoader) -> Iterator[tuple[int, int, dict[str, torch.Tensor]]]:
    """Batches without end, epoch after epoch, from where the loader of :func:`train_loader` stands.

    Yields:
        ``(epoch, step in that epoch, batch)``.
    """
    sampler = loader.batch_sampler
    epoch, step = sampler.epoch, sampler.start_step
    while True:
        sampler.move_to(epoch, step)
        for batch in loader:
            yield epoch, step, batch
            step += 1
        epoch, step = epoch + 1, 0


class _PipedLoader(DataLoader):
    """Batches come from the processes as bytes through their pipes, not by shared memory."""

    def __iter__(self) -> Iterator[Any]:
        for content in super().__iter__():
            batch = torch.load(io.BytesIO(content), weights_only=True)
            if self.pins and torch.cuda.is_available():
                batch = {k: v.pin_memory() if torch.is_tensor(v) else v for k, v in batch.items()}
            yield batch


def _as_bytes(samples: Any) -> bytes:
    """A batch of samples, or one that is given alone, as :class:`_PipedLoader` sends it."""
    collate = default_collate if isinstance(samples, list) else default_convert
    buffer = io.BytesIO()
    torch.save(collate(samples), buffer)
    return buffer.getvalue()


def shared_memory() -> int:
    """Bytes of /dev/shm, through which torch's processes hand over tensors; containers often have 64 MiB."""
    try:
        found = os.statvfs("/dev/shm")
    except (OSError, AttributeError):  # not here, or no such place: another mechanism
        return sys.maxsize
    return found.f_blocks * found.f_frsize


def processes(workers: int | None) -> int:
    """Loader processes: as many as are asked for; None = one for each core of this process, at most 8."""
    return min(own_cores(), 8) if workers is None else workers


def _loader(dataset: Dataset, workers: int, pin_memory: bool, seed: int, **options: Any) -> DataLoader:
    if workers and shared_memory() < _ROOMY * max(workers, 2) // 2:
        logger.info("/dev/shm is small (%d MiB): batches go through pipes", shared_memory() >> 20)
        loader = _make(_PipedLoader, dataset, workers, False, seed, collate_fn=_as_bytes, **options)
        loader.pins = pin_memory
        return loader
    return _make(DataLoader, dataset, workers, pin_memory, seed, **options)


def _make(
    kind: type, dataset: Dataset, workers: int, pin_memory: bool, seed: int, **options: Any
) -> DataLoader:
    return kind(
        dataset,
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=functools.partial(_quiet_worker, max_pixels()),
        multiprocessing_context=_CONTEXT if workers else None,
        # Its own generator: otherwise each pass would draw from the global one, which drives training.
        generator=torch.Generator().manual_seed(seed % 2**63),
        **options,
    )


def _quiet_worker(limit: int, worker: int) -> None:
    set_max_pixels(limit)  # where processes do not inherit it
    # Ctrl-C reaches every process of the terminal; only the main one decides what to save and when to stop.
    ignore()
    # The same for a SIGTERM to the whole group, as schedulers send it; it cannot be ignored as well, since
    # the main process ends a worker by it.
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
