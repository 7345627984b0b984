"""How well frozen patch features separate the classes of held-out scenes: ``python -m
ppap.pretraining.measure``.

k-means with one cluster per class, matched to the classes, and a linear classifier, both on L2-normalised
patches; labels serve to measure alone. The scenes have another seed than any preset's, so that choosing a
backbone by these figures leaves the evaluation's scenes unseen.
"""

import argparse
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ppap.cli import run
from ppap.data.patch_labels import patch_labels
from ppap.data.scenes import CLASS_NAMES, Difficulty, make_scene
from ppap.data.transforms import normalise
from ppap.evaluation.patches import cluster_scores, colour_features, linear_scores
from ppap.nets.backbone import Backbone, build_backbone
from ppap.settings.config import ModelConfig
from ppap.settings.pretraining import small_vit
from ppap.stopping import each

_SEED = 1000


def scene_pixels(stream: str, count: int, size: int, difficulty: Difficulty) -> tuple[Tensor, Tensor]:
    """(count, S, S, 3) uint8 pixels and (count, S, S) int64 labels of the measuring scenes."""
    scenes = [make_scene(_SEED, stream, i, size, difficulty) for i in range(count)]
    pixels, labels = (torch.from_numpy(np.stack(part)) for part in zip(*scenes, strict=True))
    return pixels, labels.long()


@torch.no_grad()
def patch_features(backbone: Backbone, pixels: Tensor, batch_size: int = 16) -> Tensor:
    """L2-normalised patch features (N, D) of (B, H, W, 3) uint8 images, in (image, row, column) order."""
    rows = []
    for part in each(pixels.split(batch_size)):
        images = torch.stack([normalise(image.numpy()) for image in part])
        rows.append(backbone(images).flatten(2).transpose(1, 2).flatten(0, 1))
    return F.normalize(torch.cat(rows), dim=1)


def measure(
    backbone: Backbone | None, difficulty: Difficulty, size: int = 128, count: int = 64
) -> tuple[float, float]:
    """Scores of a backbone, or of patch colours (None), on `count` validation scenes.

    Returns:
        mIoU of k-means and of a linear classifier fitted on as many training scenes [%].
    """
    patch = 8 if backbone is None else backbone.patch_size
    rows, labels = {}, {}
    for stream in ("train", "val"):
        pixels, label = scene_pixels(stream, count, size, difficulty)
        labels[stream] = patch_labels(label, patch)
        rows[stream] = (
            colour_features(pixels, patch) if backbone is None else patch_features(backbone, pixels)
        )
    classes = len(CLASS_NAMES)
    clusters = cluster_scores(rows["val"], labels["val"], classes)
    linear = linear_scores((rows["train"], labels["train"]), (rows["val"], labels["val"]), classes)
    return clusters.miou, linear.miou


def main(argv: Sequence[str]) -> None:
    """Print a table: a row for colour, one for a random network, one per weights given."""
    parser = argparse.ArgumentParser(prog="python -m ppap.pretraining.measure", description=__doc__)
    parser.add_argument("weights", nargs="*", help="anything that --model.weights takes")
    parser.add_argument("--size", type=int, default=128, help="side of the scenes [pixels]")
    parser.add_argument("--count", type=int, default=64, help="validation scenes, and training scenes")
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    rows = [("colour", None), ("random network", build_backbone(small_vit()))]
    rows += [(name, build_backbone(ModelConfig(weights=name))) for name in options.weights]
    print(f"{options.count} scenes of {options.size} pixels: k-means mIoU / linear mIoU [%]")
    for name, backbone in each(rows):
        cells = [measure(backbone, level, options.size, options.count) for level in ("easy", "hard")]
        text = "   ".join(f"{a:5.1f} / {b:5.1f}" for a, b in cells)
        print(f"{name:<40} easy, hard: {text}", flush=True)


if __name__ == "__main__":
    import sys

    sys.exit(run(main))
