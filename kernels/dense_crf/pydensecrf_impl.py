"""Dense CRF by the package pydensecrf (distribution pydensecrf2), on one CPU core.

Legend: ``C`` classes, ``H W`` image size [pixels], ``d`` dimensions of a kernel's feature space.
"""

import functools
import importlib
import math

import numpy as np
import torch
from torch import Tensor

INSTALL = (
    "pip install pydensecrf2 (it holds the module pydensecrf; the distribution pydensecrf no longer builds)"
)

# Both ends as published. They bound the unary energy to [0, 11.5], so that one pixel's scores can still be
# outvoted.
PROBABILITY_MIN, PROBABILITY_MAX = 1e-5, 1.0

# The package stores lattice coordinates as 16-bit integers without a check: beyond them it returns wrong
# classes or crashes.
LATTICE_MAX = 2**15 - 1


@functools.cache
def unavailable_reason() -> str | None:
    """None if pydensecrf can be imported, else what is wrong and how to install it; remembered."""
    try:
        importlib.import_module("pydensecrf.densecrf")
    except ImportError as error:
        return f"the module pydensecrf cannot be imported ({error}); {INSTALL}"
    return None


def dense_crf(
    image: Tensor,
    scores: Tensor,
    iterations: int,
    gaussian: tuple[float, float],
    bilateral: tuple[float, float, float],
) -> Tensor:
    """Mean-field inference; the parameters of :func:`ppap.kernels.dense_crf`, both tensors on the CPU.

    Potts model, diagonal kernels, symmetric normalisation: the defaults of the package, and the published
    protocol.

    Raises:
        RuntimeError: pydensecrf is missing.
        ValueError: the lattice of a kernel would not fit the package's 16-bit coordinates.
    """
    reason = unavailable_reason()
    if reason is not None:
        raise RuntimeError(f"dense_crf: {reason}")
    from pydensecrf.densecrf import DenseCRF2D

    classes, height, width = scores.shape
    (gaussian_sxy, gaussian_compat), (sxy, srgb, compat) = gaussian, bilateral
    _check_lattice("gaussian", [(width - 1) / gaussian_sxy, (height - 1) / gaussian_sxy])
    _check_lattice("bilateral", [(width - 1) / sxy, (height - 1) / sxy] + 3 * [255 / srgb])

    probability = scores.float().softmax(dim=0).clamp(PROBABILITY_MIN, PROBABILITY_MAX)
    unary = np.ascontiguousarray(-probability.log().reshape(classes, -1).numpy())
    bgr = np.ascontiguousarray(image.numpy()[..., ::-1])

    crf = DenseCRF2D(width, height, classes)
    crf.setUnaryEnergy(unary)
    crf.addPairwiseGaussian(sxy=gaussian_sxy, compat=gaussian_compat)
    crf.addPairwiseBilateral(sxy=sxy, srgb=srgb, rgbim=bgr, compat=compat)
    q = np.array(crf.inference(iterations), dtype=np.float32, order="C")  # the package's is column-major
    return torch.from_numpy(q.reshape(classes, height, width))


def _check_lattice(name: str, extents: list[float]) -> None:
    """Refuse features in [0, extents[i]] whose permutohedral coordinates would leave 16 bits.

    With s_i = sqrt(2/3) (d+1) / sqrt((i+1)(i+2)), coordinate j of a feature f >= 0 is the sum of s_i f_i over
    i >= j less j s_{j-1} f_{j-1}: it lies between minus the last term and plus the sum.
    """
    d = len(extents)
    scaled = [
        math.sqrt(2 / 3) * (d + 1) / math.sqrt((i + 1) * (i + 2)) * extent for i, extent in enumerate(extents)
    ]
    largest = max([sum(scaled)] + [(i + 1) * value for i, value in enumerate(scaled)])
    if largest + d + 1 > LATTICE_MAX:  # rounding to a lattice point and its neighbours adds at most d + 1
        raise ValueError(
            f"dense_crf: the image is too large, or a sigma too small, for the {name} kernel: its lattice "
            f"coordinates reach {largest:.0f}, pydensecrf holds {LATTICE_MAX - d - 1}; give larger "
            "sigmas or a smaller image"
        )
