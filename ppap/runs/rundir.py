"""A run directory: settings, metrics, ``checkpoints/{best,last}``, ``pictures/`` and ``report.md``."""

import json
import math
import shutil
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ppap.errors import DataError, UsageError
from ppap.runs.checkpoint import exists
from ppap.runs.disk import write_whole
from ppap.runs.lock import NAME as LOCK
from ppap.runs.lock import FolderLock, alone
from ppap.runs.stored import read_settings, sealed
from ppap.runs.trackers import Trackers, open_trackers
from ppap.settings.config import Config, config_hash, from_dict, to_dict
from ppap.settings.plain import parse_json

_CHECKSUM = "crc32"
"""What the last value of a line of metrics is called."""


def _checksum(row: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(row).encode()):08x}"


def _with_checksum(row: dict[str, Any]) -> str:
    return json.dumps({**row, _CHECKSUM: _checksum(row)})


def _row_of(line: str) -> dict[str, Any] | None:
    """What a line of metrics holds; None where it is cut or damaged."""
    try:
        row = parse_json(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


class RunDir:
    """Paths and records of one run. Nothing is created before :meth:`create`."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.pictures = self.path / "pictures"
        self.trackers = Trackers()

    def create(self, config: Any, lock: FolderLock) -> None:
        """Make the folders, take their lock and write the settings.

        Raises:
            UsageError: another process is, or was, faster.
            DataError: the folder cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.take()
            if (self.path / "config.json").exists():
                raise UsageError(f"{self.path} was begun by another process; give another --train.out")
            self.write_config(config)  # first: what is a run can be continued
            self.pictures.mkdir(exist_ok=True)
        except OSError as error:
            raise DataError(
                f"cannot make the run directory {self.path} ({error.strerror or error}); "
                "give another --train.out"
            ) from None

    def write_config(self, config: Any, *, finished: bool = False) -> None:
        """Write the resolved settings, their hash, and whether the run is at its end, report included."""
        record = {"config": to_dict(config), "hash": config_hash(config), "finished": finished}
        if finished:
            record["report_bytes"] = (self.path / "report.md").stat().st_size
        self.write_json("config.json", record)

    def is_finished(self, config: Any) -> bool:
        """Whether the run has come to its end with these settings, and its report is there.

        Raises:
            DataError: its settings are cut or were edited.
        """
        record = read_settings(self.path / "config.json")
        same = record.get("hash") == config_hash(config)
        return same and record.get("finished", False) and self.has_report()

    def has_report(self) -> bool:
        """Whether ``report.md`` is there as it was written: none that a kill or a power cut left in part.

        Raises:
            DataError: the run's settings are cut or were edited.
        """
        try:
            content = (self.path / "report.md").read_bytes()
        except OSError:
            return False
        written = read_settings(self.path / "config.json").get("report_bytes")
        # Earlier versions did not write down its size; this is what it ends with.
        return len(content) >= written if isinstance(written, int) else b"\n## Next\n" in content

    def write_json(self, name: str, values: dict[str, Any]) -> None:
        """Write a file of results, whole or not at all."""
        self.write_text(name, json.dumps(values, indent=2) + "\n")

    def write_sealed(self, name: str, values: dict[str, Any]) -> None:
        """As :meth:`write_json`, with a checksum, for :func:`ppap.runs.stored.read_sealed`."""
        self.write_json(name, sealed(values))

    def write_text(self, name: str, text: str) -> None:
        """Write a file such as the report, whose presence says that the run is done, whole or not at all."""
        write_whole(self.path / name, text)

    def read_config(self, kind: type = Config) -> Any:
        """Settings of an existing run, of the dataclass `kind`.

        Raises:
            DataError: this is no run directory, or its settings are cut or were edited.
            UsageError: its settings do not fit this version.
        """
        if (self.path / "manifest.json").exists():
            raise DataError(
                f"{self.path} is a checkpoint, not a run directory; "
                f"give the run, such as {self.path.parent.parent}"
            )
        if not (self.path / "config.json").exists():
            raise DataError(
                f"{self.path} is no run directory: it has no config.json; give the folder a run made"
            )
        return from_dict(read_settings(self.path / "config.json")["config"], kind)

    def reopen(self, config: Config, step: int) -> None:
        """Continue an existing run at `step`: write the settings, forget what came later."""
        self.pictures.mkdir(exist_ok=True)
        self.write_config(config)
        self._forget_after(step)

    def follow(self, config: Config, step: int, offline: bool) -> None:
        """Let the trackers of ``--train.log`` follow from a step on; `offline`: nothing may be sent."""
        self.trackers = open_trackers(config.train.log, self.path, config, step, offline)

    def append(self, row: dict[str, Any]) -> None:
        """Add one line to ``metrics.jsonl``, with its checksum; numbers that are not finite become null."""
        clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(_with_checksum(clean) + "\n")
        self.trackers.row(clean)

    def rows(self) -> list[dict[str, Any]]:
        """All whole lines of ``metrics.jsonl``, without their checksums.

        A power cut leaves half a line and a bad disk others; how many are left out is said.
        """
        if not self.metrics.exists():
            return []
        lines = self.metrics.read_text(encoding="utf-8", errors="replace").splitlines()
        found = [row for row in map(_row_of, lines) if row is not None]
        # Earlier versions wrote none; where one has it, those without have lost it.
        checked = any(_CHECKSUM in row for row in found)
        rows = [row for row in found if not checked or row.pop(_CHECKSUM, None) == _checksum(row)]
        if len(rows) < len(lines):
            print(f"{self.metrics}: {len(lines) - len(rows)} of {len(lines)} lines are damaged and left out")
        return rows

    def _forget_after(self, step: int) -> None:
        """Drop the lines of steps past `step`: a resumed run writes them again."""
        kept = [row for row in self.rows() if row["step"] <= step]
        write_whole(self.metrics, "".join(_with_checksum(row) + "\n" for row in kept))


def has_begun(path: Path) -> bool:
    """Whether a run has a checkpoint to go on from; what a start that saved none left there is removed.

    Raises:
        UsageError: another process works there.
        DataError: the disk refuses.
    """
    if exists(path):
        return True
    if not path.exists():
        return False
    with alone(path, f"the run {path}"):
        if exists(path):  # saved before the lock was free
            return True
        for left in path.iterdir():
            # The folder stays, and its lock till the end: without it another process could take a new one.
            if left.name != LOCK:
                _remove(left)
    return False


def _remove(path: Path) -> None:
    try:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        raise DataError(f"cannot remove {path} ({error.strerror or error}); remove it by hand") from None


def new_run_path(out: str | None, preset: str) -> Path:
    """Where a new run goes: `out`, or a folder named after the preset and the time, that does not exist yet.

    Raises:
        UsageError: `out` exists already and is not an empty folder.
    """
    if out is None:
        stem = Path("runs") / f"{preset}-{time.strftime('%Y%m%d-%H%M%S')}"
        path, number = stem, 1
        while path.exists():
            number += 1
            path = stem.with_name(f"{stem.name}-{number}")
        return path
    path = Path(out)
    if path.exists() and not (path.is_dir() and all(_is_nothing(left) for left in path.iterdir())):
        raise UsageError(
            f"--train.out {out} exists already; continue that run with --resume {out}, or give another folder"
        )
    return path


def _is_nothing(left: Path) -> bool:
    """Whether this is what a start leaves that was killed before its settings were written."""
    return left.name == LOCK or (left.name.endswith(".json.new") and left.is_file())


def begun_without_save(path: Path) -> bool:
    """Whether this is a run that ended before its first checkpoint, which is said: it starts anew.

    Raises:
        DataError: its settings are cut or were edited.
    """
    if not (path / "config.json").exists() or exists(path) or exists(path, "best"):
        return False
    read_settings(path / "config.json")
    print(f"{path} has no checkpoint: it ended before its first save, and starts anew with its settings")
    return True


def refuse_changes(stored: Any, config: Any, allowed: Sequence[str]) -> None:
    """Refuse a resumed run that differs in a setting which would make it another run.

    Args:
        stored, config: settings of the run and those asked for, of one dataclass.
        allowed: names that may differ, such as train.steps; ``eval.*`` allows a whole section.

    Raises:
        UsageError: another setting differs; the message names it and what may differ.
    """
    wrong = changed_settings(stored, config, allowed)
    if wrong:
        raise UsageError(
            f"--resume cannot change {option_names(wrong)}; start a new run for that. "
            f"It may change {option_names(allowed)}"
        )


def changed_settings(stored: Any, config: Any, allowed: Sequence[str] = ()) -> list[str]:
    """Dotted names of the settings in which two configs differ; those in `allowed` do not count."""
    before, after = _flat(to_dict(stored)), _flat(to_dict(config))

    def free(name: str) -> bool:
        return name in allowed or f"{name.split('.')[0]}.*" in allowed

    return [name for name in before if before[name] != after[name] and not free(name)]


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def option_names(names: Sequence[str]) -> str:
    """Settings as they are written on the command line."""
    return ", ".join(f"--{name.replace('_', '-')}" for name in names)
