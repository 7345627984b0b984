"""Metrics and pictures in TensorBoard and Weights & Biases, beside the run's own."""

import json
import sys
from types import SimpleNamespace

import pytest

from ppap.errors import UsageError
from ppap.runs.rundir import RunDir
from ppap.runs.trackers import Tracker, Trackers
from ppap.train import main
from tests.runs import tiny_run


def test_tensorboard_has_the_lines_and_the_pictures(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tiny_run(tmp_path / "run", "--train.steps=2", "--train.log=tensorboard")
    main(["--resume", str(run), "--train.steps=3"])
    found = EventAccumulator(str(run / "tensorboard")).Reload()
    rows = [row for row in RunDir(run).rows() if "loss" in row]
    losses = {event.step: event.value for event in found.Scalars("loss")}
    assert losses == pytest.approx({row["step"]: row["loss"] for row in rows}, rel=1e-6)
    assert {"curves", "strip"} <= set(found.Tags()["images"])


class Room:
    """What stands for wandb: it remembers what it was told."""

    Error = type("Error", (Exception,), {})

    def __init__(self):
        self.asked, self.told, self.finished = None, [], 0

    def init(self, **asked):
        self.asked = asked
        return self

    def log(self, values, step):
        self.told.append((step, values))

    def finish(self):
        self.finished += 1

    def Image(self, path):  # noqa: N802, its name there
        return path


@pytest.fixture
def room(monkeypatch):
    found = Room()
    monkeypatch.setitem(sys.modules, "wandb", found)
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: SimpleNamespace(origin="x") if name == "wandb" else None
    )
    return found


def test_wandb_gets_settings_lines_and_pictures(room, tmp_path):
    run = tiny_run(tmp_path / "run", "--train.steps=2", "--train.log=wandb")
    assert room.asked["mode"] == "offline"  # tests open no sockets
    assert room.asked["config"]["train"]["steps"] == 2 and room.asked["name"] == "run"
    losses = [(step, values["loss"]) for step, values in room.told if "loss" in values]
    assert losses == [(row["step"], row["loss"]) for row in RunDir(run).rows() if "loss" in row]
    assert room.told[-1][1].keys() <= {"curves", "strip", "positives"} and room.finished == 1
    first = room.asked["id"]
    main(["--resume", str(run), "--train.steps=3"])
    assert room.asked["id"] == first
    tiny_run(tmp_path / "other", "--train.steps=1", "--train.log=wandb")
    assert room.asked["id"] != first


def test_one_that_may_not_be_used_is_an_error_with_the_remedy(room, tmp_path, monkeypatch):
    def refused(**asked):
        raise room.Error("No API key configured.")

    monkeypatch.setattr(room, "init", refused)
    with pytest.raises(UsageError, match="No API key configured. Or set WANDB_MODE=offline"):
        tiny_run(tmp_path / "run", "--train.steps=1", "--train.log=wandb")


def test_a_missing_package_is_said_before_any_work(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="--train.log tensorboard needs a package: pip install tensorboard"):
        tiny_run(tmp_path / "run", "--train.log=tensorboard")
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_fails_ends_no_run(tmp_path, capsys):
    class Failing(Tracker):
        def scalars(self, step, values):
            raise OSError("disk full")

    run = RunDir(tmp_path)
    run.trackers = Trackers({"tensorboard": Failing()})
    for step in (1, 2):
        run.append({"step": step, "loss": 1.0, "note": None})
    assert len(run.rows()) == 2
    assert capsys.readouterr().out.count("--train.log tensorboard ends here (OSError: disk full)") == 1


def test_nothing_is_imported_without_being_asked(finished):
    assert not (finished / "tensorboard").exists()
    assert json.loads((finished / "config.json").read_text())["config"]["train"]["log"] == []
