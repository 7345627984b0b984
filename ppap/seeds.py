"""One run per seed and a table of means: ``python -m ppap.train PRESET --seeds 0 1 2``.

The folder holds a run directory per seed (``seed-0`` ...), ``seeds.json`` (what was asked), ``results.json``
and ``report.md``. An interrupted set is continued with ``--resume FOLDER``: finished seeds are kept.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ppap.config import Config, config_hash, from_dict, to_dict
from ppap.errors import DataError, Stopped, UsageError
from ppap.evaluation.comparison import TITLES
from ppap.report import comparison_lines
from ppap.rundir import RunDir

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
        path: folder that does not exist yet.
        run_one: trains one seed.

    Raises:
        UsageError: no comparison is configured, or seeds are repeated or negative.
        Stopped: interrupted; the message names the command that continues.
    """
    if len(set(seeds)) != len(seeds) or min(seeds) < 0:
        raise UsageError(f"--seeds {' '.join(map(str, seeds))}: give different numbers, 0 or more")
    if not config.compare.rows:
        raise UsageError("--seeds needs a comparison; add --compare.rows colour frozen fixed ppap")
    try:
        path.mkdir(parents=True, exist_ok=True)
        RunDir(path).write_json("seeds.json", {"seeds": list(seeds), "config": to_dict(config)})
    except OSError as error:
        raise DataError(
            f"cannot write {path} ({error.strerror or error}); give another --train.out"
        ) from None
    resume(path, run_one)


def resume(path: Path, run_one: RunOne) -> None:
    """Run the seeds of a folder that are not finished, and write the table; see :func:`start`."""
    record = json.loads((path / "seeds.json").read_text())
    config = from_dict(record["config"])
    for number, seed in enumerate(record["seeds"]):
        folder = path / f"seed-{seed}"
        if (folder / "comparison.json").exists():
            print(f"seed {seed}: finished before")
            continue
        print(f"seed {seed} ({number + 1} of {len(record['seeds'])})", flush=True)
        one = replace(config, train=replace(config.train, seed=seed, out=str(folder)))
        started = (folder / "checkpoints" / "last").exists()
        if not started:
            shutil.rmtree(folder, ignore_errors=True)  # ended before its first save: nothing to go on from
        try:
            run_one(one, folder, started)
        except Stopped:
            raise Stopped(
                f"stopped at seed {seed}; continue with: python -m ppap.train --resume {path}"
            ) from None
    _write(path, config, record["seeds"])


def _write(path: Path, config: Config, seeds: Sequence[int]) -> None:
    records = [json.loads((path / f"seed-{seed}" / "comparison.json").read_text()) for seed in seeds]
    results = [record["summary"] for record in records]
    RunDir(path).write_json("results.json", _record(config, seeds, records))
    lines = [f"# {config.preset}: {len(seeds)} seeds ({', '.join(map(str, seeds))})", ""]
    lines += [f"- backbone: {records[0]['backbone']}", f"- settings `{config_hash(config)}`", ""]
    lines += comparison_lines(config, results)
    lines += ["", "Runs: " + ", ".join(f"[seed {s}](seed-{s}/report.md)" for s in seeds)]
    (path / "report.md").write_text("\n".join(lines) + "\n")
    print("\n".join(comparison_lines(config, results)))
    print(f"report: {path / 'report.md'}")


def _record(config: Config, seeds: Sequence[int], records: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean, standard deviation and every seed's scores."""
    rows = {}
    for name in (name for name in TITLES if name in records[0]["summary"]):
        cells = {
            key: [record["summary"][name][key] for record in records] for key in records[0]["summary"][name]
        }
        rows[name] = {
            key: {
                "mean": float(np.mean(values)),
                "std": float(np.std(values, ddof=1)) if len(values) > 1 else None,
                "seeds": values,
            }
            for key, values in cells.items()
        }
    shared = ("preset", "backbone", "warning", "device", "versions")
    return {
        **{key: records[0][key] for key in shared},
        "settings": config_hash(config),
        "seeds": list(seeds),
        "rows": rows,
        "config": to_dict(config),
    }
