"""Single flipped bits in every file of a run, a cache and an export: refused, said, or of no effect."""

import contextlib
import io
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from ppap.cli import run as command
from ppap.data.label_files import read_ids
from ppap.errors import PpapError
from ppap.eval import main as evaluate
from ppap.nets.backbone import build_backbone
from ppap.nets.feature_cache import weights_hash
from ppap.predict import main as predict
from ppap.pretraining.export import export_backbone
from ppap.runs import store
from ppap.runs.checkpoint import load_checkpoint
from ppap.settings.config import ModelConfig
from ppap.train import main as train
from tests.methods import MODEL
from tests.stress.material import (
    Lab,
    Report,
    base,
    damaged,
    digest,
    done,
    flipped,
    noise,
    results,
    training,
    without_pictures,
)
from tests.stress.process import call

FLIPS = 200
SAID = ("damaged", "differs from")
_EVALUATED = "evaluation.json"
OUT_OF_SCOPE = (
    "pictures/*.png, legend.png, NAME_overlay.jpg: nothing reads them back",
    "report.md: read for its size alone; its text is for people",
    "results.json, evaluation.json: results for people, read back by no command",
    "*.log of a study, .lock: nothing reads what is in them",
)
"""Files without a check, and why."""

Reader = Callable[[], Any]
"""The final result of what the files are read for; an error or its exit code where one is refused."""


def bit_flips(lab: Lab) -> Iterator[Report]:
    """200 flips in every file that something reads back."""
    makes = (_run, _set, _plain_set, _cache, _backbone, _export)
    chosen = lab.some(make.__name__ for make in makes)
    for make in (make for make in makes if make.__name__ in chosen):
        place = lab.place(f"flips {make.__name__}")
        files, reader = make(place)
        names = {path: f"{make.__name__[1:]}/{path.relative_to(place)}" for path in files}
        ended = call(lambda reader=reader, names=names: _flip_all(lab, reader, names), 3600 * len(files))
        for path, name in names.items():
            report = Report(f"bit flips: {_plain(name)}")
            if not ended.value:
                report.fault(f"{name}: exit code {ended.code}: {ended.text[-1500:]}")
            for outcome, text in (ended.value or {}).get(path, ()):
                report.fault(text) if outcome == "wrong" else report.count(outcome)
            yield report


def _flip_all(lab: Lab, reader: Reader, names: dict[Path, str]) -> dict[Path, list[tuple[str, str]]]:
    """File -> outcome and fault of each flip in it."""
    without_pictures()
    whole, found = reader(), {}
    for path, name in names.items():
        content, rng = path.read_bytes(), lab.rng(name)
        places = rng.sample(range(8 * len(content)), min(lab.number(FLIPS), 8 * len(content)))
        found[path] = [_flip(reader, whole, path, f"{name}, bit {place}", place) for place in places]
    return found


def _flip(reader: Reader, whole: Any, path: Path, name: str, place: int) -> tuple[str, str]:
    with damaged(path, flipped(path.read_bytes(), place)):
        try:
            read = reader()
        except PpapError as error:
            read = _Refused(str(error))
        except BaseException as error:
            return "wrong", f"{name}: {type(error).__name__}: {error}"
    if isinstance(read, _Refused):
        return "refused or said", ""
    return ("harmless", "") if read == whole else ("wrong", f"{name}: another result in silence")


def _plain(name: str) -> str:
    """Without the hash that names a cache's folder."""
    return "/".join(part if len(part) != 16 else "HASH" for part in name.split("/"))


class _Refused(str):
    """What was said."""


def _told(work: Callable[[], Any], argv: list[str]) -> str | None:
    """What a command printed where it refused, or went on and said of damage; None where it said nothing.

    Raises:
        Exception: what no command should let through.
    """
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        code = command(work, argv)
    text = printed.getvalue()
    if code not in (0, 2, 3):
        raise RuntimeError(f"exit code {code}: {text[-300:]}")
    return text if code or any(word in text for word in SAID) else None


def _run(place: Path) -> tuple[list[Path], Reader]:
    """A run: read by --resume, eval of both checkpoints, and predict."""
    run, image = place / "run", place / "image.png"
    Image.fromarray(noise(random.Random(0))).save(image)
    done(training(*base(place / "data", run, "--train.steps=4", "--train.val-every=2")))
    files = [run / "config.json", run / "metrics.jsonl"]
    files += [path for name in ("last", "best") for path in sorted((run / "checkpoints" / name).iterdir())]

    def reader() -> Any:
        return _of_run(run, image, place / "masks")

    return files, reader


def _of_run(run: Path, image: Path, masks: Path) -> Any:
    copy = run.with_name("copy")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.rmtree(masks, ignore_errors=True)
    shutil.copytree(run, copy)
    found: list[Any] = []
    for which in ("last", "best"):
        (copy / _EVALUATED).unlink(missing_ok=True)
        said = _told(evaluate, [str(copy), "--which", which, "--eval.crf=none", "--data.workers=0"])
        if said is not None:
            return _Refused(said)
        found.append((copy / _EVALUATED).read_text().split('"scores"')[1])
    (copy / _EVALUATED).unlink()
    said = _told(predict, [str(copy), str(image), f"--out={masks}", "--resolution=32"])
    if said is not None:
        return _Refused(said)
    found.append(digest(masks / "image.png"))
    load_checkpoint(copy, "last").state()
    said = _told(train, ["--resume", str(copy), "--train.steps=5"])
    return _Refused(said) if said is not None else [*found, results(copy)]


def _set(place: Path) -> tuple[list[Path], Reader]:
    """A set of seeds with a comparison that is finished: its table is written again."""
    rows = ["--compare.rows", "frozen", "ppap", "--compare.steps=2", "--compare.starts=1"]
    return _of_set(place, rows, "comparison.json")


def _plain_set(place: Path) -> tuple[list[Path], Reader]:
    """The same without a comparison."""
    return _of_set(place, [], "evaluation-final.json")


def _of_set(place: Path, rows: list[str], scores: str) -> tuple[list[Path], Reader]:
    out = place / "set"
    done(training(*base(place / "data", out, "--train.steps=1", *rows, "--seeds", "0", "1")))

    def reader() -> Any:
        said = _told(train, ["--resume", str(out)])
        written = [(out / name).read_text() for name in ("results.json", "report.md")]
        return _Refused(said) if said is not None else written

    return [out / "seeds.json", out / "seed-0" / scores, out / "seed-0" / "config.json"], reader


def _cache(place: Path) -> tuple[list[Path], Reader]:
    """Kept features, read by a training."""
    argv = base(place / "data", place / "run", "--train.steps=2", "--data.cache-features")
    argv.append(f"--data.cache-dir={place / 'cache'}")
    done(training(*argv))

    def reader() -> Any:
        store._VERIFIED.clear()
        shutil.rmtree(place / "run", ignore_errors=True)
        said = _told(train, argv)
        return _Refused(said) if said is not None else results(place / "run")

    return sorted((place / "cache").glob("features/*/*")), reader


def _backbone(place: Path) -> tuple[list[Path], Reader]:
    """What a pretraining exports, loaded."""
    folder = place / "backbone"
    done(lambda: export_backbone(build_backbone(MODEL), folder, "made here"))

    def reader() -> Any:
        backbone = build_backbone(ModelConfig(weights=str(folder)))
        return [weights_hash(backbone), backbone.origin, backbone.spec]

    return sorted(folder.iterdir()), reader


def _export(place: Path) -> tuple[list[Path], Reader]:
    """Masks with their legend: read as labels, and by the same command for one more image."""
    run, images, out = place / "run", place / "images", place / "masks"
    done(training(*base(place / "data", run, "--train.steps=1")))
    images.mkdir()
    for k in range(2):
        Image.fromarray(noise(random.Random(k))).save(images / f"{k}.png")
    argv = [str(run), str(images), f"--out={out}", "--resolution=32", "--skip-existing"]
    done(lambda: command(predict, argv))

    def reader() -> Any:
        said = _told(predict, argv)
        found = [read_ids(path).tolist() for path in sorted(out.glob("?.png"))]
        return _Refused(said) if said is not None else [found, (out / "legend.json").read_bytes()]

    return [out / "0.png", out / "legend.json"], reader
