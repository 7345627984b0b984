"""A small share of every experiment of ``make stress``, in one process that forks."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_small_share_of_every_experiment(tmp_path):
    out = tmp_path / "stress.md"
    command = [sys.executable, "-m", "tests.stress", "--share", "0.002", "--seed", "2", f"--out={out}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    text = out.read_text()
    assert text.count("\n| ") > 18 and "wrong" not in text
