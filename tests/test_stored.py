"""Settings and weights that were edited, cut or damaged on the disk are refused by name, never used."""

import contextlib
import hashlib
import io
import json
import random

import numpy as np
import pytest

from ppap.analysis.study import open_study
from ppap.cli import run as command
from ppap.errors import DataError
from ppap.eval import main as evaluate
from ppap.evaluation.predictor import load
from ppap.methods import neighbours
from ppap.nets.backbone import build_backbone
from ppap.nets.files import CHECKSUMS
from ppap.pretraining.export import export_backbone
from ppap.runs.rundir import RunDir
from ppap.runs.stored import read_sealed, read_settings
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


def flipped(content: bytes, seed: int, count: int = 200):
    """Copies with one bit flipped each, at places drawn with a seed."""
    draw = random.Random(seed)
    for _ in range(count):
        place = draw.randrange(8 * len(content))
        yield (
            content[: place // 8]
            + bytes([content[place // 8] ^ (1 << place % 8)])
            + content[place // 8 + 1 :]
        )


def test_results_that_are_read_again_are_compared_with_their_checksum(tmp_path):
    """comparison.json, evaluation-final.json, choices.json, study.json, the results of a study's runs."""
    values = {
        "summary": {"ppap": {"cluster_miou": 12.5}},
        "scores": {1: [0.1, float("nan")]},
        "warning": None,
    }
    RunDir(tmp_path).write_sealed("comparison.json", values)
    path = tmp_path / "comparison.json"
    found, content = read_sealed(path, "copy it again"), path.read_bytes()
    assert found.keys() == values.keys() and found["summary"] == values["summary"]
    for damaged in flipped(content, 0):
        path.write_bytes(damaged)
        with contextlib.suppress(DataError):
            assert repr(read_sealed(path, "copy it again")) == repr(found), "harmless, such as a blank"
    path.write_bytes(content.replace(b"12.5", b"99.5"))
    with pytest.raises(
        DataError, match="comparison.json was edited or is damaged: .* checksum; copy it again"
    ):
        read_sealed(path, "copy it again")
    path.write_text(json.dumps({"summary": {}}))
    assert read_sealed(path, "") == {"summary": {}}, "of an earlier version"
    path.write_text("[" * 20000)
    with pytest.raises(DataError, match="no JSON"):
        read_sealed(path, "copy it again")


def test_an_edited_study_is_refused_by_name(tmp_path):
    config = Config(data=DataConfig(kind="scenes"))
    path = open_study(str(tmp_path / "study"), "sweep", config)
    file = path / "study.json"
    file.write_text(file.read_text().replace('"phi0": 0.55', '"phi0": 0.9'))
    with pytest.raises(DataError, match="study.json was edited or is damaged"):
        open_study(str(path), "sweep", config)
    values = {key: value for key, value in json.loads(file.read_text()).items() if key != "sha256"}
    file.write_text(json.dumps(values))
    with pytest.raises(DataError, match="its settings are not those of its hash"):
        open_study(str(path), "sweep", config)


def test_a_table_of_near_images_is_compared_with_its_checksum(tmp_path):
    path = tmp_path / "table.npy"
    plain = io.BytesIO()
    np.save(plain, np.arange(60, dtype=np.int32).reshape(20, 3))
    content = plain.getvalue() + hashlib.sha256(plain.getvalue()).digest()
    path.write_bytes(content)
    assert np.array_equal(neighbours._read(path), np.load(path))
    for damaged in flipped(content, 1):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="table.npy .*delete it, and it is made again"):
            neighbours._read(path)
    path.write_bytes(plain.getvalue())
    assert neighbours._read(path) is None, "of an earlier version: made again"
