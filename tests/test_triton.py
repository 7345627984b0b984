"""Triton without a GPU: kernels in the interpreter, and compiled ahead of time for every architecture.

The interpreter needs a process of its own, see ``tests/interpreted``.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import triton

from bench import aot
from bench.aot_table import Figures, Line, Table
from ppap.kernels import availability, available_backends, environment, proxy_average
from ppap.kernels.tiles import autotune, launch
from ppap.kernels.tiles.launch import Launch

ROOT = Path(__file__).parents[1]
INTERPRETED = sorted(path.name for path in (ROOT / "tests" / "interpreted").glob("test_*.py"))
RESULTS = ROOT / "bench" / "results" / "aot.md"
TILE_KERNELS = ("similarity", "mask_sum", "log_sum_exp", "weights")
ROW_KERNELS = (
    *("rows", "flags", "list", "sizes", "finish", "combine", "group", "add_rows", "claim", "scalars"),
    *("to_public", "from_public"),
)

interpreting = os.environ.get("TRITON_INTERPRET") == "1"
compiles = pytest.mark.skipif(interpreting, reason="Triton was imported to interpret, it cannot compile")


@pytest.mark.skipif(interpreting, reason="the tests in tests/interpreted run in this process already")
@pytest.mark.parametrize("file", INTERPRETED)
def test_kernels_in_the_interpreter(file):
    """In a process of its own: whether Triton interprets is decided when it is imported."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "--show-capture=no", "-p", "no:cacheprovider"]
    command.append(f"tests/interpreted/{file}")
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, (done.stdout + done.stderr)[-8000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout


def faults(line: Line, found: Figures) -> list[str]:
    """What keeps a kernel from running well, or at all."""
    wrong = {
        "spills": found.spills > 0,
        "matrix instructions wait": found.serialised,
        "too much shared memory": found.shared > aot.SHARED_LIMIT[line.architecture],
        "no matrix instructions": line.kernel.split()[0] in TILE_KERNELS and not found.matrix,
    }
    return [f"{' '.join(line)}: {what}: {found}" for what, there in wrong.items() if there]


def check_hardware(architecture: str) -> None:
    """Compile everything; hold the figures to the hardware where the compiler is one that we chose them with.

    What a compiler of another day makes of the kernels is for the report to show: it breaks no promise.
    """
    found = dict(aot.worst(aot.guarded_calls(architecture), architecture))
    kernels = {line.kernel.split()[0] for line in found}
    assert kernels == {*TILE_KERNELS, *ROW_KERNELS}
    wrong = [fault for line, figures in found.items() for fault in faults(line, figures)]
    tried = Table.read(RESULTS).columns
    if triton.__version__ not in tried:
        pytest.skip(
            f"every kernel compiles, {len(wrong)} faults; bench/results/aot.md is about Triton "
            f"{', '.join(tried)}, not {triton.__version__}: python -m bench.aot shows what it makes of them"
        )
    assert not wrong, "\n".join(wrong)


@compiles
@pytest.mark.parametrize("architecture", aot.TARGETS)
def test_compiled_kernels_keep_to_the_hardware(architecture):
    check_hardware(architecture)


@compiles
def test_a_compiler_of_another_day_is_reported_not_judged(monkeypatch):
    monkeypatch.setattr(aot, "resources", lambda call, architecture: Figures(255, 80, 0, True, False))
    monkeypatch.setattr(triton, "__version__", "99.0.0")
    with pytest.raises(pytest.skip.Exception, match="not 99.0.0: python -m bench.aot"):
        check_hardware("sm_80")
    monkeypatch.setattr(triton, "__version__", list(Table.read(RESULTS).columns)[0])
    with pytest.raises(AssertionError, match="sm_80 mask_sum .*: spills: 255 / 80"):
        check_hardware("sm_80")


@compiles
def test_the_table_of_resources_has_every_kernel_of_every_version():
    """The figures are the compilers'; the lines must be those of today's configurations, without a fault."""
    lines = {
        aot.line_of(call, architecture)
        for architecture in aot.TARGETS
        for width in (384, 768)
        for call in aot.guarded_calls(architecture, width)
    }
    for version, column in Table.read(RESULTS).columns.items():
        assert set(column) == lines, f"{version}: make aot"
        assert not [fault for line, figures in column.items() for fault in faults(line, figures)], version


def test_columns_of_other_versions_stay():
    old, new = Line("sm_80", "finish", "4x512 w4"), Line("sm_80", "combine", "4x256 w4 s3")
    figures = Figures(48, 0, 64, False, False), Figures(90, 8, 2048, True, True)
    table = (
        Table()
        .with_column("3.10.0", {old: figures[0], new: figures[1]})
        .with_column("3.9.0", {new: figures[0]})
    )
    assert table.columns == {"3.9.0": {new: figures[0]}, "3.10.0": {new: figures[1]}}
    assert table.text().endswith("| sm_80 | combine | 4x256 w4 s3 | 48 / 0 / 64 | 90 / 8 / 2048 m w |\n")


def test_a_table_is_read_as_it_was_written(tmp_path):
    old, new = Line("sm_80", "finish", "4x512 w4"), Line("sm_80", "combine", "4x256 w4 s3")
    table = Table(
        {"3.6.0": {old: Figures(1, 2, 3, True, False)}, "3.8.0": {new: Figures(4, 5, 6, False, True)}}
    )
    (tmp_path / "table.md").write_text(table.text())
    assert Table.read(tmp_path / "table.md") == table


@pytest.mark.parametrize("architecture", launch.TABLE)
def test_configurations_fit_together(architecture):
    """Masks are padded to one height of row tiles, and a step must divide what it walks over."""
    table = launch.TABLE[architecture]
    assert {name.removesuffix("/split") for name in table} == set(launch.KERNELS)
    assert len({config.block_m for config in table.values()}) == 1
    for name, config in table.items():
        assert launch.fits(name.removesuffix("/split"), config, 64), f"{name}: {config}"
        assert config.block_n in (128, 256)


@compiles
def test_without_a_gpu_the_reason_is_said():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert "TRITON_INTERPRET=1" in available_backends()["triton"]
    with pytest.raises(RuntimeError, match="does not run on cpu tensors; TRITON_INTERPRET=1"):
        proxy_average(torch.eye(3), torch.eye(3), torch.zeros(3), impl="triton")


def test_without_triton_the_remedy_is_said(monkeypatch):
    monkeypatch.setattr(availability.importlib.util, "find_spec", lambda name: None)
    assert "pip install triton" in availability._probe("triton")


def test_a_search_is_asked_for_by_one(monkeypatch):
    assert not environment.autotune_wanted()
    monkeypatch.setenv("PPAP_AUTOTUNE", "1")
    assert environment.autotune_wanted()
    monkeypatch.setenv("PPAP_AUTOTUNE", "false")
    with pytest.raises(ValueError, match="PPAP_AUTOTUNE is 'false'; give 0 or 1"):
        environment.autotune_wanted()


@pytest.fixture
def search(tmp_path, monkeypatch):
    """fastest() with given milliseconds per configuration, None for one that does not run."""
    monkeypatch.setenv("PPAP_CACHE_DIR", str(tmp_path))
    autotune._known.cache_clear()
    tried = []

    def run(times: dict[Launch, float | None]) -> Launch:
        shipped, *others = times
        current = []

        def go(config: Launch) -> None:
            tried.append(config)
            current[:] = [config]
            if times[config] is None:
                raise triton.runtime.errors.OutOfResources(300_000, 200_000, "shared memory")

        def timer(call) -> float:
            call()
            return times[current[0]]

        return autotune.fastest(("similarity", 384), torch.device("cpu"), shipped, others, go, timer)

    yield run, tried, tmp_path
    autotune._known.cache_clear()


def test_a_search_takes_the_fastest_and_remembers_it(search):
    run, tried, folder = search
    slow, fast, broken = Launch(), Launch(warps=8), Launch(stages=9)
    assert run({slow: 2.0, broken: None, fast: 1.0}) == fast
    assert tried == [slow, broken, fast]
    autotune._known.cache_clear()
    assert run({slow: 2.0, broken: None, fast: 1.0}) == fast, "from the file"
    assert len(tried) == 3
    (file,) = (folder / "autotune").iterdir()
    assert json.loads(file.read_text())["similarity 384"]["warps"] == 8


def test_a_spoilt_file_of_findings_is_searched_anew(search):
    run, tried, folder = search
    run({Launch(): 1.0})
    (file,) = (folder / "autotune").iterdir()
    unusable = {"similarity 384": {"block_m": 256}}  # of another version: masks are padded to other tiles
    for count, text in enumerate(["{", "[]", json.dumps(unusable)], start=2):
        file.write_text(text)
        autotune._known.cache_clear()
        assert run({Launch(): 1.0}) == Launch()
        assert len(tried) == count


def test_findings_that_cannot_be_kept_are_still_used(search, monkeypatch, caplog):
    run, _, folder = search
    (folder / "file").write_text("")
    monkeypatch.setenv("PPAP_CACHE_DIR", str(folder / "file"))
    autotune._known.cache_clear()
    assert run({Launch(): 2.0, Launch(warps=8): 1.0}) == Launch(warps=8)
    assert "findings are not kept" in caplog.text


def test_a_search_tries_only_what_can_run():
    for kernel in launch.KERNELS:
        others = launch.alternatives(kernel, launch.TABLE["sm_90"][kernel])
        assert len(others) == len(set(others)) > 10
        assert {config.block_m for config in others} == {128}
    assert not launch.fits("similarity", Launch(block_k=128), 192)
