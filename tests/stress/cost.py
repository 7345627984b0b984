"""What long runs and the care for faults cost: memory over 1,000 steps, and the time of a step."""

import os
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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
    if growth < 1 or steps < STEPS:
        report.count(outcome, steps)
    else:
        report.fault(outcome)
    yield report


class _Careless:
    """Stands in for what the loop keeps for faults alone."""

    asked = False

    def __iadd__(self, other: Any) -> "_Careless":
        return self


def _careless_step(self: Trainer, batch: Any) -> Any:
    return self.engine.train_step(batch, self.step)


def step_time(lab: Lab) -> Iterator[Report]:
    """Steps with and without the care for faults, one after the other in one run."""
    report, place = Report("time of a step"), lab.place("step time")
    steps = max(60, lab.number(2000))

    def work() -> list[tuple[bool, float]]:
        times: list[tuple[bool, float]] = []
        real, last = Trainer._step, [0.0, False]

        def step(self: Trainer, batch: Any) -> Any:
            now = time.perf_counter()
            if last[0]:
                times.append((bool(last[1]), now - last[0] - waited[0]))
            waited[0] = 0.0
            careful = self.step % 2 == 0
            if not hasattr(self, "_kept"):
                self._kept = self.health
            if careful:
                self.health = self._kept
            else:
                self.health = _Careless()
            last[:] = [time.perf_counter(), careful]
            return real(self, batch) if careful else _careless_step(self, batch)

        waited, fetch = [0.0], Trainer._next_batch

        def next_batch(self: Trainer, *arguments: Any) -> Any:
            self.health = self._kept if hasattr(self, "_kept") else self.health
            since = time.perf_counter()
            found = fetch(self, *arguments)
            waited[0] += time.perf_counter() - since
            return found

        Trainer._step, Trainer._next_batch = step, next_batch
        never = ["--train.save-every=0", f"--train.log-every={steps}", f"--train.steps={steps}"]
        size = ["--data.resolution=64", "--model.image-size=64", "--train.batch-size=8", "--model.width=96"]
        argv = base(place / "data", place / "run", *never, *size)
        return times if training(*argv)() == 0 else []

    ended = call(work, 3600)
    times = ended.value or []
    if len(times) < 20:
        report.fault(f"exit code {ended.code}: {ended.text[-1000:]}")
        yield report
        return
    times = times[len(times) // 10 :]
    # Neighbours in time, so that what else the machine does meets both alike.
    pairs = zip(times[0::2], times[1::2], strict=False)
    differences = [(a[1] - b[1]) * (1 if a[0] else -1) for a, b in pairs]
    plain = statistics.median(t for careful, t in times if not careful)
    cost = 100 * statistics.median(differences) / plain
    report.name = "care for faults in a step"
    outcome = f"steps, {1000 * plain:.1f} ms without and {cost:+.2f} % with it"
    if cost < 1 or steps < STEPS:  # of fewer it is noise
        report.count(outcome, len(times))
    else:
        report.fault(outcome)
    yield report
