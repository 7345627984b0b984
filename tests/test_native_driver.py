"""The driver in C++, without Python: each instruction set of this machine against the portable form."""

import shutil
import subprocess
from pathlib import Path

import pytest

from ppap.kernels import native

SOURCE = Path(__file__).parents[1] / "csrc" / "cpu" / "driver.cpp"


@pytest.mark.skipif(native.reason() is not None, reason=str(native.reason()))
@pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")
def test_instruction_sets_agree(tmp_path):
    program = tmp_path / "driver"
    library = native._FILE
    options = ["-std=c++17", "-Wall", "-Wextra", "-Werror", f"-Wl,-rpath,{library.parent}", "-pthread"]
    subprocess.run(["g++", *options, SOURCE, library, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    said = dict(line.split(": ") for line in done.stdout.splitlines())
    wanted = {name: "as portable" for name in native.available_isas()}
    assert {name: text for name, text in said.items() if text != "not on this processor"} == wanted
