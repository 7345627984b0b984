"""Fully connected CRF over the pixels of one image: public functions, checks, choice of implementation.

Next: ``reference.py``, the definition; ``native_impl.py``, which runs by default; ``cuda_impl.py``, which
does for scores on a GPU where the CUDA library was built; ``pydensecrf_impl.py``, the package that published
results were made with. They are chosen by ``impl=`` alone, not by the backend variable of the loss ops.
"""

import collections
import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from . import cuda_impl, native_impl, pydensecrf_impl, reference

_IMPLS = {"cpp": native_impl, "cuda": cuda_impl, "reference": reference, "pydensecrf": pydensecrf_impl}
_AUTO = "auto"  # what the op takes for None
# Images held at once per thread: one under way, one ready to follow.
_HELD_PER_THREAD = 2


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
    are the published evaluation protocol. Scores on a GPU stay there where the CUDA library was built
    (``python -m ppap.doctor --build-cuda``); else it runs on one core of the CPU (:func:`dense_crf_batch`
    uses all), and copies there and back for scores on another device. Bitwise repeatable. Not
    differentiable: a backward pass through it raises.

    Args:
        image: (H, W, 3) uint8 RGB (read in BGR order inside, as published), numpy or torch, any device.
        scores: (C, H, W) logits of any float dtype, finite, numpy or torch; log-probabilities are logits too.
        iterations: mean-field steps, >= 0; 0 gives the clipped and renormalised softmax.
        gaussian: (sigma of the position [pixels], weight).
        bilateral: (sigma of the position [pixels], sigma of the colour [grey levels 0-255], weight).
        impl: None: "cuda" for scores on a GPU if the CUDA library was built, else "cpp". "cpp" (the native
            library, on the CPU), "cuda" (the CUDA library, scores on a GPU), "reference" (numpy and torch,
            seconds per image) or "pydensecrf" (that package).

    Returns:
        q (C, H, W) float32 on the device of ``scores``: probabilities that sum to 1 over the classes.

    Raises:
        ValueError: an unknown ``impl``, a wrong shape, dtype or parameter, non-finite scores, or an image too
            large for the sigmas (see ``native_impl.LIMITS``); "cuda" also limits pixels and classes.
        RuntimeError: what `impl` needs is missing: the native library, pydensecrf, or the CUDA library and
            scores on a GPU; or a backward pass was asked for.
        MemoryError: the image needs more memory than there is, on the CPU or the GPU.

    Example:
        >>> labels = dense_crf(image, logits).argmax(dim=0)
    """
    q: Tensor
    (q,) = _dense_crf_op(*_checked(image, [scores], iterations, gaussian, bilateral, impl))
    return q


def dense_crf_batch(
    pairs: Iterable[tuple[Tensor | np.ndarray, Sequence[Tensor | np.ndarray]]],
    *,
    iterations: int = 10,
    gaussian: tuple[float, float] = (1, 3),
    bilateral: tuple[float, float, float] = (67, 3, 4),
    impl: str | None = None,
) -> Iterator[tuple[Tensor, ...]]:
    """:func:`dense_crf` of many images, on as many threads as torch has; maps of one image share its lattice.

    A generator: `pairs` are drawn only as fast as threads take them, results come in their order and do not
    depend on the number of threads, and Ctrl-C stops it after the images under way. Leave it early with
    ``close()``, or let a ``for`` loop do it.

    Args:
        pairs: (image, score maps) as :func:`dense_crf` takes them; numbers of classes and maps may differ.
        iterations: as there, as are `gaussian`, `bilateral` and `impl`; only "cpp" runs on several threads,
            "cuda" runs one image after the other on the caller's stream.

    Yields:
        The probabilities of every map of an image, detached.

    Raises:
        As :func:`dense_crf`.

    Example:
        >>> pairs = ((image, (cluster, linear)) for image, cluster, linear in data)
        >>> for cluster_q, linear_q in dense_crf_batch(pairs):
        ...     show(cluster_q.argmax(dim=0))
    """
    threads = torch.get_num_threads() if impl in (None, "cpp") else 1
    waiting: collections.deque[Future[list[Tensor]]] = collections.deque()
    pool = ThreadPoolExecutor(threads, "ppap-crf")
    try:
        for image, scores in pairs:
            maps = [_as_tensor("scores", part).detach() for part in scores]
            *arguments, name = _checked(image, maps, iterations, gaussian, bilateral, impl)
            name = _chosen(name, maps)
            if name == "cuda":
                while waiting:
                    yield tuple(waiting.popleft().result())
                yield tuple(_dense_crf_op(*arguments, name))
                continue
            waiting.append(pool.submit(_dense_crf_op, *arguments, name))
            while len(waiting) >= _HELD_PER_THREAD * threads or (waiting and waiting[0].done()):
                yield tuple(waiting.popleft().result())
        while waiting:
            yield tuple(waiting.popleft().result())
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def unavailable_reason(impl: str | None = None, device: torch.device | str = "cpu") -> str | None:
    """None if an implementation can run here, else why not and what to do; None stands for ``automatic``."""
    name = _known(impl)
    reason: str | None = _IMPLS[automatic(device) if name == _AUTO else name].unavailable_reason()
    return reason


def automatic(device: torch.device | str) -> str:
    """The implementation that ``impl=None`` takes for scores on a device."""
    return "cuda" if cuda_impl.runs_on(torch.device(device)) else "cpp"


def _chosen(name: str, scores: Sequence[Tensor]) -> str:
    """The implementation for these scores."""
    if name != _AUTO:
        return name
    devices = {part.device for part in scores}
    return automatic(devices.pop()) if len(devices) == 1 else "cpp"


def _known(impl: str | None) -> str:
    if impl is not None and impl not in _IMPLS:
        raise ValueError(f"dense_crf: impl is {impl!r}; valid: {', '.join(map(repr, _IMPLS))} or None")
    return _AUTO if impl is None else impl


def _checked(
    image: Any, scores: Sequence[Any], iterations: int, gaussian: Any, bilateral: Any, impl: str | None
) -> tuple[Tensor, list[Tensor], int, list[float], list[float], str]:
    """The op's arguments."""
    name = _known(impl)
    if not isinstance(iterations, int) or isinstance(iterations, bool) or not 0 <= iterations < 2**31:
        raise ValueError(f"dense_crf: iterations is {iterations!r}; give an integer >= 0, below 2^31")
    gaussian = _check_kernel("gaussian", gaussian, ("sxy",))
    bilateral = _check_kernel("bilateral", bilateral, ("sxy", "srgb"))
    image, scores = _as_tensor("image", image), [_as_tensor("scores", part) for part in scores]
    for part in scores:
        _check_inputs(image, part)
    return image, scores, iterations, gaussian, bilateral, name


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
    # The implementations see them in float32, where a sigma must not become 0, nor anything infinite.
    range_of = torch.finfo(torch.float32)
    fits = all(math.isfinite(number) and number <= range_of.max for number in numbers)
    if not fits or min(numbers[:-1]) < range_of.tiny or numbers[-1] < 0:
        raise ValueError(
            f"dense_crf: {name} is {values!r}; {wanted} needs sigmas > 0 and a weight >= 0, all of them "
            "finite numbers in float32"
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
    scores: Sequence[Tensor],
    iterations: int,
    gaussian: Sequence[float],
    bilateral: Sequence[float],
    impl: str,
) -> list[Tensor]:
    name = _chosen(impl, scores)
    # In float32, the arithmetic of every implementation: a float64 beyond its range counts as infinite.
    moved = [part.detach().to(part.device if name == "cuda" else "cpu", torch.float32) for part in scores]
    if not all(torch.isfinite(part).all() for part in moved):
        raise ValueError("dense_crf: scores hold NaN or infinite values (after conversion to float32)")
    image = image if name == "cuda" else image.cpu()
    results = _IMPLS[name].dense_crf(image, moved, iterations, tuple(gaussian), tuple(bilateral))
    return [q.to(part.device) for q, part in zip(results, scores, strict=True)]


@_dense_crf_op.register_fake
def _(
    image: Tensor,
    scores: Sequence[Tensor],
    iterations: int,
    gaussian: Sequence[float],
    bilateral: Sequence[float],
    impl: str,
) -> list[Tensor]:
    return [part.new_empty(part.shape, dtype=torch.float32) for part in scores]


def _refuse_backward(ctx: Any, dq: Any) -> NoReturn:
    raise RuntimeError(
        "dense_crf is not differentiable; detach its result or compute it under torch.no_grad()"
    )


_dense_crf_op.register_autograd(_refuse_backward)
