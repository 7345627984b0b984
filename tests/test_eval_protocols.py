"""The evaluation word by word, the selected checkpoint, sets of seeds, and the noise of the cluster probe."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment

from ppap.data import build_datasets
from ppap.errors import UsageError
from ppap.eval import main
from ppap.evaluation.evaluate import evaluate
from ppap.nets.probes import ClusterProbe, LinearProbe
from ppap.reports.terminal import sets_hint
from ppap.settings.config import EvalConfig
from ppap.settings.presets import preset
from ppap.train import main as train
from tests.runs import TINY, tiny_run

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


@pytest.fixture(scope="module")
def scenes():
    from dataclasses import replace

    data = replace(preset("demo").data, scenes_val=5, scenes_size=32, eval_resolution=32, workers=0)
    return build_datasets(data, ("val",)).val


def code_of(batch):
    """A fixed map of images (B, 3, 32, 32) to a code (B, 12, 4, 4)."""
    return F.pixel_unshuffle(F.avg_pool2d(batch["image"], 4), 2)


def stated(dataset, probes, *, drop=False):
    """Published order: code up-sampled, probed, argmax, counts of the whole set, one matching, scores.

    Returns:
        cluster accuracy, cluster mIoU, linear accuracy, linear mIoU.
    """
    classes = dataset.classes
    clusters = classes if drop else len(probes[0].clusters)
    counts = [np.zeros((clusters, classes), np.int64), np.zeros((classes, classes), np.int64)]
    for i in range(len(dataset)):
        sample = dataset[i]
        code = code_of({"image": sample["image"][None]})
        code = F.interpolate(code, size=sample["label"].shape, mode="bilinear", align_corners=False)
        truth = sample["label"].numpy().ravel()
        for matrix, probe in zip(counts, probes, strict=True):
            pred = probe.logits(code)[0].argmax(dim=0).numpy().ravel()
            kept = (truth >= 0) & (truth < classes) & (pred >= 0) & (pred < len(matrix))
            np.add.at(matrix, (pred[kept], truth[kept]), 1)
    rows, columns = linear_sum_assignment(counts[0], maximize=True)
    matched = np.zeros((classes, classes), np.int64)
    matched[columns] = counts[0][rows]
    left_over = np.delete(counts[0], rows, axis=0).sum(axis=0)  # wrong for the classes that they are of
    found = []
    for matrix, missed in ((matched, left_over), (counts[1], 0 * left_over)):
        correct, union = matrix.diagonal(), matrix.sum(axis=0) + matrix.sum(axis=1) + missed
        union = union - correct
        found += [100 * correct.sum() / (matrix.sum() + missed.sum())]
        found += [100 * (correct / np.maximum(union, 1))[union > 0].mean()]
    return found


@pytest.mark.parametrize(("extra", "unmatched"), [(0, "wrong"), (3, "wrong"), (3, "drop")])
@torch.no_grad()
def test_the_evaluation_is_the_published_one_word_by_word(scenes, extra, unmatched):
    torch.manual_seed(extra)
    probes = ClusterProbe(12, scenes.classes + extra), LinearProbe(12, scenes.classes)
    config = EvalConfig(batch_size=2, unmatched=unmatched)
    result = evaluate(code_of, probes, scenes, config, patch_size=8, device=CPU)
    summary = result.summary()
    names = ("cluster_accuracy", "cluster_miou", "linear_accuracy", "linear_miou")
    assert [summary[name] for name in names] == pytest.approx(
        stated(scenes, probes, drop=unmatched == "drop"), abs=1e-9
    )
    cluster = result.plain["cluster"]
    assert len(cluster.assignment) == scenes.classes + extra
    assert cluster.assignment.count(None) == extra
    everything = 5 * 32 * 32
    assert (cluster.pixels == everything) == (unmatched == "wrong"), "only the published rule loses pixels"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that selects the best checkpoint, with three clusters too many."""
    out = tmp_path_factory.mktemp("best") / "run"
    selection = ["--train.selection=best", "--train.val-every=1", "--train.steps=4"]
    return tiny_run(
        out, *selection, "--train.extra-clusters=3", "--compare.steps=5", "--compare.batch-size=4"
    )


def test_the_report_takes_what_the_run_selects(run, tmp_path, capsys):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "cluster_miou" in line]
    scores = {line["step"]: {k: line[k] for k in line if k.endswith(("miou", "accuracy"))} for line in lines}
    best = max(scores, key=lambda step: (sum(scores[step].values()), step))
    final = json.loads((run / "evaluation-final.json").read_text())
    weights = final["provenance"]["weights"]
    assert final["summary"] == scores[best] and weights["step"] == best
    assert "labels chose it" in weights["selection"]
    manifest = json.loads((run / "checkpoints/best/manifest.json").read_text())
    assert weights["sha256"] == manifest["model.safetensors"]
    assert f"checkpoint: step {best}, the best sum" in (run / "report.md").read_text()
    for which, step in (("auto", best), ("last", 4)):
        out = tmp_path / f"{which}.json"
        main([str(run), "--which", which, "--eval.crf=none", f"--out={out}"])
        record = json.loads(out.read_text())
        assert record["summary"] == scores[step] and record["provenance"]["weights"]["step"] == step
    assert "asked for: last" in capsys.readouterr().out
    assert len(record["scores"]["plain"]["cluster"]["assignment"]) == 8 + 3


def test_predictions_know_clusters_without_a_class(run):
    from PIL import Image

    import ppap

    predictor = ppap.load(run)
    labels = predictor.predict(Image.new("RGB", (40, 32), (90, 120, 30)), resolution=32)
    assert -1 <= labels.min() and labels.max() < 8
    predictor.assignment = None
    assert len(predictor.names()) == 11


def test_refitted_probes_show_their_noise(run, tmp_path, capsys):
    options = ["--refit-clusters=3", "--eval.crf=none", f"--out={tmp_path / 'a.json'}"]
    main([str(run), *options])
    text = capsys.readouterr().out
    assert "| mean of 3 refitted |" in text and "| as scored above |" in text
    refit = json.loads((tmp_path / "a.json").read_text())["refit_clusters"]
    assert refit["seeds"] == [1, 2, 3]
    values = refit["cluster_miou"]["values"]
    assert len(set(values)) > 1, "probes from other seeds differ"
    cell = refit["cluster_miou"]
    assert (cell["min"], cell["max"]) == (min(values), max(values))
    assert cell["mean"] == pytest.approx(np.mean(values))
    assert cell["std"] == pytest.approx(np.std(values, ddof=1))


def test_a_set_of_seeds_is_measured_as_one(tmp_path, capsys):
    out = tmp_path / "set"
    train([*TINY, "--train.steps=1", "--eval.pictures=0", f"--train.out={out}", "--seeds", "0", "4"])
    results = json.loads((out / "results.json").read_text())
    assert results["rows"]["ppap"]["linear_miou"]["std"] > 0, "no comparison: the runs' own scores"
    main([str(out), "--eval.crf=none"])
    record = json.loads((out / "evaluation.json").read_text())
    assert record["summary"] == results["rows"]["ppap"]
    assert record["provenance"]["seed"] == [0, 4] and len(record["runs"]) == 2
    assert "seeds 0, 4: mean ± standard deviation" in capsys.readouterr().out


def test_what_cannot_be_combined_is_refused(run, tmp_path):
    near = [str(run), "--eval.protocol=neighbours"]
    with pytest.raises(UsageError, match="--refit-clusters measures a probe"):
        main([*near, "--refit-clusters=2"])
    with pytest.raises(UsageError, match="masks .* exists already"):
        main([*near, f"--eval.neighbours.masks={tmp_path}"])
    with pytest.raises(SystemExit):
        main([str(run), "--refit-clusters=-1"])


@pytest.mark.parametrize("tensor", ["code", "z", "guidance"])
def test_neighbours_of_any_labelled_data(run, tmp_path, tensor):
    out = tmp_path / "a.json"
    options = ["--eval.neighbours.resolution=32", "--eval.neighbours.upsample=2"]
    main(
        [
            str(run),
            "--eval.protocol=neighbours",
            f"--eval.neighbours.tensor={tensor}",
            *options,
            f"--out={out}",
        ]
    )
    record = json.loads(out.read_text())
    assert 0 < record["summary"]["neighbours_miou"] < 100 and record["scores"]["embeddings"] > 12
    assert record["provenance"]["config"]["eval"]["neighbours"]["tensor"] == tensor


def test_empty_sets_get_a_hint():
    assert "lower --loss.phi0" in sets_hint({"positives": 0.0, "negatives": 5.0})
    assert "raise --loss.psi0" in sets_hint({"positives": 3.0, "negatives": 0.0})
    assert sets_hint({"positives": 3.0, "negatives": 5.0}) is None and sets_hint({"loss": 1.0}) is None
