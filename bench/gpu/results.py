"""What was found so far, as JSON and as a table, on disk after every finding."""

import json
import os
import re
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import triton

from bench.gpu import crf
from bench.gpu import peers as others
from bench.gpu.cells import BUDGET, CFG, FORMS, PARTS, STEP, TAU, Cell, Key, dense_flops
from bench.gpu.crf import Comparison
from bench.gpu.profile import Profile
from bench.shapes import Shape

SECTIONS = ("build", "loss", "tests", "profile", "peers", "crf", "sanitize")
"""In their order."""


@dataclass
class Results:
    """Findings on one device.

    Attributes:
        device: its name.
        shapes: what the table of the loss has.
        folder: where the files go.
        said: section -> what came of it, in words.
        rate: bf16 matrix rate of the device [FLOP/s].
        peer_rows: queries of the losses of other packages.
    """

    device: str
    shapes: tuple[Shape, ...]
    folder: Path
    said: dict[str, str] = field(default_factory=lambda: dict.fromkeys(SECTIONS, "not run"))
    rate: float | None = None
    cells: dict[Key, Cell] = field(default_factory=dict)
    profiles: list[Profile] = field(default_factory=list)
    peers: list[others.Row] = field(default_factory=list)
    peer_rows: int = 0
    crf: list[Comparison] = field(default_factory=list)
    date: str = field(default_factory=lambda: time.strftime("%Y-%m-%d"))

    @property
    def stem(self) -> str:
        """File name without ending."""
        return re.sub(r"[^a-z0-9]+", "-", self.device.lower()).strip("-")

    def write(self) -> None:
        """Both files, each whole at any time."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for ending, content in (("json", self._json()), ("md", self.report())):
            fresh = self.folder / f".{self.stem}.{ending}.new"
            fresh.write_text(content)
            os.replace(fresh, self.folder / f"{self.stem}.{ending}")

    def _json(self) -> str:
        found = {
            "device": self.device,
            "torch": torch.__version__,
            "triton": triton.__version__,
            "date": self.date,
            "sections": self.said,
            "bf16_matrix_rate": self.rate,
            "cells": [asdict(cell) for cell in self.cells.values()],
            "profiles": [asdict(profile) for profile in self.profiles],
            "peers": [asdict(row) for row in self.peers],
            "dense_crf": [asdict(row) for row in self.crf],
        }
        return json.dumps(found, indent=1) + "\n"

    def report(self) -> str:
        """The findings as markdown."""
        rate = "not measured" if self.rate is None else f"{self.rate / 1e12:.0f} TFLOP/s"
        lines = [
            f"# {self.device}",
            "",
            f"`python -m bench.gpu`, torch {torch.__version__}, Triton {triton.__version__}, {self.date}.",
            "",
            *[f"- {name}: {words}" for name, words in self.said.items()],
            f"- own bf16 matrix rate: {rate}",
            f"- T = {CFG.steps}, temperature {TAU}, memory budget {BUDGET >> 20} MiB.",
            "- A cell: time of a call, calls back to back; in brackets: until it returns on the host;",
            "  peak memory above the inputs. graph: the Triton form's launches, captured once, replayed.",
            "- Share: dense FLOPs ((2 T + 5) 2 A N D) of forward + backward over time and matrix rate.",
        ]
        for shape in self.shapes:
            lines += ["", *self._table(shape)]
        for profile in self.profiles:
            lines += ["", *profile.table(self.rate)]
        lines += ["", *others.report(self.peers, self.peer_rows)]
        return "\n".join([*lines, "", *crf.report(self.crf)]) + "\n"

    def _table(self, shape: Shape) -> list[str]:
        rows = []
        for form in FORMS:
            own = [self.cells.get(Key(shape.name, form, part)) for part in PARTS]
            if any(own):
                words = ["-" if cell is None else str(cell) for cell in own]
                rows.append(f"| {form} | {' | '.join(words)} | {self._share(shape, own[-1])} |")
        sizes = f"N = {shape.patches}, A = {shape.anchors}, D = E = {shape.width}"
        head = [f"## {shape.name}: {sizes}", "", f"| form | {' | '.join(PARTS)} | share |"]
        return [*head, "|---|---:|---:|---:|---:|", *rows]

    def _share(self, shape: Shape, step: Cell | None) -> str:
        if step is None or step.part != STEP or step.ms is None or self.rate is None:
            return "-"
        return f"{100 * dense_flops(shape, CFG.steps) / (step.ms / 1e3) / self.rate:.0f} %"
