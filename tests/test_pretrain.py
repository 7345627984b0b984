"""Pretraining: a run and its resumption, what it exports, losses by hand, error paths."""

import json
import math
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from ppap.cli import run
from ppap.data.scenes import make_scene
from ppap.errors import DataError, NumberError, UsageError
from ppap.nets.backbone import build_backbone
from ppap.pretrain import main, parse_arguments
from ppap.pretraining.data import build_draws
from ppap.pretraining.export import export_backbone, principal_colours
from ppap.pretraining.export import main as export_main
from ppap.pretraining.measure import patch_features
from ppap.pretraining.objective import (
    Distillation,
    dense_loss,
    masked_loss,
    spread_evenly,
    vicreg_loss,
)
from ppap.pretraining.pretrainer import Pretrainer, rate
from ppap.pretraining.views import (
    make_crops,
)
from ppap.runs.checkpoint import load_checkpoint
from ppap.runs.lock import alone
from ppap.settings.config import ModelConfig

SIZES = ["--model.width", "16", "--model.depth", "2", "--model.heads", "2", "--model.image-size", "16"]
SMALL = [
    *SIZES,
    *["--data.resolution", "32", "--data.workers", "0"],
    *["--views.global-size", "16", "--views.local-size", "8", "--views.locals", "1"],
    *["--objective.prototypes", "8", "--objective.hidden", "16", "--objective.bottleneck", "8"],
    *["--train.batch-size", "2", "--train.steps", "4", "--train.log-every", "1", "--train.save-every", "2"],
    *["--train.device", "cpu"],
]
ALL_LOSSES = [
    *["--objective.image-weight", "1", "--objective.mask-weight", "1", "--objective.dense-weight", "1"],
    *["--views.mask-odds", "1"],
]


def start(tmp_path, *options, name="run", preset="scenes"):
    """A new small run, not yet started."""
    return Pretrainer(*parse_arguments([preset, *SMALL, "--train.out", str(tmp_path / name), *options]))


@pytest.fixture
def images(tmp_path):
    """A folder of five small pictures."""
    rng = np.random.default_rng(0)
    for i in range(5):
        pixels = rng.integers(0, 256, (40, 50, 3), dtype=np.uint8)
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{i}.png")
    return tmp_path / "photos"


def rows_of(path):
    """Metrics without the speed, which no two runs share, and the checksum of the line it stands in."""
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("images_per_s", "crc32")} for row in rows]


def test_a_run_on_scenes_leaves_all_its_files(tmp_path, capsys):
    options = ["--train.picture-every", "2", "--train.out", str(tmp_path / "run")]
    assert run(main, ["scenes", *SMALL, *options]) == 0
    folder = tmp_path / "run"
    rows = rows_of(folder)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(math.isfinite(row["loss"]) and 0 < row["found"] <= 1 for row in rows)
    assert Image.open(folder / "pictures" / "features_000002.png").size[0] > 400
    assert (folder / "pictures" / "features_000004.png").exists()
    assert (folder / "checkpoints" / "last" / "manifest.json").exists()
    output = capsys.readouterr().out
    assert "images/s" in output and "--model.weights" in output


def test_the_exported_backbone_is_the_teacher(tmp_path):
    trainer = start(tmp_path)
    trainer.run()
    loaded = build_backbone(ModelConfig(weights=str(tmp_path / "run" / "backbone")))
    images = torch.randn(2, 3, 24, 40)
    shift = trainer.model.teacher.backbone(images) - loaded(images)
    assert torch.allclose(shift, shift[:1, :, :1, :1].expand_as(shift), atol=1e-5)
    mean = loaded(trainer._images(32)).mean(dim=(0, 2, 3))
    assert mean.abs().max() < 1e-4 < shift.abs().max()
    assert "synthetic scenes (easy), 8 images read" in loaded.origin and not loaded.is_random
    assert (loaded.width, loaded.depth, loaded.patch_size, loaded.spec["heads"]) == (16, 2, 8, 2)
    student = trainer.model.student.backbone
    assert not torch.equal(loaded.vit.patch_embed.proj.weight, student.vit.patch_embed.proj.weight)


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, monkeypatch):
    start(tmp_path, name="whole").run()
    log = Pretrainer._log

    def interrupted(self, values, speed):
        if self.step == 2 and not self.resumed:
            signal.raise_signal(signal.SIGINT)
        return log(self, values, speed)

    monkeypatch.setattr(Pretrainer, "_log", interrupted)
    argv = ["scenes", *SMALL, "--train.out", str(tmp_path / "parts")]
    assert run(main, argv) == 75
    assert [row["step"] for row in rows_of(tmp_path / "parts")] == [1, 2]
    assert run(main, ["--resume", str(tmp_path / "parts")]) == 0
    assert rows_of(tmp_path / "parts") == rows_of(tmp_path / "whole")
    whole, parts = (load_checkpoint(tmp_path / name, "last") for name in ("whole", "parts"))
    assert all(torch.equal(value, parts.tensors[name]) for name, value in whole.tensors.items())
    moments = [c.state()["optimiser"]["state"][0]["exp_avg_sq"] for c in (whole, parts)]
    assert torch.equal(*moments)


def test_pretraining_goes_on_from_given_weights(tmp_path):
    start(tmp_path).run()
    weights = ["--model.weights", str(tmp_path / "run" / "backbone"), "--model.backbone", "auto"]
    trainer = start(tmp_path, *weights, name="second")
    loaded = build_backbone(ModelConfig(weights=weights[1]))
    assert torch.equal(loaded.vit.pos_embed, trainer.model.student.backbone.vit.pos_embed)
    trainer.run()
    origin = build_backbone(ModelConfig(weights=str(tmp_path / "second" / "backbone"))).origin
    assert origin.count("images read") == 2, origin


def test_every_weight_of_the_student_learns(tmp_path):
    model = start(tmp_path, *ALL_LOSSES).model
    losses = model.losses(torch.rand(2, 3, 32, 32), torch.Generator().manual_seed(3))
    losses["loss"].backward()
    still = [name for name, value in model.student.named_parameters() if value.grad is None]
    assert not still
    assert all(value.grad is None for value in model.teacher.parameters())


@pytest.mark.parametrize("name", ["image", "mask", "dense", "vicreg"])
def test_each_loss_can_stand_alone(tmp_path, name):
    config = start(tmp_path).config
    weights = {f"{other}_weight": float(other == name) for other in ("image", "mask", "dense", "vicreg")}
    aim = replace(config.objective, **weights)
    config = replace(config, objective=aim, views=replace(config.views, mask_odds=1))
    torch.manual_seed(0)
    model = Distillation(build_backbone(config.model), config)
    losses = model.losses(torch.rand(2, 3, 32, 32), torch.Generator().manual_seed(0))
    assert {key for key in losses if key.endswith("_loss")} == {f"{name}_loss"}
    assert torch.equal(losses["loss"].detach(), losses[f"{name}_loss"]) and losses["loss"] > 0
    assert ("used_prototypes" in losses) == (name != "vicreg")


def test_the_teacher_follows_by_the_schedule(tmp_path):
    trainer = start(tmp_path, "--objective.momentum", "0.5", "0.9")
    model = trainer.model
    with torch.no_grad():
        for mine, its in zip(model.teacher.parameters(), model.student.parameters(), strict=True):
            mine.zero_()
            its.fill_(1)
    model.move_teacher(0)
    assert torch.allclose(model.teacher.patch_head.prototypes, torch.tensor(0.5))
    model.move_teacher(3)  # the last step
    assert torch.allclose(model.teacher.patch_head.prototypes, torch.tensor(0.55))


def test_rate_rises_and_falls():
    values = [rate(step, 100, 0.1) for step in range(100)]
    assert values[0] == pytest.approx(0.1) and max(values) == values[9] == pytest.approx(1)
    assert values[9:] == sorted(values[9:], reverse=True) and values[-1] == pytest.approx(0.01, abs=1e-3)
    assert rate(0, 10, 0) == 1


def test_losses_by_hand():
    logp = torch.tensor([[0.5, 0.5], [0.25, 0.75], [0.5, 0.5]]).log()[None]
    target = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])[None]
    masks = torch.tensor([[True, True, False]])
    assert masked_loss(logp, target, masks).item() == pytest.approx((math.log(2) - math.log(0.75)) / 2)
    assert masked_loss(logp, target, torch.zeros_like(masks)).item() == 0
    index, found = torch.tensor([[1, 0, 0]]), torch.tensor([[True, True, False]])
    assert dense_loss(logp, target, index, found).item() == pytest.approx((math.log(2) + math.log(4)) / 2)
    assert dense_loss(logp, target, index, found & False).item() == 0


def test_vicreg_by_hand():
    # Channels of deviation 2 and 1 over three rows, covariance 1: nothing is missing but independence.
    own = torch.tensor([[2.0, 0.0], [-2.0, -1.0], [0.0, 1.0]], dtype=torch.float64)
    assert torch.cov(own.T).tolist() == [[4.0, 1.0], [1.0, 1.0]]
    assert vicreg_loss(own, own, 5.0).item() == pytest.approx(2.0)  # 2 crops * 2 entries * 1 ** 2 / 2
    assert vicreg_loss(own, own + 1, 5.0).item() == pytest.approx(5 + 2)
    assert vicreg_loss(own[:, :1], own[:, :1] / 4, 1.0).item() == pytest.approx(
        (own[:, 0] * 0.75).square().mean().item() + 0.5 * (1 - 0.5), abs=1e-3
    )
    flat = torch.ones(4, 2, requires_grad=True)  # collapsed: agreement is perfect, all spread is missing
    assert vicreg_loss(flat, flat, 5.0).item() == pytest.approx(5 * 0.99)
    assert vicreg_loss(flat[:1], flat[:1], 5.0).item() == 0
    vicreg_loss(flat[:1], flat[:1], 5.0).backward()
    assert not flat.grad.any()


def test_vicreg_compares_the_same_places(generator):
    config = parse_arguments(["scenes", *SMALL, "--train.out", "unused"])[0]
    model = Distillation(build_backbone(config.model), config)
    tokens = torch.randn(4, 9, 16, generator=generator)  # two crops of two images, 3 x 3 patches
    boxes = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 0.0, -1.0, 1.0]])[:, None].expand(2, 2, 4)
    got = model._vicreg(tokens, boxes, (3, 3))  # the second crop is mirrored
    own, other = model.student.embedding(tokens).unflatten(0, (2, -1))
    mirrored = other.unflatten(1, (3, 3)).flip(2).flatten(1, 2)
    wanted, wrong = (
        vicreg_loss(own.flatten(0, 1), rows.flatten(0, 1), config.objective.vicreg_agreement)
        for rows in (mirrored, other)
    )
    assert got.item() == pytest.approx(wanted.item(), abs=1e-6) and abs(got - wrong) > 1e-3


def test_scenes_are_made_once_and_shown_in_turn(tmp_path):
    options = ["--data.scenes", "5", "--data.difficulty", "easy"]
    draws = start(tmp_path, *options).draws
    shown = [draws.order.image(n) for n in range(12)]
    assert [len(set(shown[i : i + 4])) for i in (0, 4, 8)] == [4] * 3  # epochs of two batches of two
    assert set(shown) <= set(range(5)) and shown[:4] != shown[4:8]
    first = next(n for n in range(4, 12) if shown[n] == shown[0])
    assert draws[0] is draws[first]
    pixels, _ = make_scene(0, "pretrain", shown[0], 32, "easy")
    assert torch.equal(draws[0], torch.from_numpy(pixels).permute(2, 0, 1))
    with pytest.raises(DataError, match="fewer than one batch"):
        start(tmp_path, "--data.scenes", "1")


def test_a_whitened_start_evens_out_the_patches(tmp_path):
    options = ["--model.width", "192", "--train.whiten", "0.5", "--data.resolution", "64"]
    trainer = start(tmp_path, *options)
    pixels = torch.stack([trainer.draws[n] for n in range(60, 80)]).float() / 255
    crops = make_crops(pixels, 2, 16, (0.2, 0.7), trainer.config.views, torch.Generator().manual_seed(1))
    tokens = trainer.model.teacher.backbone.vit.patch_embed.proj(crops.images)
    patches = F.unfold(crops.images, 8, stride=8)
    before, after = (
        torch.linalg.eigvalsh(torch.cov(rows.flatten(2).movedim(1, 2).flatten(0, 1).T))
        for rows in (patches, tokens)
    )
    assert after[-1] / after.median() < 0.02 * before[-1] / before.median()
    plain = start(tmp_path, "--train.whiten", "0", name="plain").model.teacher.backbone
    assert plain.vit.patch_embed.proj.weight.abs().max() < 0.5


def test_assignments_are_spread_over_all_prototypes(generator):
    scores = torch.randn(400, 5, generator=generator) + torch.tensor([4.0, 0, 0, 0, 0])
    spread = spread_evenly(scores)
    assert torch.allclose(spread.sum(dim=1), torch.ones(400))
    assert scores.softmax(dim=1).mean(dim=0)[0] > 0.8
    assert (spread.mean(dim=0) - 0.2).abs().max() < 0.03


def test_principal_colours_tell_groups_apart(generator):
    centres = torch.randn(3, 8, generator=generator)
    numbers = torch.arange(32).reshape(2, 4, 4) % 3
    features = centres[numbers].movedim(-1, 1) + 0.01 * torch.randn(2, 8, 4, 4, generator=generator)
    colours = principal_colours(features)
    assert colours.shape == (2, 4, 4, 3) and colours.dtype == np.uint8
    means = [colours[numbers.numpy() == k].astype(float).mean(axis=0) for k in range(3)]
    assert min(np.abs(means[a] - means[b]).max() for a, b in ((0, 1), (0, 2), (1, 2))) > 100
    assert np.array_equal(colours, principal_colours(features))


def test_a_folder_is_read_epoch_by_epoch_and_its_labels_never(tmp_path, images):
    root = tmp_path / "set"
    (root / "images").mkdir(parents=True)
    images.rename(root / "images" / "train")
    (root / "labels" / "train").mkdir(parents=True)
    (root / "labels" / "train" / "0.png").write_text("no image at all")
    trainer = start(tmp_path, "--data.root", str(root), preset="folder")
    assert "5 images, labels not read" in trainer.draws.description
    draws = build_draws(trainer.config)
    assert draws[0].shape == (3, 32, 32) and draws[0].dtype == torch.uint8
    assert torch.equal(draws[7], draws[7]) and not torch.equal(draws[0], draws[4])
    trainer.run()
    assert (
        "5 images of a folder"
        in build_backbone(ModelConfig(weights=str(tmp_path / "run" / "backbone"))).origin
    )


def test_half_precision_exports_load_as_fp32(tmp_path):
    backbone = start(tmp_path).model.teacher.backbone
    export_backbone(backbone, tmp_path / "half", "a test", half=True)
    loaded = build_backbone(ModelConfig(weights=str(tmp_path / "half")))
    assert {value.dtype for value in loaded.parameters()} == {torch.float32}
    pixels = torch.randint(0, 256, (2, 16, 16, 3), dtype=torch.uint8)
    assert torch.allclose(patch_features(loaded, pixels), patch_features(backbone, pixels), atol=5e-3)
    export_backbone(backbone, tmp_path / "full", "a test")
    assert run(export_main, [str(tmp_path / "full"), str(tmp_path / "again")]) == 0
    files = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("half", "again")]
    assert files[0] == files[1]
    assert "a test" in build_backbone(ModelConfig(weights=str(tmp_path / "again"))).origin
    with torch.no_grad():
        backbone.vit.pos_embed[0, 0, 0] = math.nan
    with pytest.raises(NumberError, match="pos_embed"):
        export_backbone(backbone, tmp_path / "half", "a test")
    assert build_backbone(ModelConfig(weights=str(tmp_path / "half"))).width == 16


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["folder"], 2, "--data.root"),
        (["folder", "--data.root", "/nowhere/at/all"], 3, "no such folder"),
        (["folder", "--data.root", "PHOTOS", "--train.batch-size", "6"], 3, "fewer than one batch of 6"),
        (["folder", "--data.root", "EMPTY"], 3, "no images"),
        (["scenes", "--views.global-size", "20"], 2, "no multiple of the patch of 8"),
        (["scenes", "--train.out", "PHOTOS"], 2, "exists already"),
        (["scene"], 2, "did you mean 'scenes'"),
        (["scenes", "--model.weights", "/nowhere/at/all"], 3, "does not exist"),
        (["scenes", "--train.device", "tpu9"], 2, "cannot be used"),
    ],
)
def test_errors_say_what_to_do(tmp_path, images, capsys, options, code, message):
    (tmp_path / "empty").mkdir()
    names = {"PHOTOS": str(images), "EMPTY": str(tmp_path / "empty")}
    first, *rest = (names.get(option, option) for option in options)
    out = [] if "--train.out" in rest else ["--train.out", str(tmp_path / "run")]
    assert run(main, [first, *SMALL, *out, *rest]) == code
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_resuming_refuses_another_run(tmp_path, capsys):
    start(tmp_path).run()
    folder = str(tmp_path / "run")
    with pytest.raises(UsageError, match="--optim.lr"):
        parse_arguments(["--resume", folder, "--optim.lr", "0.5"])
    assert parse_arguments(["--resume", folder, "--train.steps", "6"])[0].train.steps == 6
    with pytest.raises(DataError, match="no run directory"):
        parse_arguments(["--resume", str(tmp_path)])


def test_a_run_is_continued_by_one_process(tmp_path):
    start(tmp_path).run()
    folder = tmp_path / "run"
    arguments = parse_arguments(["--resume", str(folder), "--train.steps", "6"])
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with (
        alone(folder, "it"),
        pytest.raises(UsageError, match=f"another process works on --resume {folder}"),
    ):
        Pretrainer(*arguments)
    first = Pretrainer(*arguments)
    with pytest.raises(UsageError, match="another process works on"):
        Pretrainer(*arguments)
    assert {path: path.read_bytes() for path in before} == before
    first.run()
    with pytest.raises(UsageError, match="continued by another process since step 4"):
        Pretrainer(*arguments)
    assert not (folder / ".lock").exists()


def test_a_run_holds_its_folder_while_it_trains(tmp_path, monkeypatch):
    seen, step = [], Pretrainer._train_step

    def looking(self, batch):
        with pytest.raises(UsageError, match="another process"), alone(self.run_dir.path, "it"):
            raise AssertionError("let in")
        seen.append(self.step)
        return step(self, batch)

    monkeypatch.setattr(Pretrainer, "_train_step", looking)
    start(tmp_path).run()
    assert seen == [0, 1, 2, 3] and not (tmp_path / "run" / ".lock").exists()
