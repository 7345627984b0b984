"""Pretraining where numbers are not finite: steps that are skipped, counted, named, and end a run."""

import json
import math
import re

import pytest
import torch

from ppap.errors import DataError, NumberError
from ppap.pretrain import parse_arguments
from ppap.pretraining.pretrainer import Pretrainer
from ppap.runs.checkpoint import load_checkpoint
from tests.test_pretrain import ALL_LOSSES, SMALL, images, start

__all__ = ["images"]


def spoiled(pretrainer, monkeypatch, steps):
    """The same run with a loss of NaN at some of its steps."""
    losses = pretrainer.model.losses

    def spoil(pixels, generator, first=0):
        found = losses(pixels, generator, first)
        factor = math.nan if pretrainer.step in steps else 1.0
        return {**found, "loss": found["loss"] * factor}

    monkeypatch.setattr(pretrainer.model, "losses", spoil)
    return pretrainer


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(tmp_path, monkeypatch, images, capsys):
    options = ["--data.root", str(images), *ALL_LOSSES, "--train.out", str(tmp_path / "run")]
    pretrainer = Pretrainer(*parse_arguments(["folder", *SMALL, *options]))
    spoiled(pretrainer, monkeypatch, {1})
    kept, step = [], pretrainer._train_step

    def watched(batch):
        before = {name: value.clone() for name, value in pretrainer.model.state_dict().items()}
        values = step(batch)
        after = pretrainer.model.state_dict()
        kept.append(all(torch.equal(before[name], after[name]) for name in before))
        return values

    monkeypatch.setattr(pretrainer, "_train_step", watched)
    pretrainer.run()
    assert kept == [False, True, False, False]
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["skipped_steps"] for row in rows] == [0, 1, 1, 1]
    assert rows[1]["loss"] is None and rows[2]["loss"] is not None
    said = capsys.readouterr()
    assert re.search(
        r"step 2 skipped, not finite: loss = nan, grad_norm = nan; its images: \S+, \S+\n",
        said.out + said.err,
    )
    saved = load_checkpoint(tmp_path / "run" / "checkpoints" / "last")
    assert saved.state()["skips"] == {"total": 1, "in_a_row": 0}


def test_steps_that_are_not_finite_one_after_another_end_the_run(tmp_path, monkeypatch):
    pretrainer = start(tmp_path, "--train.steps", "9")
    spoiled(pretrainer, monkeypatch, range(2, 9))
    with pytest.raises(
        NumberError, match="step 7: not finite: loss = nan, grad_norm = nan, as in the 4 steps before"
    ):
        pretrainer.run()
    saved = load_checkpoint(tmp_path / "run" / "checkpoints" / "last")
    assert saved.info["step"] == 6 and saved.state()["skips"] == {"total": 4, "in_a_row": 4}
    with pytest.raises(NumberError, match="step 7"):
        again = Pretrainer(*parse_arguments(["--resume", str(tmp_path / "run")]))
        spoiled(again, monkeypatch, range(2, 9)).run()


@pytest.mark.parametrize(
    "counted", [5, "x", {"total": "x"}, {"total": -3, "in_a_row": -7}, {"total": 5, "in_a_row": 5}]
)
def test_counts_that_mean_nothing_are_refused(counted, tmp_path, monkeypatch):
    first = start(tmp_path, "--train.steps", "2")
    monkeypatch.setattr(first.skips, "state", lambda: counted)
    first.run()
    with pytest.raises(DataError, match=r"last/state\.pt counts .*use an earlier one"):
        Pretrainer(*parse_arguments(["--resume", str(tmp_path / "run"), "--train.steps", "4"]))


def test_a_checkpoint_of_a_version_that_kept_no_counts(tmp_path, monkeypatch):
    first = start(tmp_path, "--train.steps", "2")
    monkeypatch.setattr(first.skips, "state", lambda: None)
    first.run()
    again = Pretrainer(*parse_arguments(["--resume", str(tmp_path / "run"), "--train.steps", "3"]))
    assert again.skips.state() == {"total": 0, "in_a_row": 0}
