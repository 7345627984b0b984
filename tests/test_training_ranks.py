"""Training on several ranks against one process: every method, both ways of exchange, uneven shares."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from ppap import parallel
from ppap.methods.table import METHODS
from ppap.runs.rundir import RunDir
from ppap.train import Trainer, parse_arguments
from tests.runs import TINY

EVERY_METHOD = "EVERY_METHOD" in os.environ  # minutes
SMALL = [
    *("--hp.dim=16", "--hp.pool-size=16", "--hp.warmup=1", "--hp.renew-every=2"),
    *("--stego.dim=16", "--stego.samples=3", "--stego.neighbours=2"),
]
# Six images on four ranks are 1, 2, 1 and 2.
RUN = [*TINY, *SMALL, "--train.steps=2", "--train.batch-size=6", "--eval.pictures=0", "--train.val-every=2"]


def train(group, rank, runs, size):
    """Several runs one after the other; a module's function, for other processes."""
    for arguments in runs:
        with parallel.rank_of(group, rank, size), contextlib.redirect_stdout(io.StringIO()):
            request = parse_arguments(arguments)
            trainer = Trainer(request.config, request.path, request.checkpoint)
            trainer._report = lambda *_: None  # seconds of pictures that nobody looks at
            trainer.run()


def result(path: Path):
    return RunDir(path).rows(), load_file(path / "checkpoints/last/model.safetensors")


def assert_same_run(one: Path, other: Path) -> None:
    (rows, weights), (wanted_rows, wanted) = result(other), result(one)
    assert len(rows) == len(wanted_rows)
    for row, expected in zip(rows, wanted_rows, strict=True):
        for name, value in expected.items():
            if name != "images_per_s":
                near = pytest.approx(value, rel=1e-4 if name == "grad_norm" else 1e-5, abs=1e-6)
                assert row[name] == near, (other.name, row["step"], name)
    for name, value in wanted.items():
        torch.testing.assert_close(weights[name], value, rtol=1e-4, atol=1e-4, msg=f"{other.name} {name}")


def test_ranks_are_the_run_of_one_process(pool, tmp_path, monkeypatch):
    monkeypatch.setenv("PPAP_CACHE_DIR", str(tmp_path / "cache"))
    ring = ["--train.exchange=ring", "--model.condition=centre"]
    cases = [("ppap", 4, ring), ("random", 2, []), ("oracle", 4, ["--data.cache-features"])]
    cases += [("hp", 2, []), ("stego", 2, [])]
    if EVERY_METHOD:
        cases += [(name, size, []) for name in METHODS for size in (2, 4)]
    runs: dict[int, list[list[str]]] = {2: [], 4: []}
    pairs = []
    for number, (name, size, more) in enumerate(cases):
        command = [*RUN, f"--method={name}", *more]
        one, several = (tmp_path / f"{number}-{name}-{size}-{kind}" for kind in ("one", "several"))
        train(None, 0, [[*command, f"--train.out={one}"]], 1)
        runs[size].append([*command, f"--train.out={several}"])
        pairs.append((one, several))
    for size, commands in runs.items():
        found = pool.run(train, size, [(commands, size)] * size)
        assert not [str(f) for f in found if f is not None]
    for one, several in pairs:
        assert_same_run(one, several)


def train_with_a_bad_image(group, rank, arguments, size):
    """A run whose second step has NaN in an image of the last rank."""
    with parallel.rank_of(group, rank, size), contextlib.redirect_stdout(io.StringIO()):
        request = parse_arguments(arguments)
        trainer = Trainer(request.config, request.path, request.checkpoint)
        step_of = trainer.engine.train_step

        def step(batch, number):
            if number == 1 and rank == size - 1:
                batch = {**batch, "image": batch["image"].clone()}
                batch["image"][-1] = float("nan")
            return step_of(batch, number)

        trainer.engine.train_step = step
        trainer.run()


def test_a_step_that_one_rank_cannot_take_is_skipped_by_all(pool, tmp_path):
    command = [*RUN, "--train.steps=4", "--train.log-every=1", "--train.val-every=0"]
    one, several = tmp_path / "one", tmp_path / "several"
    train_with_a_bad_image(None, 0, [*command, f"--train.out={one}"], 1)
    arguments = [([*command, f"--train.out={several}"], 2)] * 2
    found = pool.run(train_with_a_bad_image, 2, arguments)
    assert not [str(f) for f in found if f is not None]
    rows = [RunDir(run).rows() for run in (one, several)]
    skipped = [[row["skipped_steps"] for row in of if "skipped_steps" in row] for of in rows]
    assert skipped[0] == skipped[1] == [0, 1, 1, 1]
    assert len(json.loads((several / "nonfinite.jsonl").read_text())["files"]) == 6
    for name, value in result(one)[1].items():
        torch.testing.assert_close(result(several)[1][name], value, rtol=1e-4, atol=1e-4, msg=name)


def torchrun(*arguments: str) -> subprocess.Popen[str]:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "ppap.train"]
    return subprocess.Popen(
        [sys.executable, *launch, *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def ranks_of(process: subprocess.Popen[str]) -> list[int]:
    """Ids of the ranks that a torchrun started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            if parent == process.pid and b"LOCAL_RANK=" in (stat.parent / "environ").read_bytes():
                found.append(int(stat.parent.name))
    return found


@pytest.mark.skipif(not Path("/proc").exists(), reason="finds the ranks by /proc")
def test_a_killed_rank_ends_the_job_and_resume_is_the_same_run(pool, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    killed = torchrun(*RUN, "--train.steps=100000", f"--train.out={cut}")
    while not (cut / "checkpoints/last/manifest.json").exists() and killed.poll() is None:
        time.sleep(0.02)
    os.kill(max(ranks_of(killed)), signal.SIGKILL)
    begun = time.monotonic()
    said = killed.communicate()[0]
    assert killed.returncode and time.monotonic() - begun < 60 and "Traceback" in said
    steps = [f"--train.steps={json.loads((cut / 'checkpoints/last/config.json').read_text())['step'] + 2}"]
    runs = [[*RUN, *steps, f"--train.out={whole}"], ["--resume", str(cut), *steps]]
    found = pool.run(train, 2, [(runs, 2)] * 2)
    assert not [str(f) for f in found if f is not None]
    for name, value in result(whole)[1].items():
        assert torch.equal(result(cut)[1][name], value), name


@pytest.mark.parametrize(("first", "then"), [(2, 1), (1, 4)])
def test_another_number_of_ranks_goes_on_with_the_same_images(first, then, pool, tmp_path):
    whole, part = tmp_path / "whole", tmp_path / "part"
    steps = ["--train.steps=4"]
    train(None, 0, [[*RUN, *steps, f"--train.out={whole}"]], 1)
    for size, arguments in ((first, [*RUN, f"--train.out={part}"]), (then, ["--resume", str(part), *steps])):
        found = pool.run(train, size, [([arguments], size)] * size)
        assert not [str(f) for f in found if f is not None]
    assert_same_run(whole, part)


@pytest.mark.skipif(not Path("/proc").exists(), reason="finds the ranks by /proc")
def test_a_sigterm_reaches_all_ranks_and_saves_once(tmp_path):
    run = tmp_path / "run"
    asked = torchrun(*RUN, "--train.steps=100000", f"--train.out={run}")
    while not (run / "metrics.jsonl").exists() and asked.poll() is None:
        time.sleep(0.02)
    asked.send_signal(signal.SIGTERM)
    said = asked.communicate(timeout=60)[0]
    state = json.loads((run / "checkpoints/last/config.json").read_text())
    assert f"stopped at step {state['step']} of 100000" in said
    assert said.count("stopped at step") == 1
