"""Runs whose labels come later, are many, or cannot be used: scored by what there is, and nothing is lost."""

import json

import numpy as np
import pytest
from PIL import Image

from ppap.cli import run as command
from ppap.errors import DataError
from ppap.eval import main as evaluate
from ppap.evaluation.metrics import ConfusionMatrix
from ppap.train import main as train
from ppap.training import trainer
from tests.trained import folder_run, striped_folder


def unlabelled(root):
    striped_folder(root, (0, 1, 2))
    (root / "labels").rename(root / ".kept")
    return root


@pytest.fixture(scope="module")
def later(tmp_path_factory):
    """A run trained without labels to 9 clusters, and labels of 3 ids that came afterwards."""
    folder = tmp_path_factory.mktemp("later")
    root = unlabelled(folder / "data")
    run = folder_run(root, folder / "run", ["--data.classes=9"])
    (root / ".kept").rename(root / "labels")
    return run


def scores(run, out, *options):
    evaluate([str(run), "--eval.crf=none", f"--out={out}", *options])
    return json.loads(out.read_text())


def test_classes_come_from_labels_that_came_later(later, tmp_path, capsys):
    record = scores(later, tmp_path / "a.json")
    cluster = record["scores"]["plain"]["cluster"]
    assert record["classes"] == ["class 0", "class 1", "class 2"] and len(cluster["iou"]) == 3
    assert len(cluster["assignment"]) == 9 and "linear" not in record["scores"]["plain"]
    assert {*record["summary"]} == {"cluster_miou", "cluster_accuracy"}
    printed = capsys.readouterr().out
    assert "9 clusters for 3 classes: 6 beyond one to one, each counts as its most frequent" in printed
    assert "no linear probe: it was trained without labels" in printed
    left = scores(later, tmp_path / "b.json", "--eval.extra-clusters=left-out")
    assert left["scores"]["plain"]["cluster"]["pixels"] < cluster["pixels"]
    assert sum(one is not None for one in left["scores"]["plain"]["cluster"]["assignment"]) == 3


def test_frozen_and_refitted_probes_of_labels_that_came_later(later, tmp_path):
    record = scores(later, tmp_path / "a.json", "--frozen", "--refit-clusters=2")
    assert len(record["scores"]["plain"]["linear"]["iou"]) == 3, "that linear probe saw the labels"
    assert len(record["refit_clusters"]["cluster_miou"]["values"]) == 2


def test_with_crf(later, tmp_path):
    from ppap.evaluation.crf import native_crf_missing

    if native_crf_missing():
        pytest.skip(native_crf_missing())
    evaluate([str(later), "--eval.crf=native", f"--out={tmp_path / 'a.json'}"])
    assert {*json.loads((tmp_path / "a.json").read_text())["scores"]["crf"]} == {"cluster"}


def test_another_number_of_classes_blames_what_was_given(tmp_path, capsys):
    run = folder_run(striped_folder(tmp_path / "data", (0, 80, 160)), tmp_path / "run", ["--train.steps=1"])
    with pytest.raises(SystemExit):
        evaluate([str(run), "--data.classes=2"])
    errors = " ".join(capsys.readouterr().err.split())
    assert (
        "--data.classes is 2" in errors and "by the training, are 3" in errors and "class-names" not in errors
    )


def test_more_classes_than_clusters_are_refused(tmp_path):
    root = unlabelled(tmp_path / "data")
    run = folder_run(root, tmp_path / "run", ["--data.classes=2"])
    (root / ".kept").rename(root / "labels")
    with pytest.raises(DataError, match="3 classes.*2 clusters; train with --data.classes 3"):
        evaluate([str(run), "--eval.crf=none"])


def test_validation_labels_alone_score_the_clusters_alone(tmp_path):
    root = striped_folder(tmp_path / "data", (0, 1, 2))
    (root / "labels/train").rename(root / ".kept")
    run = folder_run(root, tmp_path / "run")
    final = json.loads((run / "evaluation-final.json").read_text())
    assert {*final["summary"]} == {"cluster_miou", "cluster_accuracy"}
    assert "no linear probe" in (run / "report.md").read_text()
    again = scores(run, tmp_path / "a.json")
    assert again["summary"] == final["summary"]


def test_left_out_clusters_do_not_count():
    matrix = ConfusionMatrix(2, 3)
    matrix.counts[:] = matrix.counts.new_tensor([[5, 1], [0, 4], [3, 0]])
    rest = matrix.without([2])
    assert rest.scores((0, 1, None)).pixels == 10 and matrix.counts.sum() == 13


def test_more_than_a_hundred_classes(tmp_path, capsys):
    root = striped_folder(tmp_path / "data", tuple(range(0, 240, 2)), size=240)
    run = folder_run(root, tmp_path / "run", ["--data.resolution=128", "--data.eval-resolution=128"])
    for options in ([], ["--frozen", "--refit-clusters=1"]):
        record = scores(run, tmp_path / f"{len(options)}.json", *options)
        assert len(record["classes"]) == 120 and len(record["scores"]["plain"]["linear"]["iou"]) == 120
    assert "pixel accuracy" in capsys.readouterr().out


@pytest.mark.parametrize("error", [DataError("no labelled pixel"), MemoryError(), ValueError("x")])
def test_whatever_the_evaluation_says_the_training_is_saved(tmp_path, monkeypatch, error):
    root = striped_folder(tmp_path / "data", (0, 1, 2))

    def fails(*args, **options):
        raise error

    monkeypatch.setattr(trainer, "evaluate", fails)
    with pytest.raises(Exception):  # noqa: B017 - the error above, as it may be worded
        folder_run(root, tmp_path / "run")
    monkeypatch.undo()
    info = json.loads((tmp_path / "run/checkpoints/last/config.json").read_text())
    assert info["step"] == 4
    train(["--resume", str(tmp_path / "run")])
    assert (tmp_path / "run/report.md").exists()


def test_validation_labels_without_a_class_are_seen_before_the_first_step(tmp_path, capsys):
    root = striped_folder(tmp_path / "data", (0, 1, 2))
    for path in (root / "labels/val").iterdir():
        Image.fromarray(np.full((40, 40), 255, np.uint8)).save(path)
    code = command(
        train,
        ["folder", f"--data.root={root}", f"--train.out={tmp_path / 'run'}", "--model.weights=embedded"],
    )
    assert code == 3 and not (tmp_path / "run").exists()
    assert "the validation labels hold no class (only ids 255)" in capsys.readouterr().err
