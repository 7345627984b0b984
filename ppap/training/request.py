"""What ``python -m ppap.train`` is asked for: a new run, a run to continue, or a set of seeds."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ppap.cli import HELP_ALL, parse
from ppap.errors import UsageError, unknown_name
from ppap.methods.table import METHODS
from ppap.runs.checkpoint import Checkpoint, load_checkpoint
from ppap.runs.kept import run_of
from ppap.runs.rundir import RunDir, begun_without_save, new_run_path, refuse_changes
from ppap.settings.config import Config, DataConfig, ModelConfig, TrainConfig
from ppap.settings.presets import describe, preset
from ppap.settings.protocol import with_protocol
from ppap.settings.published import with_method
from ppap.training import seeds

# Settings that a resumed run may change without becoming another run.
_LOOP = ("steps", "epochs", "val_every", "log_every", "save_every", "keep", "device", "exchange", "log")
RESUMABLE = (
    "eval.*",
    *(f"train.{name}" for name in _LOOP),
    "data.root",
    "data.workers",
    "data.max_pixels",
    "data.cache_dir",
    "data.cache_limit_gib",
)


# What people set; the help has all others behind --help-all.
BRIEF = {
    DataConfig: ("root", "classes"),
    ModelConfig: ("weights",),
    TrainConfig: ("steps", "batch_size", "device", "out"),
}


class Request(NamedTuple):
    """What the command line asks for."""

    config: Config | None
    """None = those of the set of seeds in `path`, which is continued."""
    path: Path
    checkpoint: Checkpoint | None
    """Where to continue; None = a new run, or one that has saved nothing yet."""
    seeds: tuple[int, ...] = ()
    """Seeds of a set of runs; empty = one run with the config's seed."""
    back: bool = False
    """Whether `checkpoint` is an older one, to go back to."""


def parse_arguments(argv: Sequence[str]) -> Request:
    """Settings, run directory, and the checkpoint to continue from.

    Raises:
        UsageError: unknown preset, or a setting that a resumed run cannot change.
        DataError: the run to resume has no usable checkpoint.
    """
    command = "train [PRESET | --resume RUN] [--seeds SEED ...]"
    pre = argparse.ArgumentParser(
        prog="ppap train", usage=f"ppap {command} [options]", add_help=False, allow_abbrev=False
    )
    pre.add_argument("--resume", metavar="RUN")
    pre.add_argument("--protocol", default=None)
    pre.add_argument("--method", metavar="METHOD")
    pre.add_argument("--seeds", metavar="SEED", nargs="+", default=())
    known, rest = pre.parse_known_args(list(argv))
    if known.protocol is not None:
        rest += ["--protocol", known.protocol]  # for the parser of all options, which checks it
    if not all(seed.isdecimal() for seed in known.seeds):
        raise UsageError(f"--seeds {' '.join(known.seeds)}: give numbers, 0 or more, and the preset before")
    numbers = tuple(int(seed) for seed in known.seeds)
    if {*rest} & {"-h", "--help"} and HELP_ALL not in rest:
        description = (
            "Train PPAP, or another method (--method), on generated scenes or on a folder of images.\n\n"
            f"Presets (default: demo):\n{describe()}\n\n"
            "--seeds 0 1 2 makes one run per seed; --resume RUN goes on. Below is what is usually set, with "
            f"the preset's defaults; {HELP_ALL} shows every setting."
        )
    else:
        description = _whole_description()
    if known.resume is None:
        named = rest and not rest[0].startswith("-")
        start = with_method(preset(rest[0] if named else "demo"), _method(known.method))
        if known.protocol == "paper":
            start = with_protocol(start, "paper")
        rest = rest[1:] if named else rest
        config = parse(Config, rest, command=command, description=description, default=start, brief=BRIEF)
        return Request(config, new_run_path(config.train.out, config.preset), None, numbers)
    path, older = run_of(Path(known.resume))
    if known.method is not None:
        rest += ["--method", _method(known.method)]
    if seeds.is_set(path):
        if rest or known.seeds:
            raise UsageError(f"{path} holds the runs of several seeds: --resume takes no other option there")
        return Request(None, path, None)
    if known.seeds:
        raise UsageError(f"{path} is one run: --seeds starts a new set")
    stored = RunDir(path).read_config()
    config = parse(Config, rest, command=command, description=description, default=stored, brief=BRIEF)
    refuse_changes(stored, config, RESUMABLE)
    if older is not None:
        return Request(config, path, load_checkpoint(older), back=True)
    checkpoint = None if begun_without_save(path) else load_checkpoint(path, "last")
    return Request(config, path, checkpoint)


def _whole_description() -> str:
    return (
        "Train PPAP, or another method, on generated scenes or on a folder of images.\n\n"
        f"Presets (default: demo):\n{describe()}\n\n"
        "The defaults below are those of the preset and of --method, if it is given: ppap train folder "
        "--help shows those of another preset.\n\n"
        "With --protocol paper the run follows the paper where the published code differs from it: no "
        "dropout on the guidance, every patch an anchor, no factor tau / 0.07, one set of thresholds, the "
        "last checkpoint, the original pixels for the CRF. Options given beside it win.\n\n"
        "Give --seeds 0 1 2 for one run per seed and a table of means and standard deviations.\n\n"
        "Give --resume RUN to continue a run directory, or a set of seeds, from its last checkpoint, and "
        "--resume RUN/checkpoints/step-NUMBER to go back to an older one that --train.keep kept."
    )


def _method(name: str | None) -> str:
    if name is not None and name not in METHODS:
        raise unknown_name("method", name, METHODS)
    return name or Config().method
