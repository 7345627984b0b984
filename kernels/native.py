"""The native CPU library: found, loaded, called. It knows no torch: pointers, sizes, a thread count go in."""

import ctypes
import functools
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from .budget import rows_within
from .precision import normalise, operand

ABI = 10
ISAS = ("avx512bf16", "avx512", "avx2", "portable")
# Columns of z are padded to this, anchors of a group to it too: ppap_panel of the library.
PANEL = 32
# Anchors whose bits are formed at once, and whose exponentials are kept at once: more do not run faster. On a
# core of an Intel Xeon of 2.5 GHz (N = 12,544, D = 384) losses and gradients in groups of 256, 288 and 416
# took 218, 210 and 204 ms.
CHUNK = 784
GROUP = 416
# Features with norms between these neither over- nor underflow in squares and products that are scaled later.
_TINY, _HUGE = 1e-12, 1e12
FILE = Path(__file__).parent / "_cpu.so"
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
    if not FILE.exists():
        raise NativeError(f"the native library was not built: {_BUILD_HINT}")
    try:
        found = ctypes.CDLL(str(FILE))
        version = found.ppap_abi_version()
        found.ppap_isa_name.restype = ctypes.c_char_p
    except (OSError, AttributeError) as error:
        raise NativeError(f"{FILE} cannot be loaded ({error}): {_BUILD_HINT}") from error
    if version != ABI:
        raise NativeError(f"{FILE} has interface {version}, this version of ppap needs {ABI}: {_BUILD_HINT}")
    found.ppap_tile_rows.restype = found.ppap_panel.restype = ctypes.c_int64
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


def as_argument(value: torch.Tensor | ctypes.Structure | int | None) -> Any:
    """What a C entry point takes for a size, a tensor or a structure (its address)."""
    if isinstance(value, ctypes.Structure):
        return ctypes.byref(value)
    return ctypes.c_int64(value) if isinstance(value, int) else pointer(value)


def call(name: str, *arguments: torch.Tensor | int | None) -> None:
    """Call an entry point of any instruction set on torch's number of threads.

    Args:
        name: entry point without ``ppap_``.
        arguments: contiguous tensors (None = null) and sizes.

    Raises:
        MemoryError: the library could not allocate what it needs.
    """
    passed = [as_argument(value) for value in arguments]
    check(getattr(library(), f"ppap_{name}")(ctypes.c_int(torch.get_num_threads()), *passed))


def structure(pointers: str, sizes: str, floats: str = "") -> type[ctypes.Structure]:
    """A struct of the library: names of its pointers, of its int64 sizes, of its floats, in their order."""
    kinds = ((pointers, ctypes.c_void_p), (sizes, ctypes.c_int64), (floats, ctypes.c_float))
    fields = [(name, kind) for names, kind in kinds for name in names.split()]
    return type("Arguments", (ctypes.Structure,), {"_fields_": fields})


_PACK_PAIRS = structure("rows scale pairs norms", "N D")


def run(entry: str, kind: type[ctypes.Structure], **values: torch.Tensor | float | None) -> None:
    """Call a kernel in the instruction set of :func:`isa`, on torch's number of threads.

    Args:
        entry: entry point without ``ppap_``.
        kind: its struct, from :func:`structure`.
        values: every field of it: contiguous tensors (None = null) and numbers.

    Raises:
        MemoryError: the library could not allocate what it needs.
    """
    fields: dict[str, Any] = {field[0]: values[field[0]] for field in kind._fields_}
    fields |= {field[0]: pointer(fields[field[0]]) for field in kind._fields_ if field[1] is ctypes.c_void_p}
    kernel, threads = getattr(library(), f"ppap_{entry}"), ctypes.c_int(torch.get_num_threads())
    check(kernel(ctypes.c_int(isa()), threads, ctypes.byref(kind(**fields))))


def check(code: int) -> None:
    """Raise MemoryError for what an entry point returns, unless it is 0."""
    if code:
        raise MemoryError("the native library could not allocate memory: lower memory_budget, or free some")


def uses_pairs() -> bool:
    """Whether the instruction set of :func:`isa` multiplies pairs of bf16."""
    return bool(library().ppap_uses_pairs(ctypes.c_int(isa())))


def pack_pairs(
    rows_ND: torch.Tensor, scale_N: torch.Tensor | None, norm_N: torch.Tensor | None
) -> torch.Tensor:
    """Rows times their scale as pairs of bf16 (N, ceil(D / 2)) int32; bounds of their norms into `norm_N`."""
    rows, width = rows_ND.shape
    pairs = torch.empty((rows, -(-width // 2)), dtype=torch.int32)
    run("pack_pairs", _PACK_PAIRS, rows=rows_ND, scale=scale_N, pairs=pairs, norms=norm_N, N=rows, D=width)
    return pairs


def stride(anchors: int) -> int:
    """Bytes of one patch's row of bits."""
    return 4 * -(-anchors // 32)


def empty_bits(patches: int, anchors: int) -> torch.Tensor:
    """Unwritten bits (patches, stride), see ``csrc/cpu/ppap_cpu.h``."""
    return torch.empty((patches, stride(anchors)), dtype=torch.uint8)


def tile_bytes(patches: int, width: int) -> int:
    """Bytes that the library keeps per anchor: two partial results for every tile of patches."""
    rows: int = library().ppap_tile_rows(ctypes.c_int(isa()), ctypes.c_int64(width))
    return 8 * -(-patches // rows)


def chunk_rows(memory_budget: int, bytes_per_anchor: int) -> int:
    """Anchors per chunk within a budget: few enough to run well."""
    return min(rows_within(memory_budget, bytes_per_anchor), CHUNK)


@dataclass(frozen=True)
class Keys:
    """Rows of patches as the library reads them.

    Attributes:
        values: (N, D) float32, contiguous.
        scale: (N,) float32 factor of each row, or None: 1.
        bf16: whether the keys are bf16 numbers: all `pairs` where there are some, else all `values`.
        pairs: (N, ceil(D / 2)) int32, the scaled rows as pairs of bf16; None: the instruction set multiplies
            none.
        norms: (N,) float32 bounds of the scaled rows' norms, beside `pairs` of what is not bf16.
    """

    values: torch.Tensor
    scale: torch.Tensor | None
    bf16: bool
    pairs: torch.Tensor | None = None
    norms: torch.Tensor | None = None

    @classmethod
    def of(cls, values_ND: torch.Tensor, precision: str) -> "Keys":
        """Rows that enter as they are, rounded to `precision`."""
        bf16 = precision == "bf16"
        values = values_ND if bf16 and uses_pairs() else operand(values_ND, precision)  # packing rounds
        return cls(values.float().contiguous(), None, bf16).packed()

    @classmethod
    def normalised(cls, features_ND: torch.Tensor, precision: str) -> "Keys":
        """Features (N, D) divided by their norms; of float32 ones without a copy where none is read."""
        values = features_ND.float().contiguous()
        norm_N = torch.linalg.vector_norm(values, dim=1)
        zero_N = norm_N == 0
        if zero_N.any():  # of all zeros, or of values whose squares are 0
            zero_N[zero_N.clone()] = (values[zero_N] == 0).all(dim=1)
        if not (zero_N | ((norm_N > _TINY) & (norm_N < _HUGE))).all():
            return cls.of(normalise(features_ND, torch.float32), precision)
        scale_N = torch.where(zero_N, 0.0, 1 / norm_N)
        if precision == "fp32" or (precision == "bf16" and uses_pairs()):
            return cls(values, scale_N, precision == "bf16").packed()
        return cls.of(values * scale_N[:, None], precision)

    def packed(self) -> "Keys":
        """The same with pairs, where the instruction set multiplies them: made once for all calls."""
        if not uses_pairs():
            return self
        norm_N = None if self.bf16 else self.values.new_empty(len(self.values))
        return replace(self, pairs=pack_pairs(self.values, self.scale, norm_N), norms=norm_N)
