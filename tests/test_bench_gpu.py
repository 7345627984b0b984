"""The worker of ``python -m bench.gpu``: whatever happens to a cell, the others are measured."""

import sys
import time

import pytest

from bench.gpu import worker
from bench.gpu.cells import PARTS, TINY, Cell, Key

TASKS = [Key(TINY[0].name, "torch fp32", part) for part in PARTS]

# A worker that does what its first lines say to a cell, and says of the others that they took a millisecond.
PROGRAM = """
import json, os, sys, time
tasks, lines = json.load(open(sys.argv[1])), open(sys.argv[2], "a", buffering=1)
for task in tasks:
    lines.write(json.dumps({"start": task}) + "\\n")
    if task[2] == "loss forward":
        BEHAVIOUR
    cell = dict(zip(("shape", "form", "part"), task)) | {"ms": 1.0, "host_ms": 1.0, "note": ""}
    lines.write(json.dumps({"cell": cell}) + "\\n")
"""


@pytest.fixture
def cells(monkeypatch, tmp_path):
    """cells(behaviour) -> (what became of each part, what was left out)."""

    def run(behaviour: str, seconds: float = 30.0) -> tuple[dict[str, Cell], str]:
        program = tmp_path / "program.py"
        program.write_text(PROGRAM.replace("BEHAVIOUR", behaviour))
        start = worker.subprocess.Popen

        def popen(command, **options):
            return start([sys.executable, str(program), *command[4:]], **options)

        monkeypatch.setattr(worker.subprocess, "Popen", popen)
        found: dict[str, Cell] = {}
        left = worker.measure_all(
            TASKS, lambda cell: found.update({cell.part: cell}), time.monotonic() + seconds, 1
        )
        return found, left

    return run


def test_a_worker_that_dies_loses_one_cell(cells):
    found, left = cells("print('illegal memory access'); sys.stdout.flush(); os._exit(134)")
    assert left == "" and [cell.ms for cell in found.values()] == [1.0, None, 1.0]
    assert found["loss forward"].note == "failed: exit code 134: illegal memory access"


def test_a_cell_that_hangs_is_given_up(cells, monkeypatch):
    monkeypatch.setattr(worker, "CELL_S", 1.0)
    found, left = cells("time.sleep(60)")
    assert left == "" and [cell.ms for cell in found.values()] == [1.0, None, 1.0]
    assert found["loss forward"].note == "failed: not done within 1 s"


def test_a_worker_that_does_not_start_is_said(cells, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "PROGRAM", "raise SystemExit('no torch here')")
    assert cells("") == ({}, "the worker does not start: no torch here")


def test_the_time_ends_the_table(cells):
    found, left = cells("time.sleep(60)", seconds=2.0)
    assert list(found) == ["propagate"] and left == "no time for 2 cells"


def test_what_goes_wrong_in_a_cell_is_its_note(monkeypatch):
    said = []

    def measure(key: Key, inputs: object, rounds: int) -> Cell:
        if key.part == "loss forward":
            raise RuntimeError("out of paper\nand more")
        return Cell(*key, ms=1.0, host_ms=1.0, note="")

    monkeypatch.setattr(worker, "measure", measure)
    worker.work(TASKS, said.append, 1)
    notes = [line["cell"]["note"] for line in said if "cell" in line]
    assert notes == ["", "failed: RuntimeError: out of paper", ""]


def test_the_script_says_that_there_is_no_gpu():
    from bench.gpu.__main__ import main

    if worker.torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main([]) == 2
