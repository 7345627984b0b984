"""What is known of a data set's frozen features before training: moments of all, and the patches of one
batch.

``--model.condition`` is fitted to it and ``--loss.phi0 auto`` chosen by it (``ppap.methods.choices``). No
label is read. Legend: n images, h w patch grid, D channels."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset
from tqdm import tqdm

from ppap.data import val_loader
from ppap.errors import DataError
from ppap.nets.conditioning import Halves, Split
from ppap.nets.feature_cache import frozen_of
from ppap.nets.model import Network
from ppap.runs.randomness import drawn_order, own_randomness
from ppap.settings.config import Config
from ppap.stopping import each

PATCHES = 2**17
"""Patches that the moments are of, about: more than a hundred for each of 1024 channels."""
SAMPLE = 2**15
"""Patches at most of the batch that thresholds are measured on."""


@dataclass(frozen=True)
class Survey:
    """Frozen features of the training images, in numbers."""

    split: Split
    """Moments of two halves of the images that were looked at, on the CPU."""
    sample: Tensor
    """(n, D, h, w) fp32 features of random images, on the CPU: a batch of them, or ``SAMPLE`` patches."""
    images: int
    """Images that were looked at, drawn with the run's seed where they are not all."""


@torch.no_grad()
def survey(
    net: Network,
    source: Dataset[dict[str, Any]],
    config: Config,
    device: torch.device,
) -> Survey:
    """Look once at the training images, or at their cached features; no random state is touched.

    Args:
        net: on `device`.
        source: training images, or their cached features.
        config: seed, batch size, loader processes.
        device: where forward passes run and moments are formed.

    Raises:
        DataError: no image.
    """
    if len(source) == 0:
        raise DataError("there is no training image to fit --model.condition to")
    order = drawn_order(len(source), config.train.seed, 5)
    halves = Halves()
    sample: list[Tensor] = []
    seen = 0
    with own_randomness(), tqdm(desc="survey", unit="image", leave=False, disable=None) as bar:
        net.eval()
        images = Subset(source, order.tolist())
        for batch in each(val_loader(images, config.eval.batch_size, config.data.workers)):
            features = _features(net, batch, device)
            patches = features.shape[2] * features.shape[3]
            wanted = min(config.train.batch_size, max(SAMPLE // patches, 1))
            sample.append(features[: wanted - sum(map(len, sample))].cpu())
            halves.add(features)
            seen += len(features)
            bar.update(len(features))
            if seen * patches >= PATCHES:
                break
    return Survey(halves.split(), torch.cat(sample), seen)


def _features(net: Network, batch: dict[str, Tensor], device: torch.device) -> Tensor:
    """n(t_L) of a batch of images or of cached tokens: (B, D, h, w), fp32."""
    if "before" in batch:
        return frozen_of(batch, device).guidance.float()
    return net.features(batch["image"].to(device, non_blocking=True)).float()
