"""Packages and the native CPU library; everything else is in pyproject.toml.

The folder `kernels` is installed as `ppap.kernels`: a top-level package called `kernels` exists already. The
library has no Python or torch headers, so that one wheel serves every version of both. Without a C++ compiler
the installation succeeds and leaves it out; `ppap doctor` says so.
"""

import importlib.util
import os
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

HERE = Path(__file__).parent


def sources_builder() -> ModuleType:
    """csrc/build.py, under a name of its own: `build` is PyPA's module."""
    spec = importlib.util.spec_from_file_location("ppap_csrc_build", HERE / "csrc" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


native = sources_builder()
# Installed too, so that the CUDA library can be built on demand.
SOURCES = ["ppap.kernels.csrc", "ppap.kernels.csrc.cpu", "ppap.kernels.csrc.cuda"]


@contextmanager
def without(part: str) -> Iterator[None]:
    """Turn whatever keeps a part from being built into a warning."""
    try:
        yield
    except Exception as error:  # compilers, disks and platforms fail in any way
        print(f"warning: ppap is installed without its {part}: {error}", file=sys.stderr)


class BuildNative(build_ext):
    """The library by csrc/build.py, under a name without a Python version."""

    def get_ext_filename(self, fullname: str) -> str:
        """ppap/kernels/_cpu.so."""
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        """Compile; an installation never fails for it."""
        with without("native CPU kernels"):
            native.build_cpu(Path(self.get_ext_fullpath(ext.name)))
        if os.environ.get("PPAP_BUILD_CUDA", "0") == "1":
            with without("CUDA kernels"):
                # The package cannot be imported yet: it needs torch.
                cache = runpy.run_path(str(HERE / "kernels" / "cache.py"))["cache_folder"]()
                print(f"CUDA library: {native.build_cuda_once(cache)}", file=sys.stderr)


class Wheel(bdist_wheel):
    """Any Python 3 on this platform."""

    def get_tag(self) -> tuple[str, str, str]:
        """py3-none-<platform>."""
        return "py3", "none", super().get_tag()[2]


setup(
    packages=["ppap", *(f"ppap.{name}" for name in find_packages("ppap")), "ppap.kernels"]
    + [f"ppap.kernels.{name}" for name in find_packages("kernels")]
    + SOURCES,
    package_dir={"ppap": "ppap", "ppap.kernels": "kernels", "ppap.kernels.csrc": "csrc"},
    package_data={name: ["*.cpp", "*.h", "*.inc", "*.cu", "*.cuh"] for name in SOURCES},
    ext_modules=[
        Extension("ppap.kernels._cpu", [f"csrc/cpu/{name}" for name in native.UNITS], optional=True)
    ],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
)
