"""Times of the tile kernels in every launch configuration: ``python -m bench.gpu --only tiles``.

What :mod:`ppap.kernels.tiles.launch` ships is chosen from this. Compiling takes longer than timing: some
processes compile all configurations first, into Triton's cache on disk.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from triton.errors import TritonError

from bench.gpu.cells import STEP, Inputs, runner
from bench.gpu.clock import synchronise, time_calls
from bench.shapes import VITS8, Shape
from ppap.kernels.tiles import launch

ROOT = Path(__file__).parents[2]
PROCESSES = 12
FORMS = ("triton fp16", "triton fp32")
SHAPE = VITS8


def sweep(
    found: Callable[[str, list[dict[str, object]]], None], share: tuple[int, int] | None = None
) -> None:
    """Run one step in every form; each kernel's first launch of a kind tries all configurations.

    Args:
        found: called with the launch's name and its configurations with times, fastest first.
        share: (i, n) = only compile, and of the configurations only every n-th from i on.
    """
    inputs = Inputs.of(SHAPE, torch.device("cuda"))
    for form in FORMS:
        seen: set[str] = set()
        original = launch.choose

        def choose(kernel, operand, problem, again, form=form, seen=seen):
            shipped = launch.configuration(kernel, operand.high.device, operand.split)
            flags = [flag for flag in problem if isinstance(flag, bool)]
            name = " ".join([form, kernel, *(str(int(flag)) for flag in flags)])
            if name not in seen:
                seen.add(name)
                every = [shipped, *launch.alternatives(kernel, shipped)]
                every = [one for one in every if launch.fits(kernel, one, operand.high.shape[1])]
                part = every if share is None else every[share[0] :: share[1]]
                found(name, _try(part, again, share is None))
            return shipped

        launch.choose = choose
        try:
            runner(form, STEP, inputs, inputs.anchors)()
        finally:
            launch.choose = original


def _try(configs: list[launch.Launch], again: Callable, timed: bool) -> list[dict[str, object]]:
    rows = []
    for config in configs:
        try:
            again(config=config)
            synchronise()
            ms = time_calls(partial(again, config=config), 10).ms if timed else None
        except (TritonError, RuntimeError) as error:
            if timed:
                rows.append({**asdict(config), "ms": None, "note": str(error).strip().splitlines()[0][:80]})
            continue
        rows.append({**asdict(config), "ms": ms, "note": ""})
    return sorted(rows, key=lambda row: float("inf") if row["ms"] is None else row["ms"])


def compile_all(seconds: float) -> None:
    """Compile every configuration in processes of their own."""
    command = [sys.executable, "-m", "bench.gpu", "--compile"]
    running = [
        subprocess.Popen(
            [*command, str(i), str(PROCESSES)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for i in range(PROCESSES)
    ]
    for process in running:
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()


def write(folder: Path, seconds: float) -> str:
    """Compile, time, write ``tiles.json`` after every kernel; what came of it."""
    compile_all(seconds)
    rows: dict[str, list[dict[str, object]]] = {}

    def found(name: str, timings: list[dict[str, object]]) -> None:
        rows[name] = timings
        (folder / "tiles.json").write_text(json.dumps(rows, indent=1) + "\n")
        for row in timings[:3]:
            print(name, row, flush=True)

    sweep(found)
    return f"{sum(map(len, rows.values()))} configurations of {_shape(SHAPE)} in tiles.json"


def _shape(shape: Shape) -> str:
    return f"N = {shape.patches}, A = {shape.anchors}, D = {shape.width}"
