"""Two processes at once in one folder: one works, the other says why not, and nothing is lost."""

import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from ppap.predict import main as predict
from tests.stress.material import Lab, Report, base, differences, digest, done, noise, results, training
from tests.stress.process import Child, Ended, command

ROUNDS = 20
REASONS = (
    "another process",
    "exists already",
    "is finished",
    "meanwhile",
    "finished before",
    "already, 0 to go",
)
"""What the second one may say: that it is refused, or that all was done when it came."""

Start = Callable[[], int]
Seen = Callable[[], dict[str, Any]]


def two_at_once(lab: Lab) -> Iterator[Report]:
    """20 rounds each of a new run, one to continue, sets of seeds, a cache and a folder of masks."""
    makes = (_new_run, _resumed_run, _new_set, _resumed_set, _cache, _masks)
    chosen = lab.some(make.__name__ for make in makes)
    for make in (make for make in makes if make.__name__ in chosen):
        name, place = make.__name__[1:].replace("_", " "), lab.place(f"pairs {make.__name__}")
        report, rng = Report(f"two processes: {name}"), lab.rng(name)
        prepare, start, seen = make(place)
        prepare()
        done(start)
        alone = seen()
        for number in range(lab.number(ROUNDS)):
            prepare()
            ended = _both(start, rng)
            wrong = differences(alone, seen()) if min(e.code for e in ended) == 0 else ["no result"]
            right = not wrong and _is_right(ended, both=make is _cache)
            told = [(e.code, e.text[-700:]) for e in ended]
            outcome = "rounds, both worked on one cache" if make is _cache else "rounds, one worked"
            report.expect(right, outcome, f"{name}, round {number}: other {wrong}; {told}")
        yield report


def _both(start: Start, rng: random.Random) -> list[Ended]:
    """Two processes that begin within some milliseconds of each other."""
    read, write = os.pipe()

    def waiting() -> int:
        os.close(write)
        os.read(read, 1)  # returns as soon as nobody can write any more
        return start()

    children = [Child(waiting) for _ in range(2)]
    os.close(write)
    os.close(read)
    del rng
    return [child.wait() for child in children]


def _is_right(ended: list[Ended], both: bool) -> bool:
    if any(e.failed for e in ended):
        return False
    first, second = sorted(ended, key=lambda e: e.code)
    if both:
        return first.code == second.code == 0
    said = any(reason in e.text for e in ended for reason in REASONS)
    return first.code == 0 and second.code in (0, 2) and said


def _kept(place: Path, first: list[str]) -> Callable[[], None]:
    """Puts place/run as it was after `first`."""

    def prepare() -> None:
        if not (place / "kept").exists():
            done(training(*first))
            shutil.copytree(place / "run", place / "kept")
        shutil.rmtree(place / "run", ignore_errors=True)
        shutil.copytree(place / "kept", place / "run")

    return prepare


def _new_run(place: Path) -> tuple[Callable[[], None], Start, Seen]:
    start = training(*base(place / "data", place / "run", "--train.steps=4"))
    return lambda: shutil.rmtree(place / "run", ignore_errors=True), start, lambda: results(place / "run")


def _resumed_run(place: Path) -> tuple[Callable[[], None], Start, Seen]:
    prepare = _kept(place, base(place / "data", place / "run", "--train.steps=2"))
    return prepare, training("--resume", place / "run", "--train.steps=5"), lambda: results(place / "run")


def _new_set(place: Path) -> tuple[Callable[[], None], Start, Seen]:
    start = training(*base(place / "data", place / "run", "--train.steps=2"), "--seeds", "0", "1")
    return lambda: shutil.rmtree(place / "run", ignore_errors=True), start, lambda: results(place / "run")


def _resumed_set(place: Path) -> tuple[Callable[[], None], Start, Seen]:
    """A set whose first seed lacks its report, and whose second one has not begun."""
    whole = _kept(place, [*base(place / "data", place / "run", "--train.steps=2"), "--seeds", "0", "1"])

    def prepare() -> None:
        whole()
        (place / "run/seed-0/report.md").unlink()
        shutil.rmtree(place / "run/seed-1")

    return prepare, training("--resume", place / "run"), lambda: results(place / "run")


def _cache(place: Path) -> tuple[Callable[[], None], Start, Seen]:
    """Two runs of their own that need the same features."""

    def start() -> int:
        argv = base(place / "data", place / f"run-{os.getpid()}", "--train.steps=2", "--data.cache-features")
        return training(*argv, f"--data.cache-dir={place / 'cache'}")()

    def prepare() -> None:
        for path in (*place.glob("run-*"), place / "cache"):
            shutil.rmtree(path, ignore_errors=True)

    def seen() -> dict[str, Any]:
        found = [results(path) for path in sorted(place.glob("run-*"))]
        return found[0] if all(not differences(found[0], other) for other in found) else {"runs": "differ"}

    return prepare, start, seen


def _masks(place: Path) -> tuple[Callable[[], None], Start, Seen]:
    done(training(*base(place / "data", place / "run", "--train.steps=1")))
    (place / "images").mkdir()
    for k in range(4):
        Image.fromarray(noise(random.Random(k))).save(place / f"images/{k}.png")
    out = place / "masks"

    def seen() -> dict[str, Any]:
        return {path.name: digest(path) for path in out.iterdir()}

    start = command(predict, place / "run", place / "images", f"--out={out}", "--resolution=32")
    return lambda: shutil.rmtree(out, ignore_errors=True), start, seen
