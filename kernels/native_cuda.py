"""The native CUDA library: found, built, called on the tensors' stream; for GPUs without Triton.

Nothing here waits for the device. ``csrc/cuda/ppap_cuda.h`` is the interface.
"""

import ctypes
import functools
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from .cache import cache_folder
from .native import NativeError, as_argument, stride
from .precision import power_of_two_above

ABI = 3
_PRECISIONS = {"fp32": 0, "fp16": 1, "bf16": 2}
_HINT = "build it: python -m ppap.doctor --build-cuda (needs nvcc and a C++ compiler)"


@functools.cache
def builder() -> ModuleType:
    """csrc/build.py, of an installation or of a checkout.

    Raises:
        NativeError: neither is there.
    """
    here = Path(__file__).parent
    for file in (here / "csrc" / "build.py", here.parent / "csrc" / "build.py"):
        if file.exists():
            spec = importlib.util.spec_from_file_location("ppap_csrc_build", file)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            return module
    raise NativeError("the sources of the CUDA library are not installed: use a checkout of ppap")


def build(architectures: tuple[int, ...] | None = None) -> Path:
    """Build the library unless it is there, for `architectures` (all, without) and later ones; its file.

    Raises:
        NativeError: it cannot be built; the message says why and where the compiler's output is.
    """
    try:
        options = () if architectures is None else (architectures,)
        file: Path = builder().build_cuda_once(cache_folder(), *options)
    except builder().BuildError as error:
        raise NativeError(str(error)) from error
    library.cache_clear()
    return file


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library.

    Raises:
        NativeError: it was not built, or cannot be loaded.
    """
    file = builder().cuda_file(cache_folder())
    if not file.exists():
        raise NativeError(f"the CUDA library was not built; {_HINT}")
    try:
        found = with_sizes(ctypes.CDLL(str(file)))
        found.ppap_cuda_error.restype = ctypes.c_char_p
        version = found.ppap_cuda_abi_version()
    except (OSError, AttributeError) as error:
        raise NativeError(f"{file} cannot be loaded ({error}); delete it and {_HINT}") from error
    if version != ABI:
        raise NativeError(f"{file} has interface {version}, this version of ppap needs {ABI}; {_HINT}")
    return found


def with_sizes(library: ctypes.CDLL) -> ctypes.CDLL:
    """A library whose entry points that return sizes return them whole."""
    for name in ("tile", "crf_parts", "crf_classes_max"):
        getattr(library, f"ppap_cuda_{name}").restype = ctypes.c_int64
    return library


def reason() -> str | None:
    """Why the library cannot be used, or None."""
    try:
        library()
    except NativeError as error:
        return str(error)
    return None


def call(
    name: str, *arguments: torch.Tensor | ctypes.Structure | int | None, precision: str | None = None
) -> None:
    """Call an entry point on the current stream of the current device.

    Raises:
        RuntimeError: the launch failed.
    """
    on_gpu = torch.cuda.is_available()
    stream = torch.cuda.current_stream().cuda_stream if on_gpu else None
    passed: list[Any] = [ctypes.c_void_p(stream)]
    passed += [] if precision is None else [ctypes.c_int(_PRECISIONS[precision])]
    passed += [as_argument(value) for value in arguments]
    code = getattr(library(), f"ppap_cuda_{name}")(*passed)
    if code:
        raise RuntimeError(f"ppap_cuda_{name} failed: {library().ppap_cuda_error(code).decode()}")


@dataclass(frozen=True)
class Operand:
    """Rows of a product: float32 values of magnitude at most 1 (any for bf16), times a device scalar.

    Attributes:
        values: (rows, width) float32, contiguous.
        unit: scalar, a power of two.
    """

    values: torch.Tensor
    unit: torch.Tensor

    @classmethod
    def of(cls, values: torch.Tensor, precision: str) -> "Operand":
        """Values scaled as `precision` needs."""
        if precision == "bf16" or values.numel() == 0:
            return cls(values.contiguous(), torch.ones((), device=values.device))
        unit = power_of_two_above(values)
        return cls((values / unit).contiguous(), unit)

    @property
    def width(self) -> int:
        """Channels."""
        return self.values.shape[1]

    def take(self, index: torch.Tensor | slice) -> "Operand":
        """Some rows."""
        return Operand(self.values[index].contiguous(), self.unit)


def empty_bits(patches: int, anchors: int, device: torch.device) -> torch.Tensor:
    """Unwritten bits (patches, stride), see ``csrc/cpu/ppap_cpu.h``."""
    return torch.empty((patches, stride(anchors)), dtype=torch.uint8, device=device)
