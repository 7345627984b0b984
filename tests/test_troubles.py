"""Troubles of machines and files in the middle of a run: one line, nothing lost, no traceback."""

import io
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from ppap.cli import _printable, run
from ppap.data import build_datasets, loading, train_loader, val_loader
from ppap.data.loading import steps_loader, whole_loader
from ppap.errors import out_of_memory
from ppap.methods.engine import Engine
from ppap.predict import main as predict
from ppap.settings.config import DataConfig
from ppap.train import main as train
from tests.trained import SMALL, VIT, folder_run, striped_folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    return folder_run(striped_folder(folder / "data", (0, 1, 2)), folder / "run", ["--train.steps=2"])


def picture(path, seed=0, size=(40, 48)):
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    Image.fromarray(rng.integers(0, 255, (*size, 3), np.uint8)).save(path)
    return path


# Pictures exchanged before a run goes on


def resumed(root, out, change):
    folder_run(root, out, ["--train.steps=2"])
    change()
    train(["--resume", str(out), "--train.steps=3"])


def test_exchanged_pictures_are_said(tmp_path, capsys):
    root = striped_folder(tmp_path / "data", (0, 1, 2))
    resumed(root, tmp_path / "run", lambda: picture(root / "images/train/train0.png", size=(40, 40)))
    assert "warning: the training images or labels are not those" in capsys.readouterr().out


def test_the_warning_names_the_numbers(tmp_path, capsys):
    root = striped_folder(tmp_path / "data", (0, 1, 2), count=4)

    def remove():
        (root / "images/train/train0.png").unlink()
        (root / "labels/train/train0.png").unlink()

    resumed(root, tmp_path / "run", remove)
    assert "begun with (4 images then, 3 now)" in capsys.readouterr().out
    resumed(root, tmp_path / "again", lambda: None)
    assert "warning: " not in capsys.readouterr().out


def test_an_earlier_checkpoint_says_nothing(tmp_path, capsys):
    from tests.runs import edit_info

    root = striped_folder(tmp_path / "data", (0, 1, 2))
    out = tmp_path / "run"
    resumed(root, out, lambda: edit_info(out / "checkpoints/last", lambda info: info.pop("data")))
    assert "warning: " not in capsys.readouterr().out


# Memory


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried"
        ),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
        OSError(12, "Cannot allocate memory"),
    ],
    ids=["python", "cpu", "gpu", "system"],
)
def test_exhausted_memory_names_the_knobs_and_leaves_a_run(tmp_path, monkeypatch, capsys, error):
    root, step = striped_folder(tmp_path / "data", (0, 1, 2)), Engine.train_step

    def fails(self, batch, number):
        if number == 2:
            raise error
        return step(self, batch, number)

    monkeypatch.setattr(Engine, "train_step", fails)
    out = tmp_path / "run"
    options = [f"--data.root={root}", f"--train.out={out}", "--train.steps=4", "--train.save-every=0"]
    assert run(train, ["folder", *VIT, *SMALL, *options]) == 2
    errors = capsys.readouterr().err
    assert "memory is exhausted" in errors and "--train.batch-size" in errors and "Traceback" not in errors
    assert f"--resume {out}" in errors
    monkeypatch.undo()
    assert json.loads((out / "checkpoints/last/config.json").read_text())["step"] == 2
    assert run(train, ["--resume", str(out)]) == 0 and (out / "report.md").exists()


def test_other_commands_say_it_too(capsys):
    def fails(argv):
        raise torch.OutOfMemoryError("CUDA out of memory")

    assert run(fails, []) == 2 and "memory is exhausted (CUDA out of memory)" in capsys.readouterr().err
    assert not out_of_memory(ValueError("out of memory")) and not out_of_memory(RuntimeError("shape"))


def test_a_full_disk_is_said_wherever_it_is_met(capsys):
    def fails(argv):
        with open("/dev/full", "w") as file:
            file.write("x" * 100_000)

    assert run(fails, []) == 3 and "is full; make room" in capsys.readouterr().err


def test_a_small_shared_memory_changes_no_batch(tmp_path, monkeypatch):
    root = striped_folder(tmp_path / "data", (0, 1, 2), count=5)
    data = build_datasets(DataConfig(root=str(root), resolution=32, eval_resolution=32))
    makers = {
        "train": lambda: train_loader(data.train, 2, 0, workers=2),
        "val": lambda: val_loader(data.val, 2, workers=1),
        "whole": lambda: whole_loader(data.val, workers=1),
        "steps": lambda: steps_loader(data.val, 2, range(2), workers=1),
    }
    plain = {name: list(make()) for name, make in makers.items()}
    monkeypatch.setattr(loading, "shared_memory", lambda: 64 << 20)
    for name, make in makers.items():
        loader = make()
        assert isinstance(loader, loading._PipedLoader)
        for one, other in zip(plain[name], loader, strict=True):
            assert {*one} == {*other}
            assert all(torch.equal(torch.as_tensor(one[k]), torch.as_tensor(other[k])) for k in one)


# Output


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_no_encoding_of_the_output_ends_a_command(monkeypatch, encoding):
    content = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(content, encoding=encoding))
    assert run(lambda argv: print("57.0 ± 1.2 × 3 ✓"), []) == 0
    sys.stdout.flush()
    wanted = {"ascii": "57.0 +- 1.2 x 3 ?", "cp1252": "57.0 ± 1.2 × 3 ?", "utf-8": "57.0 ± 1.2 × 3 ✓"}
    assert content.getvalue().decode(encoding).strip() == wanted[encoding]


def test_the_table_of_seeds_under_ascii(tmp_path, monkeypatch):
    root = striped_folder(tmp_path / "data", (0, 1, 2))
    content = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(content, encoding="ascii"))
    options = [f"--data.root={root}", f"--train.out={tmp_path / 'set'}", "--train.steps=2"]
    assert run(train, ["folder", *VIT, *SMALL, *options, "--seeds", "0", "1"]) == 0
    sys.stdout.flush()
    assert b"+-" in content.getvalue()
    assert "±" in (tmp_path / "set/report.md").read_text(encoding="utf-8")


def test_streams_without_an_encoding_stay(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    _printable()
    print("±")
    assert sys.stdout.getvalue() == "±\n"


# Prediction


def test_a_cut_file_stops_no_prediction(finished, tmp_path, capsys):
    for k in range(3):
        picture(tmp_path / f"in/{k}.jpg", k)
    content = (tmp_path / "in/1.jpg").read_bytes()
    (tmp_path / "in/1.jpg").write_bytes(content[: len(content) // 2])
    out = tmp_path / "out"
    assert run(predict, [str(finished), str(tmp_path / "in"), f"--out={out}", "--resolution=32"]) == 3
    printed = capsys.readouterr()
    assert "1.jpg: cannot be read" in printed.err and "2 masks in" in printed.out
    assert sorted(path.name for path in out.glob("?.png")) == ["0.png", "2.png"]


def test_a_folder_done_in_part_goes_on(finished, tmp_path, capsys):
    for k in range(3):
        picture(tmp_path / f"in/{k}.jpg", k)
    out = tmp_path / "out"
    options = [f"--out={out}", "--resolution=32"]
    predict([str(finished), str(tmp_path / "in/0.jpg"), *options])
    before = (out / "0.png").stat().st_mtime_ns
    assert run(predict, [str(finished), str(tmp_path / "in"), *options]) == 2
    assert "--skip-existing" in capsys.readouterr().err
    for left in (2, 0):
        assert run(predict, [str(finished), str(tmp_path / "in"), *options, "--skip-existing"]) == 0
        assert f"{3 - left} masks are there already, {left} to go" in capsys.readouterr().out
    assert (out / "0.png").stat().st_mtime_ns == before and len(list(out.glob("?.png"))) == 3


def test_what_ppap_wrote_is_not_predicted(finished, tmp_path, capsys):
    picture(tmp_path / "in/0.jpg")
    options = ["--resolution=32"]
    predict([str(finished), str(tmp_path / "in"), f"--out={tmp_path / 'in/masks'}", *options])
    predict([str(finished), str(tmp_path / "in"), f"--out={tmp_path / 'again'}", *options])
    assert "skipped 4 masks, overlays and figures" in capsys.readouterr().out
    assert sorted(path.name for path in (tmp_path / "again").glob("*.png")) == ["0.png", "legend.png"]


# Several processes


def test_torchrun_is_refused_by_commands_of_one_process(monkeypatch, capsys):
    for name, value in (("TORCHELASTIC_RUN_ID", "1"), ("WORLD_SIZE", "2"), ("RANK", "0")):
        monkeypatch.setenv(name, value)
    called = []
    assert run(called.append, []) == 2 and not called
    assert "torchrun started 2 processes" in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("ppap.parallel._FIRST_SAYS_IT", 0)
    assert run(called.append, []) == 2 and not called
    assert "rank 1: torchrun started 2 processes" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert run(called.append, []) == 0 and called
