"""Options and measures of ``pytest bench --benchmark-only``; ``--quick`` only checks that all of them run."""

import platform
from collections.abc import Callable

import pytest
import torch

from bench.machine import device_name, peak_memory, synchronise
from bench.shapes import SMALL, VITB16_CHUNK, VITS8_CHUNK, VITS16, VITS16_CHUNK, Shape

_MIB = 2**20


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="one round on the smallest shape")
    parser.addoption(
        "--photos", metavar="DIR", help="folder of photographs for the dense CRF; without: scenes"
    )


def pytest_generate_tests(metafunc):
    if "shape" in metafunc.fixturenames:
        quick = metafunc.config.getoption("--quick")
        shapes = [SMALL] if quick else [SMALL, VITS16_CHUNK, VITS16, VITB16_CHUNK, VITS8_CHUNK]
        metafunc.parametrize("shape", shapes, ids=str)


@pytest.fixture
def measure(benchmark, request):
    """Call measure(run, group): times `run`, puts peak memory, machine and versions into ``extra_info``.

    The group is a shape of the ops, or words.
    """

    def run_benchmark(run: Callable[[], object], group: Shape | str) -> None:
        if isinstance(group, Shape):
            group = f"{group.name}: N={group.patches} A={group.anchors} D={group.width}"
        benchmark.group = group
        benchmark.extra_info.update(
            peak_memory_mib=round(peak_memory(run) / _MIB, 1),
            device=device_name(),
            threads=torch.get_num_threads(),
            torch=torch.__version__,
            python=platform.python_version(),
        )

        def timed() -> None:
            run()
            synchronise()

        rounds = 1 if request.config.getoption("--quick") else 5
        benchmark.pedantic(timed, rounds=rounds, iterations=1, warmup_rounds=1)

    return run_benchmark
