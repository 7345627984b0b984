"""What long runs and the care for faults cost: memory over 1,000 steps, and the time of a step."""

import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ppap.methods.finite import Gate, Held
from ppap.training.skipped import SkipLog
from ppap.training.trainer import Trainer
from tests.stress.material import Lab, Report, base, training
from tests.stress.process import call, hooked

STEPS, WARM = 1000, 300
_PAGE = os.sysconf("SC_PAGE_SIZE")


def _resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * _PAGE


def memory(lab: Lab) -> Iterator[Report]:
    """Growth of the resident memory over 1,000 steps, saves and log lines included."""
    report, place = Report("memory over 1,000 steps"), lab.place("memory")
    if not Path("/proc/self/statm").exists():
        report.skipped = "not run: no /proc"
        yield report
        return
    steps = max(100, lab.number(STEPS))
    seen: list[int] = []

    def work() -> list[int]:
        hooked(Trainer, "_step", lambda: seen.append(_resident()))
        argv = base(place / "data", place / "run", f"--train.steps={steps}", "--train.save-every=50")
        code = training(*argv)()
        return seen if code == 0 else [code]

    ended = call(work, 3600)
    if not isinstance(ended.value, list) or len(ended.value) != steps:
        report.fault(f"exit code {ended.code}: {ended.text[-1000:]}")
        yield report
        return
    warm = steps * WARM // STEPS
    before, after = (statistics.median(ended.value[k : k + 20]) for k in (warm, steps - 20))
    growth = 100 * (after / before - 1)
    report.name = f"memory over {steps} steps"
    outcome = (
        f"steps, from {before / 2**20:.1f} to {after / 2**20:.1f} MiB after {warm} steps: {growth:+.2f} %"
    )
    if growth < 1:
        report.count(outcome, steps)
    else:
        report.fault(outcome)
    yield report


CARE = ((SkipLog, "facts"), (SkipLog, "add"), (Gate, "judge"), (Held, "__init__"), (Held, "restore"))
"""What a step does for faults alone."""


def step_time(lab: Lab) -> Iterator[Report]:
    """Share of a step on a CPU that goes into the care for faults."""
    report, place = Report("care for faults in a step"), lab.place("step time")
    steps = max(60, lab.number(2000))

    def work() -> list[tuple[float, float]]:
        times: list[tuple[float, float]] = []
        spent, real = [0.0], Trainer._step

        def timed(function: Callable[..., Any]) -> Callable[..., Any]:
            def call_it(*arguments: Any, **options: Any) -> Any:
                since = time.perf_counter()
                try:
                    return function(*arguments, **options)
                finally:
                    spent[0] += time.perf_counter() - since

            return call_it

        def step(self: Trainer, *arguments: Any) -> Any:
            spent[0], since = 0.0, time.perf_counter()
            found = real(self, *arguments)
            times.append((spent[0], time.perf_counter() - since))
            return found

        for owner, name in CARE:
            setattr(owner, name, timed(getattr(owner, name)))
        Trainer._step = step
        never = ["--train.save-every=0", f"--train.log-every={steps}", f"--train.steps={steps}"]
        size = ["--data.resolution=64", "--model.image-size=64", "--train.batch-size=8", "--model.width=96"]
        return times if training(*base(place / "data", place / "run", *never, *size))() == 0 else []

    ended = call(work, 3600)
    times = (ended.value or [])[steps // 10 :]
    if len(times) < 20:
        report.fault(f"exit code {ended.code}: {ended.text[-1000:]}")
        yield report
        return
    care, whole = (statistics.median(column) for column in zip(*times, strict=True))
    outcome = f"steps, {1000 * whole:.1f} ms, {100 * care / whole:.2f} % of them for faults"
    if care < 0.01 * whole:
        report.count(outcome, len(times))
    else:
        report.fault(outcome)
    yield report
