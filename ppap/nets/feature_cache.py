"""Frozen tokens of every image, computed once and kept on disk.

Everything below the trained block sees the same crops every epoch, so it gives the same tokens. The cache
holds what :class:`ppap.nets.model.FrozenTokens` holds, in half precision, and the labels; training and
validating from it skips the images and all frozen blocks.
"""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset
from tqdm import tqdm

from ppap.data import Datasets, SegmentationDataset, val_loader
from ppap.errors import NumberError
from ppap.kernels.cache import cache_folder
from ppap.nets.model import FrozenTokens, Network
from ppap.runs.store import Kind, Part, Store
from ppap.settings.config import Config, DataConfig
from ppap.stopping import each

CacheType = Literal["fp16", "bf16"]
# bfloat16 is unknown to NumPy: its bits are kept as integers.
_STORED = {"fp16": np.float16, "bf16": np.int16}
_TORCH = {"fp16": torch.float16, "bf16": torch.bfloat16}


def cache_root(folder: str | None = None) -> Path:
    """Where features go: below `folder`, or the folder of all caches."""
    return (Path(folder) if folder else cache_folder()) / "features"


class CachedFeatures(Dataset[dict[str, Any]]):
    """A dataset of frozen tokens in place of images.

    Attributes:
        path: folder of the cache.
        classes, class_names, labelled: of the images.
    """

    def __init__(self, path: Path, dataset: SegmentationDataset) -> None:
        """Args: a complete cache, and the dataset it was made of."""
        self.path = path
        self.classes, self.class_names = dataset.classes, dataset.class_names
        self.labelled = dataset.labelled
        self.meta = json.loads((path / "meta.json").read_text())
        self._arrays: dict[str, np.ndarray] | None = None

    def __len__(self) -> int:
        return self.meta["images"]

    def __getitem__(self, i: int) -> dict[str, Any]:
        """A dict: before (P + h w, D), guidance (D, h, w) in the cache's type, label (H, W) int64, index."""
        if self._arrays is None:  # opened by the process that reads: loader processes share no file position
            names = _kinds(self.meta)
            self._arrays = {name: np.load(self.path / f"{name}.npy", mmap_mode="r") for name in names}
        tokens = {name: torch.from_numpy(self._arrays[name][i].copy()) for name in ("before", "guidance")}
        if self.meta["dtype"] == "bf16":
            tokens = {name: value.view(torch.bfloat16) for name, value in tokens.items()}
        label = torch.from_numpy(self._arrays["label"][i].astype(np.int64))
        return {**tokens, "label": label, "index": int(i)}


def frozen_of(batch: dict[str, torch.Tensor], device: torch.device, prefix: str = "") -> FrozenTokens:
    """The tokens of a batch of :class:`CachedFeatures`, on `device`; `prefix` stands before their names."""
    names = (f"{prefix}before", f"{prefix}guidance")
    before, guidance = (batch[name].to(device, non_blocking=True) for name in names)
    return FrozenTokens(before, guidance, (guidance.shape[2], guidance.shape[3]))


def is_cached(net: Network, dataset: SegmentationDataset, data: DataConfig) -> bool:
    """Whether a run caches the features of `dataset`: ``cache_features`` and its limit, which is said."""
    limit = data.cache_limit_gib
    if not data.cache_features or limit is None:
        return data.cache_features
    kinds = _kinds(_layout(net, dataset, data.cache_dtype))
    size = sum(kind.size for kind in kinds.values()) / 2**30
    if size > limit:
        print(
            f"features of {len(dataset)} images: {size:.0f} GiB would be cached, more than "
            f"--data.cache-limit-gib {limit:g}; they are computed anew in every pass"
        )
    return size <= limit


def cached(
    net: Network, dataset: SegmentationDataset, config: Config, device: torch.device
) -> CachedFeatures:
    """:func:`cache_features` with the folder, type, batches and processes that ``config`` names."""
    data = config.data
    return cache_features(
        net,
        dataset,
        root=cache_root(data.cache_dir),
        dtype=data.cache_dtype,
        batch_size=config.eval.batch_size,
        device=device,
        workers=data.workers,
    )


def source_of(
    config: Config, dataset: SegmentationDataset, net: Network, device: torch.device
) -> SegmentationDataset | CachedFeatures:
    """What a run reads in place of `dataset`: the images, or their frozen tokens where
    ``--data.cache-features`` and its limit say so.

    Raises:
        DataError, NumberError: see :func:`cache_features`.
    """
    return cached(net, dataset, config, device) if is_cached(net, dataset, config.data) else dataset


def kept_source(
    config: Config, dataset: SegmentationDataset, net: Network
) -> SegmentationDataset | CachedFeatures:
    """As :func:`source_of` for one pass: nothing is written, features are read where a run has left them.

    Raises:
        DataError: they are damaged.
    """
    data = config.data
    root = cache_root(data.cache_dir)
    # Where nothing was ever kept, the images need not be read for the name of a folder.
    if not data.cache_features or not root.is_dir():
        return dataset
    store = _store(root, _describe(net, dataset, data.cache_dtype))
    if not store.path.exists():
        return dataset
    store.verify()
    return _read_kept(store, dataset)


class Sources(NamedTuple):
    """What a run reads in place of its images: the images themselves, or their cached features."""

    train: SegmentationDataset | CachedFeatures
    val: SegmentationDataset | CachedFeatures | None
    """None = there are no validation images, or no labels of theirs."""


def sources_of(config: Config, data: Datasets, net: Network, device: torch.device) -> Sources:
    """:func:`source_of` for the images of training, and for those of validation where they have labels."""
    train, val = source_of(config, data.train, net, device), data.val
    return Sources(train, source_of(config, val, net, device) if val is not None and val.labelled else None)


@torch.no_grad()
def cache_features(
    net: Network,
    dataset: SegmentationDataset,
    *,
    root: Path,
    dtype: CacheType = "fp16",
    batch_size: int = 32,
    device: torch.device,
    workers: int | None = 0,
) -> CachedFeatures:
    """The dataset's frozen tokens, from disk where they are, computed where they are not.

    The folder's name is a hash of the backbone's weights, the crops' geometry and the dataset's files: a
    cache of anything else is never read. A stopped computation goes on where it stopped; one that another
    process is at is waited for.

    Args:
        net: network on `device`.
        dataset: images.
        root: folder of all caches, see :func:`cache_root`.
        dtype: of the stored tokens.
        batch_size: images per forward pass.
        device: where the forward passes run.
        workers: loader processes; None = one for each core, at most 8.

    Raises:
        DataError: the disk is too small, the folder cannot be written, or what it holds is damaged.
        NumberError: a token does not fit the type.
    """
    meta = _describe(net, dataset, dtype)
    store = _store(root, meta)
    with store.made() as part:
        if part is None:
            return _read_kept(store, dataset)
        left = part.left
        size = f"{store.size / 2**20:.0f} MiB into {store.path}"
        print(f"features of {len(dataset)} images: {size}, {len(left)} to go")
        _fill(part, net, val_loader(_Part(dataset, left), batch_size, workers), dtype, device)
    return CachedFeatures(store.path, dataset)


def _read_kept(store: Store, dataset: SegmentationDataset) -> CachedFeatures:
    """What is there already, which is said."""
    print(f"features of {len(dataset)} images: read from {store.path}")
    return CachedFeatures(store.path, dataset)


def _fill(part: Part, net: Network, loader: Any, dtype: CacheType, device: torch.device) -> None:
    net.eval()
    for batch in each(tqdm(loader, desc="features", unit="batch", disable=None)):
        index = batch["index"].numpy()
        frozen = net.frozen(batch["image"].to(device))
        for name, value in (("before", frozen.before), ("guidance", frozen.guidance)):
            stored = value.to(_TORCH[dtype])
            if not torch.isfinite(stored).all():
                raise NumberError(f"a frozen token does not fit {dtype}; give --data.cache-dtype bf16")
            part.arrays[name][index] = stored.cpu().view(torch.int16).numpy().view(_STORED[dtype])
        part.arrays["label"][index] = batch["label"].numpy()
        part.mark(index)


class _Part(Dataset[dict[str, Any]]):
    """Some images of a dataset, with their own indices."""

    def __init__(self, dataset: SegmentationDataset, indices: np.ndarray) -> None:
        self.dataset, self.indices = dataset, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return self.dataset[int(self.indices[i])]


def _layout(net: Network, dataset: SegmentationDataset, dtype: CacheType) -> dict[str, Any]:
    """Number, type and shapes of what is stored, by a look at the first image."""
    sample = dataset[0]
    image = sample["image"][None].to(next(net.parameters()).device)
    frozen = net.frozen(image)
    return {
        "images": len(dataset),
        "dtype": dtype,
        "before": list(frozen.before.shape[1:]),
        "guidance": list(frozen.guidance.shape[1:]),
        "label": list(sample["label"].shape),
    }


def _describe(net: Network, dataset: SegmentationDataset, dtype: CacheType) -> dict[str, Any]:
    """:func:`_layout`, and what the tokens follow from: reads every file of the dataset."""
    return {
        **_layout(net, dataset, dtype),
        "backbone": net.backbone.spec,
        "weights": weights_hash(net.backbone),
        "data": dataset.fingerprint(),
    }


def weights_hash(module: torch.nn.Module) -> str:
    """sha256 of the names and values of all weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _kinds(meta: dict[str, Any]) -> dict[str, Kind]:
    stored = _STORED[meta["dtype"]]
    types = {"before": stored, "guidance": stored, "label": np.int16}
    return {name: Kind((meta["images"], *meta[name]), dtype) for name, dtype in types.items()}


def _store(root: Path, meta: dict[str, Any]) -> Store:
    return Store(root, meta, _kinds(meta), what="features", remedy="give another --data.cache-dir")
