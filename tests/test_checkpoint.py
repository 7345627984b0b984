"""Checkpoints: complete or refused, never half-written."""

import json
import os
from pathlib import Path

import pytest
import torch

from ppap.errors import DataError, NumberError
from ppap.runs import checkpoint as module
from ppap.runs.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from ppap.runs.rundir import RunDir
from ppap.settings.config import Config, TrainConfig

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4)}
STATE = {"step": 3, "rng": torch.get_rng_state(), "nested": {"list": [1, 2.5, None]}}


def save(folder: Path, step: int = 1) -> Path:
    save_checkpoint(folder, TENSORS, {"step": step}, STATE)
    return folder


def test_round_trip(tmp_path):
    loaded = load_checkpoint(save(tmp_path / "last"))
    assert all(torch.equal(loaded.tensors[name], TENSORS[name]) for name in TENSORS)
    assert loaded.info["step"] == 1
    state = loaded.state()
    assert state["nested"] == STATE["nested"] and torch.equal(state["rng"], STATE["rng"])


@pytest.mark.parametrize(("selection", "step", "why"), [("best", 5, "labels chose it"), ("last", 9, "last")])
def test_a_run_directory_gives_what_it_selects(tmp_path, selection, step, why):
    RunDir(tmp_path).write_config(Config(train=TrainConfig(selection=selection)))
    save(tmp_path / "checkpoints" / "last", step=9)
    loaded = load_checkpoint(tmp_path)
    assert loaded.info["step"] == 9 and "the last step" in loaded.selection
    save(tmp_path / "checkpoints" / "best", step=5)
    loaded = load_checkpoint(tmp_path)
    assert loaded.info["step"] == step and why in loaded.selection
    assert load_checkpoint(tmp_path, "last").info["step"] == 9
    assert load_checkpoint(tmp_path, "best").selection == "asked for: best"
    assert load_checkpoint(tmp_path / "checkpoints/best").selection == "given by its folder"


@pytest.mark.parametrize("file", module.FILES)
def test_a_flipped_bit_is_refused(tmp_path, file):
    path = save(tmp_path / "last") / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)
    with pytest.raises(DataError, match=f"{file} differs from its checksum"):
        load_checkpoint(tmp_path / "last")


def test_missing_parts_are_named(tmp_path):
    with pytest.raises(DataError, match="no checkpoint or run directory at"):
        load_checkpoint(tmp_path / "nowhere")
    with pytest.raises(DataError, match="give a run directory or a checkpoint folder"):
        load_checkpoint(tmp_path)
    folder = save(tmp_path / "last")
    (folder / "state.pt").unlink()
    with pytest.raises(DataError, match="state.pt is missing"):
        load_checkpoint(folder)


def test_another_format_is_refused(tmp_path):
    folder = save(tmp_path / "last")
    info = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**info, "format": 99}))
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["config.json"] = module.sha256_of(folder / "config.json")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="format 99"):
        load_checkpoint(folder)


def test_a_pickle_with_code_is_refused(tmp_path):
    class Payload:
        def __reduce__(self):
            return (os.system, ("echo ran",))

    folder = save(tmp_path / "last")
    torch.save({"step": Payload()}, folder / "state.pt")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["state.pt"] = module.sha256_of(folder / "state.pt")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="state.pt cannot be read"):
        load_checkpoint(folder).state()


def test_weights_and_state_are_of_one_save(tmp_path):
    loaded = load_checkpoint(save(tmp_path / "last", step=1))
    before = loaded.sha256
    other = {name: value + 1 for name, value in TENSORS.items()}
    save_checkpoint(tmp_path / "last", other, {"step": 2}, {**STATE, "step": 4})
    with pytest.raises(DataError, match="not the one that the weights were saved with.*again"):
        loaded.state()
    assert loaded.sha256 == before, "of the weights that are in memory"


@pytest.mark.parametrize("file", module.FILES)
def test_a_save_while_a_checkpoint_is_read_mixes_nothing(tmp_path, monkeypatch, file):
    folder, seen, real = save(tmp_path / "last", step=1), [], module.sha256_of

    def saving(path):
        result = real(path)
        if path.name == file and not seen:
            seen.append(path)
            other = {name: value + 1 for name, value in TENSORS.items()}
            save_checkpoint(folder, other, {"step": 2}, {"step": 2})
        return result

    monkeypatch.setattr(module, "sha256_of", saving)
    loaded = load_checkpoint(folder)
    assert (loaded.info["step"], loaded.state()["step"]) == (2, 2) and loaded.sha256 == real(
        folder / "model.safetensors"
    )
    assert torch.equal(loaded.tensors["b"], TENSORS["b"] + 1)


def test_a_folder_that_is_always_replaced_is_said(tmp_path, monkeypatch):
    folder, numbers = save(tmp_path / "last"), iter(range(100))
    monkeypatch.setattr(module, "_manifest_of", lambda folder: next(numbers))
    with pytest.raises(DataError, match="was replaced 5 times while it was read; give the command again"):
        load_checkpoint(folder)


def test_weights_that_are_not_finite_keep_the_older_one(tmp_path):
    folder = save(tmp_path / "last", step=1)
    with pytest.raises(NumberError, match="weights b are not finite"):
        save_checkpoint(folder, {**TENSORS, "b": torch.tensor([torch.nan])}, {"step": 2}, STATE)
    assert load_checkpoint(folder).info["step"] == 1


@pytest.mark.parametrize("failing", ["save_file", "Path.write_bytes", "to_disk"])
def test_a_full_disk_keeps_the_older_one(tmp_path, failing, monkeypatch):
    folder = save(tmp_path / "last", step=1)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(f"ppap.runs.checkpoint.{failing}", full)
    with pytest.raises(DataError, match="No space left on device; free space"):
        save(folder, step=2)
    monkeypatch.undo()
    assert load_checkpoint(folder).info["step"] == 1
    assert [path.name for path in tmp_path.iterdir()] == ["last"], "nothing is left beside it"


def test_a_stop_between_the_renames_leaves_the_older_one(tmp_path, monkeypatch):
    last = save(tmp_path / "checkpoints" / "last", step=1)
    real = os.rename

    def stop_at_second(source, target):
        if Path(source).name == ".last.new":
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(module.os, "rename", stop_at_second)
    with pytest.raises(KeyboardInterrupt):
        save(last, step=2)
    assert find_checkpoint(tmp_path)[0].name == ".last.old"
    assert load_checkpoint(tmp_path).info["step"] == 1
    with pytest.raises(KeyboardInterrupt):
        save(last, step=2)
    monkeypatch.undo()
    assert load_checkpoint(tmp_path).info["step"] == 1, "stopped there twice in a row"
    save(last, step=3)
    assert load_checkpoint(tmp_path).info["step"] == 3
