"""Which backends can be used in this installation, and why the others cannot.

A backend is looked at when it is first asked for: only then is a library loaded.
"""

import importlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import sys
from pathlib import Path

import torch

from . import native, native_cuda

OPS = ("proxy_average", "relation_masks", "masked_log_softmax", "ppap_loss")
# Backend -> the file of an op's folder that implements it.
FILES = {"torch": "torch_impl", "triton": "triton_impl", "cuda": "cuda_impl", "cpp": "native_impl"}


def _interpreted() -> bool:
    """Whether Triton runs its kernels on the CPU, one program at a time: decided when it is imported."""
    if os.environ.get("TRITON_INTERPRET", "0") != "1":
        return False
    language = sys.modules.get("triton.language")
    return language is None or not isinstance(language.sum, sys.modules["triton"].runtime.JITFunction)


INTERPRETED = _interpreted()
# Backend -> the devices it runs on; torch runs on all.
DEVICES = {"triton": ("cuda", "cpu") if INTERPRETED else ("cuda",), "cuda": ("cuda",), "cpp": ("cpu",)}
INTERPRETER_HINT = "TRITON_INTERPRET=1, set before Python starts, runs its kernels on CPU tensors (slowly)"
if os.environ.get("TRITON_INTERPRET") == "1" and not INTERPRETED:
    INTERPRETER_HINT = "Triton was imported before TRITON_INTERPRET=1 was set: set it before Python starts"

# What was found out so far.
_reasons: dict[str, str | None] = {}


def reason_of(backend: str) -> str | None:
    """Why `backend` cannot be used in this installation, or None if it can; found out once."""
    if backend not in _reasons:
        _reasons[backend] = _probe(backend)
    return _reasons[backend]


# As torch.compiler.assume_constant_result does, which would import the compiler: a traced choice takes the
# answer as it is.
reason_of._dynamo_marked_constant = True  # type: ignore[attr-defined]


def look_again(backend: str) -> None:
    """Find out anew whether a backend can be used, after something was built."""
    _reasons.pop(backend, None)


def _probe(backend: str) -> str | None:
    """Why `backend` cannot be used in this installation, or None if it can."""
    here = Path(__file__).parent
    if not all((here / op / f"{FILES[backend]}.py").exists() for op in OPS):
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


def available_backends() -> dict[str, str | None]:
    """Every backend's name -> None if it can be used here, else the reason why not."""
    reasons = {backend: reason_of(backend) for backend in FILES}
    if reasons["cuda"] is None and not torch.cuda.is_available():
        reasons["cuda"] = "no GPU"
    if reasons["triton"] is None and not INTERPRETED:
        there = torch.cuda.is_available()
        reasons["triton"] = (
            unfit("triton", torch.device("cuda", 0)) if there else f"no GPU; {INTERPRETER_HINT}"
        )
    return reasons


def unfit(backend: str, device: torch.device) -> str | None:
    """Why `backend` does not run on this very GPU, or None; traced by ``torch.compile``."""
    if backend != "triton" or device.type != "cuda":
        return None
    found = torch.cuda.get_device_properties(device)  # a constant to torch.compile
    if torch.version.hip:
        known = found.gcnArchName.startswith("gfx942")
        return None if known else f"its configurations are for gfx942, {found.name} is {found.gcnArchName}"
    if found.major >= 8:
        return None
    return f"it needs compute capability 8.0 or later, {found.name} has {found.major}.{found.minor}"
