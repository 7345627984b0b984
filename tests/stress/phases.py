"""Signals in every phase of every command: exit code 75, and the same command or --resume does the rest."""

import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from ppap.analysis import features, study
from ppap.analyze import main as analyze
from ppap.data import folder_check
from ppap.eval import main as evaluate
from ppap.evaluation import comparison, crf
from ppap.evaluation import evaluate as evaluation
from ppap.predict import main as predict
from ppap.reports import prediction, strips
from ppap.runs.store import Part
from ppap.stopping import SIGNALS
from ppap.training.trainer import Trainer
from tests.stress.material import Lab, Report, base, done, noise, training
from tests.stress.process import Counter, call, command, hooked

_SMALL_STUDY = ["--compare.steps=3", "--compare.starts=1", "--seeds", "0"]


class Phase(NamedTuple):
    """Where a signal comes."""

    owner: Any
    name: str
    """Function or method that is under way."""
    work: Callable[[Path], Callable[[], int]]
    """Its command, given a folder with ``data``, ``images`` and a finished ``run``."""
    again: Callable[[Path], Callable[[], int]] | None = None
    """What does the rest; None = the same command."""
    nth: int = 1
    """At which call the signal comes."""


def _train(*options: str) -> Callable[[Path], Callable[[], int]]:
    def work(place: Path) -> Callable[[], int]:
        cache = f"--data.cache-dir={place / 'cache'}"
        return training(*base(place / "data", place / "new", "--train.steps=4", cache, *options))

    return work


def _resume(place: Path) -> Callable[[], int]:
    return training("--resume", place / "new")


def _evaluate(place: Path) -> Callable[[], int]:
    return command(evaluate, place / "run", f"--out={place / 'eval.json'}", "--eval.crf=native")


def _predict(place: Path) -> Callable[[], int]:
    return command(predict, place / "run", place / "images", f"--out={place / 'masks'}", "--resolution=32")


def _analysis(name: str, *options: str) -> Callable[[Path], Callable[[], int]]:
    def work(place: Path) -> Callable[[], int]:
        argv = [o for o in base(place / "data", place) if o.startswith(("--data", "--model", "--loss"))]
        argv = [o for o in argv if o != "--data.no-cache-features"]
        return command(analyze, name, "folder", *argv, f"--out={place / name}", *options)

    return work


def _study(place: Path) -> Callable[[], int]:
    argv = [o for o in base(place / "data", place)[1:] if not o.startswith(("--train.out", "--compare"))]
    options = ["--out", place / "ablation", "--train.steps=2", *_SMALL_STUDY]
    return command(analyze, "ablation", "folder", *argv, *options)


_VALIDATED = ["--train.val-every=2"]
_COMPARED = ["--compare.rows", "frozen", "ppap", "--compare.steps=3", "--compare.starts=1"]
_PICTURED = ["--eval.pictures=1"]

PHASES = {
    "check of files": Phase(folder_check, "verify_image", _train()),
    "caching": Phase(Part, "mark", _train("--data.cache-features")),
    "training": Phase(Trainer, "_step", _train(), _resume),
    "validation": Phase(evaluation, "pixel_products", _train(*_VALIDATED), _resume),
    "comparison": Phase(comparison, "fit_probes", _train(*_COMPARED), _resume),
    "report": Phase(strips, "predict_crop", _train(*_PICTURED), _resume),
    "CRF": Phase(crf, "CRFResult", _evaluate),
    "predict": Phase(prediction, "read_image", _predict),
    "analysis": Phase(features, "training_patches", _analysis("thresholds")),
    "study": Phase(study.Trainer, "_step", _study),
}


def signals(lab: Lab) -> Iterator[Report]:
    """Each signal in each phase."""
    rng = lab.rng("signals")
    for phase in lab.some(PHASES):
        report = Report(f"signals: {phase}")
        for number in SIGNALS if lab.share >= 0.1 else [rng.choice(SIGNALS)]:
            _one(lab.place(f"signals {phase} {number.name}"), phase, number, report)
        yield report


def _one(place: Path, phase: str, number: signal.Signals, report: Report) -> None:
    owner, name, work, again, nth = PHASES[phase]
    (place / "images").mkdir()
    for k in range(3):
        Image.fromarray(noise(random.Random(k))).save(place / f"images/{k}.png")
    done(training(*base(place / "data", place / "run", "--train.steps=1")))
    calls = Counter()

    def signalled() -> int:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where nohup started the experiment

        def send() -> None:
            calls.add()
            if calls.value == nth:
                os.kill(os.getpid(), number)

        hooked(owner, name, send)
        return work(place)()

    ended = call(signalled)
    if calls.value < nth:
        report.fault(f"{phase}: {name} is no longer called, so that no signal was sent")
        return
    rest = call((again or work)(place))
    report.expect(
        ended.code == 75 and not ended.failed and rest.code == 0 and not rest.failed,
        "ended with 75 and finished later",
        f"{phase}, {number.name}: {ended.code}, {ended.text[-500:]} then {rest.code}, {rest.text[-500:]}",
    )
