"""What a backbone's frozen features are worth for a data set before any training, raw and conditioned.

Most of it needs no label. Where there are labels, they say how pure neighbours and sets are, and what k-means
and a linear classifier make of the features; they choose nothing.

Legend: n images, h w patch grid, N patches, A anchors, D channels, K clusters = classes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, Subset
from tqdm import tqdm

from ppap.data import SegmentationDataset, val_loader
from ppap.data.patch_labels import labels_of
from ppap.methods.choices import as_compared, figures
from ppap.methods.guidance import Survey, survey
from ppap.methods.thresholds import TOLERANCE, Phi0, SetSizes, ratio
from ppap.nets.conditioning import Condition
from ppap.nets.feature_cache import cached, frozen_of
from ppap.nets.model import Network, patch_rows
from ppap.runs.randomness import drawn_order
from ppap.settings.config import Config
from ppap.stopping import each


class Maps(NamedTuple):
    """Frozen features of some images of a split, on the CPU."""

    indices: list[int]
    """Of the images in the split."""
    features: Tensor
    """(n, D, h, w) float32, raw."""
    labels: Tensor
    """(n, H, W) int16 per pixel, -1 = ignored or not known."""
    patch_classes: Tensor
    """(n, h w) int64 most frequent class of each patch, -1 = not known."""

    @property
    def classes(self) -> Tensor:
        """(N,) int64 class of each patch."""
        return self.patch_classes.flatten()

    @property
    def images(self) -> Tensor:
        """(N,) int64 place of each patch's image."""
        return torch.arange(len(self.features)).repeat_interleave(self.features[0, 0].numel())

    def part(self, places: Sequence[int]) -> "Maps":
        """Of some of the images."""
        keep = list(places)
        rest = (part[keep] for part in self[1:])
        return Maps([self.indices[i] for i in keep], *rest)


@dataclass(frozen=True)
class LabelFree:
    """A condition's figures without labels."""

    condition: str
    median: float
    """Of the cosines of two random patches."""
    most: float
    """95 % of these cosines are below it."""
    separation: float
    """How far k-means' clusters stand apart."""
    rank: float
    """Effective number of directions."""
    phi0: float
    """Threshold whose sets are nearest to the aimed size after propagation."""
    psi0: float
    """Threshold below which 89 % of the patches are, given phi0."""
    positives: float
    """Mean positive set at phi0 [share of the patches]."""
    jump: tuple[float, float]
    """Sizes of the sets just above and just below the aim [share of the patches]."""
    reached: bool
    """Whether phi0 gives nearly the size aimed for; else the sets jump past it."""


class _Held(Dataset[dict[str, Any]]):
    """Maps as a dataset of cached tokens, for what reads batches."""

    def __init__(self, features: Tensor) -> None:
        self.features = features

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {"before": torch.zeros(0), "guidance": self.features[i], "index": i}


@torch.no_grad()
def look(
    net: Network, dataset: SegmentationDataset, images: int, config: Config, device: torch.device
) -> Maps:
    """Frozen features of at most `images` images spread over a split, in its order.

    From the features' cache where ``--data.cache-features`` is on and all images are wanted.
    """
    count, net = min(images, len(dataset)), net.eval()
    chosen = [i * len(dataset) // count for i in range(count)]
    whole = config.data.cache_features and count == len(dataset)
    source = cached(net, dataset, config, device) if whole else Subset(dataset, chosen)
    features, labels, classes = [], [], []
    loader = val_loader(source, config.eval.batch_size, config.data.workers)
    for batch in each(tqdm(loader, desc="features", unit="batch", leave=False, disable=None)):
        if "before" in batch:
            found = frozen_of(batch, device).guidance
        else:
            found = net.features(batch["image"].to(device, non_blocking=True))
        features.append(found.float().cpu())
        labels.append(batch["label"].short())
        classes.append(labels_of(batch["label"], net.backbone.patch_size).view(len(found), -1))
    return Maps(chosen, torch.cat(features), torch.cat(labels), torch.cat(classes))


def survey_of(net: Network, maps: Maps, config: Config) -> Survey:
    """What training would see of these images before its first step."""
    held = replace(config, data=replace(config.data, workers=0))
    return survey(net, _Held(maps.features), held, torch.device("cpu"))


def label_free(survey: Survey, name: str, condition: Condition, config: Config, clusters: int) -> LabelFree:
    """Figures of one condition; the thresholds are those that training would choose with it.

    Args:
        survey: of the training images.
        name: of the condition.
        condition: fitted to them.
        config: loss, dropout and seed.
        clusters: K.
    """
    sizes = SetSizes(as_compared(survey.sample, condition, config), config.loss, config.train.seed)
    aim = aim_of(config, clusters)
    found: Phi0 = sizes.phi0(aim)
    return LabelFree(
        name,
        *figures(survey, condition, clusters),
        phi0=found.value,
        psi0=sizes.psi0(found.value),
        positives=found.size,
        jump=found.jump,
        reached=bool(ratio(found.size, aim) <= np.log(TOLERANCE)),
    )


def aim_of(config: Config, clusters: int) -> float:
    """Size of a positive set that phi0 auto aims for [share of the patches]."""
    return min(config.loss.positives / clusters, 0.5)


def unit_rows(maps: Maps, condition: Condition) -> Tensor:
    """Conditioned patches of unit length, (N, D) float32 in (image, row, column) order."""
    return F.normalize(patch_rows(condition(maps.features)), dim=1)


def draw(count: int, wanted: int, seed: int) -> Tensor:
    """At most `wanted` of `count` places, drawn without replacement, ascending: (A,) int64."""
    return torch.from_numpy(np.sort(drawn_order(count, seed, 9)[:wanted]))
