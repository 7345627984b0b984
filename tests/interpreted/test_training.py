"""Training and the GPU benchmark script on the Triton backend, at tiny size."""

import json
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
        options = ("--train.steps=20", "--train.val-every=0", "--train.save-every=20", "--optim.lr=0.01")
        run_dir = tiny_run(tmp_path / backend, *options)
        curves[backend] = [row["contrast_loss"] for row in rows(run_dir).values()]
    assert len(curves["torch"]) == 20 and curves["torch"][-1] < curves["torch"][0]
    assert curves["triton"] != curves["torch"], "both backends ran"
    assert curves["triton"] == pytest.approx(curves["torch"], abs=1e-4)


def test_the_gpu_script_can_be_rehearsed(tmp_path):
    command = [sys.executable, "-m", "bench.gpu", "--tiny", "--out", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=300)
    (table,) = tmp_path.glob("*.md")
    results = json.loads(table.with_suffix(".json").read_text())
    assert all(cell["ms"] > 0 for cell in results["cells"] if cell["note"] != "not built")
    assert {cell["form"] for cell in results["cells"]} >= {"triton fp32", "published fp32"}
    assert "| triton fp16 |" in table.read_text()
