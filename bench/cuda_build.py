"""Compile the CUDA library, without a GPU, and list what its kernels take: ``python -m bench.cuda_build``.

Prints registers and spills of every kernel and architecture as markdown; ``--out`` also writes it. The
figures are ptxas's, no time is measured.
"""

import argparse
import re
import shutil
import subprocess
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

from ppap.kernels import native_cuda


class Resources(NamedTuple):
    """What one kernel takes on one architecture."""

    kernel: str
    architecture: str
    registers: int
    spilled: int
    """Bytes stored and loaded."""


def resources(report: str) -> list[Resources]:
    """Every kernel of the compiler's report (``ptxas -v``), in its order."""
    entries = re.split(r"Compiling entry function", report)[1:]
    names = _demangled([re.match(r" '(\w+)'", entry)[1] for entry in entries])
    return [_resources(name, entry) for name, entry in zip(names, entries, strict=True)]


def _resources(name: str, entry: str) -> Resources:
    spills = [int(number) for number in re.findall(r"(\d+) bytes spill", entry)]
    return Resources(
        name,
        re.search(r"for '(sm_\d+)'", entry)[1],
        int(re.search(r"Used (\d+) registers", entry)[1]),
        sum(spills),
    )


def _demangled(names: list[str]) -> list[str]:
    """The kernels' C++ types, such as ``Weights<3, __half>``; names as they are where there is no c++filt."""
    if shutil.which("c++filt") is None:
        return names
    done = subprocess.run(["c++filt", *names], capture_output=True, text=True, check=True)
    plain = [line.replace("(anonymous namespace)::", "") for line in done.stdout.splitlines()]
    return [re.sub(r"^void run_kernel<(.*)>\(.*$", r"\1", line).strip() for line in plain]


def table(rows: list[Resources]) -> str:
    """Markdown: a line per kernel, a column of registers / spilled bytes per architecture."""
    by_kernel: dict[str, dict[str, Resources]] = defaultdict(dict)
    for row in rows:
        by_kernel[row.kernel][row.architecture] = row
    architectures = sorted({row.architecture for row in rows}, key=lambda name: int(name[3:]))
    lines = ["| kernel | " + " | ".join(architectures) + " |", "|---|" + "---:|" * len(architectures)]
    for kernel, found in sorted(by_kernel.items()):
        cells = [found.get(name) for name in architectures]
        texts = [f"{c.registers} / {c.spilled}" if c else "" for c in cells]
        lines.append(f"| `{kernel}` | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def main() -> None:
    """Compile, print, and write where ``--out`` says."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="markdown file to write")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = native_cuda.builder().build_cuda(Path(folder) / "cuda.so")
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release ([\d.]+)", version)[1]
    text = (
        "# Resources of the CUDA kernels\n\n"
        "Registers of a thread / spilled bytes, from `python -m bench.cuda_build` with nvcc "
        f"{release}. Nothing was run on a GPU.\nThe first number of a template is the precision of its "
        "products: 0 fp32 by split operands, 1 fp16, 2 bf16\n(tensor cores, from sm_80), 3 plain fp32. "
        "Shared memory is given at launch.\n\n"
        f"{table(resources(report))}\n"
    )
    print(text)
    if options.out:
        options.out.write_text(text)


if __name__ == "__main__":
    main()
