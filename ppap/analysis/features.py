"""Patch features and patch labels of training images, as the loss sees them, and HP's reference pool.

Legend: B images, h w patch grid, N = B h w patches, D channels, M entries of a pool.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ppap.data import SegmentationDataset, train_loader
from ppap.data.loading import stream
from ppap.data.patch_labels import LabelRule, labels_of
from ppap.methods.hidden_positives import draw_pool
from ppap.nets.model import PPAPNet, patch_rows

_BATCH = 16  # images per forward pass


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
    dataset: SegmentationDataset,
    images: int,
    *,
    seed: int,
    rule: LabelRule = "majority",
    workers: int = 0,
) -> Patches:
    """Guidance and labels of a random batch of training images; channel dropout as in training if `net` is.

    Args:
        net: network on its device, in training or evaluation mode.
        dataset: training images.
        images: images in the batch, at most those there are.
        seed: of the draw.
        rule: class of a patch, see :func:`ppap.evaluation.patches.labels_of`.
        workers: loader processes.
    """
    device, patch = next(net.parameters()).device, net.backbone.patch_size
    loader = train_loader(dataset, min(images, len(dataset)), seed, workers)
    batch = next(iter(loader))
    features, labels = [], []
    parts = zip(batch["image"].split(_BATCH), batch["label"].split(_BATCH), strict=True)
    for image, label in tqdm(parts, desc="features", total=-(-images // _BATCH), leave=False, disable=None):
        features.append(patch_rows(net(image.to(device)).guidance))
        labels.append(labels_of(label, patch, rule))
    features, labels = torch.cat(features), torch.cat(labels).to(device)
    count = len(batch["image"])
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
            for _, _, batch in stream(loader):
                yield net(batch["image"].to(device)).guidance
                bar.update(len(batch["image"]))

    return draw_pool(maps(), size, seed)
