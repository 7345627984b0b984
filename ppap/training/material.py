"""What a run trains and is compared on: images or their cached features, and the rows of its table."""

import torch

from ppap.data import Datasets, SegmentationDataset
from ppap.errors import UsageError
from ppap.nets.feature_cache import CachedFeatures, cached, is_cached
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
    return cached(net, dataset, config, device) if is_cached(net, dataset, config.data) else dataset
