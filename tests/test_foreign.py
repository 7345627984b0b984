"""Checkpoints and settings with right checksums whose contents mean nothing: one line, no traceback."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from ppap.cli import run as command
from ppap.data.scan import is_run
from ppap.predict import main as predict
from ppap.settings.config import Config, from_dict, hashes_of, to_dict
from ppap.settings.plain import fits
from ppap.train import main as train
from tests.runs import edit_info, tiny_run

INFO = {
    "no step": lambda info: info.pop("step"),
    "a step of text": lambda info: info.update(step="1"),
    "a step before the first": lambda info: info.update(step=-1),
    "no names": lambda info: info.update(class_names=[]),
    "names of numbers": lambda info: info.update(class_names=list(range(info["classes"]))),
    "a class that is not there": lambda info: info.update(assignment=[99] * info["classes"]),
    "a huge depth": lambda info: info["backbone"].update(depth=10**9),
    "a depth of text": lambda info: info["backbone"].update(depth="2"),
    "no architecture": lambda info: info["backbone"].pop("name"),
    "a choice of text": lambda info: info.update(choices={"phi0": "x"}),
    "a choice of something else": lambda info: info.update(choices={"evil": 1}),
    "files that lack all": lambda info: info.update(files={"bands": []}),
    "settings of a list": lambda info: info["config"].update(train=[]),
    "a rate of text": lambda info: info["config"]["optim"].update(linear_lr="x"),
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return tiny_run(tmp_path_factory.mktemp("foreign") / "run", "--train.steps=1")


@pytest.fixture
def kept(finished):
    """The last checkpoint, whose files are as before in the end."""
    last = finished / "checkpoints/last"
    files = {path: path.read_bytes() for path in [*last.iterdir(), finished / "config.json"]}
    yield last
    for path, content in files.items():
        path.write_bytes(content)


def refused(finished, capsys, tmp_path, *, resumed=True):
    """--resume, or predict, says it in one line that names the folder."""
    argv = ["--resume", str(finished), "--train.steps=2"]
    if not resumed:
        argv = [str(finished), str(finished / "pictures/strip.png"), f"--out={tmp_path / 'masks'}"]
    assert command(train if resumed else predict, argv) in (2, 3)
    errors = capsys.readouterr().err
    assert errors.startswith("error: ") and "Traceback" not in errors
    return errors


@pytest.mark.parametrize("change", INFO)
def test_what_a_checkpoint_says_of_itself(finished, kept, tmp_path, capsys, change):
    edit_info(kept, INFO[change])
    assert "config" in refused(finished, capsys, tmp_path, resumed=change == "no step")


def with_state(change):
    def damage(last):
        state = torch.load(last / "state.pt", weights_only=True)
        torch.save(change(state) or state, last / "state.pt")

    return damage


STATES = {
    "a list": with_state(lambda state: [1]),
    "no engine": with_state(lambda state: state.pop("engine") and None),
    "another step": with_state(lambda state: state.update(step=7)),
    "no generators": with_state(lambda state: state["engine"].pop("rng") and None),
    "a short generator": with_state(lambda s: s["engine"]["rng"].update(cpu=torch.zeros(3).byte())),
    "no optimisers": with_state(lambda state: state["engine"].update(optimisers={})),
    "other sizes": with_state(
        lambda s: s["engine"]["optimisers"]["cluster"]["state"][0].update(exp_avg=torch.zeros(1))
    ),
    "a rate of text": with_state(
        lambda s: s["engine"]["optimisers"]["cluster"]["param_groups"][0].update(lr="fast")
    ),
}


@pytest.mark.parametrize("change", STATES)
def test_the_state_of_something_else(finished, kept, tmp_path, capsys, change):
    STATES[change](kept)
    edit_info(kept, lambda info: None)
    assert "state.pt is not the state of such a training" in refused(finished, capsys, tmp_path)


@pytest.mark.parametrize("content", [b"", b"\xff" * 8 + b"{}", b"\x40" + bytes(7) + b"{" * 64])
def test_a_file_that_holds_no_weights(finished, kept, tmp_path, capsys, content):
    (kept / "model.safetensors").write_bytes(content)
    edit_info(kept, lambda info: None)
    assert "is no file of weights" in refused(finished, capsys, tmp_path)


def test_nesting_is_damage_like_any_other(finished, kept, tmp_path, capsys):
    (kept / "manifest.json").write_text("[" * 100_000)
    assert "nested too deep" in refused(finished, capsys, tmp_path, resumed=False)
    (finished / "config.json").write_text('{"config":' * 100_000)
    assert "is cut or damaged" in refused(finished, capsys, tmp_path)
    assert not is_run(finished, ["config.json"])


@pytest.mark.parametrize("section", ["data", "train", "eval"])
def test_a_section_that_is_no_object(finished, kept, tmp_path, capsys, section):
    record = json.loads((finished / "config.json").read_text())
    record["config"][section] = 0.5
    (finished / "config.json").write_text(json.dumps(record))
    assert "was edited or is damaged" in refused(finished, capsys, tmp_path)


def test_settings_of_another_type_with_their_hash(finished, kept, tmp_path, capsys):
    for section, name, value in (("optim", "lr", [1]), ("train", "steps", 10**400), ("data", "root", 7)):
        record = json.loads((finished / "config.json").read_text())
        record["config"][section][name] = value
        record["hash"] = min(hashes_of(record["config"]))
        (finished / "config.json").write_text(json.dumps(record))
        assert f"config.{section}.{name} is " in refused(finished, capsys, tmp_path)
        (finished / "config.json").write_text(json.dumps({**record, "config": to_dict(Config())}))


def test_types():
    assert from_dict(to_dict(Config())) == Config()
    nested = tuple[tuple[int], ...]
    for value, hint in ((1, float), (None, int | None), ([1, 2], tuple[int, ...]), ([[1]], nested)):
        assert fits(value, hint)
    for value, hint in ((True, int), (True, float), ("a", float), ([1], tuple[int, int]), (2**64, int)):
        assert not fits(value, hint)


def test_weights_keep_their_names(finished, kept, tmp_path, capsys):
    tensors = load_file(kept / "model.safetensors")
    save_file({**tensors, "evil": torch.zeros(1)}, kept / "model.safetensors")
    edit_info(kept, lambda info: None)
    assert "evil" in refused(finished, capsys, tmp_path)
