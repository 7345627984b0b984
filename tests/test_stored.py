"""Settings and weights that were edited, cut or damaged on the disk are refused by name, never used."""

import json

import pytest

from ppap.cli import run as command
from ppap.eval import main as evaluate
from ppap.evaluation.predictor import load
from ppap.nets.backbone import build_backbone
from ppap.nets.files import CHECKSUMS
from ppap.pretraining.export import export_backbone
from ppap.runs.rundir import RunDir
from ppap.runs.stored import read_settings
from ppap.settings.config import Config, DataConfig, ModelConfig, TrainConfig, to_dict
from ppap.train import main as train
from ppap.training.seeds import _record
from tests.methods import MODEL
from tests.runs import tiny_run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return tiny_run(tmp_path_factory.mktemp("stored") / "run", "--train.steps=1")


def edited(text: str) -> str:
    assert '"phi0": 0.55' in text
    return text.replace('"phi0": 0.55', '"phi0": 0.9')


DAMAGES = {
    "edited": edited,
    "cut": lambda text: text[: len(text) // 2],
    "empty": lambda text: "",
    "no settings": lambda text: "{}",
    "no hash": lambda text: json.dumps({"config": json.loads(text)["config"]}),
    "bits": lambda text: "\x00" * len(text),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_settings_are_refused_by_name(finished, capsys, damage):
    file = finished / "config.json"
    whole = file.read_text()
    file.write_text(DAMAGES[damage](whole))
    try:
        for main, argv in (
            (train, ["--resume", str(finished), "--train.steps=2"]),
            (evaluate, [str(finished)]),
            (lambda argv: load(*argv), [str(finished)]),
        ):
            assert command(main, argv) == 3
            errors = capsys.readouterr().err
            assert errors.startswith(f"error: {file} ") and "copy it again" in errors
    finally:
        file.write_text(whole)
    assert read_settings(file)["config"]["loss"]["phi0"] == 0.55


def test_the_settings_of_a_set_too(tmp_path):
    file = tmp_path / "seeds.json"
    file.write_text(json.dumps(_record(Config(), [0])).replace('"phi0": 0.55', '"phi0": 0.5'))
    assert command(train, ["--resume", str(tmp_path)]) == 3


def test_settings_that_came_later_and_a_moved_run_are_no_edits(tmp_path):
    run = RunDir(tmp_path)
    run.write_config(Config(train=TrainConfig(out="elsewhere")))
    record = json.loads((tmp_path / "config.json").read_text())
    record["config"]["train"]["out"] = "here"
    for name in ("images", "labels", "label_ids"):
        record["config"]["data"].pop(name)
    (tmp_path / "config.json").write_text(json.dumps(record))
    assert run.read_config().train.out == "here"
    run.write_config(Config(data=DataConfig(images="a/*.png", labels="b/*.png")))
    assert to_dict(run.read_config())["data"]["images"] == "a/*.png"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", CHECKSUMS])
@pytest.mark.parametrize("damage", ["bit", "cut", "gone"])
def test_a_damaged_backbone_is_refused_by_name(tmp_path, capsys, name, damage):
    folder = tmp_path / "backbone"
    export_backbone(build_backbone(MODEL), folder, "made here")
    config = ModelConfig(weights=str(folder))
    assert "made here" in build_backbone(config).origin
    file = folder / name
    content = bytearray(file.read_bytes())
    content[len(content) - 9] ^= 1
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(content if damage == "bit" else content[: len(content) // 2])
    if (name, damage) == (CHECKSUMS, "gone"):  # as earlier exports are
        assert build_backbone(config).width == MODEL.width
        return
    assert command(lambda argv: build_backbone(config), []) == 3
    errors = capsys.readouterr().err
    # A bit of the list itself: what it says of the first file is not so.
    assert str(file) in errors or (name, damage) == (CHECKSUMS, "bit") and CHECKSUMS in errors
    assert "Traceback" not in errors
