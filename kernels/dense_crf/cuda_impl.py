"""``dense_crf`` in the CUDA library (``csrc/cuda/dense_crf.cu``): one image at a time, on the current stream.

Legend: ``C`` classes; an entry is a pixel and one of the d + 1 vertices of its simplex.
"""

import contextlib
import ctypes
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import native_cuda
from ..native import pointer
from .limits import check_lattice, spans
from .native_impl import LIMITS

PIXELS_MAX = 2**26
"""Pixels of an image: entries and table slots are numbered in 32 bits."""
# Device types that the library runs on.
_DEVICES = ("cuda",)
_INT32_MAX = 2**31 - 1


class _Arguments(ctypes.Structure):
    """``struct PpapCudaLattice``."""

    _fields_: ClassVar[list[Any]] = (
        [("image", ctypes.c_void_p), ("height", ctypes.c_int64), ("width", ctypes.c_int64)]
        + [("slots", ctypes.c_int64)]
        + [(name, ctypes.c_void_p) for name in ("table", "first", "slot", "number")]
        + [("vertices", ctypes.c_int64)]
        + [(name, ctypes.c_void_p) for name in ("keys", "before", "next", "slice", "splat", "order", "owner")]
        + [(name, ctypes.c_void_p) for name in ("begin", "factor", "blurred_even", "blurred_odd", "partial")]
        + [(name, ctypes.c_float) for name in ("sxy", "srgb", "weight")]
    )


def unavailable_reason() -> str | None:
    """None if the library can be used here, else why not and what to do."""
    reason = native_cuda.reason()
    if reason is None and "cuda" in _DEVICES and not torch.cuda.is_available():
        return "no GPU"
    return reason


def runs_on(device: torch.device) -> bool:
    """Whether this implementation can take scores on a device."""
    return device.type in _DEVICES and unavailable_reason() is None


def dense_crf(
    image: Tensor,
    scores: Sequence[Tensor],
    iterations: int,
    gaussian: tuple[float, float],
    bilateral: tuple[float, float, float],
) -> list[Tensor]:
    """Mean-field inference for several maps of one image, which share the lattice; scores on one GPU.

    Waits for the device once, for the numbers of vertices. Memory above inputs and results, but for what
    torch's sort takes: at most 600 + 10 C bytes per pixel and 60 + 8 C per vertex. Flat images have about one
    vertex per pixel in both lattices together, noise has 7.

    Raises:
        RuntimeError: the library is missing, there is no GPU, or scores are not on it.
        ValueError: the image is too large, a sigma too small, or there are too many classes.
        MemoryError: the GPU has not enough memory.
    """
    if not scores:
        return []
    reason, device = unavailable_reason(), scores[0].device
    if reason is not None:
        raise RuntimeError(f"dense_crf: {reason}")
    if device.type not in _DEVICES or any(part.device != device for part in scores):
        found = ", ".join(sorted({str(part.device) for part in scores}))
        raise RuntimeError(
            f"dense_crf: scores on {found}; impl 'cuda' needs all of them on one GPU: move them there, or "
            "leave impl out"
        )
    _check_size(image, scores, gaussian, bilateral)
    height, width, _ = image.shape
    guard = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    try:
        with guard:
            return _inference(image.to(device), scores, iterations, gaussian, bilateral)
    except torch.cuda.OutOfMemoryError:
        raise MemoryError(
            f"dense_crf: not enough GPU memory for {height} x {width} pixels; give a smaller image, or "
            "impl='cpp'"
        ) from None


def _check_size(
    image: Tensor,
    scores: Sequence[Tensor],
    gaussian: tuple[float, float],
    bilateral: tuple[float, float, float],
) -> None:
    height, width, _ = image.shape
    if height * width > PIXELS_MAX:
        raise ValueError(
            f"dense_crf: the image has {height} x {width} pixels; impl 'cuda' takes at most {PIXELS_MAX}"
        )
    most = native_cuda.library().ppap_cuda_crf_classes_max()
    for part in scores:
        if len(part) > most:
            raise ValueError(f"dense_crf: {len(part)} classes; impl 'cuda' takes at most {most}")
    for name, span in spans(height, width, gaussian, bilateral).items():
        check_lattice(name, span, LIMITS[name])


def _inference(
    image: Tensor,
    scores: Sequence[Tensor],
    iterations: int,
    gaussian: tuple[float, float],
    bilateral: tuple[float, float, float],
) -> list[Tensor]:
    height, width, _ = image.shape
    edges = _Lattice(image.contiguous(), (height, width), *bilateral) if bilateral[-1] > 0 else None
    smooth = _Lattice(None, (height, width), gaussian[0], 1.0, gaussian[1]) if gaussian[-1] > 0 else None
    lattices = [lattice for lattice in (edges, smooth) if lattice is not None]
    for lattice in lattices:
        lattice.embed(scores[0].device)
    counts = torch.stack([lattice.vertices for lattice in lattices]).tolist() if lattices else []
    for lattice, count in zip(lattices, counts, strict=True):
        lattice.link(count)
        lattice.weigh(max(map(len, scores)))
    passed = [None if lattice is None else lattice.arguments for lattice in (edges, smooth)]
    results = []
    for part in scores:
        part = part.contiguous()
        unary, q = part.new_empty((2, *part.shape))
        results.append(torch.empty_like(part))
        sizes = (len(part), height * width, iterations)
        native_cuda.call("crf_infer", *passed, part, *sizes, unary, q, results[-1])
    return results


class _Lattice:
    """The permutohedral lattice of one kernel on one image, and the arrays that the library fills."""

    def __init__(
        self, image: Tensor | None, size: tuple[int, int], sxy: float, srgb: float, weight: float
    ) -> None:
        (height, width), self._corners = size, 3 if image is None else 6
        self._entries = height * width * self._corners
        self._arrays: dict[str, Tensor] = {}
        self.arguments = _Arguments(height=height, width=width, sxy=sxy, srgb=srgb, weight=weight)
        if image is not None:
            self._hold(image=image)

    def _hold(self, **arrays: Tensor) -> None:
        """Keep arrays as long as the library may need them."""
        for name, array in arrays.items():
            setattr(self.arguments, name, pointer(array))
            self._arrays[name] = array

    def _drop(self, *names: str) -> None:
        for name in names:
            del self._arrays[name]
            setattr(self.arguments, name, None)

    def embed(self, device: torch.device) -> None:
        """The simplices of all pixels; then ``vertices``, a scalar on the device, counts their vertices."""
        # At most two thirds full.
        self.arguments.slots = slots = 1 << (3 * self._entries // 2 - 1).bit_length()
        self._hold(
            table=torch.full((slots,), -1, dtype=torch.int64, device=device),
            first=torch.full((slots,), _INT32_MAX, dtype=torch.int32, device=device),
            slot=torch.empty(self._entries, dtype=torch.int32, device=device),
            number=torch.empty(self._entries, dtype=torch.int32, device=device),
            slice=torch.empty((self._entries, 2), dtype=torch.int32, device=device),
        )
        native_cuda.call("crf_embed", self.arguments)
        number = torch.cumsum(self._arrays["number"], 0, dtype=torch.int32)
        self._hold(number=number)
        self.vertices = number[-1]

    def link(self, count: int) -> None:
        """Numbers and neighbours of the vertices, `count` in all."""
        device = self.vertices.device
        self.arguments.vertices = count
        self._hold(
            keys=torch.empty(count, dtype=torch.int64, device=device),
            before=torch.full((self._corners, count), -1, dtype=torch.int32, device=device),
            next=torch.empty((self._corners, count), dtype=torch.int32, device=device),
        )
        native_cuda.call("crf_link", self.arguments)
        self._drop("table", "first", "slot", "number", "keys")

    def weigh(self, classes: int) -> None:
        """The lists of pixels per vertex, all weights, and room for the values of `classes` classes."""
        # A stable sort keeps the pixels of a vertex ascending: what they add up to is always the same.
        owner, order = torch.sort(self._arrays["slice"][:, 0], stable=True)
        count, device = self.arguments.vertices, owner.device
        parts = native_cuda.library().ppap_cuda_crf_parts(ctypes.c_int64(self._entries))
        numbers = torch.arange(count + 1, dtype=torch.int32, device=device)
        self._hold(
            order=order,
            owner=owner,
            begin=torch.searchsorted(owner, numbers, out_int32=True),
            splat=torch.empty((self._entries, 2), dtype=torch.int32, device=device),
            factor=torch.empty(self._entries // self._corners, device=device),
            blurred_even=torch.empty((count, classes), device=device),
            blurred_odd=torch.empty((count, classes), device=device),
            partial=torch.empty((2 * parts, classes), device=device),
        )
        native_cuda.call("crf_weigh", self.arguments)
        self._drop("order", "factor")
