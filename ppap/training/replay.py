"""Take a step again that had numbers which are not finite: ``python -m ppap.training.replay RUN/nonfinite``.

The folder is what a run writes that ends for five such steps in a row. Its network, batch, seed and random
state are those of the last of them; what the step computes is printed, and nothing is written.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import tyro
from torch import Tensor

from ppap.cli import parse, run
from ppap.data import build_datasets
from ppap.data.ids import as_trained
from ppap.data.loading import stream
from ppap.errors import DataError
from ppap.escaping import visible
from ppap.methods.engine import Engine, load_engine, pick_device
from ppap.nets.feature_cache import source_of
from ppap.runs.checkpoint import Checkpoint, load_checkpoint
from ppap.settings.config import from_dict


@dataclass(frozen=True, kw_only=True)
class ReplayArguments:
    """Options of ``python -m ppap.training.replay``."""

    folder: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN/nonfinite")]
    """Folder that the run wrote."""
    device: str = "auto"
    """auto = cuda if there is one, else cpu; or a torch device such as cuda:1. The step's random state is of
    the kind of device it ran on."""
    root: str | None = None
    """Folder of the data; None = as in the run."""


def main(argv: Sequence[str]) -> None:
    """Print the values of the step."""
    arguments = parse(ReplayArguments, argv, command="training.replay", description=__doc__)
    engine, batch, facts = prepare(load_checkpoint(arguments.folder), arguments.device, arguments.root)
    print(f"step {facts['step'] + 1}, epoch {facts['epoch']}, seed {facts['seed']}: {facts['why']}")
    for index, name in zip(facts["index"].tolist(), facts["files"], strict=True):
        print(f"  image {index}: {visible(name, one_line=True)}")
    for name, value in engine.train_step(batch, facts["step"]).items():
        print(f"{name} = {value.item()}")
    print("skipped again" if engine.skipped else "all numbers are finite here")


def prepare(
    checkpoint: Checkpoint, device: str = "auto", root: str | None = None
) -> tuple[Engine, dict[str, Tensor], dict[str, Any]]:
    """Network and batch as they were: ``engine.train_step(batch, facts["step"])`` takes the step.

    Args:
        checkpoint: of the folder.
        device: as for ``--train.device``.
        root: folder of the data; None = as in the run.

    Returns:
        Engine, batch, and facts of the step: step (from 0), seed, epoch, index (B,), files, why.

    Raises:
        DataError: the folder is of another origin, or the data have other batches now.
        UsageError: see :func:`pick_device`.
    """
    state = checkpoint.state()
    if "replay" not in state:
        raise DataError(
            f"{checkpoint.path} repeats no step; give the folder nonfinite of a run that ended so"
        )
    facts, config = state["replay"], from_dict(checkpoint.info["config"])
    place = config.data if root is None else replace(config.data, root=root)
    config = replace(config, data=as_trained(place, checkpoint.info))
    where = pick_device(device)
    engine = load_engine(checkpoint, where, config)
    images = source_of(config, build_datasets(config.data).train, engine.net, where)
    _, _, batch = next(stream(engine.start(images, facts["step"])))
    if batch["index"].tolist() != facts["index"].tolist():
        raise DataError("the data give another batch for this step; give the data of the run by --root")
    engine.load_training_state(state["engine"])  # last: what came before drew random numbers
    return engine, batch, facts


if __name__ == "__main__":
    sys.exit(run(main))
