"""What the features of an image may span, which all lattices that pack their coordinates need to know."""

import math
from collections.abc import Sequence


def spans(
    height: int, width: int, gaussian: Sequence[float], bilateral: Sequence[float]
) -> dict[str, list[float]]:
    """Kernel -> the largest value of each of its features: positions and colours over the sigmas."""
    (gaussian_sxy, _), (sxy, srgb, _) = gaussian, bilateral
    return {
        "gaussian": [(width - 1) / gaussian_sxy, (height - 1) / gaussian_sxy],
        "bilateral": [(width - 1) / sxy, (height - 1) / sxy] + 3 * [255 / srgb],
    }


def check_lattice(name: str, span: Sequence[float], limit: int) -> None:
    """Refuse features in [0, span[i]] whose permutohedral coordinates would leave -limit..limit.

    With s_i = sqrt(2/3) (d+1) / sqrt((i+1)(i+2)), coordinate j of a feature f >= 0 is the sum of s_i f_i over
    i >= j less j s_{j-1} f_{j-1}: it lies between minus the last term and plus the sum.

    Raises:
        ValueError: they do; names the kernel and the remedy.
    """
    d = len(span)
    scaled = [
        math.sqrt(2 / 3) * (d + 1) / math.sqrt((i + 1) * (i + 2)) * value for i, value in enumerate(span)
    ]
    largest = max([sum(scaled)] + [(i + 1) * value for i, value in enumerate(scaled)])
    # Rounding to a lattice point, its simplex and the neighbours of that add at most 2 (d + 1).
    if largest + 2 * (d + 1) > limit:
        raise ValueError(
            f"dense_crf: the image is too large, or a sigma too small, for the {name} kernel: its lattice "
            f"coordinates reach {largest:.0f}, the limit is {limit - 2 * (d + 1)}; give larger sigmas or a "
            "smaller image"
        )
