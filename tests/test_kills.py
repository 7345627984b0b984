"""Runs killed while a checkpoint takes the place of the one before: the next start goes on from that one."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ppap.analysis.study import Cell, run_cells
from ppap.errors import DataError, UsageError
from ppap.nets.backbone import build_backbone
from ppap.pretraining.export import export_backbone
from ppap.runs import checkpoint
from ppap.runs.checkpoint import exists, load_checkpoint, save_checkpoint
from ppap.runs.rundir import RunDir, new_run_path
from ppap.settings.config import ModelConfig, of_seed
from ppap.train import main
from ppap.training.request import parse_arguments
from ppap.training.trainer import Trainer
from tests.methods import MODEL
from tests.runs import TINY
from tests.test_pretrain import SMALL

ROOT = Path(__file__).parent.parent
STEPS = ["--train.steps=4", "--train.val-every=0", "--train.save-every=1", "--eval.pictures=0"]
KILLED = """
import os, signal, sys
from ppap.runs import checkpoint
from ppap.train import main
from tests.test_kills import at_third_save

checkpoint.os.rename = at_third_save(lambda: os.kill(os.getpid(), signal.SIGKILL))
main(sys.argv[1:])
"""


class Kill(BaseException):
    """Stands for SIGKILL inside this process: nothing catches it."""


def at_third_save(kill):
    """os.rename, but the third ``last`` meets `kill` before it gets its name."""
    real, seen = os.rename, []

    def rename(source, target):
        if Path(source).name == ".last.new":
            seen.append(source)
            if len(seen) == 3:
                kill()
        real(source, target)

    return rename


def die():
    raise Kill


def names(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir() if "last" in path.name)


def steps(run: Path) -> list[int]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["step"] for row in rows if "loss" in row]


def test_a_set_of_seeds_goes_on_after_a_real_kill(tmp_path, capsys):
    out = tmp_path / "set"
    command = [sys.executable, "-c", KILLED, *TINY, *STEPS, f"--train.out={out}", "--seeds", "0"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    run = out / "seed-0"
    assert names(run) == [".last.new", ".last.old"], "between the renames"
    (run / "mine.txt").write_text("kept")
    main(["--resume", str(out)])
    text = capsys.readouterr().out
    assert "continued at step 2" in text and "starts anew" not in text
    assert (run / "mine.txt").exists() and names(run) == ["last"] and steps(run) == [1, 2, 3, 4]


def test_a_study_goes_on(tmp_path, capsys, monkeypatch):
    config = of_seed(parse_arguments([*TINY, *STEPS, "--train.out=x"]).config, 0)
    cell = Cell("a", replace(config, eval=replace(config.eval, crf="none")), "checkpoint")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "rename", at_third_save(die))
        with pytest.raises(Kill):
            run_cells(tmp_path, [cell])
    run = tmp_path / "cells" / "a"
    assert names(run) == [".last.new", ".last.old"], "between the renames"
    run_cells(tmp_path, [cell])
    assert "continued at step 2" in capsys.readouterr().out
    assert names(run) == ["last"] and steps(run) == [1, 2, 3, 4]


def test_a_seed_is_finished_with_its_whole_report(tmp_path, capsys, monkeypatch):
    out, real = tmp_path / "set", Path.write_text

    def write(self, text, *args, **kwargs):
        if self.name.startswith("report.md"):
            real(self, text[: len(text) // 2], *args, **kwargs)
            raise Kill
        return real(self, text, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", write)
        with pytest.raises(Kill):
            main([*TINY, *STEPS, f"--train.out={out}", "--seeds", "0"])
    assert not (out / "seed-0" / "report.md").exists()
    main(["--resume", str(out)])
    assert "finished before" not in capsys.readouterr().out
    assert "## Next" in (out / "seed-0" / "report.md").read_text()


def test_a_damaged_checkpoint_is_told_and_not_removed(tmp_path):
    out = tmp_path / "set"
    main([*TINY, *STEPS, f"--train.out={out}", "--seeds", "0"])
    (out / "seed-0" / "report.md").unlink()
    (out / "seed-0" / "checkpoints" / "last" / "manifest.json").unlink()
    with pytest.raises(DataError, match="checkpoints/last"):
        main(["--resume", str(out)])
    assert (out / "seed-0" / "checkpoints" / "last" / "state.pt").exists()


def test_what_counts_as_a_checkpoint(tmp_path, monkeypatch):
    last = tmp_path / "checkpoints" / "last"
    assert not exists(tmp_path)

    def save(step):
        save_checkpoint(last, {"a": torch.ones(2)}, {"step": step}, {})

    monkeypatch.setattr(checkpoint.os, "rename", at_third_save(die))
    save(1)
    assert exists(tmp_path) and not exists(tmp_path, "best")
    save(2)
    with pytest.raises(Kill):
        save(3)
    assert not last.exists() and exists(tmp_path) and not exists(tmp_path, "best")
    # By the folder's own name too, as eval and predict may be given it.
    assert load_checkpoint(last).info["step"] == 2 == load_checkpoint(tmp_path, "last").info["step"]


def test_weights_of_a_pretraining_that_was_killed(tmp_path, monkeypatch):
    backbone, folder = build_backbone(MODEL), tmp_path / "backbone"
    export_backbone(backbone, folder, "first")
    real = os.rename

    def rename(source, target):
        if Path(source).name == ".backbone.new":
            raise Kill
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "rename", rename)
        with pytest.raises(Kill):
            export_backbone(backbone, folder, "second")
    assert not folder.exists()
    assert "first" in build_backbone(ModelConfig(weights=str(folder))).origin


# Before the first save, and in the report


@pytest.mark.parametrize("command", ["train", "pretrain"])
def test_a_run_that_was_killed_before_its_first_save_starts_anew(tmp_path, capsys, monkeypatch, command):
    out, module = tmp_path / "run", __import__(f"ppap.{command}", fromlist=["main"])
    options = [*TINY, *STEPS] if command == "train" else ["scenes", *SMALL, "--train.steps=2"]
    with monkeypatch.context() as patch:
        patch.setattr(RunDir, "append", lambda self, row: die())
        with pytest.raises(Kill):
            module.main([*options, f"--train.out={out}"])
    assert (out / "config.json").exists() and not (out / "checkpoints").exists()
    (out / "mine.txt").write_text("kept")
    with pytest.raises(UsageError, match=f"continue that run with --resume {out}"):
        module.main([*options, f"--train.out={out}"])
    module.main(["--resume", str(out)])
    assert f"{out} has no checkpoint: it ended before its first save" in capsys.readouterr().out
    assert (out / "checkpoints/last").exists() and (out / "mine.txt").read_text() == "kept"


def test_what_a_kill_leaves_before_the_settings_is_a_new_folder(tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / ".lock").write_bytes(b"")
    (out / "config.json.new").write_text('{"config": ')
    assert new_run_path(str(out), "x") == out
    main([*TINY, "--train.steps=1", f"--train.out={out}"])
    assert (out / "report.md").exists()


def test_a_run_that_saved_meanwhile_is_not_started_anew(tmp_path):
    config = parse_arguments([*TINY, *STEPS, f"--train.out={tmp_path}"]).config
    RunDir(tmp_path).write_config(config)
    request = parse_arguments(["--resume", str(tmp_path)])
    assert request.checkpoint is None
    save_checkpoint(tmp_path / "checkpoints" / "last", {"a": torch.ones(2)}, {"step": 1}, {})
    with pytest.raises(UsageError, match="was continued by another process meanwhile"):
        Trainer(request.config, request.path, None)


@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "of an earlier version"])
def test_a_report_that_was_cut_is_written_again(tmp_path, capsys, recorded):
    out = tmp_path / "run"
    main([*TINY, "--train.steps=1", f"--train.out={out}"])
    whole = (out / "report.md").read_text()
    if not recorded:
        record = json.loads((out / "config.json").read_text())
        del record["report_bytes"]
        (out / "config.json").write_text(json.dumps(record))
    main(["--resume", str(out)])
    assert "is finished" in capsys.readouterr().out
    (out / "report.md").write_text(whole[: len(whole) // 2])
    main(["--resume", str(out)])
    assert "is finished" not in capsys.readouterr().out
    assert (out / "report.md").read_text().splitlines()[-1] == whole.splitlines()[-1]
