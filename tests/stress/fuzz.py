"""Files that were changed at random, or with intent: refused in one line or used, in time and in place."""

import contextlib
import io
import random
import resource
import shutil
import signal
import struct
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ppap.cli import run as command
from ppap.predict import main as predict
from ppap.train import main as train
from tests.stress import hostile
from tests.stress.material import Lab, Report, base, done, noise, training, without_pictures
from tests.stress.process import HUNG, call
from tests.stress.watch import Watch

IMAGES, JSONS, LIMIT = 300, 300, 60
_MEMORY = 6 << 30
"""Bytes of address space beyond what the process has: more would be a file that fills the memory."""


class Hang(BaseException):
    """The limit of time is over."""


def fuzz(lab: Lab) -> Iterator[Report]:
    """300 images and labels, 300 JSON files, and checkpoints with valid hashes."""
    place = lab.place("fuzz")
    done(training(*base(place / "data", place / "run", "--train.steps=1", "--train.val-every=1")))
    yield _images(lab, place)
    yield _labels(lab, place)
    for name, cases in hostile.jsons(place, lab.rng("json"), lab.some(hostile.KINDS), lab.number(JSONS)):
        yield _files(f"mutated JSON: {name}", place, cases)
    yield _files("hostile checkpoints", place, hostile.checkpoints(place, lab.share))


def mutated(content: bytes, rng: random.Random) -> bytes:
    """Bytes after one to five changes of six kinds."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 5)):
        at = rng.randrange(max(len(data), 1))
        kind = rng.randrange(6)
        if kind == 0:
            data[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            data[at:] = b""
        elif kind == 2:
            data[at:at] = rng.randbytes(rng.randint(1, 64))
        elif kind == 3:
            del data[at : at + rng.randint(1, 64)]
        elif kind == 4:
            data[at : at + 4] = struct.pack(
                rng.choice("<>") + "I", rng.choice((0, 1, 2**16, 2**31 - 1, 2**32 - 1))
            )
        else:
            data[at : at + 16] = data[rng.randrange(max(len(data), 1)) :][:16]
    return bytes(data)


def _images(lab: Lab, place: Path) -> Report:
    """Mutated images through ``ppap predict``, in folders of ten, with one whole image each."""
    report, rng = Report("mutated images: predict"), lab.rng("images")
    formats = ["png", "jpg", "tif", "bmp", "webp", "gif"]
    left, batch = lab.number(IMAGES), 0
    while left > 0:
        folder, count = place / f"images {batch}", min(left, 10)
        folder.mkdir()
        Image.fromarray(noise(rng)).save(folder / "whole.png")
        for k in range(count):
            buffer, kind = io.BytesIO(), rng.choice(formats)
            Image.fromarray(noise(rng)).save(buffer, {"jpg": "jpeg", "tif": "tiff"}.get(kind, kind))
            (folder / f"{k}.{kind}").write_bytes(mutated(buffer.getvalue(), rng))
        out = place / f"masks {batch}"
        argv = [str(place / "run"), str(folder), f"--out={out}", "--resolution=32", "--max-pixels=1000000"]
        _judge(report, call(_watched(predict, argv, out), LIMIT), f"folder {batch}", count)
        if not (out / "whole.png").exists():
            report.fault(f"folder {batch}: the whole image has no mask")
        left, batch = left - count, batch + 1
    return report


def _labels(lab: Lab, place: Path) -> Report:
    """One mutated image or label each in a data set that is trained on."""
    report, rng, cases = Report("mutated images and labels: train"), lab.rng("labels"), []
    files = sorted(path.relative_to(place / "data") for path in (place / "data").rglob("*.png"))
    for k in range(lab.number(IMAGES)):
        path = rng.choice(files)
        content = mutated((place / "data" / path).read_bytes(), rng)

        def build(folder: Path, path: Path = path, content: bytes = content) -> list[str]:
            shutil.copytree(place / "data", folder / "data")
            (folder / "data" / path).write_bytes(content)
            return base(folder / "data", folder / "run", "--train.steps=1")

        cases.append(hostile.Case(f"{path} {k}", train, build))
    _all(report, place, cases)
    return report


def _files(name: str, place: Path, cases: Sequence[hostile.Case]) -> Report:
    report = Report(name)
    _all(report, place, cases)
    return report


def _all(report: Report, place: Path, cases: Sequence[hostile.Case]) -> None:
    """Cases one after the other in one process; a new one begins where one ended it."""
    left = list(cases)
    while left:
        part = left[:50]
        ended = call(lambda part=part: [_one(case, place) for case in part], LIMIT * len(part))
        if not isinstance(ended.value, list) or len(ended.value) != len(part):
            for case in part:  # one of them ended the process: each by itself
                alone = call(lambda case=case: [_one(case, place)], LIMIT)
                found = alone.value or [("wrong", f"{case.name}: {alone.code} {alone.text[-600:]}")]
                _note(report, found[0])
        else:
            for found in ended.value:
                _note(report, found)
        left = left[50:]


def _note(report: Report, found: tuple[str, str]) -> None:
    report.fault(found[1]) if found[0] == "wrong" else report.count(found[0])


_WATCH: list[Watch] = []


def _one(case: hostile.Case, place: Path) -> tuple[str, str]:
    """One case: its outcome, and what went wrong."""
    without_pictures()
    folder = place / "case"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    argv = case.build(folder)
    if not _WATCH:
        _limit_memory()
        _WATCH.append(Watch(folder))
    watch, printed = _WATCH[0], io.StringIO()
    watch.found.clear()
    signal.signal(signal.SIGALRM, _hang)
    signal.alarm(LIMIT)
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            code = command(case.main, argv)
    except SystemExit as ended:
        code = ended.code
    except BaseException as error:
        return "wrong", f"{case.name}: {type(error).__name__}: {str(error)[:300]} at {_place_of(error)}"
    finally:
        signal.alarm(0)
    if watch.found:
        return "wrong", f"{case.name}: {watch.found[:3]}"
    if code not in (0, 2, 3, 4):
        return "wrong", f"{case.name}: exit code {code}: {printed.getvalue()[-300:]}"
    return ("used" if code == 0 else "refused in one line"), ""


def _place_of(error: BaseException) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "ppap" in f.filename]
    return ", ".join(f"{Path(f.filename).name}:{f.lineno}" for f in frames[-3:])


def _hang(number: int, frame: Any) -> None:
    raise Hang


def _limit_memory() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _MEMORY,) * 2)


def _watched(main: Callable[[Sequence[str]], Any], argv: list[str], *folders: Path) -> Callable[[], int]:
    def work() -> int:
        _limit_memory()
        watch = Watch(*folders)
        code = command(main, argv)
        if watch.found:
            print("Traceback (most recent call last) stands for:", watch.found[:3])
        return code

    return work


def _judge(report: Report, ended: Any, name: str, count: int) -> None:
    right = ended.code in (0, 2, 3) and not ended.failed and ended.code != HUNG
    if right:
        report.count("used or refused in one line", count)
    else:
        report.fault(f"{name}: exit code {ended.code}: {ended.text[-1200:]}")
