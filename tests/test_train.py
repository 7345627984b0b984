"""Training: the loop, its records, stopping, resuming, and refusals before anything is written."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image

from ppap.cli import run
from ppap.errors import DataError, NumberError, Stopped, UsageError
from ppap.evaluation.evaluate import evaluate as real_evaluate
from ppap.kernels import ppap_loss
from ppap.train import Trainer, main, parse_arguments
from tests.runs import TINY, make_folder, tiny_run


def rows(run_dir, key="loss"):
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line for line in lines if key in line}


def losses(run_dir):
    names = ("loss", "contrast_loss", "linear_loss", "cluster_loss", "positives", "negatives", "grad_norm")
    return {step: [row[name] for name in names] for step, row in rows(run_dir).items()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 6 steps that the tests only read."""
    return tiny_run(tmp_path_factory.mktemp("finished") / "run")


def test_a_run_leaves_what_it_promises(finished):
    names = {str(path.relative_to(finished)) for path in finished.rglob("*") if path.is_file()}
    checkpoint = {"model.safetensors", "config.json", "state.pt", "manifest.json"}
    assert names >= {"config.json", "metrics.jsonl", "report.md", "pictures/curves.png", "pictures/strip.png"}
    for name in ("best", "last"):
        assert {f"checkpoints/{name}/{file}" for file in checkpoint} <= names
    assert sorted(losses(finished)) == [1, 2, 3, 4, 5, 6]
    assert sorted(rows(finished, "cluster_miou")) == [3, 6]
    report = (finished / "report.md").read_text()
    assert "backbone: random weights; results are meaningless" in report
    assert "| cluster | no |" in report and "| linear | no |" in report


def test_the_loss_falls(tmp_path):
    # Every step sees every image and every patch as an anchor: what remains is the descent.
    everything = ["--train.batch-size=12", "--loss.anchor-divisor=1", "--model.guidance-dropout=0"]
    run_dir = tiny_run(
        tmp_path / "run", "--train.steps=20", "--optim.lr=0.01", "--train.val-every=0", *everything
    )
    values = [row["contrast_loss"] for row in rows(run_dir).values()]
    assert values[-1] < 0.98 * values[0]


@pytest.mark.parametrize("stop", [1, 3, 4])
@pytest.mark.parametrize("workers", [0, 2])
def test_resuming_is_bitwise_the_same_run(finished, tmp_path, stop, workers):
    """3 steps make an epoch here: stops in the first epoch, at its end, and in the second."""
    part = tiny_run(tmp_path / "run", f"--train.steps={stop}", f"--data.workers={workers}")
    main(["--resume", str(part), "--train.steps=6"])
    assert losses(part) == losses(finished)
    whole, again = (torch.load(r / "checkpoints/last/state.pt", weights_only=True) for r in (finished, part))
    assert torch.equal(whole["engine"]["rng"]["cpu"], again["engine"]["rng"]["cpu"])
    weights = [(r / "checkpoints/last/model.safetensors").read_bytes() for r in (finished, part)]
    assert weights[0] == weights[1]


def test_sixteen_bit_autocast_on_a_cpu(finished, tmp_path):
    other = tiny_run(tmp_path / "run", "--optim.amp=bf16")
    pairs = [(a[0], b[0]) for a, b in zip(losses(other).values(), losses(finished).values(), strict=True)]
    assert all(a == pytest.approx(b, rel=0.05) for a, b in pairs)
    assert any(a != b for a, b in pairs)


def test_another_seed_is_another_run(finished, tmp_path):
    other = tiny_run(tmp_path / "run", "--train.seed=1")
    assert losses(other) != losses(finished)


def test_an_interrupt_saves_and_says_how_to_go_on(finished, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "ppap.train", *TINY, f"--train.out={out}", "--train.steps=100000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if line.startswith("step 4/"):
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75, errors
    assert "Traceback" not in errors and f"--resume {out}" in errors
    step = torch.load(out / "checkpoints/last/state.pt", weights_only=True)["step"]
    assert step >= 4
    main(["--resume", str(out), f"--train.steps={step + 2}"])
    shared = {s: v for s, v in losses(out).items() if s <= 6}
    assert shared == {s: v for s, v in losses(finished).items() if s in shared}
    assert sorted(losses(out)) == list(range(1, step + 3)), "no step twice, none left out"


def test_a_stop_during_validation_saves_too(tmp_path, monkeypatch):
    def interrupted(*args, should_stop, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        return real_evaluate(*args, should_stop=should_stop, **options)

    monkeypatch.setattr("ppap.training.trainer.evaluate", interrupted)
    with pytest.raises(Stopped, match="stopped at step 3 of 6"):
        tiny_run(tmp_path / "run")
    monkeypatch.undo()
    main(["--resume", str(tmp_path / "run")])
    assert sorted(rows(tmp_path / "run", "cluster_miou")) == [3, 6], (
        "the validation that was cut off is made up"
    )


def test_a_run_that_was_stopped_before_its_report_is_not_finished(tmp_path, monkeypatch):
    run_dir = tiny_run(tmp_path / "run", "--train.steps=2")
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_compare", lambda self, stop: self._stop())
        with pytest.raises(Stopped):
            main(["--resume", str(run_dir), "--train.steps=3"])
    main(["--resume", str(run_dir)])  # the report of 2 steps is there still
    assert "checkpoint: step 3" in (run_dir / "report.md").read_text()


def test_signal_handlers_are_restored(finished, tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    tiny_run(tmp_path / "run", "--train.steps=1")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_resume_refuses_other_settings_and_other_folders(finished, tmp_path):
    with pytest.raises(UsageError, match="cannot change --loss.steps"):
        main(["--resume", str(finished), "--loss.steps=1"])
    with pytest.raises(UsageError, match="cannot change --train.batch-size;.*--train.val-every"):
        main(["--resume", str(finished), "--train.batch-size=2"])
    with pytest.raises(DataError, match="is no run directory"):
        main(["--resume", str(tmp_path)])


def test_a_checkpoint_is_no_run_to_resume(finished):
    last = finished / "checkpoints" / "last"
    before = (last / "config.json").read_bytes()
    with pytest.raises(
        DataError, match=f"is a checkpoint, not a run directory; give the run, such as {finished}"
    ):
        main(["--resume", str(last)])
    assert (last / "config.json").read_bytes() == before


def test_a_finished_run_may_be_resumed_and_keeps_its_records(tmp_path, capsys):
    run_dir = tiny_run(tmp_path / "run", "--train.steps=3")
    before = (run_dir / "metrics.jsonl").read_text()
    assignment = json.loads((run_dir / "checkpoints/last/config.json").read_text())["assignment"]
    report = (run_dir / "report.md").stat().st_mtime_ns
    capsys.readouterr()
    main(["--resume", str(run_dir)])
    said = capsys.readouterr().out
    assert "is finished: 3 steps are done" in said and "--train.steps" in said and "validation" not in said
    assert (run_dir / "report.md").stat().st_mtime_ns == report, "nothing is done again"
    main(["--resume", str(run_dir), "--eval.pictures=1"])  # another report
    assert "all steps are done; what is left" in capsys.readouterr().out
    assert (run_dir / "report.md").stat().st_mtime_ns > report
    assert (run_dir / "metrics.jsonl").read_text() == before
    with pytest.raises(UsageError, match="ask for 2 steps, .* has done 3; give as many or more"):
        main(["--resume", str(run_dir), "--train.steps=2"])
    main(["--resume", str(run_dir), "--train.steps=4", "--train.val-every=0"])
    info = json.loads((run_dir / "checkpoints/last/config.json").read_text())
    assert info["step"] == 4 and assignment is not None and info["assignment"] is not None


def test_the_state_of_a_gpu_run_resumes_on_a_cpu_and_back(finished):
    from ppap.methods.engine import load_engine
    from ppap.runs.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(finished, "last")
    engine = load_engine(checkpoint, torch.device("cpu"))
    state = checkpoint.state()["engine"]
    engine.load_training_state({**state, "scaler": {"scale": 1024.0}, "rng": {**state["rng"], "cuda": None}})
    # A scaler that is on takes an empty state, as a CPU saves it, for a fresh start.
    engine.scaler = torch.amp.GradScaler("cpu", enabled=True)
    engine.load_training_state(state)


def test_a_sigterm_to_the_process_group_saves(tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "ppap.train", *TINY, f"--train.out={out}", "--train.steps=100000"]
    process = subprocess.Popen(
        [*command, "--data.workers=2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    for line in process.stdout:
        if line.startswith("step 4/"):
            break
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 75 and "Traceback" not in errors, errors
    assert torch.load(out / "checkpoints/last/state.pt", weights_only=True)["step"] >= 4


def test_resume_without_the_last_checkpoint(finished, tmp_path):
    run_dir = tiny_run(tmp_path / "run", "--train.steps=1")
    (run_dir / "checkpoints" / "last" / "manifest.json").unlink()
    with pytest.raises(DataError, match="checkpoints/last"):
        main(["--resume", str(run_dir)])


def test_an_existing_run_is_never_overwritten(finished):
    before = (finished / "metrics.jsonl").read_text()
    with pytest.raises(UsageError, match="exists already; continue that run with --resume"):
        main([*TINY, f"--train.out={finished}"])
    assert (finished / "metrics.jsonl").read_text() == before


def test_a_folder_of_labelled_images(tmp_path):
    root = make_folder(tmp_path / "data")
    out = tmp_path / "run"
    main(
        ["folder", *TINY[5:], f"--data.root={root}", "--data.ignore-ids", "9", *random_vit(), *tiny_size(out)]
    )
    info = json.loads((out / "checkpoints/last/config.json").read_text())
    assert info["classes"] == 3 and sorted(info["assignment"]) == [0, 1, 2]
    assert "cluster_miou" in list(rows(out, "cluster_miou").values())[0]


def test_a_folder_of_unlabelled_images(tmp_path):
    root = make_folder(tmp_path / "data", labels=False)
    out = tmp_path / "run"
    main(["folder", *TINY[5:], f"--data.root={root}", "--data.classes=4", *random_vit(), *tiny_size(out)])
    assert "No labels, hence no scores." in (out / "report.md").read_text()
    assert (out / "pictures/strip.png").exists()
    assert not (out / "checkpoints/best").exists(), "without labels nothing can be best"
    assert "ppap.eval" not in (out / "report.md").read_text(), "there is nothing to measure"


def random_vit():
    return ["--model.backbone=vit_tiny_patch16_224", "--model.weights=random", "--model.patch-size=8"]


def tiny_size(out):
    return [f"--train.out={out}", "--train.steps=2"]


def nan_weights(tmp_path):
    source = tiny_run(tmp_path / "source", "--train.steps=1") / "checkpoints/last"
    from safetensors.torch import load_file, save_file

    tensors = load_file(source / "model.safetensors")
    name = next(name for name in tensors if name.endswith("blocks.0.mlp.fc1.weight"))
    tensors[name][0, 0] = torch.nan
    save_file(tensors, tmp_path / "nan.safetensors")
    sizes = ["--model.width=24", "--model.depth=2", "--model.heads=2", "--model.image-size=32"]
    return ["demo", f"--model.weights={tmp_path / 'nan.safetensors'}", "--model.backbone=auto", *sizes]


def broken_jpeg(tmp_path):
    root = make_folder(tmp_path / "data")
    path = root / "images" / "train" / "train2.jpg"
    path.write_bytes(path.read_bytes()[:-200])
    return ["folder", f"--data.root={root}", "--data.ignore-ids", "9"]


def stray_label(tmp_path):
    root = make_folder(tmp_path / "data")
    Image.new("L", (50, 40), 7).save(root / "labels" / "val" / "val1.png")
    return ["folder", f"--data.root={root}", "--data.classes=3", "--data.ignore-ids", "9"]


BAD = [
    pytest.param(lambda t: ["fodler"], 2, ["fodler", "did you mean 'folder'"], id="preset"),
    pytest.param(lambda t: ["--preset", "folder"], 2, ["--preset"], id="preset as an option"),
    pytest.param(lambda t: ["demo", "--train.sead", "3"], 2, ["--train.sead", "--train.seed"], id="field"),
    pytest.param(lambda t: ["demo", "--train.seed", "x"], 2, ["--train.seed", "'x'"], id="type"),
    pytest.param(lambda t: ["demo", "--loss.temperature", "0"], 2, ["temperature is 0"], id="value"),
    pytest.param(lambda t: ["demo", "--loss.temperature", "inf"], 2, ["temperature is inf"], id="infinite"),
    pytest.param(lambda t: ["demo", "--train.seed", "-1"], 2, ["seed is -1"], id="seed"),
    pytest.param(lambda t: ["demo", "--data.classes", "5"], 2, ["8 classes", "--data.classes"], id="classes"),
    pytest.param(lambda t: ["demo", "--train.device", "meta"], 2, ["meta", "give auto"], id="meta device"),
    pytest.param(lambda t: ["demo", "--train.device", "tpu9"], 2, ["tpu9", "give auto"], id="device"),
    pytest.param(
        lambda t: ["demo", "--optim.amp", "fp16", "--train.device=cpu"], 2, ["bf16"], id="fp16 on CPU"
    ),
    pytest.param(
        lambda t: ["demo", "--train.batch-size", "600"],
        3,
        ["512", "600", "--train.batch-size"],
        id="batch size",
    ),
    pytest.param(lambda t: ["folder", f"--data.root={t / 'none'}"], 3, ["none"], id="missing folder"),
    pytest.param(lambda t: ["folder"], 2, ["--data.root"], id="no folder given"),
    pytest.param(stray_label, 3, ["val1.png", "7", "--data.ignore-ids"], id="stray label"),
    pytest.param(broken_jpeg, 3, ["train2.jpg"], id="truncated JPEG"),
    pytest.param(
        lambda t: ["demo", f"--model.weights={t / 'w.pth'}", "--model.backbone=auto"],
        3,
        ["w.pth"],
        id="no weights",
    ),
    pytest.param(nan_weights, 4, ["blocks.0.mlp.fc1.weight"], id="NaN weights"),
]


@pytest.mark.parametrize(("arguments", "code", "words"), BAD)
def test_bad_input_is_refused_before_anything_is_written(
    arguments, code, words, tmp_path, capsys, monkeypatch
):
    given = arguments(tmp_path)
    out = tmp_path / "run"
    capsys.readouterr()
    try:
        found = run(main, [*given, f"--train.out={out}", "--train.steps=1"])
    except SystemExit as error:
        found = error.code
    errors = capsys.readouterr().err
    assert found == code
    assert "Traceback" not in errors
    for word in words:
        assert word in errors, errors
    assert not out.exists(), "no half-written run directory"


def test_weights_that_are_not_finite_stop_and_keep_the_last_checkpoint(tmp_path, monkeypatch):
    trainer = Trainer(*parse_arguments([*TINY, f"--train.out={tmp_path / 'run'}", "--train.steps=6"])[:3])
    step = trainer.engine.train_step

    def poisoned(batch, number):
        if number == 4:
            with torch.no_grad():
                trainer.engine.net.projection.weight[0, 0] = torch.nan
        return step(batch, number)

    monkeypatch.setattr(trainer.engine, "train_step", poisoned)
    with pytest.raises(
        NumberError, match="step 5: weights projection.weight are not finite; lower --optim.lr"
    ):
        trainer.run()
    state = torch.load(tmp_path / "run/checkpoints/last/state.pt", weights_only=True)
    assert state["step"] == 4


def test_weights_that_blow_up_in_the_last_step_name_it(tmp_path, capsys):
    options = ["--optim.lr=1e6", "--train.steps=1"]
    assert run(main, [*TINY, f"--train.out={tmp_path / 'run'}", *options]) == 4
    assert re.search(r"error: step 1: .* not finite; .*--optim.lr", capsys.readouterr().err)


def test_the_paths_of_new_runs_differ(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(time, "strftime", lambda *_: "now")
    path = parse_arguments(["demo"])[1]
    path.mkdir(parents=True)
    assert str(path) == "runs/demo-now" and str(parse_arguments([])[1]) == "runs/demo-now-2"


def test_backends_of_the_loss_train_alike(finished, tmp_path, monkeypatch):
    monkeypatch.setenv("PPAP_BACKEND", "torch")
    theirs = losses(finished)
    for step, values in losses(tiny_run(tmp_path / "run")).items():
        assert values == pytest.approx(theirs[step], rel=1e-4)


@pytest.mark.parametrize("variable", ["PPAP_BACKEND", "PPAP_CPU_ISA", "PPAP_AUTOTUNE"])
def test_wrong_variables_are_refused_before_anything_is_written(variable, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(variable, "nonsense")
    assert run(main, [*TINY, f"--train.out={tmp_path / 'other'}"]) == 2
    assert f"{variable} is 'nonsense'" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


def test_a_budget_too_small_for_one_anchor_is_a_usage_error(tmp_path, monkeypatch):
    def with_little(*args, **options):
        return ppap_loss(*args, **{**options, "memory_budget": 100})

    monkeypatch.setattr("ppap.methods.loss.ppap_loss", with_little)
    with pytest.raises(UsageError, match="one anchor needs .* raise --loss.memory-budget-mib"):
        main([*TINY, f"--train.out={tmp_path / 'run'}"])


def test_the_demo_runs_from_the_embedded_weights(tmp_path, monkeypatch):
    monkeypatch.setenv("PPAP_CACHE_DIR", str(tmp_path / "cache"))
    options = ["--data.scenes-train=16", "--data.scenes-val=4", "--train.steps=2", "--compare.steps=2"]
    main([*options, f"--train.out={tmp_path / 'run'}", "--train.device=cpu"])
    report = (tmp_path / "run" / "report.md").read_text()
    assert "embedded weights" in report and "meaningless" not in report
    for text in (
        "| plain colours |",
        "| frozen features |",
        "| fixed threshold |",
        "| PPAP |",
        "positives.png",
    ):
        assert text in report
