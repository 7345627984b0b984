"""List what the compiler made of the native CPU kernels' inner loops: ``python -m bench.native_build``.

Disassembles the library and prints, as markdown, the loops that are mostly products, and how many move a
sum to the stack and back, which costs more than the products; ``--out`` also writes it. The figures are the
compiler's, no time is measured, and another compiler may give others without anything being wrong.
"""

import argparse
import re
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from ppap.kernels import native

# A loop counts where it has so many products, and they are more than this share of its instructions.
PRODUCTS, SHARE = 12, 0.2
_KINDS = ("fmadd", "dpbf16")
_FUNCTION = re.compile(r"^[0-9a-f]+ <(.*)>:\n((?:.+\n)*)", re.M)
# Every product is in a register tile (csrc/cpu/kernels.h): one for each number of rows and left operand.
_LEFT = {"RowMajor": "rows as they lie", "Tiled": "packed columns"}
_KERNEL = re.compile(rf"ppap\d+(avx512bf16|avx512|avx2|portable).*register_tile.*?({'|'.join(_LEFT)})")
_STACK = re.compile(r"%[yz]mm.*\(%r[sb]p|\(%r[sb]p.*%[yz]mm")


class Loop(NamedTuple):
    """One loop that is mostly products."""

    isa: str
    left: str
    kind: str
    """The instruction that multiplies and adds: fmadd or dpbf16."""
    stack: tuple[str, ...]
    """Instructions that move a vector to or from the stack."""


def disassembly(library: Path) -> str:
    """The library's instructions, from objdump.

    Raises:
        FileNotFoundError: objdump is not installed.
    """
    command = ["objdump", "-d", "--no-show-raw-insn", str(library)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def functions(text: str) -> Iterator[tuple[str, str]]:
    """(name, body) of every function."""
    return ((found[1], found[2]) for found in _FUNCTION.finditer(text))


def loops(text: str) -> list[Loop]:
    """The loops of the register tiles that are mostly products, in the order of the library."""
    found = []
    for name, body in functions(text):
        kernel = _KERNEL.search(name)
        if kernel:
            found += [Loop(kernel[1], _LEFT[kernel[2]], kind, stack) for kind, stack in _product_loops(body)]
    return found


def _product_loops(function: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(kind, instructions on the stack) of every jump backwards over mostly products."""
    lines = function.splitlines()
    number_of = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r" +([0-9a-f]+):", line))}
    for i, line in enumerate(lines):
        jump = re.match(r" +[0-9a-f]+:\tj\w+ +([0-9a-f]+) ", line)
        start = number_of.get(jump[1], i) if jump else i
        body = [text.split("\t", 1)[-1] for text in lines[start : i + 1]]
        for kind in _KINDS:
            products = sum(kind in text for text in body)
            if products >= PRODUCTS and products > SHARE * len(body):
                yield kind, tuple(text for text in body if _STACK.search(text))


def table(found: list[Loop]) -> str:
    """Markdown: a line per instruction set, left operand and kind of product."""
    counted: dict[tuple[str, str, str], list[int]] = defaultdict(lambda: [0, 0])
    for loop in found:
        counts = counted[loop.isa, loop.left, loop.kind]
        counts[0] += 1
        counts[1] += bool(loop.stack)
    lines = [
        "| instruction set | left operand | product | loops | with a sum on the stack |",
        "|---|---|---|---:|---:|",
    ]
    for (isa, left, kind), (count, on_stack) in sorted(counted.items()):
        lines.append(f"| {isa} | {left} | {kind} | {count} | {on_stack} |")
    return "\n".join(lines)


def main() -> None:
    """Disassemble, print, and write where ``--out`` says."""
    parser = argparse.ArgumentParser(prog="python -m bench.native_build", description=__doc__)
    parser.add_argument("--library", type=Path, default=native.FILE, help="default: the installed one")
    parser.add_argument("--out", type=Path, help="markdown file to write")
    options = parser.parse_args()
    text = disassembly(options.library)
    report = (
        "# Loops of the native CPU kernels\n\n"
        f"From `python -m bench.native_build`, compiled by {compiler(options.library)}. Nothing was run.\n"
        f"Loops with {PRODUCTS} products or more that are over {SHARE:.0%} of their instructions;\n"
        "the portable form has no such products.\n\n"
        f"{table(loops(text))}\n"
    )
    print(report)
    if options.out:
        options.out.write_text(report)


def compiler(library: Path) -> str:
    """Name and version, as compilers leave them in the file."""
    text = library.read_bytes().decode("ascii", "ignore")
    found = re.search(r"(GCC): \([^)]*\) ([\d.]+)|(clang) version ([\d.]+)", text)
    return " ".join(filter(None, found.groups())) if found else "an unknown compiler"


if __name__ == "__main__":
    main()
