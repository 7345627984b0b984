"""Analyses of presets that leave condition, thresholds and rate to be chosen."""

import json
from dataclasses import replace

import pytest
import torch

from ppap.analysis.commands import ablation, benchmark, positives, sets, sweep, thresholds
from ppap.analysis.commands.sweep import Grid, around, filled
from ppap.analysis.features import prepare
from ppap.analysis.study import choices_of
from ppap.data import build_datasets
from ppap.errors import DataError
from ppap.methods.choices import Choices, autos
from ppap.nets.model import build_net
from ppap.runs.rundir import RunDir
from ppap.runs.stored import read_sealed
from ppap.settings.config import Config, LossConfig
from ppap.training.request import parse_arguments
from tests.runs import TINY

AUTO = ["--model.condition=auto", "--loss.phi0=auto", "--loss.psi0=auto", "--loss.positives=0.4"]
LOOK = ["demo", *(option for option in TINY[1:] if option.startswith(("--data", "--model"))), *AUTO]
RUN = [*TINY, *AUTO, "--optim.lr=auto", "--train.steps=1", "--train.val-every=0", "--eval.pictures=0"]
RUN += ["--compare.steps=1", "--compare.starts=1", "--eval.crf=none"]


def tiny(*options: str) -> Config:
    return parse_arguments([*TINY, *options]).config


def test_preparing_chooses_what_is_auto_and_nothing_else(capsys):
    config = tiny(*AUTO, "--optim.lr=auto", "--compare.fixed-phi0=None")
    data, device = build_datasets(config.data).train, torch.device("cpu")
    net, settled, choices, _ = prepare(config, data, device)
    assert not autos(settled) and settled.model.condition == "clip:0.031"
    assert (settled.loss.phi0, settled.loss.psi0) == (choices.phi0, choices.psi0)
    assert settled.compare.fixed_phi0 == choices.fixed_phi0
    assert "<- chosen" in capsys.readouterr().out
    features = net.features(data[0]["image"][None])
    assert not torch.allclose(net.compared(features), features)
    given = tiny("--compare.fixed-phi0=0.4")
    net, settled, choices, _ = prepare(given, data, device)
    assert settled == given and net.condition is None and choices == Choices()
    own = tiny(*AUTO, "--compare.fixed-phi0=0.4")
    assert prepare(own, data, device).config.compare.fixed_phi0 == 0.4
    torch.manual_seed(0)
    plain = build_net(config.model)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), net.parameters(), strict=True)), (
        "as training would start"
    )


def test_sets_are_formed_of_conditioned_features(tmp_path, capsys):
    out = tmp_path / "sets"
    sets.main([*LOOK, f"--out={out}", "--images=6", "--anchors=40", "--rows", "ppap", "fixed", "kmeans"])
    text = capsys.readouterr().out
    record = json.loads((out / "sets.json").read_text())
    config = record["provenance"]["config"]
    assert config["model"]["condition"] == "clip:0.031" and "condition clip:0.031" in text
    assert f"PPAP: phi0 {config['loss']['phi0']:g}, psi0 {config['loss']['psi0']:g}" in text
    # Of about the size that was aimed for: 0.4 of 8 clusters, 96 patches.
    assert 1 < record["rows"]["ppap"]["summary"]["positives"]["mean"] < 15


def test_positives_are_those_of_conditioned_features(tmp_path, capsys):
    options = ["--images=3", "--anchors=2", "--no-hidden"]
    positives.main([*LOOK, f"--out={tmp_path / 'auto'}", *options])
    record = json.loads((tmp_path / "auto" / "positives.json").read_text())
    chosen = record["provenance"]["config"]
    same = [*LOOK, f"--loss.phi0={chosen['loss']['phi0']}", f"--loss.psi0={chosen['loss']['psi0']}", *options]
    positives.main([*same, f"--out={tmp_path / 'same'}"])
    positives.main([*same, f"--out={tmp_path / 'raw'}", "--model.condition=none"])
    again, raw = (
        json.loads((tmp_path / n / "positives.json").read_text())["anchors"] for n in ("same", "raw")
    )
    assert again == record["anchors"] != raw


def test_thresholds_of_conditioned_features(tmp_path, capsys):
    options = [*LOOK, "--images=8", "--anchors=60"]
    thresholds.main([*options, f"--out={tmp_path / 'auto'}"])
    text = capsys.readouterr().out
    assert "Condition: clip:0.031. The settings have phi0 auto and psi0 auto." in text
    record = json.loads((tmp_path / "auto" / "thresholds.json").read_text())
    point = next(p for p in record["grid"] if (p["phi0"], p["psi0"]) == (record["phi0"], record["psi0"]))
    assert point["positives"] == pytest.approx(0.05, rel=0.6) and point["negatives"] == pytest.approx(
        0.89, abs=0.1
    )
    thresholds.main([*options, f"--out={tmp_path / 'grid'}", "--phi-grid", "0.6", "0.5", "--psi-grid", "0.1"])
    record = json.loads((tmp_path / "grid" / "thresholds.json").read_text())
    assert [(p["phi0"], p["psi0"]) for p in record["grid"]] == [(0.5, 0.1), (0.6, 0.1)]


def test_thresholds_say_where_sets_jump(tmp_path, capsys):
    # Black images: every patch of every image is the same.
    from PIL import Image

    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(4):
        Image.new("RGB", (32, 32)).save(folder / f"{i}.png")
    plain = ["folder", *LOOK[1:], "--data.kind=folder", f"--data.root={folder}", "--model.condition=none"]
    thresholds.main([*plain, f"--out={tmp_path / 'out'}", "--images=4", "--anchors=20"])
    text = capsys.readouterr().out
    assert "no threshold gives positive sets" in text and "they jump from" in text
    assert "give --model.condition clip:" in text


def test_a_grid_about_what_was_chosen():
    loss = LossConfig(phi0="auto", psi0=0.2)
    assert around(loss) == Grid(phi0=None, psi0=(0.1, 0.15, 0.2, 0.25, 0.3))
    grid = filled(around(loss), replace(loss, phi0=0.4321))
    assert grid.phi0 == (0.3321, 0.3821, 0.4321, 0.4821, 0.5321) and grid.psi0 == around(loss).psi0
    assert filled(Grid(), loss) == Grid()


def test_a_sweep_settles_first_and_goes_on_with_the_same_numbers(tmp_path, capsys):
    out = tmp_path / "sweep"
    options = [*RUN, "--compare.rows", "ppap", "--vary.sigma-pos", "--vary.sigma-amb", f"--out={out}"]
    options += ["--vary.psi0"]
    few = [*options, "--vary.phi0", "0.3"]
    sweep.main(few)
    assert capsys.readouterr().out.count("<- chosen") == 1, "the cells have a name and numbers"
    chosen = read_sealed(out / "choices.json", "")
    loss = json.loads((out / "cells" / next(iter(_cells(out))) / "config.json").read_text())["config"]["loss"]
    assert loss["psi0"] == chosen["psi0"] and loss["phi0"] in (0.3, chosen["phi0"])
    record = json.loads((out / "results.json").read_text())
    assert list(record["rows"]) == ["preset", "phi0 0.3"]
    # What is stored decides, so that rounding cannot split a study.
    RunDir(out).write_sealed("choices.json", {**chosen, "phi0": 0.35})
    sweep.main(few)
    assert [s["phi0"] for s in json.loads((out / "results.json").read_text())["settings"]] == [0.35, 0.3]
    (out / "choices.json").write_text("{")
    with pytest.raises(DataError, match="damaged"):
        sweep.main(few)


def _cells(out):
    return sorted(path.stem for path in (out / "cells").glob("*.json"))


def test_ablation_and_benchmark_say_what_each_seed_chose(tmp_path, capsys):
    out = tmp_path / "ablation"
    ablation.main([*RUN, "--compare.rows", "fixed", "tps", "ans", "ppap", f"--out={out}"])
    chosen = choices_of(out, "seed-0")
    text = (out / "ablation.md").read_text()
    assert f"phi0 auto ({chosen.phi0:g}) (rows none and ANS auto ({chosen.fixed_phi0:g}))" in text
    assert json.loads((out / "results.json").read_text())["choices"] == [chosen.to_dict()]
    out = tmp_path / "same"
    rows = ["--compare.rows", "fixed", "tps", "ans", "ppap", "--compare.fixed-phi0=same"]
    ablation.main([*RUN, *rows, f"--out={out}"])
    assert f"; phi0 auto ({chosen.phi0:g}) in all rows, psi0" in (out / "ablation.md").read_text()
    out = tmp_path / "benchmark"
    benchmark.main([*RUN, "--methods", "frozen", "ppap", f"--out={out}"])
    record = json.loads((out / "results.json").read_text())
    assert record["choices"]["ppap"] == [chosen.to_dict()]
    assert choices_of(out, "none") == Choices()
