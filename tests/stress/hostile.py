"""Files whose checksums are right and whose contents are not: JSON of every kind, and checkpoints."""

import copy
import json
import os
import pickle
import random
import shutil
import struct
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ppap.analyze import main as analyze
from ppap.eval import main as evaluate
from ppap.predict import main as predict
from ppap.runs.checkpoint import FILES
from ppap.runs.disk import sha256_of
from ppap.settings.config import hashes_of
from ppap.train import main as train
from tests.stress.material import base, done, training
from tests.stress.process import command


@dataclass
class Case:
    """A command on files of its own."""

    name: str
    main: Callable[[Sequence[str]], Any]
    build: Callable[[Path], list[str]]
    """Makes the files in an empty folder, which alone may be written; the arguments."""


_VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    0,
    1,
    -1,
    3,
    2**31,
    2**63,
    10**400,
    -0.5,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "auto",
    "../../../../tmp/elsewhere",
    "/etc/passwd",
    "\x1b[2J",
    "\ud800",
    "a" * 5000,
    "0" * 300,
    [],
    {},
    [[]],
    [None],
    ["a", 1],
    {"a": 1},
    {"__class__": "os.system"},
    [0] * 1000,
)


def changed(content: Any, rng: random.Random) -> Any:
    """A JSON value with one to three of its parts replaced, removed, renamed or nested."""
    content = copy.deepcopy(content)
    for _ in range(rng.randint(1, 3)):
        places = [(content, key) for key in _keys(content)]
        seen = 0
        while seen < len(places):
            inner = places[seen][0][places[seen][1]]
            places += [(inner, key) for key in _keys(inner)]
            seen += 1
        if not places:
            return rng.choice(_VALUES)
        holder, key = rng.choice(places)
        kind = rng.randrange(5)
        if kind < 3:
            holder[key] = copy.deepcopy(rng.choice(_VALUES))
        elif kind == 3:
            del holder[key]
        elif isinstance(holder, dict):
            holder[f"{key}x"] = holder.pop(key)
        else:
            holder.append(holder[key])
    return content


def _keys(value: Any) -> list[Any]:
    return (
        list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
    )


def _text(value: Any, rng: random.Random) -> bytes:
    """As bytes, now and then no JSON at all."""
    text = json.dumps(value)
    kind = rng.randrange(12)
    if kind == 0:
        text = text[: rng.randrange(len(text) + 1)]
    elif kind == 1:
        text = "[" * 100_000
    elif kind == 2:
        text = text.replace(":", ":" + '{"a":' * 20_000, 1)
    elif kind == 3:
        return text.encode("utf-16")
    return text.encode()


def jsons(
    place: Path, rng: random.Random, names: Sequence[str], count: int
) -> Iterator[tuple[str, list[Case]]]:
    """Kind of file -> cases, `count` of all kinds together."""
    kinds = {name: KINDS[name] for name in names}
    _more_runs(place, names)
    for number, (name, make) in enumerate(kinds.items()):
        share = count // len(kinds) + (number < count % len(kinds))
        if share:
            yield name, [make(place, rng, k) for k in range(share)]


def _more_runs(place: Path, names: Sequence[str]) -> None:
    if {"seeds.json", "comparison.json"} & {*names}:
        rows = ["--compare.rows", "frozen", "ppap", "--compare.steps=2", "--compare.starts=1"]
        done(training(*base(place / "data", place / "set", "--train.steps=1", *rows, "--seeds", "0")))
    if {"study.json", "results of a study"} & {*names}:
        done(command(analyze, *_study(place, place / "study")))


def _study(place: Path, out: Path) -> list[str]:
    argv = [o for o in base(place / "data", place)[1:] if not o.startswith(("--train.out", "--compare"))]
    few = ["--train.steps=1", "--compare.steps=2", "--compare.starts=1", "--seeds", "0"]
    return ["ablation", "folder", *argv, f"--out={out}", *few]


def _put(source: Path, folder: Path, name: str, content: bytes) -> Path:
    target = folder / source.name
    shutil.copytree(source, target)
    (target / name).write_bytes(content)
    return target


def _config(place: Path, rng: random.Random, k: int) -> Case:
    """Settings of a run, most with the hash that they have."""
    record = json.loads((place / "run/config.json").read_text())
    record["config"] = changed(record["config"], rng)
    try:
        record["hash"] = sorted(hashes_of(record["config"]))[0]
    except Exception:
        record["hash"] = "0" * 12
    content = _text(record if rng.random() < 0.9 else changed(record, rng), rng)

    def build(folder: Path) -> list[str]:
        return ["--resume", str(_put(place / "run", folder, "config.json", content)), "--train.steps=2"]

    return Case(f"config.json {k}", train, build)


def _info(place: Path, rng: random.Random, k: int) -> Case:
    """What a checkpoint says of itself, with a manifest that agrees."""
    info = changed(json.loads((place / "run/checkpoints/last/config.json").read_text()), rng)
    content, which = _text(info, rng), rng.randrange(3)

    def build(folder: Path) -> list[str]:
        run = _put(place / "run", folder, "checkpoints/last/config.json", content)
        _agree(run / "checkpoints/last")
        return _use(place, folder, run, which)

    return Case(f"checkpoint config.json {k}", (predict, evaluate, train)[which], build)


def _use(place: Path, folder: Path, run: Path, which: int) -> list[str]:
    image = next((place / "data/images/val").iterdir())
    if which == 0:
        return [str(run / "checkpoints/last"), str(image), f"--out={folder / 'masks'}", "--resolution=32"]
    if which == 1:
        return [str(run), "--which=last", "--eval.crf=none"]
    return ["--resume", str(run), "--train.steps=2"]


def _agree(checkpoint: Path) -> None:
    manifest = {name: sha256_of(checkpoint / name) for name in FILES}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def _manifest(place: Path, rng: random.Random, k: int) -> Case:
    content = _text(changed(json.loads((place / "run/checkpoints/last/manifest.json").read_text()), rng), rng)
    which = rng.randrange(3)

    def build(folder: Path) -> list[str]:
        return _use(
            place, folder, _put(place / "run", folder, "checkpoints/last/manifest.json", content), which
        )

    return Case(f"manifest.json {k}", (predict, evaluate, train)[which], build)


def _legend(place: Path, rng: random.Random, k: int) -> Case:
    """A legend in the folder of masks, and one beside images."""
    record = {"probe": "cluster", "backbone": "x", "ignored_id": 255, "classes": [{"id": 0, "name": "a"}]}
    content, beside = _text(changed(record, rng), rng), rng.random() < 0.5

    def build(folder: Path) -> list[str]:
        shutil.copytree(place / "data/images/val", folder / "in")
        (folder / "masks").mkdir()
        (folder / ("in" if beside else "masks") / "legend.json").write_bytes(content)
        return [str(place / "run"), str(folder / "in"), f"--out={folder / 'masks'}", "--resolution=32"]

    return Case(f"legend.json {k}", predict, build)


def _metrics(place: Path, rng: random.Random, k: int) -> Case:
    lines = (place / "run/metrics.jsonl").read_text().splitlines()
    content = b"\n".join(_text(changed(json.loads(line), rng), rng) for line in lines for _ in range(3))

    def build(folder: Path) -> list[str]:
        return ["--resume", str(_put(place / "run", folder, "metrics.jsonl", content)), "--train.steps=2"]

    return Case(f"metrics.jsonl {k}", train, build)


def _of_set(name: str) -> Callable[[Path, random.Random, int], Case]:
    def make(place: Path, rng: random.Random, k: int) -> Case:
        content = _text(changed(json.loads((place / "set" / name).read_text()), rng), rng)
        return Case(
            f"{name} {k}", train, lambda folder: ["--resume", str(_put(place / "set", folder, name, content))]
        )

    return make


def _of_study(name: str) -> Callable[[Path, random.Random, int], Case]:
    def make(place: Path, rng: random.Random, k: int) -> Case:
        path = next((place / "study").glob(name)).relative_to(place / "study")
        content = _text(changed(json.loads((place / "study" / path).read_text()), rng), rng)

        def build(folder: Path) -> list[str]:
            return _study(place, _put(place / "study", folder, str(path), content))

        return Case(f"{path} {k}", analyze, build)

    return make


KINDS: dict[str, Callable[[Path, random.Random, int], Case]] = {
    "config.json of a run": _config,
    "config.json of a checkpoint": _info,
    "manifest.json": _manifest,
    "legend.json": _legend,
    "metrics.jsonl": _metrics,
    "seeds.json": _of_set("seeds.json"),
    "comparison.json": _of_set("seed-0/comparison.json"),
    "study.json": _of_study("study.json"),
    "results of a study": _of_study("cells/*.json"),
}


class _Runs:
    """Unpickled by a careless reader, it runs a command."""

    def __init__(self, what: Callable[..., Any], *arguments: Any) -> None:
        self.what, self.arguments = what, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.what, self.arguments


def checkpoints(place: Path, share: float) -> list[Case]:
    """Checkpoints of somebody else, whose manifest agrees with them."""
    cases = []
    for name, damage in {**_states(), **_weights()}.items():
        for which, main in enumerate((predict, evaluate, train)):

            def build(folder: Path, damage: Callable[[Path], None] = damage, which: int = which) -> list[str]:
                run = folder / "run"
                shutil.copytree(place / "run", run)
                damage(run / "checkpoints/last")
                _agree(run / "checkpoints/last")
                return _use(place, folder, run, which)

            cases.append(Case(f"{name}, {main.__module__}", main, build))
    # There are no more of them than these; of a small share, every so many.
    return cases[:: max(1, round(0.1 / share))]


def _states() -> dict[str, Callable[[Path], None]]:
    trace = str(Path(tempfile.gettempdir()) / "ppap-was-here")
    touch = f"touch {trace}"
    pickles = {
        "os.system": _Runs(os.system, touch),
        "eval": _Runs(eval, f"__import__('os').system('{touch}')"),
        "exec": _Runs(exec, f"import os; os.system('{touch}')"),
        "open": _Runs(open, trace, "w"),
        "__import__": _Runs(__import__, "this"),
        "shutil.rmtree": _Runs(shutil.rmtree, trace),
    }
    found: dict[str, Callable[[Path], None]] = {}
    for name, thing in pickles.items():
        found[f"state with {name}"] = lambda at, t=thing: torch.save(
            {"step": 1, "engine": t}, at / "state.pt"
        )
        found[f"plain pickle with {name}"] = lambda at, t=thing: (at / "state.pt").write_bytes(
            pickle.dumps(t)
        )
    values: dict[str, Any] = {
        "of nothing": {},
        "that is a list": [],
        "of text": {"step": "1", "best": "x", "validated": None, "engine": {}},
        "before the first step": {"step": -5, "best": 0.0, "validated": -1, "engine": {}},
        "of a huge step": {"step": 10**30, "best": 0.0, "validated": -1, "engine": {}},
    }
    for name, value in values.items():
        found[f"state {name}"] = lambda at, v=value: torch.save(v, at / "state.pt")

    def other(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
        def damage(at: Path) -> None:
            state = torch.load(at / "state.pt", weights_only=True)
            change(state["engine"])
            torch.save(state, at / "state.pt")

        return damage

    found["state without generators"] = other(lambda engine: engine.pop("rng"))
    found["state with a short generator"] = other(
        lambda e: e["rng"].update(cpu=torch.zeros(3, dtype=torch.uint8))
    )
    found["state with other optimisers"] = other(lambda engine: engine.update(optimisers={"net": {}}))
    found["state with other sizes"] = other(
        lambda e: e["optimisers"]["cluster"]["state"][0].update(exp_avg=torch.zeros(1, 1))
    )
    return found


def _weights() -> dict[str, Callable[[Path], None]]:
    def raw(header: bytes, length: int | None = None) -> Callable[[Path], None]:
        content = struct.pack("<Q", len(header) if length is None else length) + header
        return lambda at: (at / "model.safetensors").write_bytes(content)

    def other(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
        def damage(at: Path) -> None:
            tensors = load_file(at / "model.safetensors")
            change(tensors)
            save_file(tensors, at / "model.safetensors")

        return damage

    entry = {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}
    return {
        "empty weights": lambda at: (at / "model.safetensors").write_bytes(b""),
        "a header of 2^63 bytes": raw(b"{}", 2**63),
        "a header that is no JSON": raw(b"{" * 64),
        "a header of 100,000 brackets": raw(b"[" * 100_000),
        "a tensor of 4 TiB": raw(json.dumps({"a": entry}).encode()),
        "weights without tensors": raw(b"{}"),
        "a tensor less": other(lambda t: t.pop(sorted(t)[0])),
        "a tensor more": other(lambda t: t.update(evil=torch.zeros(1))),
        "another shape": other(lambda t: t.update({sorted(t)[0]: torch.zeros(1)})),
        "another type": other(lambda t: t.update({sorted(t)[0]: t[sorted(t)[0]].to(torch.int8)})),
        "a number that is none": other(lambda t: t[sorted(t)[0]].view(-1)[:1].fill_(float("nan"))),
    }
