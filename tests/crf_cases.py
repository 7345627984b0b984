"""Data and tolerances of the dense CRF's tests; needs numpy alone, for machines that have little else."""

import numpy as np

# Against the package: 1e-6 where the labels are clear. Ten iterations multiply a rounding a hundredfold where
# two classes are in balance, which happens in noise: there the reference, too, is 5e-5 away (native: 7e-5).
TOLERANCE, CONTESTED = 2e-5, 3e-4


def example(classes: int, height: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A picture of two coloured halves with noise, and noisy scores that prefer a class in each half."""
    rng = np.random.default_rng(seed)
    left = np.arange(width) < width // 2
    colour = np.where(left[None, :, None], (200, 60, 20), (20, 80, 220))
    image = np.clip(colour + rng.normal(0, 3, (height, width, 3)), 0, 255).astype(np.uint8)
    scores = rng.normal(0, 1, (classes, height, width)).astype(np.float32)
    scores[0, :, left] += 1
    scores[-1, :, ~left] += 1
    return image, scores
