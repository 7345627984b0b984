"""Options and measures of ``pytest bench --benchmark-only``; ``--quick`` only checks that all of them run."""

import platform
from collections.abc import Callable

import pytest
import torch

from bench.machine import device_name, matrix_rate, peak_memory, synchronise
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

    The group is a shape of the ops, or words. `products`, with a shape: how many products of anchors x
    patches x channels the op cannot do without; their rate is then printed as a share of ``torch.mm``'s.
    """

    def run_benchmark(run: Callable[[], object], group: Shape | str, products: int = 0) -> None:
        shape = group if isinstance(group, Shape) else None
        if shape is not None:
            group = f"{shape.name}: N={shape.patches} A={shape.anchors} D={shape.width}"
        benchmark.group = group
        quick = request.config.getoption("--quick")
        if not quick:
            benchmark.extra_info.update(peak_memory_mib=round(peak_memory(run) / _MIB, 1))
        benchmark.extra_info.update(
            device=device_name(),
            threads=torch.get_num_threads(),
            torch=torch.__version__,
            python=platform.python_version(),
        )

        def timed() -> None:
            run()
            synchronise()

        benchmark.pedantic(timed, rounds=1 if quick else 5, iterations=1, warmup_rounds=0 if quick else 1)
        if shape is not None and products:
            add_rate(benchmark, shape, products)

    return run_benchmark


def add_rate(benchmark, shape: Shape, products: int) -> None:
    """Rate of the products [GF/s], and of ``torch.mm`` measured right after, in float32."""
    flops = products * 2 * shape.patches * shape.anchors * shape.width
    benchmark.extra_info["gflops"] = round(flops / benchmark.stats.stats.min / 1e9, 1)
    rate = matrix_rate(shape.anchors, shape.patches, shape.width)
    benchmark.extra_info["mm_gflops"] = round(rate / 1e9, 1)


def pytest_terminal_summary(terminalreporter, config):
    """Shares of the bound below the table of times."""
    session = getattr(config, "_benchmarksession", None)
    rated = [one for one in getattr(session, "benchmarks", []) if "gflops" in one.extra_info]
    if not rated:
        return
    terminalreporter.section(
        "necessary products, in GF/s and as a share of torch.mm (float32) in the same run"
    )
    for one in sorted(rated, key=lambda one: one.group):
        rate, bound = one.extra_info["gflops"], one.extra_info["mm_gflops"]
        terminalreporter.write_line(f"{rate:9.1f} of {bound:9.1f} ({rate / bound:4.0%})  {one.name}")
