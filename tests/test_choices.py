"""What is auto: sizes that thresholds give, choices that are stored, runs that go on with them bit by bit."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from bench.shapes import clustered
from ppap.errors import DataError, NumberError, UsageError
from ppap.methods.choices import (
    BLOCK_RATE,
    HEAD_RATE,
    SCALED_BLOCK_RATE,
    Choices,
    autos,
    choose,
)
from ppap.methods.engine import build_engine
from ppap.methods.guidance import Survey
from ppap.methods.thresholds import Phi0, SetSizes, check_size
from ppap.nets.backbone import build_backbone
from ppap.nets.conditioning import Moments, Split, fit
from ppap.runs.checkpoint import load_checkpoint
from ppap.settings.config import CompareConfig, Config, LossConfig, ModelConfig
from ppap.settings.presets import folder
from ppap.train import main
from tests.runs import TINY, make_folder, tiny_run

CPU = torch.device("cpu")
VIT = ModelConfig(
    weights="random", backbone="vit_tiny_patch16_224", patch_size=8, width=24, depth=2, heads=2, image_size=32
)
DINOV2 = ModelConfig(
    weights="random", backbone="vit_small_patch14_dinov2", width=24, depth=2, heads=2, image_size=28
)
AUTO = ["--model.condition=auto", "--loss.phi0=auto", "--loss.psi0=auto", "--optim.lr=auto"]


def survey_of(features):
    """Of maps (n, D, h, w)."""
    return Survey(Split(Moments.of(features[::2]), Moments.of(features[1::2])), features, len(features))


def seen(images=12, width=24, side=6):
    rows = clustered(images * side * side, width, seed=3, clusters=4)
    return survey_of(rows.view(images, side, side, width).permute(0, 3, 1, 2).contiguous())


def test_thresholds_give_the_sizes_that_are_asked_for():
    rows, loss = clustered(900, 24, seed=1, clusters=6), LossConfig()
    sizes = SetSizes(rows, loss, seed=0)
    for aim in (0.02, 0.1):
        found = sizes.phi0(aim)
        assert found.size == pytest.approx(aim, rel=0.25)
        assert sizes.share(found.value) == pytest.approx(found.size, abs=2e-3)
        # No value of a fine grid comes much nearer.
        grid = [sizes.share(phi) for phi in np.linspace(-0.5, 1, 61)]
        assert abs(found.size - aim) <= min(abs(size - aim) for size in grid) + 2e-3
    psi0 = sizes.psi0(found.value)
    assert sizes.negatives(found.value).share(psi0) == pytest.approx(0.89 * (1 - found.size), abs=0.02)


def test_sets_that_jump_are_refused_with_both_sizes_and_the_remedy():
    # Two directions and nothing between: a patch is like half of the others, or like none.
    rows = F.one_hot(torch.arange(400) % 2, 24).float()
    found = SetSizes(rows, LossConfig(), seed=0).phi0(0.05)
    assert found.jump == (pytest.approx(0.5, abs=0.01), 0.0)
    with pytest.raises(UsageError, match=r"they jump from 50 % to 0 % with --model.condition none; give X"):
        check_size(found, 0.05, "none", "give X")
    check_size(Phi0(0.5, 0.04, (0.06, 0.04)), 0.05, "none", "give X")


def test_everything_that_is_auto_is_chosen_and_nothing_else():
    backbone = build_backbone(VIT)
    config = replace(folder(), model=replace(VIT, condition="auto"))
    assert autos(config) == ["model.condition", "loss.phi0", "loss.psi0", "optim.lr"]
    choices, condition = choose(config, backbone, seen(), 4)
    assert choices.condition == "clip:0.062" and choices.lr == BLOCK_RATE and condition is not None
    settled = choices.apply(config)
    assert not autos(settled) and settled.loss.phi0 == choices.phi0 and settled.data == config.data
    text = "\n".join(choices.reasons)
    assert "<- chosen" in text and f"phi0 {choices.phi0:g}" in text and f"psi0 {choices.psi0:g}" in text
    given = replace(config, loss=replace(config.loss, phi0=0.3), model=replace(VIT, condition="centre"))
    choices, _ = choose(given, backbone, seen(), 4)
    assert (choices.condition, choices.phi0) == (None, None) and choices.psi0 is not None
    assert choices.apply(given).loss.phi0 == 0.3 and choices.apply(given).model.condition == "centre"


def test_methods_take_the_choice_that_is_theirs():
    choices = Choices(phi0=0.5, psi0=0.1, fixed_phi0=0.4, lr=3e-4)
    config = Config(loss=LossConfig(phi0="auto", psi0="auto"))
    config = replace(config, optim=replace(config.optim, lr="auto"))
    by_method = {
        m: choices.apply(replace(config, method=m)) for m in ("ppap", "tps", "fixed", "ans", "stego")
    }
    assert [c.loss.phi0 for c in by_method.values()] == [0.5, 0.5, 0.4, 0.4, 0.5]
    assert [c.optim.lr for c in by_method.values()] == [3e-4, 3e-4, 3e-4, 3e-4, HEAD_RATE]
    config = replace(config, compare=CompareConfig(fixed_phi0="same"))
    assert {choices.apply(replace(config, method=m)).loss.phi0 for m in by_method} == {0.5}, "as in Table 5"


def test_a_layer_scale_lowers_the_rate():
    config = replace(Config(), optim=replace(Config().optim, lr="auto"))
    for model, rate in ((VIT, BLOCK_RATE), (DINOV2, SCALED_BLOCK_RATE)):
        assert choose(replace(config, model=model), build_backbone(model), None, 3)[0].lr == rate


def test_choices_survive_json_and_older_checkpoints():
    choices = Choices("clip:0.1", 0.5, 0.1, 0.4, 3e-4, ("one", "two"))
    again = Choices.from_dict(json.loads(json.dumps(choices.to_dict())))
    assert again == choices and again.reasons == choices.reasons
    assert Choices.from_dict(None) == Choices()


def test_a_network_is_not_built_of_settings_that_are_open():
    with pytest.raises(UsageError, match="--loss.phi0 auto needs training images"):
        build_engine(replace(Config(model=VIT), loss=LossConfig(phi0="auto")), 3, CPU)
    with pytest.raises(UsageError, match="--model.condition centre needs training images"):
        build_engine(Config(model=replace(VIT, condition="centre")), 3, CPU)


@pytest.mark.parametrize("value", ["autos", "x", float("nan")])
def test_thresholds_that_are_none_are_refused(value):
    with pytest.raises(ValueError, match="--loss.phi0 is .*; give a finite cosine, or auto"):
        LossConfig(phi0=value)
    with pytest.raises(ValueError, match="--compare.fixed-phi0 is .*; give a finite cosine, or same"):
        CompareConfig(fixed_phi0=value)


def weights(run, name="last"):
    return load_checkpoint(run, name).tensors


@pytest.mark.parametrize("options", [(), ("--eval.cluster-init=kmeans", "--optim.projection-lr=2e-3")])
def test_resuming_is_bitwise_the_same_run(tmp_path, options):
    options = [*AUTO, *options]
    whole = tiny_run(tmp_path / "whole", *options)
    part = tiny_run(tmp_path / "part", *options, "--train.steps=2")
    main(["--resume", str(part), "--train.steps=6"])
    one, two = weights(whole), weights(part)
    assert one.keys() == two.keys() and {"condition.mean", "condition.map", "condition.shift"} <= one.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    info = load_checkpoint(part).info
    assert info["choices"]["phi0"] == load_checkpoint(whole).info["choices"]["phi0"]
    assert info["config"]["loss"]["phi0"] == "auto"


def test_cached_features_agree(tmp_path):
    options = [*AUTO, "--eval.cluster-init=kmeans"]
    plain = tiny_run(tmp_path / "plain", *options)
    cached = tiny_run(
        tmp_path / "cached", *options, "--data.cache-features", f"--data.cache-dir={tmp_path / 'cache'}"
    )
    one, two = (load_checkpoint(run).info["choices"] for run in (plain, cached))
    assert one["condition"] == two["condition"] and one["phi0"] == pytest.approx(two["phi0"], abs=5e-3)
    losses = [
        [json.loads(line).get("contrast_loss") for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (plain, cached)
    ]
    pairs = [(a, b) for a, b in zip(*losses, strict=True) if a is not None]
    assert len(pairs) == 6 and all(a == pytest.approx(b, rel=0.05) for a, b in pairs)


def test_a_comparison_has_the_conditioned_row_and_every_method_the_condition(tmp_path):
    rows = ("frozen", "conditioned", "fixed", "hp", "stego", "ppap")
    options = [*AUTO, "--eval.cluster-init=kmeans", "--hp.consistency=0", "--hp.pool-size=8"]
    options += ["--stego.neighbours=2", "--compare.steps=3", "--compare.batch-size=4", "--compare.starts=1"]
    run = tiny_run(tmp_path / "run", *options, "--train.steps=2", "--compare.rows", *rows)
    record = json.loads((run / "comparison.json").read_text())
    assert list(record["summary"]) == ["frozen", "conditioned", "fixed", "stego", "hp", "ppap"]
    assert "frozen, conditioned" in (run / "report.md").read_text()


def test_the_folder_preset_needs_no_option_and_no_label(tmp_path, capsys):
    make_folder(tmp_path / "data", labels=False, count=8)
    model = [o for o in TINY if o.startswith("--model.") and not o.startswith("--model.condition")]
    options = ["--data.workers=0", "--train.steps=2", "--train.batch-size=4", "--data.classes=3"]
    options += ["--data.resolution=32", "--data.eval-resolution=32", f"--data.cache-dir={tmp_path / 'cache'}"]
    main(["folder", f"--data.root={tmp_path / 'data'}", *model, *options, f"--train.out={tmp_path / 'run'}"])
    out = capsys.readouterr().out
    assert "<- chosen" in out and "thresholds: " in out and "comparison: none" in out
    assert (tmp_path / "run" / "report.md").exists()


def test_the_report_says_what_was_chosen(tmp_path):
    run = tiny_run(tmp_path / "run", *AUTO, "--train.steps=1")
    assert json.loads((run / "config.json").read_text())["config"]["model"]["condition"] == "auto"
    chosen = load_checkpoint(run).info["choices"]
    assert f"condition {chosen['condition']}, phi0 {chosen['phi0']:g}" in (run / "report.md").read_text()


@pytest.mark.parametrize("clusters", [1, 2, 3])
def test_few_clusters_leave_room_for_ambiguous_patches(clusters):
    config = replace(folder(), model=replace(VIT, condition="centre"))
    choices, _ = choose(config, build_backbone(VIT), seen(), clusters)
    assert -1 < choices.psi0 < 0.95


def test_thresholds_are_not_looked_for_where_no_method_has_them():
    config = replace(folder(), method="stego", model=VIT)
    config = replace(config, compare=replace(config.compare, rows=("frozen", "stego")))
    choices, _ = choose(config, build_backbone(VIT), seen(), 4)
    assert choices.apply(config).loss.phi0 == LossConfig().phi0 and not choices.reasons


def test_cosines_within_a_hundredth_have_thresholds_too():
    rows = F.normalize(clustered(600, 24, seed=2, clusters=4) + 6 * F.normalize(torch.ones(24), dim=0), dim=1)
    assert SetSizes(rows, LossConfig(), seed=0).phi0(0.1).size == pytest.approx(0.1, rel=0.3)


@pytest.mark.parametrize(
    ("condition", "values", "error"),
    [
        ("drop:24", None, "has 24 channels; drop fewer"),
        ("clip:0.1", 1.0, "the same for every patch"),
        ("centre", float("nan"), "not finite"),
    ],
)
def test_features_that_have_no_map_are_refused(condition, values, error):
    features = seen().sample if values is None else torch.full((4, 24, 3, 3), values)
    with pytest.raises((UsageError, NumberError), match=error):
        fit(condition, survey_of(features).split)


def test_a_row_without_a_condition_is_left_out(tmp_path, capsys):
    options = ["--compare.rows", "frozen", "conditioned", "--compare.steps=2", "--compare.starts=1"]
    run = tiny_run(tmp_path / "run", "--train.steps=1", *options)
    assert list(json.loads((run / "comparison.json").read_text())["summary"]) == ["frozen"]


def test_a_folder_smaller_than_a_batch_is_refused_before_its_features(tmp_path):
    make_folder(tmp_path / "data", count=2)
    options = ["--model.weights=random", "--model.backbone=vit_tiny_patch16_224", "--data.workers=0"]
    with pytest.raises(DataError, match="batch"):
        main(
            ["folder", f"--data.root={tmp_path / 'data'}", *options, f"--data.cache-dir={tmp_path / 'cache'}"]
        )
    assert not (tmp_path / "cache").exists()


def test_what_is_said_to_be_chosen_is_what_the_method_uses():
    chosen = Choices(condition="clip:0.1", phi0=0.5, psi0=0.2, fixed_phi0=0.4, lr=3e-4)
    config = replace(folder(), method="hp")
    assert config.optim.lr == "auto"
    assert chosen.summary("hp") == f"condition clip:0.1, lr {chosen.apply(config).optim.lr:g}"
    assert chosen.summary("stego").endswith("lr 0.0005") and Choices(lr=None).summary("hp") == ""
    assert chosen.summary() == "condition clip:0.1, phi0 0.5, psi0 0.2, fixed phi0 0.4, lr 0.0003"
