"""Where one step's time on the device goes, kernel by kernel, and how many kernels it launches."""

from dataclasses import dataclass, field

import torch

from bench.gpu.cells import CFG, STEP, Inputs, runner
from bench.gpu.clock import synchronise, time_calls
from bench.shapes import Shape

# Products of 2 A N D operations that one launch makes when the anchors fit in one chunk; sums are sparse.
_TILE_KERNELS = ("similarity_kernel", "log_sum_exp_kernel", "weights_kernel")
_CALLS = 3
# Kernels below this share of the device's time go into one row.
_SMALL = 0.01


@dataclass
class Profile:
    """One step of a form on a shape.

    Attributes:
        launches: kernels, copies and fills of one step.
        device_ms: their time [ms].
        kernels: name -> (launches of one step, their time together [ms]).
        flops: operations of one product (A, D) x (D, N).
        library_rate: rate of the vendor's product of such operands, 16 bits in and out [FLOP/s].
    """

    shape: str
    form: str
    launches: float = 0.0
    device_ms: float = 0.0
    kernels: dict[str, tuple[float, float]] = field(default_factory=dict)
    flops: float = 0.0
    library_rate: float | None = None

    def table(self, rate: float | None) -> list[str]:
        """Markdown."""
        title = (
            f"## Profile of {self.form}, {self.shape}: {self.launches:.0f} launches, {self.device_ms:.3f} ms"
        )
        lines = [title, "", "| kernel | launches | ms | share of the matrix rate |", "|---|---:|---:|---:|"]
        for name, (count, ms) in self.kernels.items():
            dense = name in _TILE_KERNELS and rate is not None and "fp32" not in self.form
            products = {"similarity_kernel": CFG.steps + 1}.get(name, 1)
            share = f"{100 * products * self.flops / (ms / 1e3) / rate:.0f} %" if dense else "-"
            lines.append(f"| {name} | {count:.0f} | {ms:.3f} | {share} |")
        if self.library_rate is not None and rate is not None:
            ms, share = 1e3 * self.flops / self.library_rate, 100 * self.library_rate / rate
            lines.append(f"| (one product of the library, for comparison) | 1 | {ms:.3f} | {share:.0f} % |")
        return lines


def profile(shape: Shape, form: str, device: torch.device) -> Profile:
    """Profile one step."""
    inputs = Inputs.of(shape, device)
    run = runner(form, STEP, inputs, inputs.anchors)
    for _ in range(2):
        run()
    synchronise()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as recorded:
        for _ in range(_CALLS):
            run()
        synchronise()
    found = Profile(shape.name, form, flops=2.0 * shape.anchors * shape.patches * shape.width)
    rows: dict[str, list[float]] = {}
    for event in recorded.key_averages():
        time_us = event.self_device_time_total
        if not time_us:
            continue
        row = rows.setdefault(_name(event.key), [0.0, 0.0])
        row[0] += event.count / _CALLS
        row[1] += time_us / 1e3 / _CALLS
    found.launches = sum(row[0] for row in rows.values())
    found.device_ms = sum(row[1] for row in rows.values())
    for name, (count, ms) in sorted(rows.items(), key=lambda item: -item[1][1]):
        kept = name if ms >= _SMALL * found.device_ms else "(others)"
        before = found.kernels.pop(kept, (0.0, 0.0)) if kept == "(others)" else (0.0, 0.0)
        found.kernels[kept] = (count + before[0], ms + before[1])
    found.library_rate = _library_rate(inputs)
    return found


def _name(key: str) -> str:
    """A kernel's name in a line."""
    short = key.split("<")[0].split("(")[0].removeprefix("void ").strip()
    if "elementwise" in short or "reduce" in short:
        return "(torch: elementwise, reductions)"
    return short.split("::")[-1] or key[:60]


def _library_rate(inputs: Inputs) -> float:
    left, right = inputs.features[inputs.anchors[:8192]].half(), inputs.features.half()
    ms = time_calls(lambda: left @ right.T, 10).ms
    return 2.0 * left.numel() * right.shape[0] / (ms / 1e3)
