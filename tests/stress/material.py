"""What the experiments train on, and what of a run has to be the same however often it was ended."""

import contextlib
import hashlib
import io
import json
import math
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ppap.reports import markdown
from ppap.runs.rundir import RunDir
from ppap.train import main as train
from tests.stress.process import Ended, call, command
from tests.trained import SMALL, VIT, striped_folder

_TIMES = {"images_per_s", "crc"}


def warm_up(place: Path) -> None:
    """One training here, so that what it imports and registers is there in every forked process."""
    picture = markdown.curves
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        without_pictures()
        train(base(place / "data", place / "run", "--train.steps=1"))
    markdown.curves = picture


@dataclass
class Report:
    """What an experiment found out."""

    name: str
    cases: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    skipped: str | None = None

    def count(self, outcome: str, number: int = 1) -> None:
        """One more case with an outcome."""
        self.cases += number
        self.counts[outcome] = self.counts.get(outcome, 0) + number

    def fault(self, text: str) -> None:
        """A case that went wrong."""
        self.count("wrong")
        self.faults.append(text)

    def expect(self, good: bool, outcome: str, text: str) -> None:
        """A case that is right, or wrong and then described."""
        self.count(outcome) if good else self.fault(text)

    @property
    def outcomes(self) -> str:
        """In words."""
        return self.skipped or ", ".join(f"{number} {what}" for what, number in self.counts.items())


@dataclass
class Lab:
    """Where and how much an experiment works."""

    folder: Path
    share: float
    seed: int

    def number(self, full: int) -> int:
        """So many cases of the `full` number, at least one."""
        return max(1, round(full * self.share))

    def some(self, names: Iterable[str]) -> list[str]:
        """All names; of a share below a tenth only so many, at least one."""
        every = list(names)
        count = max(1, math.ceil(len(every) * min(10 * self.share, 1)))
        return sorted(self.rng(",".join(every)).sample(every, count), key=every.index)

    def rng(self, name: str) -> random.Random:
        """Draws of one experiment."""
        return random.Random(f"{self.seed} {name}")

    def place(self, name: str) -> Path:
        """A new folder."""
        path = self.folder / name
        path.mkdir(parents=True)
        return path


Experiment = Callable[[Lab], Iterator[Report]]


def base(root: Path, out: Path, *options: str) -> list[str]:
    """The command line of a tiny training on the images of `root`, which are made where they are missing."""
    if not root.exists():
        striped_folder(root, (0, 1, 2))
    fixed = ["--train.save-every=5", "--train.val-every=0", "--train.log-every=1", "--eval.pictures=0"]
    return ["folder", *VIT, *SMALL, *fixed, f"--data.root={root}", f"--train.out={out}", *options]


def without_pictures() -> None:
    """Let reports go without their curves, which take a second and are read back by nothing."""
    markdown.curves = lambda rows, path: path.write_bytes(b"")


def training(*argv: object, pictures: bool = False) -> Callable[[], int]:
    """``ppap train`` for a process of its own."""

    def work() -> int:
        if not pictures:
            without_pictures()
        return command(train, *argv)()

    return work


def done(work: Callable[[], Any], seconds: float = 300) -> Ended:
    """A process that an experiment begins with.

    Raises:
        RuntimeError: it failed, so that the experiment says nothing.
    """
    ended = call(work, seconds)
    if ended.code != 0:
        raise RuntimeError(f"the experiment cannot begin (exit code {ended.code}):\n{ended.text}")
    return ended


def digest(path: Path) -> str:
    """Short checksum of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def results(run: Path) -> dict[str, Any]:
    """All of a run, or of a set of seeds, that has to be the same, bit for bit."""
    found: dict[str, Any] = {}
    for folder in (run, *sorted(run.glob("seed-*"))):
        name = folder.name if folder != run else "."
        for path in sorted(folder.glob("checkpoints/*/*")):
            if path.name == "model.safetensors":
                found[f"{name}/{path.parent.name}/{path.name}"] = digest(path)
            elif path.name == "state.pt":
                # By content: which of two equal strings pickle writes once depends on who made them.
                found[f"{name}/{path.parent.name}/{path.name}"] = _plain(torch.load(path, weights_only=True))
        rows = RunDir(folder).rows()
        found[f"{name}/metrics"] = [{k: v for k, v in row.items() if k not in _TIMES} for row in rows]
        for file in ("evaluation-final.json", "comparison.json", "results.json"):
            if (folder / file).exists():
                content = json.loads((folder / file).read_text())
                found[f"{name}/{file}"] = [content.get(key) for key in ("summary", "scores", "rows")]
        if (folder / "report.md").exists():
            lines = (folder / "report.md").read_text().splitlines()
            times = ("minutes since", "ppap.", "- data:")
            found[f"{name}/report"] = [line for line in lines if not any(word in line for word in times)][1:]
    return found


def _plain(state: Any) -> Any:
    """Containers and tensors as a text that is the same for the same bits."""
    if isinstance(state, torch.Tensor):
        bits = state.contiguous().view(torch.uint8) if state.dim() else state[None].view(torch.uint8)
        return [str(state.dtype), list(state.shape), hashlib.sha256(bits.numpy().tobytes()).hexdigest()]
    if isinstance(state, dict):
        return {str(key): _plain(value) for key, value in state.items()}
    return [_plain(value) for value in state] if isinstance(state, list | tuple) else repr(state)


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of what differs between two :func:`results`."""
    return sorted(key for key in {*one, *other} if one.get(key) != other.get(key))


def flipped(content: bytes, place: int) -> bytes:
    """Bytes with one bit of them changed."""
    changed = bytearray(content)
    changed[place // 8] ^= 1 << place % 8
    return bytes(changed)


@contextmanager
def damaged(path: Path, content: bytes) -> Iterator[None]:
    """A file with other content, for a while."""
    whole = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(whole)


def noise(rng: random.Random, height: int = 24, width: int = 32) -> np.ndarray:
    """(height, width, 3) uint8."""
    return np.frombuffer(rng.randbytes(height * width * 3), np.uint8).reshape(height, width, 3)
