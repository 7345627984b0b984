"""Whether an exported network says what the predictor says: on random images, before it is kept."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ppap.errors import NumberError
from ppap.evaluation.predictor import Predictor
from ppap.exports.files import Running

TOLERANCE = 1e-4
"""Largest error of a logit, as a share of the largest logit."""
_BATCHES = (1, 3)


@dataclass(frozen=True)
class Agreement:
    """How near an exported network is to the predictor."""

    images: int
    error: float
    """Largest difference of two logits."""
    largest: float
    """Largest logit, without its sign."""
    equal: float
    """Share of the pixels whose label is the same."""

    def line(self) -> str:
        """For people."""
        return (
            f"compared with torch on {self.images} random images: largest error of a logit {self.error:.1e} "
            f"(logits up to {self.largest:.1f}), labels equal in {100 * self.equal:.2f} % of the pixels"
        )


def compare(
    predictor: Predictor, probe: str, running: Running, sizes: Sequence[tuple[int, int]], seed: int = 0
) -> Agreement:
    """Compare with what ``ppap predict`` computes, on batches of 1 and of 3 images of every size.

    Args:
        predictor: of the run.
        probe: cluster or linear.
        running: the exported network.
        sizes: (H, W) of images [pixels].
        seed: of the images.

    Raises:
        NumberError: logits differ by more than rounding explains.
    """
    rng, errors, largest, equal, images = np.random.default_rng(seed), [0.0], [0.0], [], 0
    for size in sizes:
        for count in _BATCHES:
            pixels = [_picture(rng, size) for _ in range(count)]
            batch = torch.stack([torch.from_numpy(one).permute(2, 0, 1) for one in pixels]).float() / 255
            logits, labels = running(batch)
            for i, one in enumerate(pixels):
                wanted, ids = _predicted(predictor, probe, one)
                errors.append(float((logits[i] - wanted).abs().max()))
                largest.append(float(wanted.abs().max()))
                equal.append(float((labels[i] == ids).float().mean()))
            images += count
    found = Agreement(images, max(errors), max(largest), sum(equal) / len(equal))
    if not found.error <= TOLERANCE * max(found.largest, 1.0):
        raise NumberError(
            f"the exported network differs from torch, so it is not kept: largest error of a logit "
            f"{found.error:.2g}, logits up to {found.largest:.2g}; give another --format or --size"
        )
    return found


def _predicted(predictor: Predictor, probe: str, pixels: np.ndarray) -> tuple[Tensor, Tensor]:
    """(K, H, W) logits and (H, W) ids, the predictor's own."""
    lookout = predictor.lookout(probe)
    view = lookout.look([pixels])[0].view
    size = (pixels.shape[0], pixels.shape[1])
    logits = torch.stack([view.at(channel, size) for channel in range(len(view.scores))])
    return logits, predictor.table(lookout)[view.best(size)]


def _picture(rng: np.random.Generator, size: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) uint8: coarse patches of colour with noise."""
    coarse = rng.integers(0, 200, (-(-size[0] // 8), -(-size[1] // 8), 3))
    pixels = coarse.repeat(8, axis=0).repeat(8, axis=1)[: size[0], : size[1]]
    return (pixels + rng.integers(0, 56, (*size, 3))).astype(np.uint8)
