"""What long runs and the care for faults cost: memory over 1,000 steps, and the time of a step."""

import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ppap.methods.engine import Engine
from ppap.training.trainer import Trainer
from tests.stress.material import Lab, Report, base, training
from tests.stress.process import call, hooked
from tests.trained import striped_folder

STEPS, WARM, TIMED = 1000, 300, 1000
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
    steps = max(50, lab.number(STEPS))
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
    """Stands in for a sum that the loop keeps to notice bad numbers."""

    def __iadd__(self, other: Any) -> "_Careless":
        return self


class _Plain:
    """A training step as in a textbook: what the engine computes, and nothing that looks for faults."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        probes = {"linear": engine.linear, "cluster": engine.cluster}
        rates = (engine.config.optim.linear_lr, engine.config.optim.cluster_lr)
        self.optimisers = engine.method.optimisers(engine.config.optim) | {
            name: torch.optim.Adam(probe.parameters(), lr=lr)
            for (name, probe), lr in zip(probes.items(), rates, strict=True)
        }

    def step(self, batch: dict[str, Any], step: int) -> dict[str, Any]:
        """As :meth:`Engine.train_step`."""
        engine = self.engine
        with torch.autocast(engine.device.type, dtype=engine.amp, enabled=engine.amp is not None):
            with torch.no_grad():
                engine.method.before_step(step)
            out = engine.method.step(batch, step)
            linear = engine.linear.loss(out.code, batch["label"], engine.net.backbone.patch_size)
            cluster = engine.cluster.loss(out.code)
            loss = out.loss + linear + cluster
        for optimiser in self.optimisers.values():
            optimiser.zero_grad(set_to_none=True)
        loss.backward()
        parameters = [p for group in self.optimisers["net"].param_groups for p in group["params"]]
        norm = torch.nn.utils.clip_grad_norm_(parameters, engine.config.optim.clip_norm or float("inf"))
        for optimiser in self.optimisers.values():
            optimiser.step()
        losses = {"loss": loss, "contrast_loss": out.loss, "linear_loss": linear, "cluster_loss": cluster}
        return {name: value.detach() for name, value in {**losses, **out.log, "grad_norm": norm}.items()}


class _Alternating:
    """Lets every other step of a run be a plain one, and times both, up to the next wish for a batch."""

    def __init__(self) -> None:
        self.times: list[tuple[bool, float]] = []
        self.plain: _Plain | None = None
        self.began, self.careful, self.health = 0.0, True, None
        self.step, self.fetch = Trainer._step, Trainer._next_batch
        self.save, self.log = Trainer._save, Trainer._log
        for name in ("_step", "_next_batch", "_save", "_log"):
            setattr(Trainer, name, self._bound(getattr(self, f"on{name}")))

    @staticmethod
    def _bound(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda trainer, *arguments: function(trainer, *arguments)

    def on_step(self, trainer: Trainer, batch: dict[str, Any], *arguments: Any) -> Any:
        self.plain = self.plain or _Plain(trainer.engine)
        self.careful = trainer.step % 2 == 0
        self.began = time.perf_counter()
        if self.careful:
            return self.step(trainer, batch, *arguments)
        if hasattr(trainer, "health"):
            self.health, trainer.health = trainer.health, _Careless()
        return self.plain.step(batch, trainer.step)

    def on_next_batch(self, trainer: Trainer, *arguments: Any) -> Any:
        if self.began:
            self.times.append((self.careful, time.perf_counter() - self.began))
        self._put_back(trainer)
        return self.fetch(trainer, *arguments)

    def on_save(self, trainer: Trainer, *arguments: Any) -> Any:
        self._put_back(trainer)
        return self.save(trainer, *arguments)

    def on_log(self, trainer: Trainer, *arguments: Any) -> Any:
        self._put_back(trainer)
        return self.log(trainer, *arguments)

    def _put_back(self, trainer: Trainer) -> None:
        if self.health is not None:
            trainer.health, self.health = self.health, None


def step_time(lab: Lab) -> Iterator[Report]:
    """Steps with and without the care for faults, one after the other in one run."""
    report, place = Report("care for faults in a step"), lab.place("step time")
    steps = max(6, lab.number(TIMED))
    striped_folder(place / "data", (0, 1, 2), count=16, size=128)
    options = ["--train.save-every=0", f"--train.log-every={steps}", f"--train.steps={steps}"]
    # A step as that of the demo, the smallest of use; what care costs does not grow with the images.
    options += ["--data.resolution=128", "--model.image-size=128", "--train.batch-size=16"]
    options += ["--model.width=128", "--model.depth=6", "--model.heads=4", "--data.cache-features"]
    options += [f"--data.cache-dir={place / 'cache'}"]

    def work() -> list[tuple[bool, float]]:
        alternating = _Alternating()
        code = training(*base(place / "data", place / "run", *options))()
        return alternating.times if code == 0 else []

    ended = call(work, 3600)
    times = (ended.value or [])[steps // 10 :]
    if len(times) < 4:
        report.fault(f"exit code {ended.code}: {ended.text[-1000:]}")
        yield report
        return
    # Neighbours in time, so that what else the machine does meets both alike.
    pairs = [sorted(pair, reverse=True) for pair in zip(times[0::2], times[1::2], strict=False)]
    plain = statistics.median(pair[1][1] for pair in pairs)
    cost = 100 * statistics.median(careful[1] - bare[1] for careful, bare in pairs) / plain
    outcome = f"steps, {1000 * plain:.2f} ms without and {cost:+.2f} % with it"
    if cost < 1 or steps < TIMED // 4:  # of fewer it is noise
        report.count(outcome, len(times))
    else:
        report.fault(outcome)
    yield report
