"""One run per seed and a table of means: ``python -m ppap.train PRESET --seeds 0 1 2``.

The folder holds a run directory per seed (``seed-0`` ...), ``seeds.json`` (what was asked), ``results.json``
and ``report.md``. An interrupted set is continued with ``--resume FOLDER``: finished seeds are kept.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ppap.errors import DataError, Stopped, UsageError
from ppap.escaping import markdown
from ppap.evaluation.tables import table
from ppap.methods.table import TITLES
from ppap.reports.markdown import comparison_lines
from ppap.reports.records import FINAL_SCORES, shared_provenance, spread_of
from ppap.runs.lock import alone
from ppap.runs.rundir import RunDir, has_begun
from ppap.runs.stored import check_settings, read_sealed
from ppap.settings.config import Config, config_hash, from_dict, of_seed, to_dict
from ppap.settings.plain import parse_json

RunOne = Callable[[Config, Path, bool], None]
"""Trains one seed: its settings, its run directory, and whether that is to be continued."""


def is_set(path: Path) -> bool:
    """Whether a folder holds the runs of several seeds."""
    return (path / "seeds.json").exists()


def start(config: Config, seeds: Sequence[int], path: Path, run_one: RunOne) -> None:
    """Run every seed in a new folder and write the table.

    Args:
        config: settings of all runs; its seed is replaced.
        seeds: different, 0 or more.
        path: folder that does not exist yet, or an empty one.
        run_one: trains one seed.

    Raises:
        UsageError: seeds are repeated or impossible, or what a run raises.
        DataError: the folder cannot be written, or what a run raises.
        Stopped: interrupted; the message names the command that continues.
    """
    if len(set(seeds)) != len(seeds):
        raise UsageError(f"--seeds {' '.join(map(str, seeds))}: give different numbers")
    for seed in seeds:
        of_seed(config, seed)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from None
    with alone(path, f"--train.out {path}"):
        if is_set(path):
            raise UsageError(f"{path} was begun by another process; continue it with --resume {path}")
        try:
            RunDir(path).write_json("seeds.json", _record(config, seeds))
        except OSError as error:
            raise _unwritable(path, error) from None
        try:
            _resume(path, run_one)
        except (UsageError, DataError):
            # Refused before any work: leave nothing that blocks a second try.
            if not any(path.glob("seed-*")):
                (path / "seeds.json").unlink()
            raise


def _record(config: Config, seeds: Sequence[int]) -> dict[str, Any]:
    return {"seeds": list(seeds), "config": to_dict(config), "hash": config_hash(config)}


def _unwritable(path: Path, error: OSError) -> DataError:
    return DataError(f"cannot write {path} ({error.strerror or error}); give another --train.out")


def resume(path: Path, run_one: RunOne) -> None:
    """Run the seeds of a folder that are not finished, and write the table; see :func:`start`.

    Raises:
        UsageError: another process works on the folder, or what a run raises.
    """
    _read(path)
    with alone(path, f"--resume {path}"):
        _resume(path, run_one)


def _resume(path: Path, run_one: RunOne) -> None:
    config, seeds = _read(path)
    for number, seed in enumerate(seeds):
        folder, one = path / f"seed-{seed}", of_seed(config, seed)
        if _finished(folder, one):
            print(f"seed {seed}: finished before")
            continue
        print(f"seed {seed} ({number + 1} of {len(seeds)})", flush=True)
        started = has_begun(folder)
        if folder.exists() and not started:
            print(f"seed {seed}: it ended before its first save and starts anew")
        try:
            run_one(one, folder, started)
        except Stopped:
            raise Stopped(
                f"stopped at seed {seed}; continue with: python -m ppap.train --resume {path}"
            ) from None
    _write(path, config, seeds)


def _finished(folder: Path, config: Config) -> bool:
    scores = folder / _scores_file(folder)
    if not (scores.exists() and RunDir(folder).has_report()):
        return False
    if _scores(folder)["provenance"]["settings"] != config_hash(config):
        raise UsageError(
            f"{folder} was trained with other settings than its set; move it away, or start a new set"
        )
    return True


def _scores_file(folder: Path) -> str:
    """What a finished run measured: its comparison, or where there is none its own scores."""
    return "comparison.json" if (folder / "comparison.json").exists() else FINAL_SCORES


def _scores(folder: Path) -> dict[str, Any]:
    return read_sealed(
        folder / _scores_file(folder), f"copy it again, or remove {folder}, which is then trained again"
    )


def _write(path: Path, config: Config, seeds: Sequence[int]) -> None:
    folders = [path / f"seed-{seed}" for seed in seeds]
    records = [_scores(folder) for folder in folders]
    compared = _scores_file(folders[0]) != FINAL_SCORES
    if not compared:
        records = [{**record, "summary": {config.method: record["summary"]}} for record in records]
    results = [record["summary"] for record in records]
    shared = {key: records[0][key] for key in ("backbone", "warning")}
    rows = {name: spread_of([record[name] for record in results]) for name in TITLES if name in results[0]}
    origin = shared_provenance([record["provenance"] for record in records])
    RunDir(path).write_json(
        "results.json", {**shared, "provenance": origin, "seeds": list(seeds), "rows": rows}
    )
    lines = [f"# {config.preset}: {len(seeds)} seeds ({', '.join(map(str, seeds))})", ""]
    lines += [f"- backbone: {markdown(shared['backbone'])}"]
    lines += [f"- protocol {config.protocol}, settings `{config_hash(config)}`", ""]
    scores = comparison_lines(config, results) if compared else table(results)
    lines += [*scores, "", "Runs: " + ", ".join(f"[seed {s}](seed-{s}/report.md)" for s in seeds)]
    RunDir(path).write_text("report.md", "\n".join(lines) + "\n")
    print("\n".join(scores))
    print(f"report: {path / 'report.md'}")


def runs_of(path: Path) -> list[Path]:
    """The run directories of a set, in the order of its seeds.

    Raises:
        DataError: the set is damaged, or a run is not finished.
    """
    config, seeds = _read(path)
    folders = [path / f"seed-{seed}" for seed in seeds]
    for folder in folders:
        if not RunDir(folder).has_report():
            raise DataError(f"{folder} is not finished; continue with: python -m ppap.train --resume {path}")
    return folders


def _read(path: Path) -> tuple[Config, list[int]]:
    try:
        record = parse_json((path / "seeds.json").read_bytes())
        if "hash" in record:  # sets were begun without one
            check_settings(record, path / "seeds.json")
        return from_dict(record["config"]), record["seeds"]
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(f"{path / 'seeds.json'} is damaged; start a new set in another folder") from None
