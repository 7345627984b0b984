"""The table of ``bench/results/aot.md``: a line per kernel, a column per version of Triton."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

_HEAD = """# Resources of the Triton kernels

From `make aot`; nothing was run. A column per version of Triton: registers per thread / spills (bytes;
gfx942: registers) / shared memory per program (bytes); m: has matrix instructions; w: these wait for others.
"""
_CELL = re.compile(r"(\d+) / (\d+) / (\d+)( m)?( w)?")


class Line(NamedTuple):
    """What one line is about."""

    architecture: str
    kernel: str
    configuration: str


@dataclass(frozen=True)
class Figures:
    """What one compiled kernel takes."""

    registers: int
    spills: int  # bytes of spill stores and loads; gfx942: spilled registers
    shared: int  # bytes per program
    matrix: bool  # matrix instructions of the architecture are there
    serialised: bool  # ptxas made warp-group matrix instructions wait for one another

    def __str__(self) -> str:
        marks = " m" * self.matrix + " w" * self.serialised
        return f"{self.registers} / {self.spills} / {self.shared}{marks}"

    @classmethod
    def parse(cls, text: str) -> "Figures":
        """The figures of a cell."""
        registers, spills, shared, matrix, serialised = _CELL.fullmatch(text).groups()
        return cls(int(registers), int(spills), int(shared), matrix is not None, serialised is not None)


@dataclass(frozen=True)
class Table:
    """Version of Triton -> line -> figures; versions in their order."""

    columns: dict[str, dict[Line, Figures]] = field(default_factory=dict)

    def with_column(self, version: str, found: dict[Line, Figures]) -> "Table":
        """With the figures of one version, new or anew; lines that it has no longer leave every column."""
        others = {name: column for name, column in self.columns.items() if name != version}
        kept = {
            name: {line: column[line] for line in found if line in column} for name, column in others.items()
        }
        return Table(dict(sorted((kept | {version: found}).items(), key=lambda item: _order(item[0]))))

    def text(self) -> str:
        """Markdown; a cell is empty where a version was not asked since the line is there."""
        lines = list(dict.fromkeys(line for column in self.columns.values() for line in column))
        rows = [["architecture", "kernel", "configuration", *self.columns], ["---"] * (3 + len(self.columns))]
        for line in lines:
            rows.append([*line, *(str(column.get(line, "")) for column in self.columns.values())])
        return _HEAD + "\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"

    @classmethod
    def read(cls, file: Path) -> "Table":
        """The table of a file that :meth:`text` wrote."""
        rows = [row[2:-2].split(" | ") for row in file.read_text().splitlines() if row.startswith("| ")]
        columns: dict[str, dict[Line, Figures]] = {version: {} for version in rows[0][3:]}
        for row in rows[2:]:
            for column, cell in zip(columns.values(), row[3:], strict=True):
                if cell.strip():
                    column[Line(*row[:3])] = Figures.parse(cell)
        return cls(columns)


def _order(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]
