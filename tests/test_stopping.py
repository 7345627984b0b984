"""Signals: training saves, all else ends at the next item; both say how to go on, with exit code 75."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ppap import stopping
from ppap.cli import run as command
from ppap.data.checks import in_threads
from ppap.errors import Stopped
from ppap.predict import main as predict
from ppap.reports import prediction, strips
from ppap.runs.lock import FolderLock
from ppap.stopping import Interrupted, Listening, StopRequest, each
from ppap.train import main as train
from ppap.training.trainer import Trainer
from tests.runs import TINY, tiny_run
from tests.test_troubles import picture

ROOT = Path(__file__).parents[1]
NAMES = [number.name for number in stopping.SIGNALS]


def send(number) -> None:
    os.kill(os.getpid(), number)


@pytest.fixture(autouse=True)
def no_signal_is_ignored():
    """Also where nohup started the tests, which the code under test rightly obeys."""
    ignored = [number for number in stopping.SIGNALS if signal.getsignal(number) == signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return tiny_run(tmp_path_factory.mktemp("stopping") / "run", "--train.steps=1")


@pytest.mark.parametrize("name", NAMES)
def test_training_saves_at_every_signal(tmp_path, monkeypatch, capsys, name):
    real = Trainer._step

    def step(self, *args):
        send(signal.Signals[name])
        return real(self, *args)

    monkeypatch.setattr(Trainer, "_step", step)
    out = tmp_path / "run"
    assert command(train, [*TINY, f"--train.out={out}", "--train.steps=6"]) == 75
    assert f"stopped at step 1 of 6; continue with: python -m ppap.train --resume {out}" in (
        capsys.readouterr().err
    )
    assert json.loads((out / "checkpoints/last/config.json").read_text())["step"] == 1


@pytest.mark.parametrize("name", NAMES)
def test_any_loop_ends_at_the_next_item(capsys, name):
    done = []

    def work(argv):
        for item in each(range(5)):
            done.append(item)
            if item == 1:
                send(signal.Signals[name])
            done.append(item)

    before = {number: signal.getsignal(number) for number in stopping.SIGNALS}
    assert command(work, []) == 75 and done == [0, 0, 1, 1]
    errors = capsys.readouterr().err
    assert "stopping at the next image or item" in errors and "give the same command again" in errors
    assert {number: signal.getsignal(number) for number in stopping.SIGNALS} == before


def test_no_loop_is_forgotten():
    """Loops with a progress bar go through ``each``, or ask what their caller tells them."""
    for path in (ROOT / "ppap").rglob("*.py"):
        text = path.read_text()
        assert not re.search(r"for [^\n]* in tqdm\(", text) or "should_stop" in text, path


def test_a_second_signal_ends_at_once(capsys):
    def work(argv):
        send(signal.SIGTERM)
        send(signal.SIGHUP)
        pytest.fail("went on")

    assert command(work, []) == 130


def test_nohup_stays_in_force():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Listening(), StopRequest() as stop:
            send(signal.SIGHUP)
            assert not stop.asked
    finally:
        signal.signal(signal.SIGHUP, before)


def test_nothing_is_heard_without_a_command():
    assert list(each([1, 2])) == [1, 2]
    with pytest.raises(Interrupted), Listening() as listening:
        listening.asked = True
        list(each([1, 2]))
    assert list(each([1, 2])) == [1, 2]


def test_a_request_before_the_loop_is_the_loops():
    with Listening() as listening:
        send(signal.SIGUSR1)
        assert listening.asked
        with StopRequest() as stop:
            assert stop.asked and list(each([1])) == [1], "the loop saves, and ends by itself"


def test_checks_of_files_and_waiting_for_others_end(tmp_path):
    with Listening() as listening:
        looks = in_threads(lambda job: job, range(100), "check")
        assert next(iter(looks)) == 0
        listening.asked = True
        with pytest.raises(Interrupted):
            list(looks)
        lock = FolderLock(tmp_path, "x").take()
        with pytest.raises(Interrupted):
            FolderLock(tmp_path, "x").wait("waiting")
        lock.release()


@pytest.mark.parametrize("options", [[], ["--data.cache-features"]], ids=["images", "features"])
def test_a_stop_before_the_first_step_leaves_a_command_that_goes_on(tmp_path, monkeypatch, options):
    argv = [*TINY, *options, f"--train.out={tmp_path / 'run'}", "--train.steps=1"]
    argv += [f"--data.cache-dir={tmp_path / 'cache'}"]
    real = Trainer._load

    def load(self, checkpoint):
        send(signal.SIGTERM)
        real(self, checkpoint)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_load", load)
        assert command(train, argv) == 75
    assert not options or not (tmp_path / "run").exists()
    argv = argv if options else ["--resume", str(tmp_path / "run")]
    assert command(train, argv) == 0


def test_a_stop_in_the_report(tmp_path, monkeypatch, capsys):
    real = strips.predict_crop

    def slow(*args):
        send(signal.SIGUSR1)
        return real(*args)

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(strips, "predict_crop", slow)
        assert command(train, [*TINY, f"--train.out={out}", "--train.steps=1"]) == 75
    assert f"--resume {out}" in capsys.readouterr().err and not (out / "report.md").exists()
    assert command(train, ["--resume", str(out)]) == 0 and (out / "report.md").exists()


@pytest.mark.parametrize("end", ["signal", "kill"])
def test_the_command_of_an_interrupted_predict_goes_on(finished, tmp_path, monkeypatch, capsys, end):
    for k in range(3):
        picture(tmp_path / f"in/{k}.png", k)
    out, real, seen = tmp_path / "out", prediction._Writer.write, []

    def slow(self, *args, **options):
        seen.append(args)
        if len(seen) == 2:
            if end == "kill":
                raise MemoryError("stands for a kill")
            send(signal.SIGHUP)
        return real(self, *args, **options)

    argv = [str(finished), str(tmp_path / "in"), f"--out={out}", "--batch-size=1", "--resolution=32"]
    with monkeypatch.context() as patch:
        patch.setattr(prediction._Writer, "write", slow)
        assert command(predict, argv) == (75 if end == "signal" else 2)
    done = 2 if end == "signal" else 1
    assert len(list(out.glob("?.png"))) == done
    assert command(predict, [*argv[:-1], "--resolution=40"]) == 2, "another command does not go on"
    capsys.readouterr()
    assert command(predict, argv) == 0
    assert f"{done} masks are there already, {3 - done} to go" in capsys.readouterr().out
    assert len(list(out.glob("?.png"))) == 3
    assert command(predict, argv) == 2, "a finished folder is refused as before"


def test_a_real_process(finished, tmp_path):
    """Signals reach a process that waits in a system call too."""
    code = "import os, signal, sys, time\nfrom ppap.cli import run\nfrom ppap.stopping import each\n"
    code += "def work(argv):\n    for _ in each(range(999)):\n        print('on', flush=True)\n"
    code += "        time.sleep(0.05)\nsys.exit(run(work, []))"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=-1, stderr=-1, text=True)
    assert process.stdout.readline() == "on\n"
    process.send_signal(signal.SIGHUP)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == Stopped.exit_code and "same command" in errors
