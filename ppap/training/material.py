"""What a run trains and is compared on: images or their cached features, and the rows of its table."""

import torch

from ppap.data import Datasets, SegmentationDataset
from ppap.errors import UsageError
from ppap.nets.feature_cache import CachedFeatures, cache_bytes, cache_features, cache_root
from ppap.nets.model import Network
from ppap.settings.config import Config
from ppap.settings.presets import preset
from ppap.settings.published import with_method


def comparison_rows(config: Config, data: Datasets) -> tuple[str, ...]:
    """Rows of the comparison; those that only the preset asks for give way where labels are missing.

    Raises:
        UsageError: rows were asked for, and labels that they need are missing.
    """
    rows = config.compare.rows
    if not rows:
        return rows
    missing = None
    if data.val is None or not data.val.labelled:
        missing = "--compare.rows needs validation labels; give labels/val, or leave it out"
    elif not data.train.labelled:
        missing = "--compare.rows needs training labels for its linear probe; give labels/train"
    if missing is None:
        return rows
    if rows != with_method(preset(config.preset), config.method).compare.rows:
        raise UsageError(missing)
    print("comparison: none, for want of labels")
    return ()


def training_set(
    config: Config, dataset: SegmentationDataset, net: Network, device: torch.device
) -> SegmentationDataset | CachedFeatures:
    """The training images, or their frozen tokens where ``--data.cache-features`` and its limit say so.

    Raises:
        DataError, NumberError: see :func:`ppap.nets.feature_cache.cache_features`.
    """
    data = config.data
    if not data.cache_features:
        return dataset
    size = cache_bytes(net, dataset, data.cache_dtype) / 2**30
    if data.cache_limit_gib is not None and size > data.cache_limit_gib:
        print(
            f"features: {size:.0f} GiB would be cached, more than --data.cache-limit-gib "
            f"{data.cache_limit_gib:g}; they are computed anew in every pass"
        )
        return dataset
    return cache_features(
        net,
        dataset,
        root=cache_root(data.cache_dir),
        dtype=data.cache_dtype,
        batch_size=config.eval.batch_size,
        device=device,
        workers=data.workers,
    )
