"""Measure a checkpoint on labelled images: both probes without and with CRF, or nearest neighbours.

RUN is a run directory, a checkpoint folder, or a set of seeds (every run is measured, with mean and standard
deviation). --eval.protocol neighbours, the default for ImageNet-S, labels by nearest neighbours among the
labelled training images. --refit-clusters 5 shows the noise of the cluster probe alone. Settings under --data
and --eval that are not given are those of the run, but for folders and the CRF; ppap eval RUN --help shows
them.
"""

import contextlib
import dataclasses
import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from ppap.cli import first_positional, parse, run
from ppap.errors import PpapError, UsageError
from ppap.evaluation.crf import native_crf_missing
from ppap.methods.engine import pick_device
from ppap.nets.shared_runs import is_shared, local_run
from ppap.parallel import by_ranks, from_first
from ppap.reports.measure import (
    MeasureOptions,
    check_protocol,
    check_writable,
    measure,
    of_set,
    settings_of,
    write_record,
)
from ppap.runs.checkpoint import load_checkpoint
from ppap.settings.config import EvalConfig
from ppap.training import seeds


@dataclass(frozen=True, kw_only=True)
class EvalArguments(MeasureOptions):
    """Options of ``ppap eval``; data and eval settings default to those of the run."""

    checkpoint: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN_OR_CHECKPOINT")]
    """Run directory, checkpoint folder, folder of a set of seeds, or hf-hub:OWNER/NAME."""
    which: Literal["auto", "best", "last"] = "auto"
    """Checkpoint of a run directory: best, last, or auto = what the run's --train.selection says."""
    out: str | None = None
    """JSON file for the results, never overwritten; None = a new evaluation*.json in the run."""
    eval: EvalConfig = field(default_factory=lambda: _with_crf(EvalConfig(), "auto"))


@by_ranks
def main(argv: Sequence[str]) -> None:
    """Command ``eval``; each rank of torchrun measures some of the images, and the first one writes."""
    arguments, runs = _parse(argv)
    check_protocol(arguments, len(runs))
    if arguments.out is not None and Path(arguments.out).exists():
        raise UsageError(f"--out {arguments.out} exists already; give another file")
    check_writable(Path(arguments.out) if arguments.out is not None else _folder(arguments) / "x")
    records, lines = [], []
    for path in runs:
        record, found = measure(load_checkpoint(path, _name(arguments)), arguments)
        records.append(record)
        lines += found
    if seeds.is_set(Path(arguments.checkpoint)):
        record, found = of_set(records)
        lines += found
    try:
        out = from_first(
            lambda: _write(arguments, record)
        )  # before the tables: a reader who closes the pipe loses no result
    except PpapError:
        print("\n".join(lines))  # the disk filled up meanwhile: what was measured is not lost
        raise
    print("\n".join([*lines, f"written: {out}"]))


def _parse(argv: Sequence[str]) -> tuple[EvalArguments, list[Path]]:
    """Read the arguments twice: for the checkpoint, and then with the checkpoint's settings as defaults."""
    path, name, device, out = first_positional(argv), None, "auto", ""
    if path is None or not set(argv) & {"-h", "--help"}:
        first = parse(EvalArguments, argv, command="eval", description=__doc__)
        path, name, device, out = first.checkpoint, _name(first), first.device, first.out
    if is_shared(path):
        if out is None:
            raise UsageError(f"{path} is no folder to write results to; give --out FILE.json")
        path = str(local_run(path))
    runs = seeds.runs_of(Path(path)) if seeds.is_set(Path(path)) else [Path(path)]
    config = settings_of(load_checkpoint(runs[0], name))
    defaults = EvalArguments(checkpoint=path, data=config.data, eval=_with_crf(config.eval, device))
    arguments = parse(EvalArguments, argv, command="eval", description=__doc__, default=defaults)
    return dataclasses.replace(arguments, checkpoint=path), runs


def _with_crf(config: EvalConfig, device: str) -> EvalConfig:
    """The settings of a training as defaults here: where it did without CRF, the native one if it can run."""
    if config.crf != "none" or native_crf_missing(pick_device(device)):
        return config
    return dataclasses.replace(config, crf="native")


def _name(arguments: EvalArguments) -> str | None:
    return None if arguments.which == "auto" else arguments.which


def _write(arguments: EvalArguments, record: dict[str, Any]) -> Path:
    """Write the results to a file that was not there before, whoever else evaluates meanwhile; its path."""
    if arguments.out is not None:
        try:
            write_record(Path(arguments.out), record)
        except FileExistsError:
            raise UsageError(f"--out {arguments.out} was written meanwhile; give another file") from None
        return Path(arguments.out)
    stem = "evaluation-frozen" if arguments.frozen else "evaluation"
    for number in itertools.count(1):
        out = _folder(arguments) / _numbered(stem, number)
        with contextlib.suppress(FileExistsError):
            write_record(out, record)
            break
    return out


def _folder(arguments: EvalArguments) -> Path:
    """Where results go without ``--out``: the run, or the folder of the checkpoint that was given."""
    folder = Path(arguments.checkpoint)
    if folder.resolve().parent.name == "checkpoints":
        return folder.resolve().parent.parent  # the next save replaces the checkpoint's folder
    return folder


def _numbered(stem: str, number: int) -> str:
    return f"{stem}.json" if number == 1 else f"{stem}-{number}.json"


if __name__ == "__main__":
    sys.exit(run(main))
