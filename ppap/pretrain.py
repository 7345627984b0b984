"""Pretraining: ``python -m ppap.pretrain [PRESET] [--section.field value ...]``, or ``--resume RUN``.

Trains a ViT without labels, on a folder of images or on generated scenes, and writes ``RUN/backbone``, which
``python -m ppap.train --model.weights RUN/backbone`` takes. With ``--objective distill --teacher WEIGHTS`` it
learns what a trained network knows. Read ``ppap.pretraining.pretrainer`` for the loop,
``ppap.pretraining.objective`` and ``ppap.pretraining.distillation`` for what is learned.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ppap.cli import parse, run
from ppap.pretraining.pretrainer import Pretrainer
from ppap.runs.checkpoint import Checkpoint, load_checkpoint
from ppap.runs.rundir import RunDir, begun_without_save, new_run_path, refuse_changes
from ppap.settings.pretraining import PRESETS, PretrainConfig, distilled, preset

# Settings that a resumed run may change. The schedules span --train.steps: they continue on the new ones.
RESUMABLE = (
    "train.steps",
    "train.log_every",
    "train.save_every",
    "train.picture_every",
    "train.device",
    "data.root",
    "data.workers",
    "data.max_pixels",
    "distill.teacher",  # the same weights, moved elsewhere
    "distill.cache_dir",
)


def parse_arguments(argv: Sequence[str]) -> tuple[PretrainConfig, Path, Checkpoint | None]:
    """Settings, run directory, and the checkpoint to continue from (None = a new run,
    or one that has saved nothing yet).

    Raises:
        UsageError: unknown preset, or a setting that a resumed run cannot change.
        DataError: the run to resume has no usable checkpoint.
    """
    pre = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    pre.add_argument("--resume", metavar="RUN")
    known, rest = pre.parse_known_args(list(argv))
    presets = "\n".join(f"  {name:<11} {make.__doc__.strip()}" for name, make in PRESETS.items())
    description = (
        "Pretrain a backbone without labels. Usage: ppap pretrain [PRESET] [--section.field value ...], or "
        f"ppap pretrain --resume RUN.\n\nPresets (default: folder):\n{presets}\n\n"
        "With --objective distill --teacher WEIGHTS a small ViT learns the patch features of a trained "
        "network, on the images of any preset, for use where that network is too slow. Other defaults hold "
        "then: --objective distill --help lists them.\n\n"
        "RUN/backbone is what --model.weights takes; --resume RUN continues a run directory."
    )
    if known.resume is None:
        named = rest and not rest[0].startswith("-")
        start, rest = preset(rest[0] if named else "folder"), rest[1:] if named else rest
        if _asked_objective(rest) == "distill":
            start = distilled(start)
        config = parse(PretrainConfig, rest, command="pretrain", description=description, default=start)
        return config, new_run_path(config.train.out, f"pretrain-{config.preset}"), None
    path = Path(known.resume)
    stored = RunDir(path).read_config(PretrainConfig)
    config = parse(PretrainConfig, rest, command="pretrain", description=description, default=stored)
    refuse_changes(stored, config, RESUMABLE)
    checkpoint = None if begun_without_save(path) else load_checkpoint(path, "last")
    return config, path, checkpoint


def _asked_objective(argv: Sequence[str]) -> str | None:
    """Which objective the command line names: the defaults of everything else depend on it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--objective", "--objective.kind", dest="kind")
    return parser.parse_known_args([a for a in argv if a not in ("-h", "--help")])[0].kind


def main(argv: Sequence[str]) -> None:
    """Command ``pretrain``."""
    Pretrainer(*parse_arguments(argv)).run()


if __name__ == "__main__":
    sys.exit(run(main))
