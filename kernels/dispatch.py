"""Which backend runs an op: ``impl=`` argument, then ``use_backend``, then ``PPAP_BACKEND``, then ``auto``.

An explicit choice runs or raises with the reason; only ``auto`` passes over a backend that cannot run here.
The choice is a look-up in tables made on import, so that it can be traced by ``torch.compile``; loading an
implementation and logging happen in :func:`load`, which is called from inside the registered ops. A compiled
function keeps the value of ``PPAP_BACKEND`` that it was traced with; ``use_backend`` and ``impl=`` are
followed at every call.
"""

import contextlib
import importlib
import importlib.metadata
import importlib.util
import logging
import os
import re
import shutil
import sys
import warnings
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType

import torch

from . import native, native_cuda

logger = logging.getLogger("ppap.kernels")

OPS = ("proxy_average", "relation_masks", "masked_log_softmax", "ppap_loss")
# Backend -> the file of an op's folder that implements it.
_FILES = {"torch": "torch_impl", "triton": "triton_impl", "cuda": "cuda_impl", "cpp": "native_impl"}
# Device -> the order in which `auto` looks for a backend; other devices take torch.
AUTO = {"cuda": ("triton", "cuda", "torch"), "cpu": ("cpp", "torch")}


def _interpreted() -> bool:
    """Whether Triton runs its kernels on the CPU, one program at a time: decided when it is imported."""
    if os.environ.get("TRITON_INTERPRET", "0") != "1":
        return False
    language = sys.modules.get("triton.language")
    return language is None or not isinstance(language.sum, sys.modules["triton"].runtime.JITFunction)


INTERPRETED = _interpreted()
# Backend -> the devices it runs on; torch runs on all.
_DEVICES = {"triton": ("cuda", "cpu") if INTERPRETED else ("cuda",), "cuda": ("cuda",), "cpp": ("cpu",)}
VARIABLES = ("PPAP_BACKEND", "PPAP_AUTOTUNE", "PPAP_CPU_ISA", "PPAP_CACHE_DIR", "PPAP_BUILD_CUDA")

_INTERPRETER_HINT = "TRITON_INTERPRET=1, set before Python starts, runs its kernels on CPU tensors (slowly)"
if os.environ.get("TRITON_INTERPRET") == "1" and not INTERPRETED:
    _INTERPRETER_HINT = "Triton was imported before TRITON_INTERPRET=1 was set: set it before Python starts"

_chosen: ContextVar[str | None] = ContextVar("ppap_backend", default=None)


class _Latest:
    """The choice of the last ``use_backend``, of whichever thread: what can be traced before torch 2.14."""

    name: str | None = None


_latest = _Latest()
# Since 2.14 torch.compile follows a ContextVar; before, it refuses to trace one.
_TRACES_CONTEXT = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14)
_logged: set[tuple[str, str]] = set()


def _probe(backend: str) -> str | None:
    """Why `backend` cannot be used in this installation, or None if it can."""
    here = Path(__file__).parent
    if not all((here / op / f"{_FILES[backend]}.py").exists() for op in OPS):
        return f"this version of ppap has no {backend} implementation"
    if backend == "cuda":
        return native_cuda.reason()
    if backend == "cpp":
        return native.reason()
    if backend == "triton" and not _has_triton():
        return "triton is not installed: pip install triton"
    if backend == "triton" and not INTERPRETED:
        return _missing_compiler()
    return None


def _has_triton() -> bool:
    """Whether there is a package, and not only a folder of that name, such as a checkout's."""
    spec = importlib.util.find_spec("triton")
    return spec is not None and spec.origin is not None


def _triton_version() -> tuple[int, ...] | None:
    """Its first two numbers; None = unknown."""
    try:
        text = str(importlib.metadata.version("triton"))
    except importlib.metadata.PackageNotFoundError:
        # Some wheels bring it under another name, as ROCm's do, or without metadata.
        try:
            text = str(importlib.import_module("triton").__version__)
        except Exception:  # a broken installation fails in any way; using it will say how
            return None
    found = re.match(r"(\d+)\.(\d+)", text)
    return tuple(map(int, found.groups())) if found else None


def _missing_compiler() -> str | None:
    """Why Triton cannot build what launches its kernels: before 3.9, and on AMD GPUs, in C."""
    version = _triton_version()
    old = version is None or version < (3, 9)
    commands = (os.environ.get("CC"), "gcc", "clang")
    if (old or torch.version.hip) and not any(command and shutil.which(command) for command in commands):
        return "Triton needs a C compiler here: install gcc or clang, or set CC"
    return None


_REASONS = {backend: _probe(backend) for backend in _FILES}


def look_again(backend: str) -> None:
    """Find out anew whether a backend can be used, after something was built."""
    _REASONS[backend] = _probe(backend)


def available_backends() -> dict[str, str | None]:
    """Every backend's name -> None if it can be used here, else the reason why not."""
    reasons = dict(_REASONS)
    if reasons["cuda"] is None and not torch.cuda.is_available():
        reasons["cuda"] = "no GPU"
    if reasons["triton"] is None and not INTERPRETED:
        there = torch.cuda.is_available()
        reasons["triton"] = (
            _unfit("triton", torch.device("cuda", 0)) if there else f"no GPU; {_INTERPRETER_HINT}"
        )
    return reasons


def _check_name(name: str, source: str) -> str:
    if name != "auto" and name not in _FILES:
        raise ValueError(f"{source} is {name!r}; valid: auto, {', '.join(_FILES)}")
    return name


@contextlib.contextmanager
def use_backend(name: str):
    """Run the loss ops called inside the ``with`` block on backend `name` (or ``auto``).

    Backward passes use the backend of their forward pass, also outside the block.

    Raises:
        ValueError: no backend is called `name`.
    """
    token = _chosen.set(_check_name(name, "use_backend"))
    before, _latest.name = _latest.name, name
    try:
        yield
    finally:
        _chosen.reset(token)
        _latest.name = before


def choose(impl: str | None, *tensors: torch.Tensor) -> str:
    """Name of the backend that runs an op on `tensors`; a pure look-up.

    Args:
        impl: backend name, ``auto`` or None (= context, environment, ``auto``).
        tensors: the op's tensor arguments, all on one device.

    Raises:
        ValueError: an unknown backend, tensors on several devices, or float64 on a backend other than torch.
        RuntimeError: the backend was chosen explicitly and cannot run here; the message says why.
    """
    device = tensors[0].device
    for tensor in tensors[1:]:
        if tensor.device != device:
            raise ValueError(f"tensors are on {device} and {tensor.device}; move them to one device")
    name, source = _requested(impl)
    double = torch.float64 in [tensor.dtype for tensor in tensors]
    if name == "auto":
        if double:
            return "torch"
        order = AUTO.get(device.type, ("torch",))
        return next(b for b in order if _REASONS[b] is None and _unfit(b, device) is None)
    reason = _REASONS[name] or _unfit(name, device)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} ({source}) is not available: {reason}")
    if name in _DEVICES and device.type not in _DEVICES[name]:
        hint = f"; {_INTERPRETER_HINT}" if name == "triton" and device.type == "cpu" else ""
        raise RuntimeError(f"backend {name!r} ({source}) does not run on {device.type} tensors{hint}")
    if double and name != "torch":
        raise ValueError(f"backend {name!r} ({source}) has no float64; use the torch backend or float32")
    return name


def _unfit(backend: str, device: torch.device) -> str | None:
    if backend != "triton" or device.type != "cuda":
        return None
    found = torch.cuda.get_device_properties(device)  # a constant to torch.compile
    if torch.version.hip:
        known = found.gcnArchName.startswith("gfx942")
        return None if known else f"its configurations are for gfx942, {found.name} is {found.gcnArchName}"
    if found.major >= 8:
        return None
    return f"it needs compute capability 8.0 or later, {found.name} has {found.major}.{found.minor}"


def _requested(impl: str | None) -> tuple[str, str]:
    if impl is not None:
        return _check_name(impl, "impl"), "impl argument"
    traced = torch.compiler.is_compiling() and not _TRACES_CONTEXT
    context = _latest.name if traced else _chosen.get()
    if context is not None:
        return context, "use_backend"
    return _check_name(os.environ.get("PPAP_BACKEND") or "auto", "PPAP_BACKEND"), "PPAP_BACKEND"


def autotune_wanted() -> bool:
    """Whether PPAP_AUTOTUNE asks for a search of launch configurations.

    Raises:
        ValueError: it is neither 0 nor 1.
    """
    value = os.environ.get("PPAP_AUTOTUNE") or "0"
    if value not in ("0", "1"):
        raise ValueError(f"PPAP_AUTOTUNE is {value!r}; give 0 or 1")
    return value == "1"


def check_environment() -> None:
    """Refuse wrong values of the variables that only a kernel would read, before any long work.

    Raises:
        ValueError: PPAP_CPU_ISA or PPAP_AUTOTUNE is none of its values.
    """
    autotune_wanted()
    if _REASONS["cpp"] is None:
        native.isa()


def load(op: str, backend: str) -> ModuleType:
    """Implementation module of `op` for `backend`; imported on first use, logged once per op and backend."""
    if (op, backend) not in _logged:
        _logged.add((op, backend))
        logger.info("%s runs on the %s backend (python -m ppap.doctor says why)", op, backend)
    return importlib.import_module(f"{__package__}.{op}.{_FILES[backend]}")


def load_if_any(op: str, backend: str) -> ModuleType | None:
    """:func:`load` where a backend may do without a form of its own."""
    there = (Path(__file__).parent / op / f"{_FILES[backend]}.py").exists()
    return load(op, backend) if there else None


def _warn_of_unknown_variables() -> None:
    unknown = sorted(key for key in os.environ if key.startswith("PPAP_") and key not in VARIABLES)
    if unknown:
        warnings.warn(
            f"unknown environment variables {unknown}; ppap reads {', '.join(VARIABLES)}", stacklevel=2
        )


_warn_of_unknown_variables()
