"""HP's other view of an image: its colours and its sharpness changed at random, every patch in its place.

Jitter of brightness, contrast, saturation (0.7 to 1.3 times) and hue (up to a tenth of the circle), in random
order; grey with odds of 1/5; Gaussian blur of 5 x 5 pixels, sigma 0.1 to 2, with odds of 1/2.
"""

import numpy as np
import torch
import torchvision.transforms.functional as TF
from torch import Tensor

from ppap.data.transforms import MEAN, STD

_JITTER, _HUE, _GREY, _BLUR, _SIGMA, _KERNEL = 0.3, 0.1, 0.2, 0.5, (0.1, 2.0), 5


def recolour(images: Tensor, seed: int, step: int, *, normalised: bool) -> Tensor:
    """Another view of each image, a pure function of its arguments.

    Args:
        images: normalised, (B, 3, H, W) float32.
        seed, step: of the run.
        normalised: change the normalised values, as published. torchvision's jitter clamps to 0..1, so all
            that is darker than the mean colour becomes the mean, and all brighter than a standard deviation
            above it that. False = change the colours of the image itself, and normalise again.
    """
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in (MEAN, STD))
    images = images if normalised else images * std + mean
    changed = torch.stack([_change(image, _draw(seed, step, i)) for i, image in enumerate(images)])
    return changed if normalised else (changed - mean) / std


def _draw(seed: int, step: int, image: int) -> np.ndarray:
    """Twelve numbers in [0, 1) for one image."""
    # Counter words keep them apart from the anchors, which share the key.
    key = np.array([seed, 2**63 | step], dtype=np.uint64)
    return np.random.Philox(counter=[0, 0, image, 2], key=key).random_raw(12) / 2.0**64


def _change(image: Tensor, draw: np.ndarray) -> Tensor:
    def between(low: float, high: float, u: float) -> float:
        return float(low + (high - low) * u)

    changes = (
        lambda x: TF.adjust_brightness(x, between(1 - _JITTER, 1 + _JITTER, draw[0])),
        lambda x: TF.adjust_contrast(x, between(1 - _JITTER, 1 + _JITTER, draw[1])),
        lambda x: TF.adjust_saturation(x, between(1 - _JITTER, 1 + _JITTER, draw[2])),
        lambda x: TF.adjust_hue(x, between(-_HUE, _HUE, draw[3])),
    )
    for k in draw[4:8].argsort(kind="stable"):
        image = changes[k](image)
    if draw[8] < _GREY:
        image = TF.rgb_to_grayscale(image, num_output_channels=3)
    if draw[9] < _BLUR:
        image = TF.gaussian_blur(image, [_KERNEL, _KERNEL], [between(*_SIGMA, draw[10])] * 2)
    return image
