"""--train.keep: older checkpoints, whatever died when; and the way back to one."""

import os
import shutil

import pytest
import torch

import ppap
from ppap.errors import DataError
from ppap.eval import main as evaluate
from ppap.predict import main as predict
from ppap.runs import kept
from ppap.runs.checkpoint import exists, find_checkpoint, load_checkpoint, save_checkpoint
from ppap.runs.kept import keep, step_folders
from ppap.runs.rundir import has_begun
from ppap.train import main as train
from tests.runs import tiny_run


def saved(run, step):
    last = run / "checkpoints/last"
    save_checkpoint(last, {"w": torch.tensor([float(step)])}, {"step": step}, {"step": step})
    return last


def names(run):
    return [path.name for path in step_folders(run / "checkpoints")]


def refusing(number, text):
    def refuses(*args):
        raise OSError(number, text)

    return refuses


def test_the_last_saves_stay_and_older_ones_go(tmp_path):
    for step in (5, 10, 15):
        keep(saved(tmp_path, step), step, 2)
    assert names(tmp_path) == ["step-00000010", "step-00000015"]
    saved(tmp_path, 20)
    assert load_checkpoint(tmp_path / "checkpoints/step-00000015").tensors["w"] == 15, "not the one of 20"
    keep(tmp_path / "checkpoints/last", 20, 1)
    assert names(tmp_path) == ["step-00000020"]


@pytest.mark.parametrize("operation", ["link", "rename", "rmtree", "mkdir"])
def test_a_kill_at_any_moment_leaves_the_newest_complete_one(operation, tmp_path, monkeypatch):
    """Each operation in turn is the last one that takes place."""
    for number in range(12):
        run = tmp_path / f"{operation}{number}"
        for step in (5, 10):
            keep(saved(run, step), step, 2)
        saved(run, 15)
        count, place = [0], shutil if operation == "rmtree" else os
        real = getattr(place, operation)

        def dies(*args, real=real, count=count, number=number, **options):
            count[0] += 1
            if count[0] > number:
                raise KeyboardInterrupt
            return real(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(kept.os if place is os else kept.shutil, operation, dies)
            try:
                keep(run / "checkpoints/last", 15, 2)
                done = True
            except KeyboardInterrupt:
                done = False
        assert names(run)[-2:] in (["step-00000005", "step-00000010"], ["step-00000010", "step-00000015"])
        for path in step_folders(run / "checkpoints"):
            load_checkpoint(path)
        shutil.rmtree(run / "checkpoints/last")
        assert find_checkpoint(run, "last")[0].name == names(run)[-1] and exists(run) and has_begun(run)
        if done:
            break
    else:
        pytest.fail("the operations have no end")


def test_a_disk_that_refuses_keeps_all(tmp_path, monkeypatch):
    keep(saved(tmp_path, 5), 5, 1)
    monkeypatch.setattr(kept, "_link", refusing(28, "No space left on device"))
    with pytest.raises(DataError, match=r"step-00000010: No space left .* --train\.keep 0"):
        keep(saved(tmp_path, 10), 10, 1)
    assert names(tmp_path) == ["step-00000005"] and load_checkpoint(tmp_path, "last").info["step"] == 10


def test_without_links_a_copy_stays(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", refusing(95, "Operation not supported"))
    assert load_checkpoint(keep(saved(tmp_path, 5), 5, 1)).tensors["w"] == 5


def test_an_older_one_serves_and_is_gone_on_from(tmp_path, capsys):
    options = ["--train.save-every=2", "--train.val-every=0", "--eval.pictures=0"]
    run = tiny_run(tmp_path / "run", *options, "--train.keep=2")
    assert names(run) == ["step-00000004", "step-00000006"]
    whole = (run / "checkpoints/last/model.safetensors").read_bytes()
    older = run / "checkpoints/step-00000004"
    assert ppap.load(str(older))
    evaluate([str(older), "--eval.crf=none"])
    assert "(step 4: given by its folder)" in capsys.readouterr().out and (run / "evaluation.json").exists()
    (tmp_path / "images").mkdir()
    shutil.copy(run / "pictures/curves.png", tmp_path / "images/a.png")
    predict([str(older), str(tmp_path / "images"), "--out", str(tmp_path / "masks"), "--resolution=32"])
    assert (tmp_path / "masks/a.png").exists()
    capsys.readouterr()
    train(["--resume", str(older)])  # although the run is finished
    out = capsys.readouterr().out
    assert "going back to step 4: the last checkpoint, of step 6, stays in" in out
    assert "continued at step 4" in out
    assert (run / "checkpoints/last/model.safetensors").read_bytes() == whole, "bitwise the same run"
    with pytest.raises(DataError):
        load_checkpoint(run / "checkpoints/step-00000002")
