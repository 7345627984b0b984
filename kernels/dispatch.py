"""Which backend runs an op: ``impl=`` argument, then ``use_backend``, then ``PPAP_BACKEND``, then ``auto``.

An explicit choice runs or raises with the reason; only ``auto`` passes over a backend that cannot run here.
``torch.compile`` traces the choice; loading an implementation and logging happen in :func:`load`, which is
called from inside the registered ops. A compiled function keeps the value of ``PPAP_BACKEND`` that it was
traced with; ``use_backend`` and ``impl=`` are followed at every call.
"""

import contextlib
import importlib
import logging
import os
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType

import torch

from . import native
from .availability import (
    DEVICES,
    FILES,
    INTERPRETER_HINT,
    OPS,
    available_backends,
    look_again,
    reason_of,
    unfit,
)
from .environment import VARIABLES, autotune_wanted, warn_of_unknown_variables

__all__ = [
    "AUTO",
    "OPS",
    "VARIABLES",
    "asked_for",
    "autotune_wanted",
    "available_backends",
    "check_environment",
    "choose",
    "load",
    "load_if_any",
    "look_again",
    "use_backend",
]

logger = logging.getLogger("ppap.kernels")

# Device -> the order in which `auto` looks for a backend; other devices take torch.
AUTO = {"cuda": ("triton", "cuda", "torch"), "cpu": ("cpp", "torch")}

_chosen: ContextVar[str | None] = ContextVar("ppap_backend", default=None)


class _Latest:
    """The choice of the last ``use_backend``, of whichever thread: what can be traced before torch 2.14."""

    name: str | None = None


_latest = _Latest()
# Since 2.14 torch.compile follows a ContextVar; before, it refuses to trace one.
_TRACES_CONTEXT = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 14)
_logged: set[tuple[str, str]] = set()


def _check_name(name: str, source: str) -> str:
    if name != "auto" and name not in FILES:
        raise ValueError(f"{source} is {name!r}; valid: auto, {', '.join(FILES)}")
    return name


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
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
        return next(b for b in order if reason_of(b) is None and unfit(b, device) is None)
    reason = reason_of(name) or unfit(name, device)
    if reason is not None:
        raise RuntimeError(f"backend {name!r} ({source}) is not available: {reason}")
    if name in DEVICES and device.type not in DEVICES[name]:
        hint = f"; {INTERPRETER_HINT}" if name == "triton" and device.type == "cpu" else ""
        raise RuntimeError(f"backend {name!r} ({source}) does not run on {device.type} tensors{hint}")
    if double and name != "torch":
        raise ValueError(f"backend {name!r} ({source}) has no float64; use the torch backend or float32")
    return name


def _requested(impl: str | None) -> tuple[str, str]:
    if impl is not None:
        return _check_name(impl, "impl"), "impl argument"
    traced = torch.compiler.is_compiling() and not _TRACES_CONTEXT
    context = _latest.name if traced else _chosen.get()
    if context is not None:
        return context, "use_backend"
    return _check_name(os.environ.get("PPAP_BACKEND") or "auto", "PPAP_BACKEND"), "PPAP_BACKEND"


def asked_for(name: str) -> bool:
    """Whether the context or the environment asks for backend `name`, or leaves the choice (``auto``)."""
    return _requested(None)[0] in ("auto", name)


def check_environment() -> None:
    """Refuse wrong values of the variables that only a kernel would read, before any long work.

    Raises:
        ValueError: PPAP_CPU_ISA or PPAP_AUTOTUNE is none of its values.
    """
    autotune_wanted()
    if reason_of("cpp") is None:
        native.isa()


def load(op: str, backend: str) -> ModuleType:
    """Implementation module of `op` for `backend`; imported on first use, logged once per op and backend."""
    if (op, backend) not in _logged:
        _logged.add((op, backend))
        logger.info("%s runs on the %s backend (python -m ppap.doctor says why)", op, backend)
    return importlib.import_module(f"{__package__}.{op}.{FILES[backend]}")


def load_if_any(op: str, backend: str) -> ModuleType | None:
    """:func:`load` where a backend may do without a form of its own."""
    there = (Path(__file__).parent / op / f"{FILES[backend]}.py").exists()
    return load(op, backend) if there else None


warn_of_unknown_variables()
