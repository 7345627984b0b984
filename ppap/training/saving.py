"""What a run saves: the contents of its checkpoints, and the older ones that it keeps."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ppap import parallel
from ppap.data.ids import label_facts
from ppap.runs.checkpoint import find_checkpoint, save_checkpoint
from ppap.runs.kept import is_kept, keep, step_of
from ppap.runs.rundir import RunDir
from ppap.settings.config import to_dict

if TYPE_CHECKING:
    from ppap.training.trainer import Trainer


def contents(run: "Trainer") -> tuple[dict[str, Any], dict[str, Any]]:
    """Facts and state of a checkpoint of a run as it is, beside its weights."""
    backbone = run.engine.net.backbone
    dataset = run.data.val or run.data.train
    info = {
        "config": to_dict(run.config),
        "backbone": backbone.spec,
        "origin": backbone.origin,
        "classes": dataset.classes,
        "class_names": list(dataset.class_names),
        **label_facts(run.data),
        "labelled": run.data.train.labelled,
        "assignment": run.assignment,
        "step": run.step,
        "choices": run.engine.choices.to_dict(),
        "data": run.data_facts,
    }
    state = {
        "step": run.step,
        "best": run.best,
        "validated": run.validated,
        "skips": run.skips.state(),
        "engine": run.engine.training_state(),
        "ranks": parallel.world().size,
    }
    return info, state


def save(run: "Trainer", name: str) -> None:
    """Write ``checkpoints/NAME``; of the last one also the step's folder that ``--train.keep`` asks for.

    Raises:
        NumberError: a weight is not finite.
        DataError: the disk refuses; the older checkpoint stays.
    """
    folder = run.run_dir.checkpoints / name
    save_checkpoint(folder, run.engine.weights(), *contents(run))
    if name == "last" and run.config.train.keep:
        keep(folder, run.step, run.config.train.keep)


def go_back(run: RunDir, begins_at: Path | None) -> None:
    """Where a run goes on from an older checkpoint: keep its last one beside it, and say so.

    Args:
        run: that is continued, under its lock.
        begins_at: the checkpoint it goes on from; None = from its beginning.

    Raises:
        DataError: the disk refuses.
    """
    if begins_at is None or not is_kept(begins_at):
        return
    last, _ = find_checkpoint(run.path, "last")
    if is_kept(last):  # there is no other one
        return
    step = int(json.loads((last / "config.json").read_text())["step"])
    if step > step_of(begins_at):
        place = keep(last, step)
        print(
            f"going back to step {step_of(begins_at)}: the last checkpoint, of step {step}, stays in {place} "
            "till the run comes to that step again; the lines of metrics.jsonl past it are written anew"
        )
