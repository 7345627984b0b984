"""The published presets: their values, the protocol switch, and every family from the command line."""

import dataclasses
import json
import re

import pytest

from ppap import cli
from ppap.errors import UsageError
from ppap.settings.config import LossConfig, TrainConfig, config_hash
from ppap.settings.presets import PRESETS, describe, preset
from ppap.settings.protocol import with_protocol
from ppap.settings.published import with_method
from ppap.training.request import parse_arguments
from tests import trees

# The published code's configuration files, one column per preset:
# Phi0, Psi0, sigma_pos, sigma_amb, T, tau, trainpatchsplit, batch, resolution, optimiser, rate, decay,
# rates of the linear and the cluster probe, epochs, iterations between validations.
PUBLISHED = """
cocostuff27-vits8    0.55  0.2   3  3  2  0.8   16  64  224  adamw  1e-3  0.1   1e-3  5e-3   5  100
cocostuff27-vits16   0.55  0.15  3  4  2  0.8    4  64  224  adamw  1e-3  0.01  1e-3  1e-3   5  100
cityscapes-vits8     0.6   0.2   3  3  3  0.8   16  64  224  adam   1e-3  0     1e-3  1e-3  30   50
cityscapes-vitb8     0.6   0.2   3  2  3  0.1   16  64  224  adam   1e-3  0     1e-3  1e-3  30   50
potsdam-vitb8        0.55  0.15  5  3  1  0.07  16  64  224  adam   5e-4  0     1e-3  1e-3  40   20
"""
BACKBONES = {"vits8": "vit_small_patch8", "vits16": "vit_small_patch16", "vitb8": "vit_base_patch8"}
KINDS = {"cocostuff27": "cocostuff27", "cityscapes": "cityscapes27", "potsdam": "potsdam3"}


@pytest.mark.parametrize("line", PUBLISHED.split("\n")[1:-1], ids=lambda line: line.split()[0])
def test_published_values(line):
    name, *cells = line.split()
    config = preset(name)
    loss, train, optim = config.loss, config.train, config.optim
    values = [loss.phi0, loss.psi0, loss.sigma_pos, loss.sigma_amb, loss.steps, loss.temperature]
    values += [loss.anchor_divisor, train.batch_size, config.data.resolution, optim.name, optim.lr]
    values += [optim.weight_decay, optim.linear_lr, optim.cluster_lr, train.epochs, train.val_every]
    assert values == [cell if cell.startswith("adam") else float(cell) for cell in cells]
    # What all of them share.
    assert (loss.chunk, loss.base_temperature, config.method) == (784, 0.07, "ppap")
    assert (optim.clip_norm, train.seed, train.steps, train.extra_clusters) == (10.0, 0, None, 0)
    assert (config.data.eval_resolution, config.data.interpolation) == (320, "nearest")
    assert (config.model.guidance_dropout, config.model.pos_interp) == (0.1, "dino")
    assert (train.selection, config.eval.crf_image, config.protocol) == ("best", "published", "code")
    kind, backbone = name.split("-")
    assert config.data.kind == KINDS[kind]
    assert config.model.weights == f"{BACKBONES[backbone]}_224.dino"


@pytest.mark.parametrize("classes", [919, 300, 50])
def test_imagenet_s_takes_no_label_before_its_end(classes):
    config = preset(f"imagenet_s{classes}-vits16")
    assert (config.data.kind, config.data.classes) == ("imagenet_s", classes)
    assert config.data.imagenet_s_train == "train", "without labels"
    assert (config.eval.protocol, config.train.selection, config.train.val_every) == ("auto", "last", 0)
    near = config.eval.neighbours
    assert (near.k, near.temperature, near.resolution, near.upsample, near.rematch) == (
        10,
        0.07,
        256,
        4,
        False,
    )
    assert config.model.weights == "vit_small_patch16_224.dino"
    images = {919: 1_183_322, 300: 384_862, 50: 64_431}[classes]
    assert abs(config.train.epochs * (images // 64) / (5 * 7632) - 1) < 0.1, "about COCO-Stuff's steps"


def asked(*argv):
    return parse_arguments(list(argv)).config


def test_the_command_line_takes_a_protocol():
    code = with_method(preset("cityscapes-vits8"), "ppap")
    assert asked("cityscapes-vits8") == code == asked("cityscapes-vits8", "--protocol=code")
    assert asked("cityscapes-vits8", "--protocol", "paper") == with_protocol(code, "paper")
    stego = asked("cityscapes-vits8", "--method=stego", "--protocol=paper")
    assert (stego.method, stego.train.selection, stego.eval.crf_image) == ("stego", "last", "original")
    assert stego.loss == code.loss, "the paper's departures are PPAP's"


@pytest.mark.parametrize("name", PRESETS)
def test_the_protocols(name):
    code = preset(name)
    paper = with_protocol(code, "paper")
    assert (code.protocol, paper.protocol) == ("code", "paper") and with_protocol(code, "code") == code
    assert config_hash(code) != config_hash(paper)
    assert paper.model.guidance_dropout == 0 and code.model.guidance_dropout == 0.1
    assert (paper.loss.anchor_divisor, paper.loss.base_temperature) == (1, None)
    assert (paper.train.selection, paper.eval.crf_image) == ("last", "original")
    if name not in ("demo", "camvid"):
        loss = paper.loss
        assert (loss.phi0, loss.psi0, loss.sigma_pos, loss.sigma_amb) == (0.55, 0.15, 3, 3)
    # Nothing else changes.
    put_back = dataclasses.replace(
        paper,
        protocol="code",
        model=code.model,
        loss=code.loss,
        train=dataclasses.replace(paper.train, selection=code.train.selection),
        eval=dataclasses.replace(paper.eval, crf_image=code.eval.crf_image),
    )
    assert put_back == code


def test_an_option_wins_over_the_protocol():
    options = ["--model.guidance-dropout=0.1", "--loss.base-temperature=0.07", "--train.selection=best"]
    for argv in (["--protocol=paper", *options], [*options, "--protocol", "paper"]):
        config = asked("cocostuff27-vits8", *argv)
        assert (config.model.guidance_dropout, config.loss.base_temperature) == (0.1, 0.07)
        assert (config.train.selection, config.loss.anchor_divisor) == ("best", 1)


def test_an_unknown_protocol_is_refused(capsys):
    with pytest.raises(SystemExit) as error:
        asked("demo", "--protocol", "papers")
    assert error.value.code == 2 and "papers" in capsys.readouterr().err


def test_the_factor_of_the_loss():
    import torch

    from bench.shapes import clustered
    from ppap.methods.loss import PPAPLoss

    features, z = clustered(60, 8, seed=0, clusters=3), torch.nn.functional.normalize(torch.randn(60, 5))
    scaled, plain = (
        PPAPLoss(LossConfig(base_temperature=base, temperature=0.8), 0)(features, z, 0).loss
        for base in (0.07, None)
    )
    torch.testing.assert_close(scaled, plain * 0.8 / 0.07)


def test_help_names_every_preset_and_the_protocol(capsys):
    with pytest.raises(SystemExit):
        asked("--help-all")
    text = " ".join(capsys.readouterr().out.split())
    assert all(name in text for name in PRESETS) and "--protocol" in text and "--train.selection" in text
    with pytest.raises(SystemExit):
        asked("folder", "--help")
    brief = capsys.readouterr().out
    assert set(re.findall(r"^. --([a-z.-]+) ", brief, re.M)) == {
        f"{section}.{name}"
        for section, names in (
            ("data", ("root", "classes")),
            ("model", ("weights",)),
            ("train", ("steps", "batch-size", "device", "out")),
        )
        for name in names
    }
    assert "--help-all shows every setting" in " ".join(brief.split()) and len(brief.splitlines()) < 80
    assert asked("folder", "--data.root=x", "--optim.lr=0.5").optim.lr == 0.5, "still an option"
    assert all(len(line) <= 130 for line in describe().splitlines())


def test_impossible_settings():
    with pytest.raises(ValueError, match="--train.extra-clusters is -1"):
        TrainConfig(extra_clusters=-1)
    with pytest.raises(UsageError, match="did you mean 'cityscapes-vits8'"):
        preset("cityscapes-vit8")


TINY_VIT = [
    "--model.backbone=vit_tiny_patch16_224",
    "--model.weights=random",
    "--model.patch-size=16",
    "--model.width=24",
    "--model.depth=2",
    "--model.heads=2",
]
FAMILIES = {
    "cocostuff27-vits16": lambda root: trees.five_crop_tree(trees.coco_tree(root, 2), 5),
    "cityscapes-vits8": lambda root: trees.five_crop_tree(trees.cityscapes_tree(root, 1), 5, "cityscapes"),
    "potsdam-vitb8": lambda root: trees.potsdam_mat_tree(root, 4, 2),
    "imagenet_s50-vits16": lambda root: trees.imagenet_s_tree(root, 2, 50, categories=2),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_trains_and_evaluates_from_the_command_line(name, tmp_path, capsys):
    root, out = tmp_path / "data", tmp_path / "run"
    FAMILIES[name](root)
    main_options = ["--data.partial", "--data.workers=0", "--train.device=cpu", "--eval.pictures=0"]
    steps = ["--train.batch-size=2", "--train.steps=3"]
    assert cli.main(
        ["train", name, f"--data.root={root}", f"--train.out={out}", *TINY_VIT, *main_options, *steps]
    ) == 0, capsys.readouterr().err  # fmt: skip
    masks = out / "masks"
    extra = [f"--eval.neighbours.masks={masks}"] if name.startswith("imagenet") else []
    assert cli.main(["eval", str(out), "--device=cpu", *extra]) == 0, capsys.readouterr().err
    text = capsys.readouterr().out
    record = json.loads((out / "evaluation.json").read_text())
    assert record["provenance"]["preset"] == name and record["provenance"]["weights"]["step"] == 3
    if name.startswith("imagenet"):
        assert "protocol: neighbours (chosen for imagenet_s)" in text
        assert set(record["summary"]) == {"neighbours_miou", "neighbours_accuracy"}
        assert len(record["scores"]["scores"]["iou"]) == 51 == len(record["classes"])
        found = {path.relative_to(masks).with_suffix("") for path in masks.rglob("*.png")}
        truth = root / "ImageNetS50/validation-segmentation"
        assert found == {path.relative_to(truth).with_suffix("") for path in truth.rglob("*.png")}
        assert "decided beforehand" in record["provenance"]["weights"]["selection"]
    else:
        assert "protocol: probes" in text and "labels chose it" in text
        final = json.loads((out / "evaluation-final.json").read_text())
        assert "cluster_miou" in final["summary"]
        assert final["summary"].items() <= record["summary"].items(), "which has those with CRF too"
