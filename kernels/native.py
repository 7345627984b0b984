"""The native CPU library: found, loaded, called. It knows no torch: pointers, sizes, a thread count go in."""

import ctypes
import functools
import os
from pathlib import Path

import torch

from .common import rows_within

ABI = 3
ISAS = ("avx512", "avx2", "portable")
# Columns of z are padded to this, anchors of a group to it too.
PANEL = 32
# Anchors whose bits are formed at once, and whose exponentials are kept at once: more do not run faster.
CHUNK = 784
GROUP = 256
_FILE = Path(__file__).parent / "_cpu.so"
_BUILD_HINT = (
    "install a C++ compiler (g++ or clang++), then ppap again (a checkout: pip install --editable .)"
)


class NativeError(RuntimeError):
    """The native library cannot be used; the message says why and what to do."""


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library.

    Raises:
        NativeError: it was not built, or is of another version.
    """
    if not _FILE.exists():
        raise NativeError(f"the native library was not built: {_BUILD_HINT}")
    try:
        found = ctypes.CDLL(str(_FILE))
        found.ppap_isa_name.restype = ctypes.c_char_p
        version = found.ppap_abi_version()
    except (OSError, AttributeError) as error:
        raise NativeError(f"{_FILE} cannot be loaded ({error}): {_BUILD_HINT}") from error
    if version != ABI:
        raise NativeError(f"{_FILE} has interface {version}, this version of ppap needs {ABI}: {_BUILD_HINT}")
    return found


def reason() -> str | None:
    """Why the library cannot be used, or None."""
    try:
        library()
    except NativeError as error:
        return str(error)
    return None


def available_isas() -> dict[str, int]:
    """Instruction sets of this library that this processor has, best first -> their index in the library."""
    names, index = {}, 0
    while (name := library().ppap_isa_name(index)) is not None:
        if library().ppap_isa_available(index):
            names[name.decode()] = index
        index += 1
    return names


def isa() -> int:
    """Index of the instruction set to use: PPAP_CPU_ISA, by default the best.

    Raises:
        ValueError: PPAP_CPU_ISA names none that runs here.
    """
    found, wanted = available_isas(), os.environ.get("PPAP_CPU_ISA") or "auto"
    if wanted == "auto":
        return next(iter(found.values()))
    if wanted not in found:
        raise ValueError(f"PPAP_CPU_ISA is {wanted!r}; this machine has: auto, {', '.join(found)}")
    return found[wanted]


def pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    """Address of a contiguous tensor's data; null for None."""
    if tensor is not None and not tensor.is_contiguous():
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} is not contiguous")
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def as_argument(value: torch.Tensor | int | None) -> ctypes.c_int64 | ctypes.c_void_p:
    """What a C entry point takes for a size or a tensor."""
    return ctypes.c_int64(value) if isinstance(value, int) else pointer(value)


def call(name: str, *arguments: torch.Tensor | int | None) -> None:
    """Call an entry point on torch's number of threads.

    Args:
        name: entry point without ``ppap_``; those that end in ``_fwd`` also take the instruction set.
        arguments: contiguous tensors (None = null) and sizes.

    Raises:
        MemoryError: the library could not allocate what it needs.
    """
    passed = [as_argument(value) for value in arguments]
    first = [ctypes.c_int(isa())] if name.endswith("_fwd") else []
    check(getattr(library(), f"ppap_{name}")(*first, ctypes.c_int(torch.get_num_threads()), *passed))


def check(code: int) -> None:
    """Raise MemoryError for what an entry point returns, unless it is 0."""
    if code:
        raise MemoryError("the native library could not allocate memory: lower memory_budget, or free some")


def stride(anchors: int) -> int:
    """Bytes of one patch's row of bits."""
    return 4 * -(-anchors // 32)


def empty_bits(patches: int, anchors: int) -> torch.Tensor:
    """Unwritten bits (patches, stride), see ``csrc/cpu/ppap_cpu.h``."""
    return torch.empty((patches, stride(anchors)), dtype=torch.uint8)


def tile_bytes(patches: int, width: int) -> int:
    """Bytes that the library keeps per anchor: two partial results for every tile of patches."""
    return 8 * (patches * width * 4 // (128 << 10) + 1)


def chunk_rows(memory_budget: int, bytes_per_anchor: int) -> int:
    """Anchors per chunk within a budget: few enough to run well."""
    return min(rows_within(memory_budget, bytes_per_anchor), CHUNK)
