"""Every method from the command line: trained, resumed, measured, predicted with, compared; and refusals."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import ppap
from ppap.cli import run
from ppap.errors import DataError, Stopped, UsageError
from ppap.eval import main as evaluate
from ppap.evaluation.neighbours import map_source
from ppap.kernels import PropagationConfig
from ppap.kernels.ppap_loss import reference
from ppap.methods.table import METHODS, TITLES
from ppap.predict import main as predict
from ppap.settings.config import HPConfig, LossConfig, StegoConfig
from ppap.settings.presets import demo, preset
from ppap.settings.published import published_hp, published_stego, with_method
from ppap.train import Trainer, main, parse_arguments
from tests.methods import tiny_engine
from tests.runs import TINY, edit_info, settled_demo, tiny_run

SMALL = [
    "--hp.dim=16",
    "--hp.pool-size=16",
    "--hp.warmup=1",
    "--hp.renew-every=2",
    "--stego.dim=16",
    "--stego.samples=3",
]
WIDTH = {"hp": 16, "stego": 16}
LOGS = {
    "frozen": set(),
    "hp": {
        "hp_loss",
        "consistency_loss",
        "positives",
        "specific_positives",
        "negatives",
        "specific_weight",
    },
    "stego": {"self_loss", "neighbour_loss", "random_loss"},
}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("PPAP_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "cache"))


def lines(run_dir):
    """Metrics without the checksums of their lines, which have the speed in them."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "crc32"} for row in rows]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_trained_measured_and_predicts(method, tmp_path, capsys):
    out = tmp_path / "run"
    arguments = ["--method", method, *SMALL, "--train.steps=3", "--train.val-every=0", "--eval.pictures=0"]
    tiny_run(out, *arguments)
    assert f"method {method}, " in capsys.readouterr().out
    steps = [line for line in lines(out) if "loss" in line]
    common = {"step", "epoch", "loss", "contrast_loss", "linear_loss", "cluster_loss", "grad_norm"}
    common.add("skipped_steps")
    if method != "frozen":  # whose code keeps everything
        common.add("neighbours_kept")
    assert set(steps[-1]) == common | {"images_per_s"} | LOGS.get(method, {"positives", "negatives"})
    assert (steps[-1]["contrast_loss"] == 0 == steps[-1]["grad_norm"]) == (method == "frozen")
    assert f"method `{method}`" in (out / "report.md").read_text()
    assert set(load_file(out / "checkpoints/last/model.safetensors")) >= {"linear.classifier.weight"}

    evaluate([str(out), f"--out={tmp_path / 'scores.json'}", "--device=cpu"])
    last = next(line for line in reversed(lines(out)) if "cluster_miou" in line)
    scores = json.loads((tmp_path / "scores.json").read_text())["scores"]["plain"]
    assert scores["cluster"]["miou"] == pytest.approx(last["cluster_miou"])

    if method == "hp":
        evaluate([str(out), "--frozen", "--frozen-steps=1", f"--out={tmp_path / 'frozen.json'}"])
        assert json.loads((tmp_path / "frozen.json").read_text())["frozen"] is True

    Image.new("RGB", (50, 40), (90, 120, 60)).save(tmp_path / "photo.png")
    predict([str(out), str(tmp_path / "photo.png"), f"--out={tmp_path / 'masks'}", "--resolution=32"])
    assert Image.open(tmp_path / "masks/photo.png").size == (50, 40)
    labels = ppap.load(out).predict(Image.open(tmp_path / "photo.png"), resolution=32)
    assert labels.shape == (40, 50)
    code = ppap.load(out).engine.code(torch.zeros(1, 3, 32, 32))
    assert code.shape == (1, WIDTH.get(method, 24), 4, 4)


@pytest.mark.parametrize("method", ["hp", "stego"])
def test_resuming_is_bitwise_the_same_run(method, tmp_path, monkeypatch):
    """Stopped in the second epoch, at a step that renews HP's pool."""
    options = [*SMALL, "--method", method, "--eval.pictures=0", "--train.save-every=0", "--train.val-every=0"]
    whole = tiny_run(tmp_path / "whole", *options)
    request = parse_arguments([*TINY, f"--train.out={tmp_path / 'part'}", "--train.steps=6", *options])
    trainer = Trainer(request.config, request.path)
    step = trainer.engine.train_step

    def stops(batch, number):
        values = step(batch, number)
        if number == 4:  # steps 0 to 4 are done
            monkeypatch.setattr(trainer, "_log", lambda *args: trainer._stop())
        return values

    monkeypatch.setattr(trainer.engine, "train_step", stops)
    with pytest.raises(Stopped, match="stopped at step 5 of 6"):
        trainer.run()
    torch.rand(5)
    main(["--resume", str(tmp_path / "part"), "--data.workers=1"])
    parts = [r / "checkpoints/last/model.safetensors" for r in (whole, tmp_path / "part")]
    assert parts[0].read_bytes() == parts[1].read_bytes()
    last = [{k: v for k, v in lines(r)[5].items() if k != "images_per_s"} for r in (whole,)]
    again = [row for row in lines(tmp_path / "part") if row.get("step") == 6 and "loss" in row]
    assert [{k: v for k, v in row.items() if k != "images_per_s"} for row in again] == last


def test_a_stop_while_pools_are_filled_saves(tmp_path):
    request = parse_arguments([*TINY, f"--train.out={tmp_path / 'run'}", *SMALL, "--method=hp"])
    trainer = Trainer(request.config, request.path)
    trainer.stop.asked = True
    with pytest.raises(Stopped, match="stopped at step 0 of "):
        trainer.run()
    assert (tmp_path / "run/checkpoints/last/state.pt").exists()
    assert not trainer._due(1), "no validation of what is not trained, when the run goes on"


@pytest.mark.parametrize("method", ["hp", "stego"])
def test_cached_features_train_alike(method, tmp_path):
    options = [*SMALL, "--method", method, "--hp.consistency=0", "--eval.pictures=0", "--train.steps=2"]
    plain = tiny_run(tmp_path / "plain", *options)
    cached = tiny_run(tmp_path / "cached", *options, "--data.cache-features")
    pairs = zip(lines(plain)[:2], lines(cached)[:2], strict=True)
    for one, two in pairs:
        # Flips at radii of rounded features are part of HP's difference.
        assert two["contrast_loss"] == pytest.approx(one["contrast_loss"], rel=0.05)


@pytest.mark.parametrize("method", ["hp", "stego"])
def test_sixteen_bit_autocast(method):
    engine = tiny_engine(
        method, hp=HPConfig(dim=8, pool_size=8), optim=replace(settled_demo().optim, amp="bf16")
    )
    loader = iter(engine.start(engine.images))
    for step in range(2):
        values = engine.train_step(next(loader), step)
        assert all(torch.isfinite(value) for value in values.values())
    assert engine.code(torch.zeros(1, 3, 32, 32)).dtype == torch.float32


def test_neighbours_compare_the_projection_of_methods_that_have_one():
    for method, width in (("ppap", 24), ("hp", 8)):
        engine = tiny_engine(method, hp=HPConfig(dim=8, pool_size=8))
        z = map_source(engine, "z")(torch.randn(2, 3, 32, 24))
        assert z.shape == (2, width, 4, 3)
        torch.testing.assert_close(z.norm(dim=1), torch.ones(2, 4, 3))
    with pytest.raises(UsageError, match="method stego does not have; give code or guidance"):
        map_source(tiny_engine("stego"), "z")


def test_rows_of_a_comparison_are_methods(tmp_path):
    rows = ["frozen", "tps", "ans", "stego", "hp", "ppap"]
    options = ["--compare.rows", *rows, "--compare.steps=2", "--compare.batch-size=4", "--compare.starts=1"]
    out = tiny_run(
        tmp_path / "run", *options, *SMALL, "--method=hp", "--train.steps=2", "--train.val-every=0"
    )
    record = json.loads((out / "comparison.json").read_text())
    assert set(record["summary"]) == set(rows)
    report = (out / "report.md").read_text()
    assert all(f"| {TITLES[name]} |" in report for name in rows)
    assert not (out / "pictures/positives.png").exists(), "hp has no propagation to draw"


@pytest.mark.parametrize(
    ("method", "switches"),
    [
        ("fixed", {"trustworthy_positives": False, "ambiguity_excluded": False}),
        ("tps", {"ambiguity_excluded": False}),
        ("ans", {"trustworthy_positives": False}),
        ("ppap", {}),
    ],
)
def test_methods_of_table_5(method, switches):
    """Positives and denominators of the four rows, from the definition of the sets."""
    engine = tiny_engine(method, loss=LossConfig(phi0=0.5, psi0=0.3, steps=2, anchor_divisor=1, chunk=8))
    cfg = PropagationConfig(phi0=0.5, psi0=0.3, steps=2, sigma_pos=3.0, sigma_amb=4.0, **switches)
    assert engine.method.propagation == cfg
    torch.manual_seed(0)
    x, z = torch.randn(8, 12) + 0.3, torch.nn.functional.normalize(torch.randn(8, 6), dim=1)
    got = engine.method.contrast(x, z, 0)
    rel = reference.propagate(x, torch.arange(8), cfg)
    f = torch.nn.functional.normalize(x, dim=1)
    own = ~torch.eye(8, dtype=torch.bool)
    if method in ("fixed", "ans"):
        assert torch.equal(rel.positive, (f @ f.T > 0.5) & own), "P0 around the anchor itself"
    if method in ("fixed", "tps"):
        assert torch.equal(rel.kept, own), "all others are negatives"
    assert got.positives == rel.positive.sum(1).float().mean()
    assert got.negatives == (rel.kept & ~rel.positive).sum(1).float().mean()


def test_clipping_can_be_off_and_leaves_hps_projection_alone():
    for limit, clipped in ((1e-3, True), (None, False)):
        engine = tiny_engine(
            "hp", hp=HPConfig(dim=8, pool_size=8), optim=replace(settled_demo().optim, clip_norm=limit)
        )
        norm = engine.train_step(next(iter(engine.start(engine.images))), 0)["grad_norm"]
        after = torch.cat([p.grad.flatten() for p in engine.net.head.parameters()]).norm()
        assert norm > 1e-2 and (after < 1.01e-3) == clipped
        assert engine.net.projection.weight.grad.norm() > 1e-2


def test_published_settings():
    hp = published_hp("potsdam3", "vitb8")
    assert (hp.method.dim, hp.method.temperature, hp.method.consistency, hp.method.negatives_kept) == (
        256,
        0.4,
        0,
        1,
    )
    assert (hp.method.pool_size, hp.method.renew_every, hp.method.warmup, hp.method.ema) == (
        1024,
        20,
        100,
        0.999,
    )
    assert (hp.optim.name, hp.optim.lr, hp.optim.weight_decay) == ("adamw", 5e-4, 0.1)
    assert (hp.optim.linear_lr, hp.optim.cluster_lr, hp.optim.clip_norm) == (1e-3, 5e-3, 10)
    assert (hp.train["epochs"], hp.train["val_every"]) == (10, 50)
    coco, city = published_hp("cocostuff27", "vits8"), published_hp("cityscapes27", "vits8")
    assert coco.method == HPConfig() and coco.train["epochs"] == 3
    assert city.method == HPConfig(temperature=0.6, renew_every=20, warmup=50, ema=0.999)
    with pytest.raises(
        UsageError, match="no settings for potsdam3 with vits8; there are cocostuff27 with vits8"
    ):
        published_hp("potsdam3", "vits8")
    active = published_stego()
    assert (active.method.weight_self, active.method.shift_random, active.method.dim) == (0.67, 0.46, 70)
    assert published_stego("cocostuff27-vits8").method == StegoConfig()
    assert active.optim.clip_norm is None and active.train["steps"] == 5000
    with pytest.raises(UsageError, match="no block 'cocostuff'; there are active, cocostuff27-vits8"):
        published_stego("cocostuff")


def test_a_method_brings_its_published_settings_where_there_are_any():
    base, city = preset("cityscapes-vitb8"), published_hp("cityscapes27", "vits8")
    assert (base.hp, base.stego) == (city.method, published_stego("cityscapes27").method)
    assert preset("potsdam-vitb8").hp == published_hp("potsdam3", "vitb8").method
    assert preset("cocostuff27-vits8").stego == published_stego("cocostuff27-vits8").method
    hp, stego = with_method(base, "hp"), with_method(base, "stego")
    assert (hp.optim, hp.train.epochs, hp.train.steps) == (city.optim, 30, None)
    assert stego.optim == published_stego().optim
    assert (stego.train.batch_size, stego.train.steps) == (16, 5000)
    for name in ("ppap", "tps"):
        assert with_method(base, name) == replace(base, method=name)
    rows = replace(demo().compare, rows=("colour", "frozen", "conditioned", "fixed", "stego"))
    assert with_method(demo(), "stego") == replace(demo(), method="stego", compare=rows)
    assert with_method(demo(), "ppap") == demo()
    assert with_method(demo(), "fixed").compare.rows == ("colour", "frozen", "conditioned", "fixed")
    assert not with_method(demo(), "hp").data.cache_features
    own, potsdam = with_method(preset("folder"), "hp"), published_hp("potsdam3", "vitb8").method
    assert own.data.cache_features, "one view of an image is enough for it"
    assert own.hp == replace(potsdam, renew_every=5, anchor_divisor=own.loss.anchor_divisor)
    assert own.hp.warmup < own.train.least_steps / 2
    assert own.stego == published_stego("cityscapes27").method
    request = parse_arguments(["potsdam-vitb8", "--method=hp", "--hp.dim=32", "--optim.lr=1e-3"])
    wanted = published_hp("potsdam3", "vitb8")
    assert request.config.hp == replace(wanted.method, dim=32)
    assert request.config.optim == replace(wanted.optim, lr=1e-3)


BAD = [
    pytest.param(
        ["demo", "--method=steg"], ["no method is called 'steg'", "did you mean 'stego'"], id="name"
    ),
    pytest.param(["demo", "--method=hp", "--data.cache-features"], ["--hp.consistency 0"], id="hp cached"),
    pytest.param(
        ["demo", "--data.cache-features", "--compare.rows", "hp"],
        ["--data.no-cache-features"],
        id="row cached",
    ),
    pytest.param(["demo", "--hp.negatives-kept=1.5"], ["--hp.negatives-kept is 1.5"], id="rho"),
    pytest.param(["demo", "--hp.pool-size=0"], ["--hp.pool-size is 0"], id="pool"),
    pytest.param(["demo", "--stego.weight-self=-1"], ["--stego.weight-self is -1"], id="weight"),
    pytest.param(["demo", "--stego.samples=0"], ["--stego.samples is 0"], id="samples"),
]


@pytest.mark.parametrize(("arguments", "words"), BAD)
def test_bad_settings_are_refused(arguments, words, tmp_path, capsys):
    try:
        code = run(main, [*arguments, f"--train.out={tmp_path / 'run'}"])
    except SystemExit as error:
        code = error.code
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert code == 2 and all(word in said for word in words), said
    assert not (tmp_path / "run").exists()


def test_checkpoints_of_other_methods_and_formats_are_told(tmp_path):
    out = tiny_run(tmp_path / "run", "--train.steps=1", "--eval.pictures=0", "--train.val-every=0")
    with pytest.raises(UsageError, match="--resume cannot change --method"):
        main(["--resume", str(out), "--method=hp"])
    edit_info(out / "checkpoints/last", lambda info: info["config"].update(method="hp"))
    with pytest.raises(
        DataError, match="agnostic_pool .* is it a checkpoint of another architecture or method"
    ):
        ppap.load(out / "checkpoints/last")
    edit_info(out / "checkpoints/last", lambda info: info.update(format=1))
    with pytest.raises(DataError, match="has checkpoint format 1, this ppap reads 2; train again"):
        ppap.load(out / "checkpoints/last")
