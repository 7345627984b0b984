"""Training and the GPU benchmark script on the Triton backend, at tiny size."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import tiny_run
from tests.test_train import rows

ROOT = Path(__file__).parents[2]


def test_a_run_has_the_loss_curve_of_the_torch_backend(tmp_path, monkeypatch):
    curves = {}
    for backend in ("torch", "triton"):
        monkeypatch.setenv("PPAP_BACKEND", backend)
        options = ("--train.steps=8", "--train.val-every=0", "--train.save-every=8", "--optim.lr=0.01")
        run_dir = tiny_run(tmp_path / backend, *options)
        curves[backend] = [row["contrast_loss"] for row in rows(run_dir).values()]
    assert len(curves["torch"]) == 8 and curves["torch"][-1] < curves["torch"][0]
    assert curves["triton"] != curves["torch"], "both backends ran"
    assert curves["triton"] == pytest.approx(curves["torch"], abs=1e-4)


def test_the_gpu_script_can_be_rehearsed(tmp_path):
    forms = ("triton fp32", "graph fp16", "torch fp16", "published fp32")
    done = rehearse(tmp_path, "--forms", *forms).communicate(timeout=300)[0]
    (table,) = tmp_path.glob("*.md")
    results = json.loads(table.with_suffix(".json").read_text())
    cells = {(cell["form"], cell["part"]): cell for cell in results["cells"]}
    assert {form for form, _ in cells} == set(forms)
    assert all(cell["ms"] > 0 for (form, _), cell in cells.items() if form != "graph fp16"), done
    assert cells["graph fp16", "forward + backward"]["note"] == "no GPU"
    assert "| triton fp32 |" in table.read_text() and "== loss: done" in done


def test_a_gpu_script_that_is_killed_leaves_its_table(tmp_path):
    process = rehearse(tmp_path, "--forms", "torch fp32", "triton fp32")
    for line in process.stdout:
        if line.startswith("tiny: triton fp32"):
            break
    process.kill()
    process.communicate()
    results = json.loads(next(tmp_path.glob("*.json")).read_text())
    measured = {(cell["form"], cell["note"]) for cell in results["cells"]}
    assert {("torch fp32", ""), ("triton fp32", ""), ("triton fp32", "not measured")} <= measured
    assert "not measured" in next(tmp_path.glob("*.md")).read_text()


def rehearse(folder, *options):
    """Start the script where neither tyro nor a GPU is."""
    (folder / "bare").mkdir()
    (folder / "bare" / "sitecustomize.py").write_text("import sys\nsys.modules['tyro'] = None\n")
    command = [sys.executable, "-m", "bench.gpu", "--tiny", "--out", str(folder), *options]
    environment = {**os.environ, "PYTHONPATH": str(folder / "bare")}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)
