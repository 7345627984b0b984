"""One process at a time in a folder of results: what is refused, what stale locks are worth, what is kept."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest

from ppap import eval as evaluation
from ppap.analysis import study
from ppap.analysis.study import Cell, run_cells
from ppap.errors import DataError, UsageError
from ppap.predict import main as predict
from ppap.runs import lock
from ppap.runs.checkpoint import load_checkpoint
from ppap.runs.lock import FolderLock, alone
from ppap.settings.config import of_seed
from ppap.train import _train_seed
from ppap.train import main as train
from ppap.training import seeds, trainer
from ppap.training.request import parse_arguments
from ppap.training.trainer import Trainer
from tests.runs import TINY, make_folder, tiny_run

ROOT = Path(__file__).parents[1]
HOLD = """
import sys, time
from pathlib import Path
from ppap.runs.lock import FolderLock
held = FolderLock(Path(sys.argv[1]), "it").take()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture
def other():
    """Starts processes that hold a folder."""
    started = []

    def hold(folder: Path) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize("platform", ["here", "without fcntl"])
def test_the_second_is_refused(tmp_path, monkeypatch, platform):
    taken = []

    def locking(number, mode, length):
        if taken:
            raise PermissionError(errno.EACCES, "held")
        taken.append((mode, length))

    if platform != "here":
        monkeypatch.setattr(lock, "fcntl", None)
        monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(locking=locking))
    with alone(tmp_path, "--out x"):
        with pytest.raises(UsageError, match="another process works on --out x"), alone(tmp_path, "--out x"):
            raise AssertionError("let in")
    assert taken == ([] if platform == "here" else [(2, 1)])
    assert not list(tmp_path.iterdir()), "nothing is left in the folder"


def test_a_killed_process_holds_nothing(tmp_path, other):
    process = other(tmp_path)
    with pytest.raises(UsageError, match="another process"):
        FolderLock(tmp_path, "it").take()
    process.kill()
    process.wait()
    assert (tmp_path / lock.NAME).exists(), "its file is left"
    with alone(tmp_path, "it"):
        pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_does_not_keep_the_lock(tmp_path):
    held = FolderLock(tmp_path, "it").take()
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, b"1")
        time.sleep(60)
        os._exit(0)
    try:
        os.read(read, 1)  # the child runs, so it has closed its copies
        # As if this process had died: its own copy is closed, and nothing is unlocked.
        lock._HELD.discard(held)
        held.file.close()
        with alone(tmp_path, "it"):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(read)
        os.close(write)


def test_a_lock_whose_file_is_gone_is_taken_anew(tmp_path):
    first = FolderLock(tmp_path, "it").take()
    (tmp_path / lock.NAME).unlink()
    second = FolderLock(tmp_path, "it").take()
    first.release()
    second.release()
    second.release()


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    def refuse(file, how):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(lock, "fcntl", SimpleNamespace(flock=refuse, LOCK_EX=2, LOCK_NB=4, LOCK_UN=8))
    with pytest.warns(UserWarning, match="has no locks"), alone(tmp_path, "it"):
        pass
    assert not list(tmp_path.iterdir()), "nothing is left in the folder"


def test_a_disk_that_fails_is_no_other_process(tmp_path, monkeypatch):
    def fail(file, how):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(lock, "fcntl", SimpleNamespace(flock=fail, LOCK_EX=2, LOCK_NB=4, LOCK_UN=8))
    with pytest.raises(DataError, match=f"{os.strerror(errno.EIO)}.*give another folder"):
        FolderLock(tmp_path, "it").take()
    assert not list(tmp_path.iterdir()), "nothing is left in the folder"


def test_the_lock_of_another_is_not_removed(tmp_path):
    first = FolderLock(tmp_path, "it").take()
    (tmp_path / lock.NAME).unlink()
    second = FolderLock(tmp_path, "it").take()
    first.release()
    with pytest.raises(UsageError, match="another process"):
        FolderLock(tmp_path, "it").take()
    second.release()
    assert not list(tmp_path.iterdir())


def test_a_file_that_stays_hides_no_error_and_holds_nothing(tmp_path, monkeypatch):
    def fail(self, missing_ok=False):
        raise OSError(errno.EROFS, "read-only")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", fail)
        with pytest.raises(KeyError, match="the real one"), alone(tmp_path, "it"):
            raise KeyError("the real one")
    assert (tmp_path / lock.NAME).exists()
    with alone(tmp_path, "it"):
        pass


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_that_unwinds_leaves_the_lock(tmp_path):
    held = FolderLock(tmp_path, "it").take()
    child = os.fork()
    if child == 0:
        try:
            held.release()
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert (tmp_path / lock.NAME).exists()
    with pytest.raises(UsageError, match="another process"):
        FolderLock(tmp_path, "it").take()
    held.release()


def test_a_run_is_continued_by_one_process(tmp_path, other):
    run = tiny_run(tmp_path / "run")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    process = other(run)
    with pytest.raises(UsageError, match=rf"another process works on --resume {run}"):
        train([f"--resume={run}", "--train.steps=8"])
    assert {path: path.read_bytes() for path in before} == before
    process.kill()
    process.wait()
    train([f"--resume={run}", "--train.steps=8"])
    assert load_checkpoint(run).info["step"] == 8 and not (run / lock.NAME).exists()


def test_a_run_that_was_continued_meanwhile_is_not_continued_from_before(tmp_path):
    run = tiny_run(tmp_path / "run", "--train.steps=2", "--train.val-every=0")
    request = parse_arguments([f"--resume={run}", "--train.steps=4"])
    train([f"--resume={run}", "--train.steps=3"])  # begins, saves and ends before the first has the lock
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match="continued by another process since step 2.*give the command again"):
        Trainer(request.config, request.path, request.checkpoint)
    assert {path: path.read_bytes() for path in before} == before and not (run / lock.NAME).exists()
    train([f"--resume={run}", "--train.steps=4"])
    assert load_checkpoint(run).info["step"] == 4


def test_a_seed_without_labels_to_measure_lets_its_folder_go(tmp_path, monkeypatch):
    run = tiny_run(tmp_path / "run", "--train.steps=1", "--train.val-every=0")
    config = parse_arguments([f"--resume={run}"]).config
    build = trainer.build_datasets
    monkeypatch.setattr(trainer, "build_datasets", lambda data: build(data)._replace(val=None))
    with pytest.raises(UsageError, match="needs labelled validation images"):
        _train_seed(config, run, True)
    with alone(run, "it"):
        pass


def test_a_run_holds_its_folder_while_it_trains(tmp_path, monkeypatch):
    seen, step = [], trainer.Trainer._step

    def looking(self, *args):
        with pytest.raises(UsageError, match="another process"):
            FolderLock(self.run_dir.path, "it").take()
        seen.append(self.step)
        return step(self, *args)

    monkeypatch.setattr(trainer.Trainer, "_step", looking)
    tiny_run(tmp_path / "run")
    assert len(seen) == 6


def test_a_set_of_seeds_is_continued_by_one_process(tmp_path, other):
    out = tmp_path / "set"
    options = [*TINY, "--train.steps=2", "--train.val-every=0", f"--train.out={out}"]
    train([*options, "--seeds", "0"])
    (out / "seed-0" / "report.md").unlink()  # as if it were not finished
    other(out)
    with pytest.raises(UsageError, match="another process works on --resume"):
        train([f"--resume={out}"])
    assert (out / "seed-0" / "checkpoints" / "last").exists(), "a run of another process is not removed"


def test_two_sets_do_not_begin_in_one_folder(tmp_path, monkeypatch):
    from ppap.settings.config import Config

    (tmp_path / "set").mkdir()
    monkeypatch.setattr(seeds, "_resume", lambda path, run_one: None)
    seeds.start(Config(), [0], tmp_path / "set", lambda *_: None)
    with pytest.raises(UsageError, match="begun by another process"):
        seeds.start(Config(), [1], tmp_path / "set", lambda *_: None)
    assert json.loads((tmp_path / "set" / "seeds.json").read_text())["seeds"] == [0]


def test_a_study_belongs_to_one_process(tmp_path, other):
    other(tmp_path)
    with pytest.raises(UsageError, match="another process works on --out"):
        run_cells(tmp_path, [])


def cell(name: str) -> Cell:
    options = [*TINY, "--train.steps=2", "--train.val-every=0", "--eval.pictures=0", "--eval.crf=none"]
    config = of_seed(parse_arguments([*options, "--train.out=x"]).config, 0)
    return Cell(name, config, "checkpoint", keep_checkpoints=False)


def test_a_run_without_a_save_is_removed_only_where_nobody_works(tmp_path, other):
    run = tmp_path / "cells" / "a"
    (run / "pictures").mkdir(parents=True)
    (run / "config.json").write_text("{}")
    process = other(run)  # as a process goes on whose study was killed
    with pytest.raises(UsageError, match=f"another process works on the run {run}"):
        run_cells(tmp_path, [cell("a")])
    assert (run / "config.json").exists() and (run / "pictures").exists()
    process.kill()
    process.wait()
    run_cells(tmp_path, [cell("a")])
    assert (run / "report.md").exists() and not (run / lock.NAME).exists()


def test_a_seed_without_a_save_is_removed_only_where_nobody_works(tmp_path, other):
    out = tmp_path / "set"
    options = [*TINY, "--train.steps=2", "--train.val-every=0", f"--train.out={out}"]
    train([*options, "--seeds", "0"])
    run = out / "seed-0"
    (run / "report.md").unlink()
    (run / "checkpoints").rename(tmp_path / "gone")
    other(run)
    with pytest.raises(UsageError, match=f"another process works on the run {run}"):
        train([f"--resume={out}"])
    assert (run / "config.json").exists()


def test_a_cell_is_measured_and_its_checkpoints_removed_by_one_process(tmp_path, monkeypatch):
    seen, measured = [], study._MEASURES["checkpoint"]

    def looking(path, config):
        with pytest.raises(UsageError, match="another process"):
            FolderLock(path, "it").take()
        seen.append(path)
        return measured(path, config)

    monkeypatch.setitem(study._MEASURES, "checkpoint", looking)
    run_cells(tmp_path, [cell("a")])
    run = tmp_path / "cells" / "a"
    assert seen == [run] and not (run / "checkpoints").exists() and not (run / lock.NAME).exists()
    before = (run / "report.md").stat().st_mtime_ns
    study.run_cell(tmp_path / "cells", cell("a"))
    assert (run / "report.md").stat().st_mtime_ns == before, "finished by another one meanwhile"


def test_masks_are_written_by_one_process(tmp_path, other):
    run = tiny_run(tmp_path / "run", "--train.steps=1")
    images = make_folder(tmp_path / "data", labels=False, count=2) / "images" / "val"
    out = tmp_path / "masks"
    out.mkdir()
    other(out)
    with pytest.raises(UsageError, match=rf"another process works on --out {out}"):
        predict([str(run), str(images), f"--out={out}", "--resolution=32"])
    assert [path.name for path in out.iterdir()] == [lock.NAME]


def test_evaluations_at_once_all_keep_their_results(tmp_path):
    arguments = SimpleNamespace(out=None, frozen=False, checkpoint=str(tmp_path))
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda n: evaluation._write(arguments, {"n": n}), range(40)))
    assert len(set(paths)) == 40
    assert sorted(json.loads(path.read_text())["n"] for path in paths) == list(range(40))
    assert {path.name for path in paths} >= {"evaluation.json", "evaluation-2.json", "evaluation-40.json"}
    given = SimpleNamespace(out=str(paths[0]), frozen=False, checkpoint=str(tmp_path))
    with pytest.raises(UsageError, match="was written meanwhile"):
        evaluation._write(given, {})
