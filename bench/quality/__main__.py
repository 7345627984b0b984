"""The command: data set after data set, row after row, files rewritten after each run."""

import argparse
import json
import shutil
import sys
from collections.abc import Collection, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any, get_args

from bench.quality import report
from bench.quality.known import Known
from bench.quality.settings import (
    BATCH,
    CORE,
    POOL,
    SHARED,
    STEPS,
    TRAINED,
    UNTRAINED,
    base_config,
    cells,
    data_sets,
    in_order,
)
from ppap.analysis.arguments import make_folder
from ppap.analysis.commands import sets as set_command
from ppap.analysis.study import check, open_study, run_cells
from ppap.cli import run
from ppap.errors import UsageError
from ppap.reports.sharing import public_config
from ppap.runs.lock import alone
from ppap.settings.config import Amp, Config, from_dict, of_seed, to_dict
from ppap.settings.published import HP_ELSEWHERE, STEGO_ELSEWHERE


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
    parser.add_argument(
        "--known",
        type=Path,
        metavar="FILE",
        help="a quality.json of before: its runs are not made again, and stand in the tables",
    )
    parser.add_argument("--steps", "--train.steps", type=int, default=STEPS, help="of a training")
    parser.add_argument(
        "--batch-size", "--train.batch-size", type=int, default=BATCH, metavar="N", help="images of a step"
    )
    parser.add_argument(
        "--amp",
        choices=get_args(Amp),
        default="auto",
        help="mixed precision, as --optim.amp; bf16 is faster on CPUs with AVX512-BF16 or AMX",
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="runs at once, each with its share of the cores",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    """Everything that is asked for and not finished yet."""
    options = arguments(argv)
    if len(set(options.seeds)) != len(options.seeds):
        raise UsageError(f"--seeds {' '.join(map(str, options.seeds))}: give different numbers")
    names = options.sets or data_sets(options.data)
    try:
        configs = {
            name: base_config(
                options.data, name, options.weights, options.steps, options.amp, options.batch_size
            )
            for name in names
        }
    except ValueError as error:
        raise UsageError(str(error)) from None
    known = Known.read(options.known)
    for name, config in configs.items():
        known.check(options.known, name, config)
        check(config, options.jobs)
    make_folder(options.out)
    with alone(options.out, f"--out {options.out}"):
        check_shared(options.out, configs)
        studies = {
            name: open_study(str(options.out / name), "quality", of_seed(config, 0))
            for name, config in configs.items()
        }
        for name, config in configs.items():
            print(f"data set {name}", flush=True)
            left = known.without(name, options.rows, options.seeds)
            every = cells(config, tuple(options.rows), tuple(options.seeds))
            runs = [run for run in every.values() if run.name in left]
            if len(runs) < len(every):
                print(f"{len(every) - len(runs)} of {len(every)} runs are known", flush=True)
            run_cells(studies[name], runs, options.jobs, lambda: summarise(options.out, known))
            if name not in known.sets:
                measure_sets(config, studies[name], tuple(options.seeds))
            print(summarise(options.out, known), flush=True)
        print(f"written: {options.out / 'quality.md'}")


def measure_sets(config: Config, study: Path, seeds: tuple[int, ...]) -> None:
    """``ppap analyze sets`` with the same settings, once for a data set and its seeds."""
    out = study / "sets"
    known = sets_of(out)["seeds"] if (out / "sets.json").exists() else []
    if known and set(known) >= set(seeds):
        return
    seeds = tuple(sorted({*known, *seeds}))
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


def sets_of(folder: Path) -> dict[str, Any]:
    """What ``ppap analyze sets`` found."""
    found: dict[str, Any] = json.loads((folder / "sets.json").read_text())
    return found


def summarise(out: Path, known: Known) -> str:
    """Write the files of all that is finished in the folder, and of what is known."""
    results, sets = {}, dict(known.sets)
    for name in in_order({*known.results, *(path.parent.name for path in out.glob("*/study.json"))}):
        rows = known.join(name, finished(out / name))
        if not rows:
            continue
        results[name] = rows
        if (out / name / "sets" / "sets.json").exists():
            sets[name] = sets_of(out / name / "sets")["rows"]
    methods = {row for rows in results.values() for row in rows}
    return report.write(out, results, sets, facts(out, known, methods))


def finished(study: Path) -> dict[str, dict[int, Any]]:
    """Row -> seed -> scores of a study's finished runs."""
    rows: dict[str, dict[int, Any]] = {}
    for path in sorted((study / "cells").glob("*.json")):
        seed = int(path.stem.rpartition("-")[2])
        for row, scores in json.loads(path.read_text())["result"]["summary"].items():
            rows.setdefault(row, {})[seed] = scores
    return rows


def stored(out: Path) -> dict[str, Config]:
    """Settings that the studies in a folder were begun with: data set -> its own."""
    return {
        path.parent.name: from_dict(json.loads(path.read_text())["config"])
        for path in sorted(out.glob("*/study.json"))
    }


def check_shared(out: Path, more: Mapping[str, Config]) -> None:
    """Refuse other steps, batches, backbone or precision than those of the data sets that are in a folder.

    Raises:
        UsageError: all of them and of `more` are not the same.
    """
    configs = [*stored(out).values(), *more.values()]
    for option, setting in SHARED.items():
        values = {attrgetter(setting)(config) for config in configs}
        if len(values) > 1:
            raise UsageError(
                f"--out {out} would hold runs of {option} {' and '.join(map(str, sorted(values)))}; give one "
                "folder for each"
            )


def facts(out: Path, known: Known, methods: Collection[str]) -> dict[str, Any]:
    """How it was measured, with a line for each of the methods that has settings of its own."""
    configs = stored(out)
    one = next(iter(configs.values()))  # all are alike: see check_shared
    side, train = one.data.resolution, one.train
    return {
        "lines": [
            f"backbone {Path(one.model.weights).name}, frozen tokens of {side} x {side} crops",
            f"every trained row: {train.steps} steps of {train.batch_size} images, --optim.amp "
            f"{one.optim.amp}, otherwise the preset `folder`; mean ± standard deviation over seeds; bold: "
            "more than two standard deviations of the difference",
            "condition, thresholds and rates chosen without labels by each run; settings of the preset were "
            "chosen on MSRC-21",
            f"clusters by {one.eval.cluster_init}; scores are means of {one.compare.clusterings} clusterings "
            "of each code, with CRF those of the first"
            if one.compare.clusterings > 1
            else f"clusters by {one.eval.cluster_init}, one clustering of each code",
            *(line for method, line in _own_lines(one).items() if method in methods),
        ],
        "configs": {
            name: to_dict(public_config(config)) for name, config in {**known.configs, **configs}.items()
        },
    }


def _own_lines(config: Config) -> dict[str, str]:
    """Method -> what it has of its own."""
    hp = config.hp
    return {
        "stego": f"stego with its published weights and shifts of {STEGO_ELSEWHERE}",
        "hp": f"hp with the loss, dropout and pools published for {HP_ELSEWHERE[0]}, but --hp.renew-every "
        f"{hp.renew_every}; one patch in {hp.anchor_divisor} is an anchor, as in other rows, not all",
    }


if __name__ == "__main__":
    sys.exit(run(main))
