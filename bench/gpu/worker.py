"""The table of the loss, measured in a process of its own that may die, hang or be killed, cell by cell.

The parent writes the results after every cell. Where the worker dies, its cell gets the reason and another
worker goes on with the rest: an illegal access spoils the CUDA context of one process only.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bench.gpu.cells import SHAPES, TINY, Cell, Inputs, Key, measure, missing, wrong

ROOT = Path(__file__).parents[2]
# A cell may compile kernels and the published form allocates gigabytes [s].
CELL_S = 60.0


def work(tasks: list[Key], say: Callable[[dict[str, object]], None], rounds: int) -> None:
    """Measure `tasks`; `say` gets {"start": key} before a cell and {"cell": ...} after it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shapes = {shape.name: shape for shape in (*SHAPES, *TINY)}
    inputs: dict[str, Inputs] = {}
    verdicts: dict[tuple[str, str], str | None] = {}
    for key in tasks:
        say({"start": key})
        cell = Cell(*key)
        reason = missing(key.form)
        if reason is None:
            try:
                if key.shape not in inputs:
                    inputs[key.shape] = Inputs.of(shapes[key.shape], device)
                pair = key.shape, key.form
                if pair not in verdicts:
                    verdicts[pair] = wrong(key.form, inputs[key.shape])
                reason = verdicts[pair]
                cell = measure(key, inputs[key.shape], rounds) if reason is None else cell
            except Exception as error:
                reason = f"failed: {_short(error)}"
                if _context_is_lost():
                    # Nothing more can be measured in this process.
                    say({"cell": {**vars(cell), "note": reason}})
                    sys.exit(1)
        if reason is not None:
            cell.note = reason
        say({"cell": vars(cell)})


def _short(error: BaseException) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:160]}"


def _context_is_lost() -> bool:
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def main(tasks_file: str, out_file: str, rounds: int) -> None:
    """The worker process: read tasks, append lines."""
    tasks = [Key(*task) for task in json.loads(Path(tasks_file).read_text())]
    with Path(out_file).open("a") as out:

        def say(line: dict[str, object]) -> None:
            out.write(json.dumps(line) + "\n")
            out.flush()

        work(tasks, say, rounds)


def measure_all(tasks: list[Key], done: Callable[[Cell], None], deadline: float, rounds: int) -> str:
    """Measure `tasks` in workers until `deadline` (of ``time.monotonic()``); `done` gets every cell.

    Returns:
        "" or why cells were left out.
    """
    left = list(tasks)
    with tempfile.TemporaryDirectory() as folder:
        while left and time.monotonic() < deadline:
            before = len(left)
            _one_worker(Path(folder), left, done, deadline, rounds)
            if len(left) == before and time.monotonic() < deadline:
                return f"the worker does not start: {_tail(Path(folder) / 'log')}"
    return "" if not left else f"no time for {len(left)} cells"


def _one_worker(
    folder: Path, left: list[Key], done: Callable[[Cell], None], deadline: float, rounds: int
) -> None:
    """Start a worker on `left`, and take from it what is finished or failed, until it ends."""
    tasks, lines, log = folder / "tasks.json", folder / "lines", folder / "log"
    tasks.write_text(json.dumps(left))
    lines.write_text("")
    command = [sys.executable, "-m", "bench.gpu", "--worker", str(tasks), str(lines), str(rounds)]
    current: Key | None = None
    rest = ""
    since = time.monotonic()

    def finish(cell: Cell) -> None:
        left.remove(cell.key)
        done(cell)

    with log.open("w") as output, lines.open() as reader:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
        try:
            while True:
                ended = process.poll() is not None
                for text in reader:
                    rest += text
                    if not rest.endswith("\n"):
                        continue  # being written, or for ever unfinished
                    line, rest = json.loads(rest), ""
                    since = time.monotonic()
                    if "start" in line:
                        current = Key(*line["start"])
                    else:
                        current = None
                        finish(Cell(**line["cell"]))
                if ended or time.monotonic() > deadline:
                    break
                if time.monotonic() - since > CELL_S:
                    if current is not None:
                        finish(Cell(*current, note=f"failed: not done within {CELL_S:.0f} s"))
                    return
                time.sleep(0.05)
        finally:
            process.kill()
            process.wait()
    if ended and current is not None:
        finish(Cell(*current, note=f"failed: exit code {process.returncode}: {_tail(log)[:160]}"))


def _tail(log: Path) -> str:
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it said nothing"
