"""Evaluation of checkpoints, and of the evaluation's own arithmetic."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ppap import eval as evaluation
from ppap.cli import run
from ppap.data import build_datasets
from ppap.errors import DataError, UsageError
from ppap.eval import main
from ppap.evaluation.evaluate import PROBES, evaluate, evaluate_each, pixel_products, pixel_scores
from ppap.kernels import native
from ppap.nets.probes import ClusterProbe, LinearProbe
from ppap.reports import measure as reports_measure
from ppap.reports.measure import write_record
from ppap.settings.config import EvalConfig
from ppap.settings.presets import preset
from ppap.train import main as train
from tests.runs import edit_info, make_folder, tiny_run


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """What `auto` takes here: scores are compared exactly with those of training on the CPU."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return tiny_run(tmp_path_factory.mktemp("finished") / "run", "--train.steps=3")


def probes(width=12, classes=8, seed=0):
    torch.manual_seed(seed)
    return ClusterProbe(width, classes), LinearProbe(width, classes)


def scenes(count=7):
    import dataclasses

    data = dataclasses.replace(
        preset("demo").data, scenes_val=count, scenes_size=32, eval_resolution=32, workers=0
    )
    return build_datasets(data, ("val",)).val


def code_of(batch):
    """A fixed map of images (B, 3, 32, 32) to a code (B, 12, 4, 4)."""
    return F.pixel_unshuffle(F.avg_pool2d(batch["image"], 4), 2)


def test_pixel_scores_are_those_of_the_resized_code():
    cluster, linear = probes()
    code = torch.randn(1, 12, 4, 5, generator=torch.Generator().manual_seed(1))
    resized = F.interpolate(code, size=(32, 40), mode="bilinear", align_corners=False)[:, :, :30, :37]
    got = pixel_scores(code, (cluster, linear), 8, (30, 37))
    centres = F.normalize(cluster.clusters, dim=1)
    cosine = torch.einsum("kd,dhw->khw", centres, F.normalize(resized[0], dim=0))
    torch.testing.assert_close(got[0], cosine, atol=1e-5, rtol=0)
    torch.testing.assert_close(got[1], linear.logits(resized)[0], atol=1e-5, rtol=0)
    undivided = pixel_products(code, (cluster, linear), 8, (30, 37))[0][0]
    assert torch.equal(undivided.argmax(0), got[0].argmax(0))


@pytest.mark.parametrize("workers", [0, 2])
def test_scores_do_not_depend_on_batches_or_workers(workers):
    dataset = scenes()
    results = []
    for batch_size in (1, 3, 7):
        config = EvalConfig(batch_size=batch_size)
        results.append(
            evaluate(
                code_of,
                probes(),
                dataset,
                config,
                patch_size=8,
                device=torch.device("cpu"),
                workers=workers,
            )
        )
    assert results[0].to_dict() == results[1].to_dict() == results[2].to_dict()
    assert set(results[0].plain) == set(PROBES) and not results[0].crf
    assert results[0].plain["linear"].pixels == 7 * 32 * 32


@pytest.mark.skipif(native.reason() is not None, reason=str(native.reason()))
def test_the_crf_runs_beside_the_plain_scores():
    config = EvalConfig(crf="native")
    result = evaluate(code_of, probes(), scenes(3), config, patch_size=8, device=torch.device("cpu"))
    plain = evaluate(code_of, probes(), scenes(3), EvalConfig(), patch_size=8, device=torch.device("cpu"))
    assert result.plain == plain.plain
    assert set(result.crf) == set(PROBES)
    assert {"crf/cluster_miou", "linear_accuracy"} <= set(result.summary())


@pytest.fixture
def no_library(monkeypatch):
    from ppap.kernels.dense_crf import native_impl

    monkeypatch.setattr(native_impl, "unavailable_reason", lambda: "not built: install a C++ compiler")


def test_a_crf_that_cannot_run_is_refused(no_library, finished):
    config = EvalConfig(crf="native")
    with pytest.raises(UsageError, match="crf native cannot run here: not built.*crf pydensecrf or none"):
        evaluate(code_of, probes(), scenes(2), config, patch_size=8, device=torch.device("cpu"))
    with pytest.raises(UsageError, match="crf native cannot run here"):
        main([str(finished), "--eval.crf", "native"])
    with pytest.raises(UsageError, match="crf native cannot run here"):
        train(["--resume", str(finished), "--eval.crf", "native"])


def test_without_the_library_the_rest_is_reported(no_library, finished, tmp_path, capsys):
    out = tmp_path / "evaluation.json"
    main([str(finished), "--out", str(out)])
    record = json.loads(out.read_text())
    note = "no scores with CRF, the native one cannot run here: not built: install a C++ compiler"
    assert note in capsys.readouterr().out
    assert record["scores"]["notes"] == [note] and not record["scores"]["crf"]


def test_the_command_prints_and_writes(finished, capsys):
    main([str(finished)])
    text = capsys.readouterr().out
    assert "mIoU" in text and "sky" in text
    assert text.count("backbone: random weights; results are meaningless") == 2
    first = finished / "evaluation.json"
    record = json.loads(first.read_text())
    origin = record["provenance"]
    if native.reason() is None:
        assert "native library" in origin["crf"]
        assert set(record["scores"]["crf"]) == set(PROBES) and "CRF by ppap" in text
    assert origin["seed"] == 0 and len(record["classes"]) == 8
    assert origin["weights"]["step"] == 3 and "decided beforehand" in origin["weights"]["selection"]
    assert "decided beforehand" in text
    assert "meaningless" in record["warning"]
    main([str(finished)])
    again = json.loads((finished / "evaluation-2.json").read_text())
    assert again["scores"] == record["scores"], "an evaluation can be repeated and overwrites nothing"


def test_evaluation_equals_the_validation_in_training(finished, tmp_path):
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    wanted = next(row for row in rows if row["step"] == 3 and "cluster_miou" in row)
    main([str(finished), "--which", "last", "--eval.crf=none", f"--out={tmp_path / 'last.json'}"])
    scores = json.loads((tmp_path / "last.json").read_text())["scores"]["plain"]
    for probe in PROBES:
        assert scores[probe]["miou"] == wanted[f"{probe}_miou"]
        assert scores[probe]["accuracy"] == wanted[f"{probe}_accuracy"]


def test_the_frozen_backbone(finished, tmp_path):
    out = [tmp_path / f"{i}.json" for i in range(2)]
    for path in out:
        main([str(finished), "--frozen", "--frozen-steps", "4", "--eval.crf=none", "--out", str(path)])
    records = [json.loads(path.read_text()) for path in out]
    assert records[0] == records[1] and records[0]["frozen"] is True
    main([str(finished), "--eval.crf=none", "--out", str(tmp_path / "plain.json")])
    assert json.loads((tmp_path / "plain.json").read_text())["scores"] != records[0]["scores"]


def test_options_may_stand_before_the_checkpoint(finished, tmp_path, capsys):
    main(["--which", "last", "--out", str(tmp_path / "a.json"), str(finished)])
    assert "mIoU" in capsys.readouterr().out and (tmp_path / "a.json").exists()


def test_results_survive_the_next_save(tmp_path):
    run_dir = tiny_run(tmp_path / "run", "--train.steps=1")
    main([str(run_dir / "checkpoints" / "last")])
    from ppap.train import main as train

    train(["--resume", str(run_dir), "--train.steps=2"])
    assert (run_dir / "evaluation.json").exists()


def test_the_crf_may_see_the_published_picture():
    from ppap.evaluation.evaluate import _picture_source

    dataset = scenes(1)
    original = _picture_source(dataset, "original")(0, None)
    published = _picture_source(dataset, "published")(0, None)
    assert (_picture_source(dataset, "published")(0, dataset[0]["image"]) == published).all()
    assert (original == dataset.pixels(0)).all()
    difference = original.astype(int) - torch.as_tensor(published).numpy().astype(int)
    assert set(np.unique(difference)) == {0, 1}, "truncation makes some values 1 too low"


def test_another_labelled_set(finished, tmp_path):
    root = make_folder(tmp_path / "data")
    out = tmp_path / "other.json"
    data = ["--data.kind=folder", f"--data.root={root}", "--data.ignore-ids", "9"]
    main([str(finished), *data, f"--out={out}"])
    scores = json.loads(out.read_text())["scores"]["plain"]["cluster"]
    assert "vehicle" in scores["absent"] and scores["pixels"] == 6 * 32 * 32 - ignored(root)


def ignored(root):
    """Pixels with the ignored id in the validation crops."""
    from ppap.settings.config import DataConfig

    data = DataConfig(root=str(root), ignore_ids=(9,), classes=8, eval_resolution=32, resolution=32)
    return sum(int((sample["label"] < 0).sum()) for sample in iterate(build_datasets(data, ("val",)).val))


def iterate(dataset):
    return (dataset[i] for i in range(len(dataset)))


def test_bad_input(finished, tmp_path, capsys):
    assert run(main, [str(tmp_path / "none")]) == 3
    assert "no checkpoint or run directory" in capsys.readouterr().err
    for wrong in (["--which", "worst"], ["--frozen", "--frozen-steps", "0"]):
        with pytest.raises(SystemExit) as error:
            main([str(finished), *wrong])
        assert error.value.code == 2
    with pytest.raises(DataError, match="3 classes"):
        main([str(finished), "--data.kind=folder", f"--data.root={make_folder(tmp_path / 'a')}",
        "--data.classes=3",
              "--data.class-names", "--data.ignore-ids", "9"])  # fmt: skip
    unlabelled = make_folder(tmp_path / "b", labels=False)
    with pytest.raises(DataError, match="nothing can be measured"):
        main([str(finished), "--data.kind=folder", f"--data.root={unlabelled}"])
    existing = tmp_path / "mine.json"
    existing.write_text("precious")
    with pytest.raises(UsageError, match="exists already"):
        main([str(finished), f"--out={existing}"])
    assert existing.read_text() == "precious"
    with pytest.raises(SystemExit) as error:
        main([])
    assert error.value.code == 2


def measuring_nothing(monkeypatch):
    """Counts evaluations that begin; each gives a record at once."""
    begun = []

    def measure(checkpoint, arguments):
        begun.append(checkpoint)
        return {"summary": 1}, ["the table"]

    monkeypatch.setattr(evaluation, "measure", measure)
    return begun


@pytest.mark.parametrize("below", ["x.json", "deeper/x.json"])
def test_a_file_that_cannot_be_written_is_refused_before_the_work(finished, tmp_path, monkeypatch, below):
    begun = measuring_nothing(monkeypatch)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(DataError, match=r"cannot write .*x.json \(.*file is no folder\); give another --out"):
        main([str(finished), f"--out={tmp_path / 'file' / below}"])
    assert not begun
    with pytest.raises(DataError, match="cannot write .*give another --out"):
        write_record(tmp_path / "file" / below, {})
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("out", ["given", "default"])
def test_a_folder_without_permission_is_refused_before_the_work(finished, tmp_path, monkeypatch, out):
    begun = measuring_nothing(monkeypatch)
    options = [f"--out={tmp_path / 'new' / 'x.json'}"] if out == "given" else []
    folder = tmp_path if out == "given" else finished
    monkeypatch.setattr("os.access", lambda path, mode: path != folder)  # root may write everywhere
    with pytest.raises(DataError, match=f"no permission to write in {folder}"):
        main([str(finished), *options])
    assert not begun and not (tmp_path / "new").exists()


def test_results_that_cannot_be_written_are_shown(finished, tmp_path, monkeypatch, capsys):
    def full(aside, out):
        raise OSError(28, "No space left on device")

    begun = measuring_nothing(monkeypatch)
    monkeypatch.setattr(reports_measure, "_publish", full)
    with pytest.raises(DataError, match="No space left on device"):
        main([str(finished), f"--out={tmp_path / 'x.json'}"])
    assert begun and "the table" in capsys.readouterr().out and not list(tmp_path.iterdir())


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "no hard links"])
def test_a_record_is_written_whole_or_not_at_all(tmp_path, monkeypatch, links):
    def refuse(source, target):
        raise PermissionError(1, "no hard links here")

    def stopped(self, text):
        real(self, text[: len(text) // 2])
        raise KeyboardInterrupt

    if not links:
        monkeypatch.setattr("os.link", refuse)
    out, real = tmp_path / "new" / "x.json", Path.write_text
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", stopped)
        with pytest.raises(KeyboardInterrupt):
            write_record(out, {"values": list(range(100))})
    assert not list(out.parent.iterdir())
    write_record(out, {"a": 1})
    with pytest.raises(FileExistsError):
        write_record(out, {"a": 2})
    assert json.loads(out.read_text()) == {"a": 1} and list(out.parent.iterdir()) == [out]


def test_a_checkpoint_of_another_architecture(finished, tmp_path):
    folder = tmp_path / "last"
    shutil.copytree(finished / "checkpoints/last", folder)

    def deeper(info):
        info["backbone"]["depth"] = 3

    edit_info(folder, deeper)
    with pytest.raises(DataError, match="blocks.2.*another architecture"):
        main([str(folder)])


def test_several_pairs_share_one_pass():
    passes = []

    def counted(batch):
        passes.append(len(batch["image"]))
        return code_of(batch)

    pairs = [probes(), (probes(seed=3)[0], None)]
    several = {"patch_size": 8, "device": torch.device("cpu")}
    found = evaluate_each(counted, pairs, scenes(), EvalConfig(batch_size=3), **several)
    assert passes == [3, 3, 1]
    alone = [evaluate(code_of, pair, scenes(), EvalConfig(batch_size=3), **several) for pair in pairs]
    assert [one.to_dict() for one in found] == [one.to_dict() for one in alone]
    assert "linear" in found[0].plain and "linear" not in found[1].plain
