"""``dense_crf`` in the native CPU library: see ``csrc/cpu/dense_crf.h``. One image, in the calling thread."""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import native
from .limits import check_lattice, spans

# Coordinates (d + 1) q + r of a lattice vertex: the bilateral kernel's keys have 12 bits for q, rounding in
# float32 leaves the Gaussian kernel's 21.
LIMITS = {"gaussian": 3 * 2**20, "bilateral": 6 * 2**11}
PIXELS_MAX = 2**28
"""Pixels of an image; far less fits into memory."""


# struct PpapDenseCrf
_Arguments = native.structure(
    "image scores q classes",
    "height width maps iterations",
    "gaussian_sxy gaussian_weight bilateral_sxy bilateral_srgb bilateral_weight",
)


def unavailable_reason() -> str | None:
    """None if the library can be used, else why not and what to do."""
    return native.reason()


def dense_crf(
    image: Tensor,
    scores: Sequence[Tensor],
    iterations: int,
    gaussian: tuple[float, float],
    bilateral: tuple[float, float, float],
) -> list[Tensor]:
    """Mean-field inference for several maps of one image, which share the lattice; tensors on the CPU.

    Memory above inputs and results, with S the number of classes rounded up to whole vectors (8 floats for
    AVX2; more than 4 of them to whole fours): about 8 S + 200 bytes per pixel and 4 S + 90 bytes per vertex
    of the bilateral lattice; photographs have about one vertex for two pixels, noise up to 6 per pixel.

    Raises:
        RuntimeError: the library is missing.
        ValueError: the image is too large, or a sigma too small.
        MemoryError: there is not enough memory.
    """
    reason = unavailable_reason()
    if reason is not None:
        raise RuntimeError(f"dense_crf: {reason}")
    height, width, _ = image.shape
    if height * width > PIXELS_MAX:
        raise ValueError(f"dense_crf: the image has {height} x {width} pixels; give at most {PIXELS_MAX}")
    for name, span in spans(height, width, gaussian, bilateral).items():
        check_lattice(name, span, LIMITS[name])
    image, scores = image.contiguous(), [part.contiguous() for part in scores]
    results = [torch.empty_like(part) for part in scores]
    # Arrays of C, which must live as long as the call.
    inputs, outputs = _addresses(scores), _addresses(results)
    classes = (ctypes.c_int64 * len(scores))(*[len(part) for part in scores])
    arguments = _Arguments(
        native.pointer(image),
        ctypes.addressof(inputs),
        ctypes.addressof(outputs),
        ctypes.addressof(classes),
        height,
        width,
        len(scores),
        iterations,
        *gaussian,
        *bilateral,
    )
    if native.library().ppap_dense_crf(ctypes.c_int(native.isa()), ctypes.byref(arguments)):
        raise MemoryError(f"dense_crf: not enough memory for {height} x {width} pixels; give a smaller image")
    return results


def _addresses(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*[tensor.data_ptr() for tensor in tensors])
