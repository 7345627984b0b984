"""The command: sections in their order, each within its share of the time, results on disk as they come."""

import argparse
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bench.gpu import checks, crf, peers, profile, tiles, worker
from bench.gpu.cells import FORMS, SHAPES, TINY, Cell, all_keys
from bench.gpu.clock import matrix_rate
from bench.gpu.results import SECTIONS, Results

ROOT = Path(__file__).parents[2]
# Seconds that a section may take at most; all of them together fit eight minutes.
SECONDS = {
    "build": 90,
    "loss": 140,
    "tests": 90,
    "profile": 30,
    "peers": 40,
    "crf": 30,
    "sanitize": 60,
    "tiles": 240,
}
PEER_ROWS, TINY_PEER_ROWS = 12_544, 130
"""Queries of the losses of other packages."""
PROFILED = SHAPES[:3]
PROFILED_FORMS = ("triton fp16", "triton fp32")


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parsed options."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description="Builds the native libraries for the GPU at hand, times the loss in all forms, other "
        "packages' losses and the dense CRF, runs the tests and compute-sanitizer. DEVICE.json and DEVICE.md "
        "are written after every finding.",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "bench" / "results",
        metavar="DIR",
        help="folder of the results (default bench/results)",
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=[*SECTIONS, "tiles"],
        default=list(SECTIONS),
        metavar="SECTION",
        help=f"of {', '.join(SECTIONS)} (default: all of these), tiles (launch configurations, 4 minutes)",
    )
    parser.add_argument(
        "--forms",
        nargs="+",
        choices=FORMS,
        default=list(FORMS),
        metavar="FORM",
        help=f"of {', '.join(FORMS)}",
    )
    parser.add_argument("--minutes", type=float, default=8, help="time for everything [minutes] (default 8)")
    parser.add_argument(
        "--tiny", action="store_true", help="tiny shapes, also on a CPU (TRITON_INTERPRET=1): a rehearsal"
    )
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--warm", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--compile", nargs=2, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--one-step", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


class Run:
    """The sections of one call."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.gpu = torch.cuda.is_available()
        self.device = torch.device("cuda" if self.gpu else "cpu")
        name = torch.cuda.get_device_name() if self.gpu else platform.machine()
        self.results = Results(name, TINY if options.tiny else SHAPES, options.out)
        self.rounds = 1 if options.tiny else 10
        self.end = time.monotonic() + 60 * options.minutes

    def build(self, _seconds: float) -> str:
        """Both libraries."""
        return checks.build(self.device)

    def loss(self, seconds: float) -> str:
        """The table of the loss."""
        if self.gpu:
            self.results.rate = matrix_rate(self.device)
        tasks = all_keys(self.results.shapes, tuple(self.options.forms))
        self.results.cells = {key: Cell(*key) for key in tasks}
        torch.cuda.empty_cache()

        def done(cell: Cell) -> None:
            self.results.cells[cell.key] = cell
            self.results.write()
            print(f"{cell.shape}: {cell.form}, {cell.part}: {cell}", flush=True)

        return worker.measure_all(tasks, done, time.monotonic() + seconds, self.rounds) or "done"

    def profile(self, seconds: float) -> str:
        """Time by kernel."""
        if not self.gpu:
            return "not run: no GPU"
        deadline = time.monotonic() + seconds
        for form in PROFILED_FORMS:
            for shape in PROFILED:
                if time.monotonic() > deadline:
                    return "not finished: no time"
                self.results.profiles.append(profile.profile(shape, form, self.device))
                self.results.write()
        return "done"

    def peers(self, seconds: float) -> str:
        """Losses of other packages."""
        self.results.peer_rows = TINY_PEER_ROWS if self.options.tiny else PEER_ROWS

        def done(row: peers.Row) -> None:
            self.results.peers.append(row)
            self.results.write()
            print(f"{row.title}: {row.note or f'{row.ms:,.2f} ms'}", flush=True)

        deadline = time.monotonic() + seconds
        return peers.compare(self.results.peer_rows, self.device, done, self.rounds, deadline)

    def crf(self, _seconds: float) -> str:
        """The dense CRF."""

        def done(row: crf.Comparison) -> None:
            self.results.crf.append(row)
            self.results.write()
            print(f"dense CRF, {row.picture}: {crf.line(row)}", flush=True)

        crf.compare(done, self.rounds)
        return "done"

    def tests(self, seconds: float) -> str:
        """tests/test_gpu.py."""
        if not self.gpu:
            return "not run: no GPU"
        return checks.gpu_tests(seconds, checks.log_file(self.options.out, "tests"))

    def sanitize(self, seconds: float) -> str:
        """compute-sanitizer."""
        if not self.gpu:
            return "not run: no GPU"
        return checks.sanitizer(seconds, checks.log_file(self.options.out, "sanitizer"))

    def tiles(self, seconds: float) -> str:
        """Launch configurations."""
        if not self.gpu:
            return "not run: no GPU"
        return tiles.write(checks.log_file(self.options.out, "tiles").parent, seconds)

    def section(self, name: str) -> None:
        """Run one section; what goes wrong in it is said, and the next one runs."""
        left = self.end - time.monotonic()
        if left < 5:
            self.results.said[name] = "not run: no time"
            return
        part: Callable[[float], str] = getattr(self, name)
        start = time.monotonic()
        self.results.said[name] = "not finished"
        try:
            said = part(min(SECONDS[name], left))
        except Exception as error:
            said = f"FAILED: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
        self.results.said[name] = f"{said} ({time.monotonic() - start:.0f} s)"
        self.results.write()
        print(f"== {name}: {self.results.said[name]}", flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run what was asked for; exit code 1 where something failed or is wrong, 2 without a GPU."""
    options = arguments(argv)
    # One architecture's CUDA library must not stand where a user's is looked for.
    os.environ.setdefault("PPAP_CACHE_DIR", str(ROOT / "build" / "bench-gpu"))
    if options.worker:
        worker.main(*options.worker[:2], int(options.worker[2]))
        return 0
    if options.warm:
        checks.warm(options.warm[0], int(options.warm[1]))
        return 0
    if options.one_step:
        checks.one_step()
        return 0
    if options.compile:
        tiles.sweep(lambda name, rows: None, tuple(options.compile))
        return 0
    if not torch.cuda.is_available() and not options.tiny:
        print(
            "bench.gpu: torch sees no GPU here; --tiny rehearses on the CPU with TRITON_INTERPRET=1, "
            "python -m bench.aot compiles the kernels",
            file=sys.stderr,
        )
        return 2
    run = Run(options)
    for name in options.only:
        run.section(name)
    found = [str(cell) for cell in run.results.cells.values()] + list(run.results.said.values())
    print(f"written: {run.results.folder / run.results.stem}.md", flush=True)
    return int(any("failed" in words.lower() or "WRONG" in words for words in found))


if __name__ == "__main__":
    sys.exit(main())
