"""The network of an analysis with all that is auto chosen, and the patches that its loss would compare.

Legend: B images, h w patch grid, N = B h w patches, D channels, M entries of a pool.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from ppap.data import SegmentationDataset, train_loader
from ppap.data.loading import stream
from ppap.data.patch_labels import LabelRule, labels_of
from ppap.methods.choices import Choices, look_and_choose
from ppap.methods.guidance import PATCHES
from ppap.methods.hidden_positives import draw_pool
from ppap.nets.feature_cache import cached, frozen_of
from ppap.nets.model import Network, PPAPNet, build_net, patch_rows
from ppap.runs.randomness import own_randomness
from ppap.settings.config import Config
from ppap.stopping import each

_BATCH = 16  # images per forward pass


class Prepared(NamedTuple):
    """A network as training would start with it."""

    net: PPAPNet
    """On the device, in training mode, its condition in place."""
    config: Config
    """Without auto."""
    choices: Choices
    """What stands in the place of auto."""
    source: Dataset[dict[str, Any]]
    """The training images, or their cached features if the survey made or read them."""


def prepare(config: Config, dataset: SegmentationDataset, device: torch.device) -> Prepared:
    """Build the network and choose what is auto by a look at the training images; the choices are printed.

    Args:
        config: settings; torch's global generator starts from its seed.
        dataset: training images.
        device: where it computes.

    Raises:
        UsageError: no threshold gives sets of the size that is asked for.
        DataError: the features' cache cannot be written.
    """
    torch.manual_seed(config.train.seed)
    net = build_net(config.model).to(device)
    source: Dataset[dict[str, Any]] = dataset

    def looked_at() -> Dataset[dict[str, Any]]:
        nonlocal source
        source = _source(net, dataset, config, device)
        return source

    with own_randomness():
        clusters = dataset.classes + config.train.extra_clusters
        choices, condition = look_and_choose(config, net, looked_at, device, clusters)
    net.condition = None if condition is None else condition.to(device)
    net.train()  # whoever looked left it in evaluation mode
    return Prepared(net, with_choices(config, choices), choices, source)


def with_choices(config: Config, choices: Choices) -> Config:
    """``config`` with numbers in the place of auto, that of the row fixed among them."""
    compare = config.compare
    if config.loss.phi0 == "auto" and compare.fixed_phi0 is None:
        compare = replace(compare, fixed_phi0=choices.fixed_phi0)
    return replace(choices.apply(config), compare=compare)


def _source(
    net: Network, dataset: SegmentationDataset, config: Config, device: torch.device
) -> Dataset[dict[str, Any]]:
    """What the survey looks at: the features' cache where training makes one and the survey needs all."""
    patches = (config.data.resolution // net.backbone.patch_size) ** 2
    if not config.data.cache_features or len(dataset) * patches > PATCHES:
        return dataset
    return cached(net, dataset, config, device)


class Patches(NamedTuple):
    """The patches of a batch of training images."""

    features: Tensor
    """(N, D) float32 guidance, any norm, rows in (image, row, column) order."""
    labels: Tensor
    """(N,) int64 class of each patch; -1 = ignored, or unlabelled images."""
    images: Tensor
    """(N,) int64 place of each patch's image in the batch."""


@torch.no_grad()
def training_patches(
    net: PPAPNet,
    source: Dataset[dict[str, Any]],
    images: int,
    *,
    seed: int,
    rule: LabelRule = "majority",
    workers: int = 0,
) -> Patches:
    """Guidance and labels of a random batch of training images; channel dropout as in training if `net` is.

    Args:
        net: network on its device, in training or evaluation mode.
        source: training images, or their cached features.
        images: images in the batch, at most those there are.
        seed: of the draw.
        rule: class of a patch, see :func:`ppap.evaluation.patches.labels_of`.
        workers: loader processes.
    """
    device, patch = next(net.parameters()).device, net.backbone.patch_size
    loader = train_loader(source, min(images, len(source)), seed, workers)
    batch = next(iter(loader))
    features, labels = [], []
    count = len(batch["label"])
    for i in each(tqdm(range(0, count, _BATCH), desc="features", leave=False, disable=None)):
        part = {name: value[i : i + _BATCH] for name, value in batch.items()}
        frozen = frozen_of(part, device) if "before" in part else net.frozen(part["image"].to(device))
        features.append(patch_rows(net.guidance_of(frozen)))
        labels.append(labels_of(part["label"], patch, rule))
    features, labels = torch.cat(features), torch.cat(labels).to(device)
    place = torch.arange(count, device=device).repeat_interleave(len(features) // count)
    return Patches(features, labels, place)


def backbone_weights(net: PPAPNet) -> dict[str, Tensor]:
    """The frozen weights by their names in a checkpoint, for the record of where numbers come from."""
    return {name: value for name, value in net.state_dict().items() if name.startswith("backbone.")}


@torch.no_grad()
def reference_pool(
    net: PPAPNet, dataset: SegmentationDataset, size: int, *, seed: int, workers: int = 0
) -> Tensor:
    """HP's reference pool: a random patch of each of `size` training images in shuffled order.

    Where there are fewer images, they come again, with other patches. Channel dropout as in training if
    `net` is in training mode.

    Returns:
        (M, D) float32, L2-normalised.
    """
    device = next(net.parameters()).device

    def maps() -> Iterator[Tensor]:
        loader = train_loader(dataset, min(_BATCH, len(dataset)), seed, workers)
        with tqdm(total=size, desc="pool", unit="image", leave=False, disable=None) as bar:
            for _, _, batch in each(stream(loader)):
                yield net(batch["image"].to(device)).guidance
                bar.update(len(batch["image"]))

    return draw_pool(maps(), size, seed)
