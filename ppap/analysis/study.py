"""A study: several runs in one folder, each trained and measured once, one after another or in parallel.

``study.json`` holds the settings that all runs share. A run is a *cell*: ``cells/NAME`` is its run directory,
``cells/NAME.json`` its result, written when it is finished, and ``cells/NAME.log`` what it printed where
several run at once. The same command given again goes on: finished cells are kept, a stopped one continues
from its last checkpoint. Other seeds or values only add cells; other settings are refused.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from tqdm import tqdm

import ppap
from ppap.analysis.arguments import make_folder
from ppap.analysis.features import prepare, with_choices
from ppap.data import EpochSampler, build_datasets
from ppap.errors import DataError, NumberError, PpapError, Stopped, UsageError
from ppap.evaluation.crf import require_crf
from ppap.methods.choices import Choices, autos
from ppap.methods.engine import pick_device
from ppap.nets.feature_cache import sources_of
from ppap.nets.model import build_net
from ppap.parallel import own_cores
from ppap.reports.measure import MeasureOptions, check_protocol, measure, settings_of, write_record
from ppap.runs.checkpoint import load_checkpoint
from ppap.runs.lock import alone
from ppap.runs.rundir import RunDir, changed_settings, has_begun, option_names
from ppap.runs.stored import check_settings, read_sealed
from ppap.settings.config import Config, config_hash, from_dict, to_dict
from ppap.stopping import StopRequest
from ppap.training.trainer import Trainer

Measure = Literal["comparison", "checkpoint"]
"""What a cell's result is: the table of ``--compare.rows``, or what ``ppap eval`` says of the checkpoint that
``--train.selection`` names."""

# Settings that may differ when a study is continued: where things are, and how fast.
FREE = (
    "train.out",
    "train.seed",
    "train.device",
    "train.log_every",
    "train.save_every",
    "train.log",
    "data.root",
    "data.workers",
    "data.cache_dir",
    "eval.batch_size",
)
_ANEW = "copy it again, or start anew in another folder"
_CONTINUE = "the same command continues"
_ERRORS = {error.exit_code: error for error in (UsageError, DataError, NumberError)}


@dataclass(frozen=True)
class Cell:
    """One run of a study."""

    name: str
    """Name of its folder."""
    config: Config
    measure: Measure = "comparison"
    keep_checkpoints: bool = True
    """Off = they are removed once the run is finished and measured."""


def open_study(out: str, kind: str, config: Config) -> Path:
    """The folder of a new study, or of one to continue; made if it is not there.

    Args:
        out: ``--out``.
        kind: name of the analysis.
        config: settings that all cells share.

    Raises:
        UsageError: not given; or the folder holds something else, or a study with other settings.
        DataError: it cannot be written, or ``study.json`` is damaged.
    """
    if not out:
        raise UsageError("--out is not given; name a new folder, or one to continue")
    path = Path(out)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        _check_same(path, kind, config)
        return path
    make_folder(path)
    record = {"analysis": kind, "config": to_dict(config), "hash": config_hash(config)}
    RunDir(path).write_sealed("study.json", record)
    return path


def _check_same(path: Path, kind: str, config: Config) -> None:
    if not (path / "study.json").exists():
        raise UsageError(f"--out {path} exists already and is no {kind}; give a new folder")
    try:
        stored = read_sealed(path / "study.json", _ANEW)
        if "hash" in stored:  # studies were begun without one
            check_settings(stored, path / "study.json")
        before, name = from_dict(stored["config"]), stored["analysis"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"{path / 'study.json'} is damaged; start anew in another folder") from None
    if name != kind:
        raise UsageError(f"--out {path} holds the analysis {name}, not {kind}; give another folder")
    changed = changed_settings(before, config, FREE)
    if changed:
        raise UsageError(
            f"--out {path} was started with another {option_names(changed)}; give the same settings to "
            "continue it, or another folder"
        )


def check(config: Config, jobs: int, *, splits: Sequence[str] = ("train", "val")) -> None:
    """Refuse what would stop the cells, such as data without labels or too few; nothing is written.

    With several jobs the caches of features that are wanted are made here, so that no two make one at once.

    Args:
        config: settings that the cells share.
        jobs: cells at once.
        splits: those that need labels.

    Raises:
        UsageError, DataError, NumberError: see the parts.
    """
    if jobs < 1:
        raise UsageError(f"--jobs is {jobs}; give at least 1")
    device = pick_device(config.train.device)
    require_crf(config.eval.crf, device)
    data = build_datasets(config.data)
    if data.train is not None:
        EpochSampler(len(data.train), config.train.batch_size, config.train.seed)  # refuses too large a batch
    for name in splits:
        split = getattr(data, name)
        if split is None or not split.labelled:
            raise DataError(f"there are no labels to score with; give labels/{name}")
    net = build_net(config.model)
    if jobs > 1:
        sources_of(config, data, net.to(device), device)


def settle(study: Path, config: Config) -> Config:
    """``config`` with numbers for what is auto: chosen when the study begins, kept in ``choices.json``.

    Args:
        study: folder of :func:`open_study`.
        config: settings that the cells share.

    Raises:
        UsageError: no threshold gives sets of the size that is asked for.
        DataError: ``choices.json`` is damaged.
    """
    if not autos(config):
        return config
    path = study / "choices.json"
    if path.exists():
        try:
            choices = Choices.from_dict(read_sealed(path, _ANEW))
        except (ValueError, TypeError):
            raise DataError(f"{path} is damaged; start anew in another folder") from None
        return with_choices(config, choices)
    dataset = build_datasets(config.data, ("train",)).train
    _, settled, choices, _ = prepare(config, dataset, pick_device(config.train.device))
    RunDir(study).write_sealed(path.name, choices.to_dict())
    return settled


def choices_of(study: Path, cell: str) -> Choices:
    """What a finished cell chose for itself where settings are auto; nothing where its checkpoint is gone."""
    path = study / "cells" / cell / "checkpoints" / "last" / "config.json"
    return Choices.from_dict(json.loads(path.read_text()).get("choices") if path.exists() else None)


def run_cells(
    study: Path, cells: Sequence[Cell], jobs: int = 1, after: Callable[[], object] = lambda: None
) -> dict[str, dict[str, Any]]:
    """Train and measure the cells that are not finished.

    Args:
        study: folder of :func:`open_study`.
        cells: with different names.
        jobs: processes at once; with 1 the cells run in this one.
        after: called here when a cell has been finished.

    Returns:
        Cell name -> its record, in the order of `cells`.

    Raises:
        Stopped: interrupted; the same command continues.
        UsageError, DataError, NumberError: what a cell raises; the message names it.
    """
    with alone(study, f"--out {study}"):
        return _run_cells(study, cells, jobs, after)


def _run_cells(
    study: Path, cells: Sequence[Cell], jobs: int, after: Callable[[], object]
) -> dict[str, dict[str, Any]]:
    folder = study / "cells"
    make_folder(folder)
    left = [cell for cell in cells if not (folder / f"{cell.name}.json").exists()]
    if len(left) < len(cells):
        print(f"{len(cells) - len(left)} of {len(cells)} runs were finished before", flush=True)
    if jobs > 1:
        _run_parallel(folder, left, jobs, after)
    else:
        for number, cell in enumerate(left):
            print(f"run {number + 1} of {len(left)}: {cell.name}", flush=True)
            run_cell(folder, cell)
            after()
    return {cell.name: _result(folder, cell) for cell in cells}


def _result(folder: Path, cell: Cell) -> dict[str, Any]:
    path = folder / f"{cell.name}.json"
    return read_sealed(path, "copy it again, or remove it: the same command then measures the run again")


def run_cell(folder: Path, cell: Cell) -> None:
    """Train one cell, from its last checkpoint where there is one, measure it, and write its record.

    Raises:
        Stopped: interrupted; the same command continues.
        UsageError: another process works on the cell, such as one whose study was killed; or see the parts.
        DataError, NumberError: see the parts.
    """
    path, began = folder / cell.name, time.perf_counter()
    if (folder / f"{cell.name}.json").exists():
        print(f"run {cell.name} was finished meanwhile, by a process of an earlier start", flush=True)
        return
    checkpoint = load_checkpoint(path, "last") if has_begun(path) else None
    try:
        Trainer(cell.config, path, checkpoint).run()
        with alone(path, f"the run {path}"):
            _conclude(folder, cell, began)
    except Stopped as stopped:
        raise Stopped(f"{str(stopped).split(';')[0]} of run {cell.name}; {_CONTINUE}") from None


def _conclude(folder: Path, cell: Cell, began: float) -> None:
    """Measure a cell that is trained, and write its record."""
    path = folder / cell.name
    result = _MEASURES[cell.measure](path, cell.config)
    minutes = (time.perf_counter() - began) / 60
    record = {"cell": cell.name, "minutes_since_last_start": minutes, "result": result}
    RunDir(folder).write_sealed(f"{cell.name}.json", record)
    if not cell.keep_checkpoints:
        shutil.rmtree(path / "checkpoints")


def _comparison(path: Path, config: Config) -> dict[str, Any]:
    return read_sealed(path / "comparison.json", f"copy it again, or remove {path} to train it again")


def _checkpoint(path: Path, config: Config) -> dict[str, Any]:
    """What ``ppap eval`` says of the run."""
    out = path / "evaluation.json"
    out.unlink(missing_ok=True)  # of a start that was stopped before the cell's record
    checkpoint = load_checkpoint(path)
    settings = settings_of(checkpoint)
    data = replace(settings.data, cache_dir=config.data.cache_dir)
    scored = replace(settings.eval, crf=config.eval.crf)
    options = MeasureOptions(device=config.train.device, data=data, eval=scored)
    check_protocol(options, 1)
    record, lines = measure(checkpoint, options)
    write_record(out, record)
    print("\n".join([*lines, f"written: {out}"]))
    return json.loads(out.read_text())


_MEASURES: dict[str, Callable[[Path, Config], dict[str, Any]]] = {
    "comparison": _comparison,
    "checkpoint": _checkpoint,
}


def _run_parallel(folder: Path, cells: Sequence[Cell], jobs: int, after: Callable[[], object]) -> None:
    """Processes of their own, which end by themselves; a stop is passed on to them, once."""
    waiting, running = list(cells), {}
    with StopRequest() as stop, tqdm(total=len(cells), desc="runs", unit="run", disable=None) as bar:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    cell = waiting.pop(0)
                    running[cell.name] = _start(folder, cell, jobs)
                for name, process in list(running.items()):
                    if process.poll() is None:
                        continue
                    del running[name]
                    _check_exit(folder, name, process.returncode)
                    bar.update()
                    tqdm.write(f"finished: {name}")
                    after()
                if stop.asked:
                    raise Stopped(f"stopped with {len(waiting) + len(running)} runs to go; {_CONTINUE}")
                time.sleep(0.05)
        finally:
            for process in running.values():
                process.terminate()
            for process in running.values():
                process.wait()


def _start(folder: Path, cell: Cell, jobs: int) -> subprocess.Popen:
    """A process that runs one cell; it reads what is asked from its standard input."""
    root = str(Path(ppap.__file__).parent.parent)
    threads = max(own_cores() // jobs, 1)
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    request = {**vars(cell), "config": to_dict(cell.config)}
    with open(folder / f"{cell.name}.log", "a") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "ppap.analysis.cell", str(folder)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # the terminal's Ctrl-C reaches this process alone, which passes it on
        )
    process.stdin.write(json.dumps(request).encode())
    process.stdin.close()
    return process


def _check_exit(folder: Path, name: str, code: int) -> None:
    if code == 0:
        return
    log = folder / f"{name}.log"
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    reason = lines[-1].removeprefix("error: ") if lines else f"exit code {code}"
    if code == Stopped.exit_code:
        raise Stopped(f"run {name}: {reason}")
    raise _ERRORS.get(code, PpapError)(f"run {name}: {reason} (all it printed: {log})")
