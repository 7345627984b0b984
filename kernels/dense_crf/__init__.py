"""Fully connected CRF over the pixels of one image: public function, checks, choice of implementation.

Next: ``pydensecrf_impl.py``, the only implementation so far. It is chosen by ``impl=`` alone; the backend
variable of the loss ops does not apply here.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import pydensecrf_impl

DEFAULT_IMPL = "pydensecrf"

_IMPLS = {"pydensecrf": pydensecrf_impl}


def dense_crf(
    image: Tensor | np.ndarray,
    scores: Tensor | np.ndarray,
    *,
    iterations: int = 10,
    gaussian: tuple[float, float] = (1, 3),
    bilateral: tuple[float, float, float] = (67, 3, 4),
    impl: str | None = None,
) -> Tensor:
    """Refine class scores by mean-field inference in a fully connected CRF with a Potts model.

    The unary energy is ``-log(clip(softmax(scores), 1e-5, 1))``; a Gaussian kernel on positions smooths, a
    bilateral kernel on positions and colours aligns to edges; both are normalised symmetrically. The defaults
    are the published evaluation protocol. Runs on the CPU and copies there and back for scores on another
    device. Not differentiable: a backward pass through it raises.

    Args:
        image: (H, W, 3) uint8 RGB (read in BGR order inside, as published), numpy or torch, any device.
        scores: (C, H, W) logits of any float dtype, finite, numpy or torch; log-probabilities are logits too.
        iterations: mean-field steps, >= 0; 0 gives the clipped and renormalised softmax.
        gaussian: (sigma of the position [pixels], weight).
        bilateral: (sigma of the position [pixels], sigma of the colour [grey levels 0-255], weight).
        impl: "pydensecrf", or None = "pydensecrf".

    Returns:
        q (C, H, W) float32 on the device of ``scores``: probabilities that sum to 1 over the classes.

    Raises:
        ValueError: an unknown ``impl``, a wrong shape, dtype or parameter, non-finite scores, or an image too
            large for the sigmas (the lattice has 16-bit coordinates).
        RuntimeError: pydensecrf is not installed; or a backward pass was asked for.

    Example:
        >>> labels = dense_crf(image, logits).argmax(dim=0)
    """
    name = DEFAULT_IMPL if impl is None else impl
    if name not in _IMPLS:
        raise ValueError(f"dense_crf: impl is {impl!r}; valid: {', '.join(map(repr, _IMPLS))} or None")
    if not isinstance(iterations, int) or isinstance(iterations, bool) or iterations < 0:
        raise ValueError(f"dense_crf: iterations is {iterations!r}; give an integer >= 0")
    gaussian = _check_kernel("gaussian", gaussian, ("sxy",))
    bilateral = _check_kernel("bilateral", bilateral, ("sxy", "srgb"))
    image, scores = _as_tensor("image", image), _as_tensor("scores", scores)
    _check_inputs(image, scores)
    return _dense_crf_op(image, scores, iterations, gaussian, bilateral, name)


def _check_kernel(name: str, values: Any, sigmas: tuple[str, ...]) -> list[float]:
    """A kernel's parameters as floats: positive sigmas, then a weight >= 0."""
    wanted = f"({', '.join(sigmas)}, weight)"
    try:
        numbers = [float(value) for value in values]
    except (TypeError, ValueError):
        raise ValueError(
            f"dense_crf: {name} is {values!r}; give {len(sigmas) + 1} numbers {wanted}"
        ) from None
    if len(numbers) != len(sigmas) + 1:
        raise ValueError(f"dense_crf: {name} has {len(numbers)} values; give {len(sigmas) + 1}: {wanted}")
    if not all(math.isfinite(number) for number in numbers) or min(numbers[:-1]) <= 0 or numbers[-1] < 0:
        raise ValueError(
            f"dense_crf: {name} is {values!r}; {wanted} needs sigmas > 0 and a weight >= 0, all finite"
        )
    return numbers


def _as_tensor(name: str, values: Any) -> Tensor:
    if isinstance(values, Tensor):
        return values
    if not isinstance(values, np.ndarray):
        raise ValueError(
            f"dense_crf: {name} is a {type(values).__name__}; give a numpy array or a torch tensor"
        )
    if values.dtype == np.longdouble:  # torch has no such type
        values = values.astype(np.float64)
    try:
        # A copy: torch accepts neither negative strides (a flipped view) nor, without a warning, read-only
        # memory.
        return torch.from_numpy(values.copy())
    except TypeError:
        raise ValueError(f"dense_crf: {name} has dtype {values.dtype}, which torch does not know") from None


def _check_inputs(image: Tensor, scores: Tensor) -> None:
    if scores.ndim != 3 or min(scores.shape) < 1:
        raise ValueError(
            f"dense_crf: scores has shape {tuple(scores.shape)}; give (C, H, W), each at least 1"
        )
    if not scores.is_floating_point():
        raise ValueError(f"dense_crf: scores has dtype {scores.dtype}; give logits of a float dtype")
    if image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"dense_crf: image has shape {tuple(image.shape)}; give (H, W, 3), RGB last")
    if image.dtype != torch.uint8:
        raise ValueError(f"dense_crf: image has dtype {image.dtype}; give uint8 in 0..255")
    if image.shape[:2] != scores.shape[1:]:
        raise ValueError(
            f"dense_crf: the image is {image.shape[0]} x {image.shape[1]} pixels, the scores are "
            f"{scores.shape[1]} x {scores.shape[2]}; resize the scores to the image first"
        )


@torch.library.custom_op("ppap::dense_crf", mutates_args=())
def _dense_crf_op(
    image: Tensor,
    scores: Tensor,
    iterations: int,
    gaussian: Sequence[float],
    bilateral: Sequence[float],
    impl: str,
) -> Tensor:
    # In float32, the arithmetic of every implementation: a float64 beyond its range counts as infinite.
    scores_cpu = scores.detach().to("cpu", torch.float32)
    if not torch.isfinite(scores_cpu).all():
        raise ValueError("dense_crf: scores hold NaN or infinite values (after conversion to float32)")
    q = _IMPLS[impl].dense_crf(image.cpu(), scores_cpu, iterations, tuple(gaussian), tuple(bilateral))
    return q.to(scores.device)


@_dense_crf_op.register_fake
def _(image, scores, iterations, gaussian, bilateral, impl):
    return scores.new_empty(scores.shape, dtype=torch.float32)


def _refuse_backward(ctx, dq):
    raise RuntimeError(
        "dense_crf is not differentiable; detach its result or compute it under torch.no_grad()"
    )


_dense_crf_op.register_autograd(_refuse_backward)
