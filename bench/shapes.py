"""Shapes named after the training settings they stand for, and the one generator of their data."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Shape:
    """One step's loss: N patches, A anchors, D guidance and E embedding channels."""

    name: str
    patches: int
    anchors: int
    width: int
    code_width: int

    def __str__(self) -> str:
        return self.name


SMALL = Shape("8 crops of 14x14, every 4th patch", 8 * 196, 8 * 49, 384, 384)
VITS16 = Shape("ViT-S/16, 64 crops of 14x14, every 4th patch", 64 * 196, 16 * 196, 384, 384)
VITS16_CHUNK = Shape("ViT-S/16, 64 crops, one chunk of anchors", 64 * 196, 784, 384, 384)
VITS8_CHUNK = Shape("ViT-S/8, 64 crops, one chunk of anchors", 64 * 784, 784, 384, 384)
VITB16_CHUNK = Shape("ViT-B/16, 64 crops of 14x14, one chunk of anchors", 64 * 196, 784, 768, 768)
VITS8 = Shape("ViT-S/8, 64 crops of 28x28, every 16th patch", 64 * 784, 64 * 49, 384, 384)
VITB8 = Shape("ViT-B/8, 64 crops of 28x28, every 16th patch", 64 * 784, 64 * 49, 768, 768)


def clustered(rows: int, width: int, seed: int, clusters: int = 40) -> torch.Tensor:
    """Unit rows (rows, width) float32 around random centres in runs of neighbours, as patches of images are.

    Two rows of one cluster have a cosine of about 0.7, rows of different clusters of about 0; every tenth
    cluster is a blend of two others, so that some similarities lie between the thresholds.
    """
    g = torch.Generator().manual_seed(seed)
    centres = F.normalize(torch.randn(clusters, width, generator=g), dim=1)
    blends = torch.arange(0, clusters, 10)
    centres[blends] = F.normalize(centres[blends] + centres[(blends + 1) % clusters], dim=1)
    # Runs of 1 to 12 equal labels, laid end to end.
    lengths = torch.randint(1, 13, (rows,), generator=g)
    labels = torch.randint(clusters, (rows,), generator=g).repeat_interleave(lengths)[:rows]
    noise = torch.randn(rows, width, generator=g) * (0.65 / width**0.5)
    return F.normalize(centres[labels] + noise, dim=1)


def anchors_of(shape: Shape, seed: int = 0) -> torch.Tensor:
    """(A,) int64 anchors drawn evenly over the patches, in their order."""
    g = torch.Generator().manual_seed(seed + 1)
    return torch.randperm(shape.patches, generator=g)[: shape.anchors].sort().values


def loss_inputs(shape: Shape, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """features (N, D), z (N, E), both unit rows, and anchors (A,) int64 drawn evenly over the patches."""
    features = clustered(shape.patches, shape.width, seed)
    z = clustered(shape.patches, shape.code_width, seed + 2)
    return features, z, anchors_of(shape, seed)
