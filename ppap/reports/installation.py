"""What this installation has: versions, devices, and which backends can run, with reasons."""

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from typing import Any

import torch

from ppap import __version__
from ppap.errors import UsageError
from ppap.evaluation.crf import IMPLS
from ppap.kernels import available_backends, dispatch, native, native_cuda
from ppap.kernels.dense_crf import unavailable_reason

PACKAGES = (
    "torch",
    "triton",
    "torchvision",
    "timm",
    "numpy",
    "scipy",
    "scikit-learn",
    "threadpoolctl",
    "pillow",
    "safetensors",
    "tyro",
    "tqdm",
    "matplotlib",
)
"""What pyproject.toml asks for."""


def report() -> dict[str, Any]:
    """Everything the command prints, as plain containers."""
    return {
        "ppap": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "devices": _devices(),
        "variables": _variables(),
        "backends": {name: reason or "available" for name, reason in available_backends().items()},
        "auto": {device: _auto(device) for device in ("cpu", "cuda")},
        "instruction sets": _instruction_sets(),
        "taken": {"CPU tensors": _taken()},
        "dense_crf": {
            name: unavailable_reason(impl) or "available"
            for name, impl in {**IMPLS, "native on a GPU": "cuda"}.items()
        },
        "compilers": {name: shutil.which(name) or "not on the PATH" for name in ("g++", "clang++", "nvcc")},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        # A wheel of another name, such as those of Triton for ROCm.
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            return "not installed"
        try:
            return f"{importlib.import_module(package).__version__} (no metadata of that name)"
        except Exception as error:  # a broken installation fails in any way
            return f"damaged ({type(error).__name__}: {error})"


def _variables() -> dict[str, str | None]:
    """Values of the variables that choose what runs, Triton's own where it is set; None = not set."""
    foreign = [name for name in ("TRITON_INTERPRET",) if name in os.environ]
    return {name: os.environ.get(name) for name in (*dispatch.VARIABLES, *foreign)}


def _devices() -> dict[str, str]:
    devices = {"cpu": f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"}
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        devices["cuda"] = (
            f"none found (torch is built for {built})" if built else "torch is built without CUDA"
        )
        return devices
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        devices[f"cuda:{i}"] = f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB"
    return devices


def build_cuda() -> None:
    """Build the CUDA library into the cache folder.

    Raises:
        UsageError: it cannot be built here.
    """
    try:
        print(f"CUDA library: {native_cuda.build()}\n", file=sys.stderr)
    except native.NativeError as error:
        raise UsageError(f"the CUDA library cannot be built: {error}") from error
    dispatch.look_again("cuda")


def _instruction_sets() -> dict[str, str]:
    """Of the native CPU library: whether this processor has each, and which one runs."""
    if native.reason() is not None:
        return {"none": native.reason()}
    found = native.available_isas()
    try:
        used = native.isa()
    except ValueError as error:
        return {"none": str(error)}
    says = {index: "in use" if index == used else "available" for index in found.values()}
    return {name: says.get(found.get(name), "not on this processor") for name in native.ISAS}


def _auto(device: str) -> dict[str, str]:
    """Op -> backend that ``auto`` takes on a device type."""
    order = dispatch.AUTO[device]
    taken = next(name for name in order if available_backends()[name] is None)
    return dict.fromkeys(dispatch.OPS, taken)


def _taken() -> str:
    """What the ops take on CPU tensors with the variables as they are, or why they would refuse."""
    try:
        dispatch.check_environment()
        return dispatch.choose(None, torch.empty(0))
    except (ValueError, RuntimeError) as error:
        return f"none: {error}"
