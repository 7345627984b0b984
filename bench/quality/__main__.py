"""The command: data set after data set, row after row, files rewritten after each run."""

import argparse
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.quality import report
from bench.quality.settings import BATCH, CORE, STEPS, TRAINED, UNTRAINED, base_config, cells, data_sets
from ppap.analysis.commands import sets as set_command
from ppap.analysis.study import check, open_study, run_cells
from ppap.cli import run
from ppap.errors import UsageError
from ppap.settings.config import Config, of_seed

POOL = 256
"""Patches of HP's reference pool where sets are measured, one of each of as many images."""


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parsed options."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.quality",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        description="Trains and measures methods on labelled photographs, every row with the same images, "
        "steps, condition and probes; all that is chosen chooses itself without labels. quality.md, "
        "quality.json and quality.png are rewritten after each run; the same command goes on after a stop.",
    )
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="holds a folder per data set")
    parser.add_argument("--weights", required=True, metavar="WEIGHTS", help="backbone, as --model.weights")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="new folder, or one to continue"
    )
    parser.add_argument("--sets", nargs="+", metavar="NAME", help="folders of --data; without: all")
    parser.add_argument(
        "--rows",
        nargs="+",
        choices=[*UNTRAINED, *TRAINED],
        default=list(CORE),
        metavar="ROW",
        help=f"of {', '.join([*UNTRAINED, *TRAINED])}",
    )
    parser.add_argument(
        "--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED", help="of every row"
    )
    parser.add_argument("--steps", type=int, default=STEPS, help="of a training")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    """Everything that is asked for and not finished yet."""
    options = arguments(argv)
    names = options.sets or data_sets(options.data)
    configs = {name: base_config(options.data, name, options.weights, options.steps) for name in names}
    for config in configs.values():
        check(config, 1)
    for name, config in configs.items():
        print(f"data set {name}", flush=True)
        study = open_study(str(options.out / name), "quality", of_seed(config, 0))
        for cell in cells(config, tuple(options.rows), tuple(options.seeds)).values():
            run_cells(study, [cell])
            summarise(options)
        measure_sets(config, study, tuple(options.seeds))
        print(summarise(options), flush=True)


def measure_sets(config: Config, study: Path, seeds: tuple[int, ...]) -> None:
    """``ppap analyze sets`` with the same settings, once for a data set."""
    out = study / "sets"
    if (out / "sets.json").exists():
        return
    shutil.rmtree(out, ignore_errors=True)  # of a start that was stopped
    set_command.measure_all(
        set_command.SetArguments(
            preset=config.preset,
            out=str(out),
            images=config.train.batch_size,
            anchors=1024,
            seeds=seeds,
            pool=POOL,
            rows=("ppap", "fixed", "hp", "kmeans", "chance"),
            data=config.data,
            model=config.model,
            loss=config.loss,
            compare=config.compare,
        )
    )


def summarise(options: argparse.Namespace) -> str:
    """Write the files of all that is finished in the folder."""
    results, sets = {}, {}
    for name in sorted(path.parent.name for path in options.out.glob("*/study.json")):
        rows: dict[str, dict[int, Any]] = {}
        for path in sorted((options.out / name / "cells").glob("*.json")):
            seed = int(path.stem.rpartition("-")[2])
            for row, scores in json.loads(path.read_text())["result"]["summary"].items():
                rows.setdefault(row, {})[seed] = scores
        results[name] = rows
        found = options.out / name / "sets" / "sets.json"
        if found.exists():
            sets[name] = json.loads(found.read_text())
    return report.write(options.out, results, sets, facts(options))


def facts(options: argparse.Namespace) -> dict[str, Any]:
    """How it was measured."""
    stored: Mapping[str, Any] = {
        path.parent.name: json.loads(path.read_text())["config"] for path in options.out.glob("*/study.json")
    }
    steps = {config["train"]["steps"] for config in stored.values()}
    if len(steps) > 1:
        raise UsageError(f"--out {options.out} holds runs of {sorted(steps)} steps; give one folder for each")
    return {
        "lines": [
            f"backbone {Path(options.weights).name}, frozen tokens of 224 x 224 crops",
            f"every trained row: {steps.pop()} steps of {BATCH} images, otherwise the preset `folder`; mean "
            "± standard deviation over seeds; bold: more than two standard deviations of the difference",
            "condition, thresholds and rates chosen without labels by each run; clusters by k-means; "
            "settings of the preset were chosen on msrc21",
            "hp without its recoloured view, as in its settings for Potsdam, so that all train on the same "
            "tokens",
        ],
        "configs": stored,
    }


if __name__ == "__main__":
    sys.exit(run(main))
