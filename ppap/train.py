"""Training: ``python -m ppap.train [PRESET] [--section.field value ...]``, or ``--resume RUN``.

Read ``ppap.training.trainer`` for the loop, ``ppap.methods.engine`` for a step, ``ppap.settings.config`` for
the settings, ``ppap.training.request`` for the command line.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from ppap.cli import run
from ppap.errors import UsageError
from ppap.parallel import by_ranks, from_first, world
from ppap.runs.checkpoint import load_checkpoint
from ppap.runs.rundir import RunDir
from ppap.settings.config import Config
from ppap.training import seeds
from ppap.training.request import parse_arguments
from ppap.training.trainer import Trainer


@by_ranks
def main(argv: Sequence[str]) -> None:
    """Command ``train``."""
    request = parse_arguments(argv)
    if world().several:
        if request.seeds or request.config is None:
            raise UsageError("--seeds trains in one process: under torchrun start a run for each seed")
        request = request._replace(path=from_first(lambda: request.path))  # its name may hold the time
    if request.seeds:
        seeds.start(request.config, request.seeds, request.path, _train_seed)
    elif request.config is None:
        seeds.resume(request.path, _train_seed)
    elif (
        request.checkpoint is not None
        and not request.back
        and RunDir(request.path).is_finished(request.config)
    ):
        print(
            f"{request.path} is finished: {request.checkpoint.info['step']} steps are done, and report.md is "
            "written. To train on, give a larger --train.steps; to measure, use ppap eval"
        )
    else:
        Trainer(request.config, request.path, request.checkpoint).run()


def _train_seed(config: Config, path: Path, started: bool) -> None:
    trainer = Trainer(config, path, load_checkpoint(path, "last") if started else None)
    if trainer.data.val is None or not trainer.data.val.labelled:
        trainer.lock.release()
        raise UsageError("--seeds needs labelled validation images to measure; give labels/val")
    trainer.run()


if __name__ == "__main__":
    sys.exit(run(main))
