"""Everything that only a GPU can show, in one command: ``python -m bench.gpu``.

Runs the GPU tests (parity, opcheck, 30 bitwise repeats), compute-sanitizer on small shapes, and the table of
times and peak memory; writes ``DEVICE.json`` and ``DEVICE.md``. Every stage has its share of eight minutes;
what was not reached or does not fit stays "not measured" or "out of memory", and a wrong result is never
timed.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton

from bench import baselines, gpu_crf
from bench.shapes import VITB8, VITS8, Shape, loss_inputs
from ppap.kernels import (
    PropagationConfig,
    available_backends,
    contrastive_loss,
    dense_crf,
    ppap_loss,
    propagate,
)
from ppap.kernels.dense_crf import unavailable_reason

CFG = PropagationConfig()
TAU = 0.1
BUDGET = 512 * 2**20
HERE = Path(__file__).parent
SHAPES = (
    VITS8,
    Shape("ViT-S/8, every patch an anchor", VITS8.patches, VITS8.patches, 384, 384),
    VITB8,
    Shape("ViT-B/8, every patch an anchor", VITB8.patches, VITB8.patches, 768, 768),
)
TINY = (Shape("tiny", 260, 70, 64, 64),)
PARTS = ("propagate", "loss forward", "forward + backward")
# The forms of the table, in the order in which a shape gives them its time.
FORMS = (
    "triton fp16",
    "eager chunks fp16",
    "compiled chunks fp16",
    "published fp32",
    "triton bf16",
    "triton fp32",
    "cuda fp16",
)


@dataclass
class Cell:
    """One measurement: milliseconds (median of `rounds`), MiB above inputs, or why there is none."""

    shape: str
    form: str
    part: str
    ms: float | None = None
    peak_mib: float | None = None
    rounds: int = 0
    note: str = "not measured"


def dense_flops(shape: Shape, steps: int) -> float:
    """2 T + 5 products of (A, D) and (D, N): T + 1 similarities, T sums, logits twice, gradient twice."""
    return (2 * steps + 5) * 2.0 * shape.anchors * shape.patches * shape.width


def matrix_rate(device: torch.device) -> float:
    """The machine's own bf16 matrix rate [FLOP/s]: the best of products of 8192 x 8192."""
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192.0**3 / (milliseconds(lambda: a @ b, 20)[0] / 1e3)


def milliseconds(run: Callable[[], object], rounds: int) -> tuple[float, int]:
    """Median time of a call after one warm-up, and how many were timed."""
    run()
    synchronise()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        run()
        synchronise()
        times.append((time.perf_counter() - start) * 1e3)
        if sum(times) > 5e3:
            break
    return sorted(times)[len(times) // 2], len(times)


def synchronise() -> None:
    """Wait for the device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def runner(form: str, part: str, features, z, anchors) -> Callable[[], object]:
    """What one cell times."""
    name, _, precision = form.rpartition(" ")
    impl = {"triton": "triton", "cuda": "cuda", "eager chunks": "torch"}.get(name)
    options = {"temperature": TAU, "precision": precision, "memory_budget": BUDGET, "impl": impl}

    def gradient(loss: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(loss, z)[0]

    if impl:
        if part == "propagate":
            return lambda: propagate(
                features, anchors, CFG, precision=precision, memory_budget=BUDGET, impl=impl
            )
        if part == "loss forward":
            return lambda: ppap_loss(features, z.detach(), anchors, CFG, **options)
        return lambda: gradient(ppap_loss(features, z, anchors, CFG, **options))
    if name == "published":
        return lambda: gradient(baselines.published(features, z, anchors, CFG, TAU))
    run = baselines.compiled_chunks(TAU, CFG, precision, BUDGET)
    return lambda: run(features, z.detach(), anchors)


def wrong(form: str, features, z, anchors) -> bool:
    """Whether a form is off by more than 16-bit rounding and flips at thresholds explain, on 64 anchors."""
    part = anchors[:: max(len(anchors) // 64, 1)]
    true = baselines.published(features, z, part, CFG, TAU)
    true_dz = torch.autograd.grad(true, z)[0]
    found = runner(form, PARTS[-1], features, z, part)()
    loss, dz = found if isinstance(found, tuple) else (None, found)
    off = (dz - true_dz).norm() > 0.05 * true_dz.norm()
    return bool(off or (loss is not None and (loss - true).abs() > 0.02 * true.abs()))


def measure(cell: Cell, run: Callable[[], object], rounds: int) -> None:
    """Fill `cell`; memory that does not suffice is a finding, not a failure."""
    try:
        cell.ms, cell.rounds = milliseconds(run, rounds)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            synchronise()
            cell.peak_mib = (torch.cuda.max_memory_allocated() - before) / 2**20
        cell.note = ""
    except torch.cuda.OutOfMemoryError:
        cell.note = "out of memory"
        torch.cuda.empty_cache()


def benchmark(shapes: tuple[Shape, ...], device: torch.device, deadline: float, rounds: int) -> list[Cell]:
    """All cells; those that the time does not reach stay as they are."""
    cells = []
    for shape in shapes:
        data = None
        for form in FORMS:
            for part in PARTS:
                if part != PARTS[-1] and not form.startswith(("triton", "cuda", "eager")):
                    continue  # the form has no such part
                cell = Cell(shape.name, form, part)
                if form.startswith("cuda") and available_backends()["cuda"] is not None:
                    cell.note = "not built"
                elif time.monotonic() < deadline:
                    if data is None:
                        features, z, anchors = (tensor.to(device) for tensor in loss_inputs(shape))
                        data = features, z.requires_grad_(), anchors
                    if part in (PARTS[0], PARTS[-1]) and wrong(form, *data):
                        raise SystemExit(f"bench.gpu: {form} is wrong on {shape}; run tests/test_gpu.py")
                    measure(cell, runner(form, part, *data), rounds)
                    print(f"{shape.name}: {form}, {part}: {text(cell)}", flush=True)
                cells.append(cell)
    return cells


def text(cell: Cell) -> str:
    """A cell in words."""
    if cell.ms is None:
        return cell.note
    peak = "" if cell.peak_mib is None else f", {cell.peak_mib:,.0f} MiB"
    return f"{cell.ms:,.2f} ms{peak}"


def gpu_tests() -> str:
    """Last line of the GPU tests."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/test_gpu.py"]
    return verdict(command, 240)


def sanitizer() -> str:
    """Verdict of compute-sanitizer on one step of small shapes."""
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(program).exists():
        return "not run: compute-sanitizer is not installed"
    command = [
        program,
        "--tool",
        "memcheck",
        "--error-exitcode",
        "9",
        sys.executable,
        "-m",
        "bench.gpu",
        "--one-step",
    ]
    # Without its cache torch asks the driver for every tensor: an overrun leaves what was asked for.
    return verdict(command, 120, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


def verdict(command: list[str], seconds: int, variables: dict[str, str] | None = None) -> str:
    """The last line that a command says, and its exit code where it failed; its end is printed then."""
    try:
        options = {"env": {**os.environ, **(variables or {})}, "cwd": HERE.parent, "timeout": seconds}
        done = subprocess.run(command, capture_output=True, text=True, **options)
    except subprocess.TimeoutExpired:
        return f"FAILED: did not end within {seconds} s"
    lines = [line for line in done.stdout.splitlines() if line.strip()] or ["no output"]
    if done.returncode:
        print(done.stdout[-3000:] + done.stderr[-2000:], file=sys.stderr)
    failed = f" (FAILED, exit code {done.returncode})" if done.returncode else ""
    return lines[-1].strip("= ") + failed


def one_step() -> None:
    """Every kernel in every precision on ragged shapes, for the sanitizer."""
    features, z, anchors = (t.cuda() for t in loss_inputs(Shape("ragged", 1301, 333, 80, 48)))
    z.requires_grad_()
    for precision in ("fp16", "bf16", "fp32"):
        for cfg in (CFG, PropagationConfig(trustworthy_positives=False)):
            options = {"temperature": TAU, "precision": precision, "impl": "triton"}
            torch.autograd.grad(ppap_loss(features, z, anchors, cfg, **options), z)
            rel = propagate(features, anchors, cfg, precision=precision, impl="triton")
            torch.autograd.grad(contrastive_loss(z, rel, **options).sum(), z)
    if unavailable_reason("cuda") is None:
        for classes, height, width in ((1, 1, 1), (5, 37, 41), (64, 9, 130)):
            image = torch.randint(256, (height, width, 3), dtype=torch.uint8, device="cuda")
            dense_crf(image, torch.randn(classes, height, width, device="cuda"), impl="cuda")
    synchronise()


def report(
    results: dict[str, object], cells: list[Cell], shapes: tuple[Shape, ...], crf: list[gpu_crf.Comparison]
) -> str:
    """The findings as markdown."""
    rate = results["bf16_matrix_rate"]
    lines = [
        f"# {results['device']}",
        "",
        f"`python -m bench.gpu`, torch {results['torch']}, Triton {results['triton']}, {results['date']}.",
        "",
        f"- tests: {results['tests']}",
        f"- compute-sanitizer: {results['sanitizer']}",
        f"- own bf16 matrix rate: {'not measured' if rate is None else f'{rate / 1e12:.0f} TFLOP/s'}",
        f"- T = {CFG.steps}, temperature {TAU}, memory budget {BUDGET >> 20} MiB; peak memory above inputs;",
        "  share = dense FLOPs ((2 T + 5) 2 A N D) of forward + backward over time and matrix rate",
    ]
    for shape in shapes:
        title = f"{shape.name}: N = {shape.patches}, A = {shape.anchors}, D = E = {shape.width}"
        lines += [
            "",
            f"## {title}",
            "",
            f"| form | {' | '.join(PARTS)} | share |",
            "|---|---:|---:|---:|---:|",
        ]
        for form in FORMS:
            own = {cell.part: cell for cell in cells if (cell.shape, cell.form) == (shape.name, form)}
            step = own.get("forward + backward")
            share = (
                "not measured"
                if step is None or step.ms is None or rate is None
                else (f"{100 * dense_flops(shape, CFG.steps) / (step.ms / 1e3) / rate:.0f} %")
            )
            row = [text(own[part]) if part in own else "-" for part in PARTS]
            lines.append(f"| {form} | {' | '.join(row)} | {share} |")
    return "\n".join([*lines, "", *gpu_crf.report(crf)]) + "\n"


def main() -> int:
    """Run what was asked for; exit code 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=HERE / "results", help="folder of the results (bench/results)"
    )
    parser.add_argument("--minutes", type=float, default=7.5, help="time for everything [minutes] (7.5)")
    parser.add_argument(
        "--one-step", action="store_true", help="one small step and nothing else (for the sanitizer)"
    )
    parser.add_argument("--only-table", action="store_true", help="no tests and no sanitizer")
    parser.add_argument(
        "--tiny", action="store_true", help="tiny shapes, also on a CPU (TRITON_INTERPRET=1): a rehearsal"
    )
    parser.add_argument(
        "--unmeasured", metavar="DEVICE", help="write the table of a device without measuring"
    )
    options = parser.parse_args()
    start = time.monotonic()
    if options.one_step:
        one_step()
        return 0
    gpu = torch.cuda.is_available()
    if not gpu and not options.tiny and not options.unmeasured:
        print(
            "bench.gpu: torch sees no GPU here; --tiny rehearses on the CPU with TRITON_INTERPRET=1, "
            "python -m bench.aot compiles the kernels",
            file=sys.stderr,
        )
        return 2
    shapes = TINY if options.tiny else SHAPES
    device = torch.device("cuda" if gpu else "cpu")
    name = options.unmeasured or (torch.cuda.get_device_name() if gpu else platform.machine())
    full = gpu and not (options.unmeasured or options.only_table)
    results: dict[str, object] = {
        "device": name,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "tests": gpu_tests() if full else "not run",
        "sanitizer": sanitizer() if full else "not run",
        "bf16_matrix_rate": matrix_rate(device) if gpu and not options.unmeasured else None,
    }
    failed = "FAILED" in f"{results['tests']} {results['sanitizer']}"
    # What is wrong is not timed.
    deadline = 0.0 if options.unmeasured or failed else start + 60 * options.minutes
    rounds = 1 if options.tiny else 10
    crf = gpu_crf.compare(deadline, rounds, milliseconds)
    cells = benchmark(shapes, device, deadline, rounds)
    stem = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    options.out.mkdir(parents=True, exist_ok=True)
    results["cells"], results["dense_crf"] = [[asdict(cell) for cell in part] for part in (cells, crf)]
    (options.out / f"{stem}.json").write_text(json.dumps(results, indent=1) + "\n")
    (options.out / f"{stem}.md").write_text(report(results, cells, shapes, crf))
    print(f"written: {options.out / stem}.md", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
