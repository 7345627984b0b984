"""The comparison table: equal treatment of its rows, seeds, what is written, error paths."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from ppap.data.transforms import MEAN, STD
from ppap.errors import DataError, Stopped, UsageError
from ppap.evaluation import comparison
from ppap.evaluation.comparison import (
    cluster_losses,
    colour_code,
    fit_probes,
    variant,
)
from ppap.evaluation.tables import table
from ppap.kernels import native
from ppap.methods.loss import PPAPLoss
from ppap.methods.ppap import SWITCHES
from ppap.nets.probes import ClusterProbe
from ppap.settings.config import CompareConfig, Config
from ppap.train import Trainer, main, parse_arguments
from tests.runs import TINY, make_folder, settled_demo, tiny_run

CPU = torch.device("cpu")
ROWS = ("colour", "frozen", "fixed", "random", "ppap")
COMPARE = ["--compare.rows", *ROWS, "--compare.steps=4", "--compare.batch-size=4", "--compare.starts=2"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny_run(tmp_path_factory.mktemp("compare") / "run", *COMPARE, "--loss.phi0=0.3")


def test_a_run_ends_with_the_table(run):
    record = json.loads((run / "comparison.json").read_text())
    assert list(record["summary"]) == list(ROWS)
    for name, summary in record["summary"].items():
        assert set(summary) == {"cluster_miou", "cluster_accuracy", "linear_miou", "linear_accuracy"}, name
        assert all(0 <= value <= 100 for value in summary.values())
    report = (run / "report.md").read_text()
    for name in ROWS:
        assert f"| {comparison.TITLES[name]} |" in report
    for name in ("comparison", "positives"):
        assert (run / "pictures" / f"{name}.png").exists() and f"pictures/{name}.png" in report


@pytest.mark.skipif(native.reason() is not None, reason=str(native.reason()))
def test_scores_with_crf_get_a_table_of_their_own(tmp_path):
    options = [
        "--compare.rows",
        "colour",
        "ppap",
        *COMPARE[-3:],
        "--eval.crf=native",
    ]
    run = tiny_run(tmp_path / "run", *options, "--train.val-every=0")
    report = (run / "report.md").read_text()
    assert "| with CRF [%] | cluster accuracy |" in report and report.count("| PPAP |") == 2
    summary = json.loads((run / "comparison.json").read_text())["summary"]
    assert {"cluster_miou", "crf/cluster_miou", "crf/linear_accuracy"} <= set(summary["ppap"])


@pytest.mark.parametrize("crf", ["none", "native"])
@pytest.mark.parametrize("init", ["kmeans", "linkage"])
def test_cluster_scores_are_means_over_clusterings(tmp_path, init, crf):
    if crf == "native" and native.reason() is not None:
        pytest.skip(str(native.reason()))
    options = ["--compare.rows", "frozen", *COMPARE[-3:], f"--eval.crf={crf}", f"--eval.cluster-init={init}"]
    one = tiny_run(tmp_path / "one", *options)
    three = tiny_run(tmp_path / "three", *options, "--compare.clusterings=3")
    first, record = (json.loads((run / "comparison.json").read_text()) for run in (one, three))
    scores = record["scores"]["frozen"]
    other = {"kmeans": "linkage", "linkage": "kmeans"}[init]
    assert {name: len(found) for name, found in scores["clusterings"].items()} == {"": 2, other: 3}
    every = [scores["plain"]["cluster"], *scores["clusterings"][""]]
    assert len({score["miou"] for score in every}) > 1, "of several seeds"
    assert scores["plain"] == first["scores"]["frozen"]["plain"], "the first is that of a run with one alone"
    assert scores["crf"] == first["scores"]["frozen"]["crf"]
    for key in ("miou", "accuracy"):
        mean = float(np.mean([score[key] for score in every]))
        assert record["summary"]["frozen"][f"cluster_{key}"] == pytest.approx(mean)
        mean = float(np.mean([score[key] for score in scores["clusterings"][other]]))
        assert record["summary"]["frozen"][f"{other}/cluster_{key}"] == pytest.approx(mean)
    if crf == "native":
        assert record["summary"]["frozen"]["crf/without/cluster_miou"] == scores["plain"]["cluster"]["miou"]
        assert "| of the same clusters without CRF |" in (three / "report.md").read_text()
    reports = [(run / "report.md").read_text() for run in (one, three)]
    assert "mean ± standard deviation of the scores of 3 clusterings" in reports[1]
    miou = [score["miou"] for score in every]
    assert f" | {np.mean(miou):.1f} ± {np.std(miou, ddof=1):.1f} | " in reports[1]
    assert not {"clusterings", "±"} & set(reports[0].split())
    title = comparison.FITTED[other]
    head = f"| [%] | cluster accuracy | cluster mIoU | cluster mIoU by {title} | linear accuracy |"
    assert head in reports[1] and title not in first["summary"]["frozen"]


def test_cached_features_give_the_same_rows(run, tmp_path):
    options = [*COMPARE, "--loss.phi0=0.3", "--data.cache-features", f"--data.cache-dir={tmp_path / 'cache'}"]
    cached = json.loads((tiny_run(tmp_path / "run", *options) / "comparison.json").read_text())["summary"]
    plain = json.loads((run / "comparison.json").read_text())["summary"]
    assert cached["colour"] == plain["colour"]
    for name in ROWS:
        for key, value in plain[name].items():
            assert cached[name][key] == pytest.approx(value, abs=1.0), (name, key)


def test_variants_start_from_the_same_weights_and_see_the_same_batches(tmp_path):
    trainer = Trainer(*parse_arguments([*TINY, f"--train.out={tmp_path / 'run'}", "--train.steps=6"])[:3])
    trainer.run()
    same = comparison.train_variant(trainer.config, trainer.sources.train, trainer.engine, lambda: False)
    theirs = trainer.engine.weights()
    for name, value in same.weights().items():
        assert torch.equal(value, theirs[name]), name
    with pytest.raises(InterruptedError):
        comparison.train_variant(trainer.config, trainer.sources.train, trainer.engine, lambda: True)


def test_settings_of_the_rows():
    config = replace(settled_demo(), compare=CompareConfig(fixed_phi0=0.9))
    fixed = variant(config, "fixed")
    assert fixed == replace(config, method="fixed", loss=replace(config.loss, phi0=0.9))
    for phi0 in (None, "same"):
        own = replace(config, compare=CompareConfig(fixed_phi0=phi0))
        assert variant(own, "fixed") == replace(own, method="fixed")
    assert variant(config, "tps") == replace(config, method="tps")


def test_random_positives_are_as_many_and_elsewhere():
    generator = torch.Generator().manual_seed(0)
    guidance = torch.randn(40, 6, generator=generator)
    z = torch.nn.functional.normalize(torch.randn(40, 5, generator=generator), dim=1)
    config = replace(settled_demo().loss, phi0=0.3, psi0=0.1, anchor_divisor=1)
    right, control = PPAPLoss(config, 3), PPAPLoss(config, 3, SWITCHES["random"])
    a, b, again, later = (
        right(guidance, z, 7),
        control(guidance, z, 7),
        control(guidance, z, 7),
        control(guidance, z, 8),
    )
    assert a.positives == b.positives > 0 and a.negatives == b.negatives
    assert b.loss == again.loss and b.loss != a.loss and later.loss != b.loss


def test_probes_do_not_depend_on_what_was_drawn_before():
    codes, labels = torch.randn(6, 4, 3, 3), torch.randint(0, 3, (6, 24, 24))
    settings = CompareConfig(steps=3, batch_size=4, starts=3)
    both = []
    for _ in range(2):
        torch.rand(7)
        both.append(
            fit_probes(
                codes, labels, 3, Config(compare=settings), seed=5, patch_size=8, device=torch.device("cpu")
            )
        )
    (a, b), (c, d) = both
    assert torch.equal(a.clusters, c.clusters) and torch.equal(b.classifier.weight, d.classifier.weight)


def test_the_cluster_probe_with_the_least_loss_is_kept(monkeypatch):
    codes, labels = torch.randn(6, 4, 3, 3), torch.zeros(6, 24, 24, dtype=torch.int64)
    made = []

    class Probe(comparison.ClusterProbe):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(comparison, "ClusterProbe", Probe)
    settings = Config(compare=CompareConfig(steps=2, batch_size=3, starts=4))
    kept, _ = fit_probes(codes, labels, 3, settings, seed=0, patch_size=8, device=CPU)
    losses = [probe.loss(codes).item() for probe in made]
    assert len(made) == 4 and len(set(losses)) == 4 and kept is made[int(np.argmin(losses))]


def test_cluster_losses_are_those_of_the_probes():
    torch.manual_seed(0)
    starts, code = [ClusterProbe(6, 4) for _ in range(3)], torch.randn(2, 6, 5, 3)
    got = cluster_losses(starts, code)
    got.sum().backward()
    gradients = [start.clusters.grad.clone() for start in starts]
    for start, loss, gradient in zip(starts, got, gradients, strict=True):
        start.clusters.grad = None
        start.loss(code).backward()
        assert loss.item() == pytest.approx(start.loss(code).item(), abs=1e-6)
        assert torch.allclose(gradient, start.clusters.grad, atol=1e-6)


def test_colours_by_hand():
    image = torch.zeros(1, 3, 8, 12)
    image[:, 0, :, :8] = 2.0
    image[:, 1, :4, :8] = 1.0
    code = colour_code(8)(image)[0]
    assert code.shape == (6, 1, 2)
    assert code[:, 0, 0].tolist() == pytest.approx([2, 0.5, 0, 0, 0.5, 0])
    assert not code[:, 0, 1].any()
    assert len(MEAN) == len(STD) == 3


def test_table_of_several_seeds():
    cells = ("cluster_accuracy", "cluster_miou", "linear_accuracy", "linear_miou")
    one = {"ppap": dict.fromkeys(cells, 10.0), "frozen": dict.fromkeys(cells, 5.0)}
    two = {"ppap": dict.fromkeys(cells, 12.0), "frozen": dict.fromkeys(cells, 5.0)}
    lines = table([one, two])
    assert lines[2] == "| frozen features |" + " 5.0 ± 0.0 |" * 4
    assert lines[3] == "| PPAP |" + " 11.0 ± 1.4 |" * 4
    assert table([one])[3] == "| PPAP |" + " 10.0 |" * 4


SEEDS = [*TINY, "--train.steps=2", "--train.val-every=0", *COMPARE[:1], "frozen", "ppap", *COMPARE[-3:]]


def test_seeds_make_a_run_each_and_a_table(tmp_path, capsys):
    out = tmp_path / "set"
    main([*SEEDS, f"--train.out={out}", "--seeds", "3", "5"])
    results = json.loads((out / "results.json").read_text())
    assert results["seeds"] == [3, 5]
    for seed in (3, 5):
        assert (
            json.loads((out / f"seed-{seed}" / "config.json").read_text())["config"]["train"]["seed"] == seed
        )
    ppap = results["rows"]["ppap"]["cluster_miou"]
    assert ppap["mean"] == pytest.approx(np.mean(ppap["values"])) and len(set(ppap["values"])) == 2
    assert ppap["std"] == pytest.approx(np.std(ppap["values"], ddof=1))
    origin = results["provenance"]
    assert origin["seed"] == [3, 5] and len({weights["sha256"] for weights in origin["weights"]}) == 2
    assert "±" in (out / "report.md").read_text() and "±" in capsys.readouterr().out
    before = (out / "results.json").read_text()
    main(["--resume", str(out)])  # nothing is left to train
    assert (out / "results.json").read_text() == before
    with pytest.raises(UsageError, match="no other option"):
        main(["--resume", str(out), "--train.steps=9"])
    moved = out.rename(tmp_path / "moved")
    main(["--resume", str(moved / "seed-5"), "--train.steps=3"])
    with pytest.raises(UsageError, match="seed-5 was trained with other settings"):
        main(["--resume", str(moved)])
    (moved / "seeds.json").write_text("{")
    with pytest.raises(DataError, match="damaged"):
        main(["--resume", str(moved)])


def test_an_interrupted_set_goes_on(tmp_path, monkeypatch):
    out, calls = tmp_path / "set", []

    def stopped(self, stop):
        calls.append(self.config.train.seed)
        self._stop()

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_compare", stopped)
        with pytest.raises(Stopped, match=f"--resume {out}"):
            main([*SEEDS, f"--train.out={out}", "--seeds", "0", "1"])
    assert calls == [0] and not (out / "results.json").exists()
    main(["--resume", str(out)])
    assert list(json.loads((out / "results.json").read_text())["rows"]) == ["frozen", "ppap"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--seeds", "1", "1"], "different numbers"),
        (["--seeds", "1", "demo"], "preset before"),
        (["--seeds", "1", str(2**70)], "give 0 to"),
        (["--seeds", "1", "--model.weights=nowhere.pth"], "does not exist"),
    ],
)
def test_impossible_seeds(tmp_path, options, text):
    with pytest.raises((UsageError, DataError), match=text):
        main([*SEEDS, f"--train.out={tmp_path / 'set'}", *options])
    assert not any((tmp_path / "set").glob("*"))


def test_a_comparison_needs_validation_labels(tmp_path):
    root = make_folder(tmp_path / "data", labels=False)
    arguments = [*TINY, "--data.kind=folder", f"--data.root={root}", "--compare.rows", "frozen"]
    with pytest.raises(UsageError, match="needs validation labels"):
        main([*arguments, f"--train.out={tmp_path / 'run'}"])
    assert not (tmp_path / "run").exists()


def test_a_comparison_needs_training_labels(tmp_path):
    root = make_folder(tmp_path / "data")
    shutil.rmtree(root / "labels" / "train")
    arguments = [*TINY, "--data.kind=folder", f"--data.root={root}", "--compare.rows", "frozen"]
    with pytest.raises(UsageError, match="needs training labels"):
        main([*arguments, f"--train.out={tmp_path / 'run'}"])
