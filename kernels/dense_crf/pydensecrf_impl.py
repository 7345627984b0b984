"""Dense CRF by the package pydensecrf (distribution pydensecrf2), on one CPU core.

Legend: ``C`` classes, ``H W`` image size [pixels], ``d`` dimensions of a kernel's feature space.
"""

import functools
import importlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from .limits import check_lattice, spans
from .reference import PROBABILITY_MAX, PROBABILITY_MIN

INSTALL = (
    "pip install pydensecrf2 (it holds the module pydensecrf; the distribution pydensecrf no longer builds)"
)

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
    scores: Sequence[Tensor],
    iterations: int,
    gaussian: tuple[float, float],
    bilateral: tuple[float, float, float],
) -> list[Tensor]:
    """Mean-field inference for several maps of one image; tensors on the CPU.

    Potts model, diagonal kernels, symmetric normalisation: the defaults of the package, and the published
    protocol.

    Raises:
        RuntimeError: pydensecrf is missing.
        ValueError: the lattice of a kernel would not fit the package's 16-bit coordinates.
    """
    reason = unavailable_reason()
    if reason is not None:
        raise RuntimeError(f"dense_crf: {reason}")
    height, width, _ = image.shape
    for name, span in spans(height, width, gaussian, bilateral).items():
        check_lattice(name, span, LATTICE_MAX)
    return [_one_map(image, part, iterations, gaussian, bilateral) for part in scores]


def _one_map(
    image: Tensor,
    scores: Tensor,
    iterations: int,
    gaussian: tuple[float, float],
    bilateral: tuple[float, float, float],
) -> Tensor:
    from pydensecrf.densecrf import DenseCRF2D

    classes, height, width = scores.shape
    probability = scores.softmax(dim=0).clamp(PROBABILITY_MIN, PROBABILITY_MAX)
    unary = np.ascontiguousarray(-probability.log().reshape(classes, -1).numpy())
    bgr = np.ascontiguousarray(image.numpy()[..., ::-1])

    crf = DenseCRF2D(width, height, classes)
    crf.setUnaryEnergy(unary)
    crf.addPairwiseGaussian(sxy=gaussian[0], compat=gaussian[1])
    crf.addPairwiseBilateral(sxy=bilateral[0], srgb=bilateral[1], rgbim=bgr, compat=bilateral[2])
    q = np.array(crf.inference(iterations), dtype=np.float32, order="C")  # the package's is column-major
    return torch.from_numpy(q.reshape(classes, height, width))
