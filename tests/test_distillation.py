"""Distillation: a run and its resumption, kept features, the target, and what is refused."""

import json
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from ppap.cli import run
from ppap.errors import DataError
from ppap.nets.backbone import build_backbone
from ppap.nets.conditioning import Moments, Split, fit
from ppap.pretrain import main, parse_arguments
from ppap.pretraining.distillation import Target
from ppap.pretraining.export import export_backbone
from ppap.pretraining.pretrainer import Pretrainer
from ppap.pretraining.teacher import Teacher
from ppap.runs.checkpoint import load_checkpoint
from ppap.settings.config import ModelConfig
from ppap.settings.distillation import DistillConfig
from ppap.settings.pretraining import distilled, preset

SMALL = [
    *["--objective", "distill", "--train.device", "cpu"],
    *["--model.width", "16", "--model.depth", "2", "--model.heads", "2", "--model.image-size", "16"],
    *[
        "--model.patch-size",
        "8",
        "--data.resolution",
        "32",
        "--data.workers",
        "0",
        "--views.global-size",
        "16",
    ],
    *["--train.batch-size", "2", "--train.steps", "4", "--train.log-every", "1", "--train.save-every", "2"],
    *["--distill.resolution", "30", "--distill.measured", "4", "--distill.neighbours", "3"],
    *["--distill.clusters", "3"],
]


def save_teacher(folder, seed=0, width=24):
    """A tiny ViT of patch 6 that counts as trained."""
    torch.manual_seed(seed)
    sizes = {"patch_size": 6, "width": width, "depth": 2, "heads": 2, "image_size": 24}
    backbone = build_backbone(ModelConfig(backbone="vit_tiny_patch16_224", weights="random", **sizes))
    export_backbone(backbone, folder, "a test's teacher")
    return str(folder)


@pytest.fixture
def teacher(tmp_path, monkeypatch):
    monkeypatch.setenv("PPAP_CACHE_DIR", str(tmp_path / "cache"))
    return save_teacher(tmp_path / "teacher")


@pytest.fixture
def images(tmp_path):
    """A labelled folder, five training and three validation images."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 5), ("val", 3)):
        for i in range(count):
            for kind, pixels in (
                ("images", rng.integers(0, 256, (40, 70, 3), dtype=np.uint8)),
                ("labels", rng.integers(0, 3, (5, 7), dtype=np.uint8).repeat(8, 0).repeat(10, 1)),
            ):
                folder = tmp_path / "set" / kind / split
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return tmp_path / "set"


def arguments(tmp_path, teacher, *options, name="run", start="scenes"):
    scenes = ["--data.scenes", "5"] if start == "scenes" else []
    out = ["--train.out", str(tmp_path / name)]
    return [start, *SMALL, "--teacher", teacher, *scenes, *out, *options]


def new(*args, **names):
    return Pretrainer(*parse_arguments(arguments(*args, **names)))


def rows_of(path):
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("images_per_s", "crc32")} for row in rows]


def test_a_run_on_a_folder_ends_with_a_table(tmp_path, teacher, images, capsys):
    argv = arguments(
        tmp_path, teacher, "--data.root", str(images), "--distill.head", "learned", start="folder"
    )
    assert run(main, argv) == 0
    output = capsys.readouterr().out
    assert (
        "sees 30 pixels, 5 x 5 patches" in output
        and "on 3 validation images of 32 pixels, 3 classes" in output
    )
    record = json.loads((tmp_path / "run" / "distillation.json").read_text())
    names = ["student", "student, behind its head", "teacher", "teacher, conditioned"]
    assert list(record["rows"]) == names
    assert all(0 <= row["purity"] <= 1 and 0 <= row["miou"] <= 1 for row in record["rows"].values())
    assert record["rows"][record["reference"]]["kept"] == 1
    assert record["networks"]["student"]["parameters"] < record["networks"]["teacher"]["parameters"]
    assert record["provenance"]["config"]["distill"]["teacher"] == teacher
    report = (tmp_path / "run" / "report.md").read_text()
    assert all(f"| {name} |" in report for name in names) and "k-means mIoU" in report
    loaded = build_backbone(ModelConfig(weights=str(tmp_path / "run" / "backbone")))
    assert "distilled by ppap.pretrain on 5 images of a folder" in loaded.origin
    assert (loaded.width, loaded.patch_size) == (16, 8)


def test_without_labels_the_table_has_no_scores_of_them(tmp_path, teacher, images, capsys):
    options = ["--data.root", str(images), "--distill.no-labels", "--train.steps", "1"]
    assert run(main, arguments(tmp_path, teacher, *options, start="folder")) == 0
    record = json.loads((tmp_path / "run" / "distillation.json").read_text())
    assert {row["miou"] for row in record["rows"].values()} == {None}
    assert "mIoU" not in (tmp_path / "run" / "report.md").read_text()
    assert "no labels" in capsys.readouterr().out


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, teacher, monkeypatch):
    new(tmp_path, teacher, name="whole").run()
    log = Pretrainer._log

    def interrupted(self, values, speed):
        if self.step == 2 and not self.resumed:
            signal.raise_signal(signal.SIGINT)
        return log(self, values, speed)

    monkeypatch.setattr(Pretrainer, "_log", interrupted)
    assert run(main, arguments(tmp_path, teacher, name="parts")) == 75
    assert not (tmp_path / "parts" / "report.md").exists()
    moved = tmp_path / "elsewhere"
    (tmp_path / "teacher").rename(moved)
    assert run(main, ["--resume", str(tmp_path / "parts"), "--teacher", str(moved)]) == 0
    assert rows_of(tmp_path / "parts") == rows_of(tmp_path / "whole")
    whole, parts = (load_checkpoint(tmp_path / name, "last") for name in ("whole", "parts"))
    assert all(torch.equal(value, parts.tensors[name]) for name, value in whole.tensors.items())
    tables = [
        json.loads((tmp_path / n / "distillation.json").read_text())["rows"] for n in ("whole", "parts")
    ]
    assert tables[0] == tables[1]


def test_a_resumed_run_wants_the_same_teacher(tmp_path, teacher, capsys):
    new(tmp_path, teacher).run()
    other = save_teacher(tmp_path / "other", seed=1)
    assert run(main, ["--resume", str(tmp_path / "run"), "--teacher", other, "--train.steps", "5"]) == 3
    assert "holds other weights than this run began with" in capsys.readouterr().err
    assert run(main, ["--resume", str(tmp_path / "run"), "--distill.head", "learned"]) == 2
    other = save_teacher(tmp_path / "wider", width=36)
    assert run(main, ["--resume", str(tmp_path / "run"), "--teacher", other]) == 3
    assert "holds other weights" in capsys.readouterr().err


def test_features_are_computed_once(tmp_path, teacher, monkeypatch, capsys):
    seen = []
    maps = Teacher.maps

    def counted(self, pixels):
        seen.append(len(pixels))
        if len(seen) == 1:
            signal.raise_signal(signal.SIGINT)
        return maps(self, pixels)

    monkeypatch.setattr(Teacher, "maps", counted)
    monkeypatch.setattr(Teacher, "BATCH", 2)
    argv = arguments(tmp_path, teacher)
    assert run(main, argv) == 75
    assert "the same command goes on" in capsys.readouterr().err and not (tmp_path / "run").exists()
    trainer = Pretrainer(*parse_arguments(argv))
    trainer.model.prepare(lambda: False)
    assert seen == [2, 2, 1]
    assert "3 of 5 squares to go" in capsys.readouterr().out
    trainer.model.prepare(lambda: False)
    assert len(seen) == 3 and "features read from" in capsys.readouterr().out


def test_kept_features_change_nothing_but_rounding(tmp_path, teacher):
    new(tmp_path, teacher, name="kept").run()
    new(tmp_path, teacher, "--distill.no-cache", name="fresh").run()
    losses = [[row["loss"] for row in rows_of(tmp_path / name)] for name in ("kept", "fresh")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-3) and losses[0] != losses[1]


@pytest.mark.parametrize("options", [["--distill.loss", "cosine"], ["--distill.loss", "smooth_l1"]])
def test_the_student_learns(tmp_path, teacher, options):
    steps = ["--train.steps", "40", "--optim.lr", "5e-3", "--train.save-every", "0"]
    new(tmp_path, teacher, *steps, *options).run()
    rows = rows_of(tmp_path / "run")
    assert rows[-1]["loss"] < 0.8 * rows[0]["loss"] and rows[-1]["cosine"] > rows[0]["cosine"] + 0.2


def test_every_weight_of_the_student_learns(tmp_path, teacher):
    model = new(tmp_path, teacher, "--distill.head", "learned").model
    model.prepare(lambda: False)
    model.losses(torch.rand(2, 3, 32, 32), torch.Generator().manual_seed(0))["loss"].backward()
    assert all(value.grad is not None for value in model.student.parameters())
    assert not any(value.requires_grad for value in model.teacher.backbone.parameters())


def test_the_exported_backbone_is_the_student(tmp_path, teacher):
    trainer = new(tmp_path, teacher)
    trainer.run()
    loaded = build_backbone(ModelConfig(weights=str(tmp_path / "run" / "backbone")))
    images = torch.randn(2, 3, 24, 40)
    assert torch.equal(loaded(images), trainer.model.student.backbone(images))


def moments(rows):
    """Of (n, D) rows as two halves."""
    return Split(*(Moments.of(part.T[None, :, None]) for part in rows.chunk(2)))


@pytest.mark.parametrize("outputs", [6, 9])
def test_a_fixed_target_has_the_conditioned_cosines(generator, outputs):
    rows = torch.randn(400, 6, generator=generator) @ torch.randn(6, 6, generator=generator) + 3
    target = Target(6, outputs)
    assert target.fit("clip:0.1", moments(rows), turned=True) == pytest.approx(1)
    wanted = fit("clip:0.1", moments(rows))(rows.T[None, :, None])[0, :, 0].T
    got = target(rows)
    assert torch.allclose(target.conditioned(rows), wanted, atol=1e-5)
    a, b = (F.normalize(x, dim=1) for x in (got, wanted))
    assert torch.allclose(a @ a.T, b @ b.T, atol=1e-4)
    assert got.square().mean().item() == pytest.approx(1, abs=0.02)


def test_a_narrow_target_keeps_the_leading_directions(generator):
    rows = torch.randn(500, 6, generator=generator) * torch.tensor([4.0, 3.0, 2.0, 0.1, 0.1, 0.1])
    target = Target(6, 3)
    assert target.fit("none", moments(rows), turned=True) > 0.99
    a, b = (F.normalize(x, dim=1) for x in (target(rows), rows))
    assert (a @ a.T - b @ b.T).abs().max() < 0.1


def test_squares_of_an_image_stay_and_reach_both_ends(tmp_path, teacher, images):
    options = ["--data.root", str(images), "--distill.squares", "2"]
    draws = new(tmp_path, teacher, *options, start="folder").draws
    assert draws.count == 10
    first = {draws.number(n): draws[n] for n in range(10)}
    assert all(torch.equal(first[draws.number(n)], draws[n]) for n in range(10, 20))
    whole = Image.open(images / "images" / "train" / "0.png").resize((56, 32), Image.Resampling.BILINEAR)
    pixels = torch.from_numpy(np.array(whole)).permute(2, 0, 1)
    assert torch.equal(draws.square(0), pixels[:, :, :32]) and torch.equal(
        draws.square(1), pixels[:, :, -32:]
    )


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--teacher", "random"], 2, "--teacher random: these weights were never trained"),
        (["--teacher", "/nowhere/at/all.pth"], 3, "--teacher: /nowhere/at/all.pth does not exist"),
        (["--teacher", "vit_small_patch16"], 2, "--teacher 'vit_small_patch16' is neither"),
        (["--distill.resolution", "32"], 2, "--distill.resolution 32 does not fit the teacher's patch of 6"),
        (["--distill.resolution", "6"], 2, "at least two patches, such as 12"),
        (["--views.global-size", "20"], 2, "no multiple of the patch of 8"),
        (["--data.scenes", "0"], 2, "--data.scenes 0 makes a new scene for every draw"),
        (["--objective", "self"], 2, "is for --objective distill; add that"),
        (["--distill.cache-dir", "FILE"], 3, "give another --distill.cache-dir, or --distill.no-cache"),
        (["--distill.teacher-heads", "5"], 2, "--distill.teacher-heads 5"),
    ],
)
def test_errors_say_what_to_do(tmp_path, teacher, capsys, options, code, message):
    (tmp_path / "file").write_text("no folder")
    options = [str(tmp_path / "file") if option == "FILE" else option for option in options]
    assert run(main, arguments(tmp_path, teacher, *options)) == code
    error = capsys.readouterr().err
    assert message in error and "--model" not in error
    assert not (tmp_path / "run").exists()


def test_a_teacher_must_be_named(tmp_path, capsys):
    assert run(main, ["scenes", "--objective", "distill", "--train.out", str(tmp_path / "run")]) == 2
    assert "--teacher is not given" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--distill.condition is 'whiter'"):
        DistillConfig(condition="whiter")


def test_broken_labels_are_found_first(tmp_path, teacher, images):
    (images / "labels" / "val" / "0.png").write_text("no image at all")
    options = ["--data.root", str(images)]
    with pytest.raises(DataError, match="--distill.no-labels"):
        new(tmp_path, teacher, *options, start="folder")
    assert (
        new(tmp_path, teacher, *options, "--distill.no-labels", start="folder").model.measured.labels is None
    )


def test_defaults_follow_the_objective():
    for name in ("scenes", "folder", "folder-gpu"):
        config = distilled(preset(name))
        assert config.views.locals == 0 and config.views.global_size % config.model.patch_size == 0
        assert config.data.resolution >= config.views.global_size
    argv = ["folder", "--train.out", "unused", "--objective", "distill", "--model.width", "128"]
    config = parse_arguments(argv)[0]
    assert (config.model.patch_size, config.model.width, config.preset) == (16, 128, "folder")
    assert parse_arguments(["folder", "--train.out", "unused"])[0].model.patch_size == 8
