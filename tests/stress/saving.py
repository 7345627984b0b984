"""Kills while something is saved: at random moments, and before every single operation on files."""

import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ppap.nets.backbone import build_backbone
from ppap.pretraining.export import export_backbone
from ppap.runs import checkpoint
from ppap.runs.checkpoint import exists, load_checkpoint, save_checkpoint
from ppap.runs.disk import write_whole
from ppap.runs.store import Kind, Store
from ppap.settings.config import ModelConfig
from ppap.training import saving as saves
from tests.methods import MODEL
from tests.stress.material import Lab, Report, base, differences, done, results, training
from tests.stress.process import Counter, call, hooked, killed_at

KILLS, _TRIES = 50, 20
_OPERATIONS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link")


def kills_in_saves(lab: Lab) -> Iterator[Report]:
    """50 kills while a run saves, and one before every operation of four kinds of saves."""
    yield _random_moments(lab)
    for name, (save, whole) in SAVES.items():
        yield _every_operation(lab, name, save, whole)


def _random_moments(lab: Lab) -> Report:
    report, place, rng = Report("kills while a checkpoint is saved"), lab.place("saves"), lab.rng("saves")
    kills = lab.number(KILLS)
    options = ["--train.save-every=1", f"--train.steps={kills + 10}"]
    done(training(*base(place / "data", place / "whole", *options)))
    out, counter = place / "killed", Counter()
    start = base(place / "data", out, *options)

    def until_saved() -> int:
        hooked(saves, "save_checkpoint", counter.add)
        return training(*start)()

    for _ in range(_TRIES):  # its first one
        if exists(out):
            break
        shutil.rmtree(out, ignore_errors=True)
        begun = killed_at(until_saved, counter, 2, 0)
    else:
        report.fault(f"no first checkpoint in {_TRIES} starts: {begun.code}, {begun.text[-800:]}")
        return report

    def saving() -> int:
        hooked(saves, "save_checkpoint", counter.add)
        return training("--resume", out)()

    step = load_checkpoint(out, "last").info["step"]
    for _ in range(kills):
        (out / "mine.txt").write_text("kept")
        ended = killed_at(saving, counter, 1, rng.uniform(0, 0.03))
        try:
            now = load_checkpoint(out, "last").info["step"]
        except Exception as error:
            report.fault(f"after a kill: {error}")
            break
        kept = exists(out) and (out / "mine.txt").exists()
        report.expect(
            ended.code == -9 and kept and step <= now <= step + 2,
            "kills, each with a whole checkpoint",
            f"step {step}, then {now}, exit code {ended.code}: {ended.text[-800:]}",
        )
        step = now
    ended = call(training("--resume", out))
    wrong = differences(results(place / "whole"), results(out)) if ended.code == 0 else [ended.text[-800:]]
    report.expect(not wrong, "run bit for bit the same", f"in the end other {wrong}")
    return report


class _Fuse:
    """Kills this process before its n-th operation on files below a folder."""

    def __init__(self, folder: Path, number: int) -> None:
        self.folder, self.left, self.armed = str(folder), number, False

    def tick(self) -> None:
        if self.armed:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def light(self) -> None:
        sys.addaudithook(self._heard)
        hooked(os, "fsync", self.tick)
        checkpoint.save_file = self._half(checkpoint.save_file, 1)
        for name in ("write_bytes", "write_text"):
            setattr(Path, name, self._half(getattr(Path, name), 0))
        self.armed = True

    def _heard(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.armed and event in _OPERATIONS and str(arguments[0]).startswith(self.folder):
            self.tick()

    def _half(self, real: Callable[..., Any], place: int) -> Callable[..., Any]:
        """Before it, with half of its file, and with all of it."""

        def replaced(*arguments: Any, **options: Any) -> Any:
            path = Path(arguments[place])
            self.tick()
            done = real(*arguments, **options)
            content = path.read_bytes() if self.left == 1 else b""
            if content:
                os.truncate(path, len(content) // 2)
            self.tick()
            return done

        return replaced


def _checkpoint(folder: Path, version: int) -> None:
    tensors = {"a": torch.full((64,), float(version))}
    save_checkpoint(folder / "checkpoints/last", tensors, {"step": version}, {"step": version})


def _whole_checkpoint(folder: Path) -> int:
    found = load_checkpoint(folder, "last")
    version = found.info["step"]
    assert found.state() == {"step": version} and bool((found.tensors["a"] == version).all())
    return version


def _text(folder: Path, version: int) -> None:
    write_whole(folder / "report.md", f"{version}\n" * 1000)


def _whole_text(folder: Path) -> int:
    content = (folder / "report.md").read_text()
    assert content == content[:2] * 1000
    return int(content[0])


def _backbone(folder: Path, version: int) -> None:
    torch.manual_seed(version)
    export_backbone(build_backbone(MODEL), folder / "backbone", f"version {version}")


def _whole_backbone(folder: Path) -> int:
    return int(build_backbone(ModelConfig(weights=str(folder / "backbone"))).origin.split("version ")[1][0])


def _features(folder: Path, version: int) -> None:
    if version == 1:
        return  # nothing is replaced: features are there, or are not
    with _store(folder).made() as part:
        if part is not None:
            part.arrays["a"][part.left] = 2
            part.mark(part.left)


def _store(folder: Path) -> Store:
    return Store(folder, {"of": "x"}, {"a": Kind((6, 5), np.float16)}, what="features", remedy="none")


def _whole_features(folder: Path) -> int:
    store = _store(folder)
    if not store.path.exists():
        return 1
    store.verify()
    assert (np.load(store.path / "a.npy") == 2).all()
    return 2


SAVES: dict[str, tuple[Callable[[Path, int], None], Callable[[Path], int]]] = {
    "checkpoint": (_checkpoint, _whole_checkpoint),
    "report": (_text, _whole_text),
    "backbone": (_backbone, _whole_backbone),
    "features": (_features, _whole_features),
}
"""What is saved -> how a version of it is, and how it is read: the version, or an error."""


def _every_operation(
    lab: Lab, name: str, save: Callable[[Path, int], None], whole: Callable[[Path], int]
) -> Report:
    report, place = Report(f"a kill before every operation: {name}"), lab.place(f"operations {name}")
    step = max(1, round(0.1 / lab.share))  # of a small share, every so many
    number = 1
    while True:
        folder = place / str(number)
        folder.mkdir()
        done(lambda folder=folder: save(folder, 1))

        def killed(folder: Path = folder, number: int = number) -> None:
            _Fuse(folder, number).light()
            save(folder, 2)

        ended, read = call(killed), call(lambda folder=folder: [whole(folder)])
        again = call(lambda folder=folder: (save(folder, 2), [whole(folder)])[1])
        right = ended.code in (0, -9) and read.value in ([1], [2]) and again.value == [2]
        text = f"{name}, operation {number}: {ended.text[-500:]} {read.text[-500:]} {again.text[-500:]}"
        report.expect(right, "kills, each with a whole one", text)
        shutil.rmtree(folder)
        if ended.code != -9:
            return report
        number += step
