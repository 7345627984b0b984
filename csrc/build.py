"""Build the native CPU library: ``python csrc/build.py`` (setup.py does it on installation).

Needs a C++17 compiler and nothing else: no torch, no Python headers. Every instruction set is a translation
unit of its own with its own flags; which one runs is decided at run time.
"""

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

HERE = Path(__file__).resolve().parent
_AVX2 = ["-mavx2", "-mfma"]
_AVX512 = ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma"]
# Of an inline function's copies the linker keeps the first: units without flags of their own come first, so
# that no function shared by all holds instructions that only some processors have.
UNITS = {
    "library.cpp": [],
    "dense_crf_lattice.cpp": ["-ffp-contract=off"],
    "isa_portable.cpp": [],
    "dense_crf_portable.cpp": [],
    "isa_avx2.cpp": _AVX2,
    "dense_crf_avx2.cpp": _AVX2,
    "isa_avx512.cpp": _AVX512,
    "dense_crf_avx512.cpp": _AVX512,
    "isa_avx512bf16.cpp": [*_AVX512, "-mavx512bf16"],
}
CUDA_ARCHITECTURES = (75, 80, 90)
CUDA_UNITS = (
    *("library.cu", "masks.cu", "relation_masks.cu", "proxy_average.cu", "masked_log_softmax.cu"),
    "dense_crf.cu",
)
# What each instruction set of x86 is made of; the others have what is left.
ISA_UNITS = {
    "avx2": ("isa_avx2.cpp", "dense_crf_avx2.cpp"),
    "avx512": ("isa_avx512.cpp", "dense_crf_avx512.cpp"),
    "avx512bf16": ("isa_avx512bf16.cpp", "dense_crf_avx512.cpp"),
}
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"]


class BuildError(RuntimeError):
    """The library cannot be built; the message says why."""


def compiler() -> list[str]:
    """The C++ compiler: the variable CXX, else g++, clang++ or c++ on the PATH.

    Raises:
        BuildError: there is none.
    """
    named = os.environ.get("CXX", "").split()
    if named and shutil.which(named[0]) is None:
        raise BuildError(f"the variable CXX names {named[0]!r}, which is not there")
    for command in [named, ["g++"], ["clang++"], ["c++"]]:
        if command and shutil.which(command[0]):
            return command
    raise BuildError("no C++ compiler (g++, clang++ or c++) is on the PATH")


def build_cpu(out: Path, extra: Sequence[str] = (), isas: Sequence[str] = tuple(ISA_UNITS)) -> None:
    """Compile and link the CPU library into the file `out`.

    Args:
        out: file to write.
        extra: flags for every unit and for the link.
        isas: instruction sets of x86 beside the portable one; a processor of another kind has none of them.

    Raises:
        BuildError: no compiler, or it fails; the message has its output.
    """
    command = compiler()
    chosen = isas if platform.machine().lower() in ("x86_64", "amd64") else ()
    left_out = {unit for names in ISA_UNITS.values() for unit in names}
    left_out -= {unit for isa in chosen for unit in ISA_UNITS[isa]}
    units = [name for name in UNITS if name not in left_out]
    extra = [*extra, *(f"-DPPAP_WITHOUT_{isa.upper()}" for isa in ISA_UNITS if isa not in chosen)]
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        objects = [str(Path(scratch) / f"{name}.o") for name in units]

        def compile_unit(name: str, target: str) -> None:
            source = str(HERE / "cpu" / name)
            _run([*command, *FLAGS, *UNITS[name], *extra, "-c", source, "-o", target])

        with ThreadPoolExecutor() as pool:
            list(pool.map(compile_unit, units, objects))
        linked = str(Path(scratch) / "linked.so")
        _run([*command, "-shared", *extra, *objects, "-o", linked, "-pthread"])
        _put(Path(linked), out)


def _put(built: Path, out: Path) -> None:
    """Give a file its name at once: whoever has the old one loaded keeps it, two builds do not meet."""
    handle, fresh = tempfile.mkstemp(dir=out.parent, suffix=".so")
    os.close(handle)
    try:
        shutil.copy(built, fresh)
        os.replace(fresh, out)
    except OSError as error:
        Path(fresh).unlink(missing_ok=True)
        raise BuildError(f"{out} cannot be written: {error}") from error


def build_cuda(out: Path, architectures: Sequence[int] = CUDA_ARCHITECTURES) -> str:
    """Compile the CUDA library into `out` for `architectures` and, as PTX, later GPUs; ptxas's report.

    Raises:
        BuildError: no nvcc, or it fails; the message has its output.
    """
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    if nvcc is None:
        raise BuildError("nvcc is not on the PATH: install the CUDA toolkit")
    codes = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in architectures]
    codes.append(f"-gencode=arch=compute_{architectures[-1]},code=compute_{architectures[-1]}")
    flags = ["-std=c++17", "-O3", "-shared", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xptxas=-v"]
    return _run([nvcc, "--threads=0", *flags, *codes, *_cuda_sources(), "-o", str(out)])


def _cuda_sources() -> list[str]:
    return [str(HERE / "cuda" / name) for name in CUDA_UNITS]


def cuda_file(cache: Path) -> Path:
    """Where the CUDA library of these sources is kept, below the folder of caches."""
    sources = sorted((HERE / "cuda").iterdir())
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]
    return cache / "native" / f"cuda-{digest}.so"


def build_cuda_once(cache: Path, architectures: Sequence[int] = CUDA_ARCHITECTURES) -> Path:
    """The file of :func:`cuda_file`, built unless it is there; who comes second waits for the first.

    The compiler's output is kept beside it, with the ending .log.

    Raises:
        BuildError: no nvcc, or it fails, and the message names the log; or `cache` cannot be written.
    """
    file = cuda_file(cache)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.with_suffix(".lock").open("w") as lock:
            _wait_for(lock)
            if not file.exists():
                _build_into(file, architectures)
    except OSError as error:
        raise BuildError(f"{file} cannot be written: {error}") from error
    return file


def _wait_for(lock: IO[str]) -> None:
    """Hold the open file alone; where there is no fcntl, two processes may do the same work at once."""
    if fcntl is not None:
        fcntl.flock(lock, fcntl.LOCK_EX)


def _build_into(file: Path, architectures: Sequence[int]) -> None:
    fresh, log = file.with_suffix(f".{os.getpid()}.new"), file.with_suffix(".log")
    try:
        log.write_text(build_cuda(fresh, architectures))
    except BuildError as error:
        log.write_text(str(error))
        raise BuildError(f"{str(error).splitlines()[0]} (all of it: {log})") from error
    os.replace(fresh, file)


def build_emulated_cuda(out: Path) -> None:
    """Compile the CUDA library's kernels for the CPU, one thread after the other: to test them without a GPU.

    Raises:
        BuildError: no compiler, or it fails; the message has its output.
    """
    # The CRF's lattice must not be contracted into fused products; on the device its operations say so.
    flags = [*FLAGS, "-shared", "-DPPAP_EMULATED", "-ffp-contract=off", "-x", "c++"]
    _run([*compiler(), *flags, *_cuda_sources(), "-o", str(out)])


def _run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{' '.join(command)} failed:\n{done.stderr.strip()}")
    return done.stderr


def main() -> int:
    """Build into kernels/, or where --out says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE.parent / "kernels" / "_cpu.so", help="file to write")
    parser.add_argument(
        "--isas", nargs="*", choices=[*ISA_UNITS], default=[*ISA_UNITS], help="instruction sets of x86"
    )
    parser.add_argument("flags", nargs="*", help="more compiler flags, after --")
    options = parser.parse_args()
    try:
        build_cpu(options.out, options.flags, options.isas)
    except BuildError as error:
        print(f"csrc/build.py: {error}", file=sys.stderr)
        return 1
    print(f"written: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
