"""A disk that fills up: the exit code of data, the checkpoint before whole, and room lets it go on."""

import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image

from ppap.predict import main as predict
from ppap.runs.checkpoint import exists, load_checkpoint
from tests.stress.material import Lab, Report, base, done, noise, training
from tests.stress.process import call, command

SIZES = 20
_ROOM = "64m"


def full_disks(lab: Lab) -> Iterator[Report]:
    """20 sizes of a file system for a training, kept features, a set of seeds and a folder of masks."""
    place = lab.place("disk")
    reason = _unmountable(place)
    done(training(*base(place / "data", place / "run", "--train.steps=1")))
    (place / "images").mkdir()
    for k in range(6):
        Image.fromarray(noise(random.Random(k), 120, 160)).save(place / f"images/{k}.png")
    for name in lab.some(WORKS):
        work, again = WORKS[name]
        report = Report(f"full disk: {name}")
        if reason is None:
            _fill(lab, place, report, work, again)
        else:
            report.skipped = f"not run: {reason}"
        yield report


def _unmountable(place: Path) -> str | None:
    (place / "try").mkdir()
    try:
        with _mounted(place / "try", "64k"):
            return None
    except (OSError, subprocess.CalledProcessError):
        return "mounting a file system of a given size needs root and mount"


@contextmanager
def _mounted(folder: Path, size: str) -> Iterator[None]:
    folder.mkdir(exist_ok=True)
    argv = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    subprocess.run(argv, check=True, capture_output=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True, capture_output=True)


Work = Callable[[Path, Path], Callable[[], int]]
"""Command, given the place of data and the full disk."""


def _train(place: Path, disk: Path) -> Callable[[], int]:
    options = ["--train.steps=6", "--train.save-every=1", "--train.val-every=3"]
    return training(*base(place / "data", disk / "new", *options))


def _resume(place: Path, disk: Path) -> Callable[[], int]:
    begun = (disk / "new/config.json").exists() or (disk / "new/seeds.json").exists()
    return training("--resume", disk / "new") if begun else _train(place, disk)


def _cached(place: Path, disk: Path) -> Callable[[], int]:
    out = place / "with cache"
    shutil.rmtree(out, ignore_errors=True)
    cache = f"--data.cache-dir={disk / 'cache'}"
    return training(*base(place / "data", out, "--train.steps=1", "--data.cache-features", cache))


def _set(place: Path, disk: Path) -> Callable[[], int]:
    return training(*base(place / "data", disk / "new", "--train.steps=2"), "--seeds", "0", "1")


def _resume_set(place: Path, disk: Path) -> Callable[[], int]:
    return training("--resume", disk / "new") if (disk / "new/seeds.json").exists() else _set(place, disk)


def _masks(place: Path, disk: Path) -> Callable[[], int]:
    return command(predict, place / "run", place / "images", f"--out={disk / 'masks'}", "--resolution=32")


WORKS: dict[str, tuple[Work, Work]] = {
    "training": (_train, _resume),
    "kept features": (_cached, _cached),
    "set of seeds": (_set, _resume_set),
    "masks": (_masks, _masks),
}
"""What is done on the disk, and what does the rest when there is room."""


def _fill(lab: Lab, place: Path, report: Report, work: Work, again: Work) -> None:
    disk = place / "full"
    with _mounted(disk, _ROOM):
        done(work(place, disk))
        need = sum(path.stat().st_size for path in disk.rglob("*") if path.is_file()) // 1024 + 8
    sizes = lab.number(SIZES)
    for k in range(sizes):
        size = max(4, need * (k + 1) // (sizes + 1))
        with _mounted(disk, f"{size}k"):
            ended = call(work(place, disk))
            broken = _broken(disk)
            subprocess.run(
                ["mount", "-o", f"remount,size={_ROOM}", str(disk)], check=True, capture_output=True
            )
            rest = call(again(place, disk))
        right = ended.code in (0, 3) and not ended.failed and not broken and rest.code in (0, 2)
        # 2: all was done but what nothing reads back, and the same command finds its files.
        right = right and (rest.code == 0 or ended.code == 0)
        outcome = "ended with 3, then finished" if ended.code == 3 else "fitted"
        text = f"{report.name} of {size} KiB: {ended.code}, {ended.text[-900:]}; {broken}; {rest.code}, "
        report.expect(right, outcome, text + rest.text[-500:])


def _broken(disk: Path) -> list[str]:
    """Checkpoints that cannot be loaded."""
    found = []
    for config in disk.glob("**/config.json"):
        if "checkpoints" not in config.parts and exists(config.parent):
            try:
                load_checkpoint(config.parent, "last").state()
            except Exception as error:
                found.append(str(error))
    return found
