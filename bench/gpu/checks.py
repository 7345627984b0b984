"""What is not a time: the native libraries, the tests on the GPU, and the sanitizer."""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from bench.gpu.cells import CFG, FORMS, PARTS, TAU, Inputs, runner
from bench.gpu.clock import synchronise
from bench.shapes import VITS8_CHUNK, Shape, loss_inputs
from ppap.kernels import (
    PropagationConfig,
    contrastive_loss,
    dense_crf,
    native,
    native_cuda,
    ppap_loss,
    propagate,
)
from ppap.kernels.dense_crf import unavailable_reason

ROOT = Path(__file__).parents[2]
WORKERS = 8
"""Processes of the tests."""


def build(device: torch.device) -> str:
    """Build what is missing of the libraries, the CUDA one for this device alone, and Triton's kernels."""
    with ThreadPoolExecutor() as pool:
        return "; ".join(pool.map(lambda part: part(device), (_build_cuda, _build_cpu, _build_triton)))


def _build_triton(device: torch.device) -> str:
    """Compile what the table launches, in as many processes as there are forms and widths."""
    if device.type != "cuda":
        return "triton: no GPU"
    forms = [(form, width) for form in FORMS if form.startswith("triton") for width in ("384", "768")]
    command = [sys.executable, "-m", "bench.gpu", "--warm"]
    running = [
        subprocess.Popen([*command, *one], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for one in forms
    ]
    failed = sum(process.wait() != 0 for process in running)
    return f"triton FAILED for {failed} of {len(forms)} forms" if failed else "triton compiled"


def warm(form: str, width: int) -> None:
    """Run every part of a form once."""
    shape = Shape("warm", VITS8_CHUNK.patches, VITS8_CHUNK.anchors, width, width)
    inputs = Inputs.of(shape, torch.device("cuda"))
    for part in PARTS:
        runner(form, part, inputs, inputs.anchors)()
    synchronise()


def _build_cuda(device: torch.device) -> str:
    if device.type != "cuda":
        return "cuda: no GPU"
    major, minor = torch.cuda.get_device_capability(device)
    try:
        native_cuda.build((10 * major + minor,))
    except native.NativeError as error:
        return f"cuda FAILED: {str(error).splitlines()[0]}"
    return "cuda built"


def _build_cpu(_device: torch.device) -> str:
    if native.reason() is None:
        return "cpp found"
    done = subprocess.run([sys.executable, "csrc/build.py"], cwd=ROOT, capture_output=True, text=True)
    return "cpp built" if done.returncode == 0 else f"cpp FAILED: {done.stderr.strip().splitlines()[0]}"


def gpu_tests(seconds: float, log: Path) -> str:
    """Last line of the GPU tests; all of their output goes to `log`."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_gpu.py"]
    probe = subprocess.run([sys.executable, "-c", "import xdist"], capture_output=True)
    command += ["-n", str(WORKERS)] if probe.returncode == 0 else []
    return verdict(command, seconds, log)


def sanitizer(seconds: float, log: Path) -> str:
    """Verdict of compute-sanitizer on one step of small shapes."""
    program = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(program).exists():
        return "not run: compute-sanitizer is not installed"
    # Errors that an API call returns, such as torch asking for what a driver does not have, are no faults.
    command = [program, "--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "9"]
    command += [sys.executable, "-m", "bench.gpu", "--one-step"]
    # Without its cache torch asks the driver for every tensor: an overrun leaves what was asked for.
    return verdict(command, seconds, log, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


def verdict(command: list[str], seconds: float, log: Path, variables: dict[str, str] | None = None) -> str:
    """The last line that a command says, with its exit code where it failed."""
    with log.open("w") as output:
        try:
            done = subprocess.run(
                command,
                cwd=ROOT,
                env={**os.environ, **(variables or {})},
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=seconds,
            )
        except subprocess.TimeoutExpired:
            return f"FAILED: not done within {seconds:.0f} s, see {log.name}"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    said = re.sub(r"^[=\s]+|[=\s]+$", "", lines[-1]) if lines else "it said nothing"
    return said if done.returncode == 0 else f"{said} (FAILED, exit code {done.returncode}, see {log.name})"


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


def log_file(folder: Path, name: str) -> Path:
    """Where a section's output goes."""
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{name}.log"
