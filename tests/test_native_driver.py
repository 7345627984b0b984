"""The driver in C++, without Python: each instruction set of this machine against the portable form."""

import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from ppap.kernels import native
from tests.helpers import isas_to_build

ROOT = Path(__file__).parents[1]
pytestmark = [
    pytest.mark.skipif(native.reason() is not None, reason=str(native.reason())),
    pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed"),
]


def build(library: Path, program: Path) -> Path:
    """The driver linked to a library."""
    options = ["-std=c++17", "-Wall", "-Wextra", "-Werror", f"-Wl,-rpath,{library.parent}", "-pthread"]
    source = ROOT / "csrc" / "cpu" / "driver.cpp"
    subprocess.run(["g++", *options, source, library, "-o", program], check=True)
    return program


@pytest.fixture(scope="module")
def driver(tmp_path_factory) -> Path:
    """The driver of the installed library."""
    return build(native.FILE, tmp_path_factory.mktemp("driver") / "driver")


@pytest.fixture(scope="module")
def driver_of_pairs(tmp_path_factory) -> Path:
    """The driver of a library whose portable form multiplies bf16, as few processors can."""
    folder = tmp_path_factory.mktemp("pairs")
    flags = ["-O1", "-DPPAP_EMULATE_PAIRS"]
    command = [
        sys.executable,
        "csrc/build.py",
        "--out",
        folder / "pairs.so",
        "--isas",
        *isas_to_build(),
        "--",
    ]
    subprocess.run([*command, *flags], cwd=ROOT, check=True, capture_output=True)
    return build(folder / "pairs.so", folder / "driver")


def run(*command: Path | str) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True)


def check_agreement(program: Path, isas: Iterable[str]) -> None:
    done = run(program)
    assert done.returncode == 0, done.stdout
    said = dict(line.split(": ") for line in done.stdout.splitlines())
    wanted = {name: "as portable" for name in isas}
    assert {name: text for name, text in said.items() if text != "not on this processor"} == wanted


def test_instruction_sets_agree(driver):
    check_agreement(driver, native.available_isas())


def test_products_of_bf16_agree_with_those_of_float32(driver_of_pairs):
    """What a processor with AVX512-BF16 compares: pairs of bf16 in one form, float32 in the other."""
    check_agreement(driver_of_pairs, [*isas_to_build(), "portable"])


@pytest.mark.parametrize(
    ("what", "complaint"),
    [
        ("exact", "loss 1 1 19: other masks"),
        ("far", "bf16 loss 1 1 19: another mask far from its threshold"),
        ("many", "bf16 loss 1 33 19: too many other masks"),
    ],
)
def test_a_spoilt_mask_is_refused(what, complaint, driver):
    done = run(driver, "--spoil", what)
    assert done.returncode == 1 and done.stdout.strip().endswith(complaint)


def test_a_bit_of_bf16_on_its_threshold_may_differ(driver):
    assert run(driver, "--spoil", "tie").returncode == 0
