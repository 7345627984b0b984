"""Measure both probes of a checkpoint on labelled images, without and with CRF."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from ppap import __version__
from ppap.checkpoint import Checkpoint, load_checkpoint
from ppap.cli import first_positional, parse, run
from ppap.config import Config, DataConfig, EvalConfig, config_hash, from_dict
from ppap.data import build_datasets
from ppap.data.base import SPLITS
from ppap.engine import Engine, for_inference, load_engine, pick_device
from ppap.errors import DataError, UsageError
from ppap.evaluation.crf import crf_available
from ppap.evaluation.evaluate import Evaluation, evaluate
from ppap.evaluation.frozen import train_frozen_probes
from ppap.provenance import device_name
from ppap.report import RANDOM_WARNING, score_table


@dataclass(frozen=True, kw_only=True)
class EvalArguments:
    """Options of ``ppap eval``; data and eval settings default to those of the run."""

    checkpoint: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN_OR_CHECKPOINT")]
    """Run directory or checkpoint folder."""
    which: Literal["auto", "best", "last"] = "auto"
    """Checkpoint of a run directory: best, last, or auto = best if there is one."""
    frozen: bool = False
    """Measure the frozen backbone instead: train both probes on its features first (the paper's DINO
    rows).
    """
    frozen_steps: int | None = None
    """Training steps of the probes with --frozen; None = as many as the checkpoint was trained."""
    device: str = "auto"
    """auto = cuda if there is one, else cpu; or a torch device such as cuda:1."""
    out: str | None = None
    """JSON file for the results, never overwritten; None = a new evaluation*.json in the run."""
    data: DataConfig = field(default_factory=DataConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        if self.frozen_steps is not None and self.frozen_steps < 1:
            raise ValueError(f"--frozen-steps is {self.frozen_steps}; give at least 1")


def main(argv: Sequence[str]) -> None:
    """Command ``eval``."""
    checkpoint, config, arguments = _parse(argv)
    config = dataclasses.replace(config, data=arguments.data, eval=arguments.eval)
    out = _out_file(arguments, checkpoint)
    device = pick_device(arguments.device)
    datasets = build_datasets(config.data, SPLITS if arguments.frozen else ("val",))
    dataset = datasets.val
    if dataset is None or not dataset.labelled:
        raise DataError(
            "there are no validation labels, so nothing can be measured; give images/val and labels/val. "
            f"What was found: {datasets.description}"
        )
    _check_classes(checkpoint, dataset.classes)
    engine = load_engine(checkpoint, device, for_inference(config, device))
    _announce(engine, checkpoint, datasets.description)
    missing = crf_available(config.eval.crf) if config.eval.crf != "none" else None
    if missing:
        print(f"{missing}; going on without", flush=True)
    code_of = engine.code
    if arguments.frozen:
        if not datasets.train.labelled:
            print("the training images have no labels: the linear probe stays as drawn", flush=True)
        train_frozen_probes(engine, datasets.train, arguments.frozen_steps or checkpoint.info["step"])
        code_of = engine.frozen_code
    result = evaluate(
        code_of,
        engine.probes,
        dataset,
        config.eval,
        patch_size=engine.net.backbone.patch_size,
        device=device,
        workers=config.data.workers,
    )
    print(score_table(result, dataset.class_names))
    for note in result.notes:
        print(note)
    if engine.net.backbone.is_random:
        print(RANDOM_WARNING)
    _write(out, _record(arguments, checkpoint, config, engine, result))
    print(f"written: {out}")


def _parse(argv: Sequence[str]) -> tuple[Checkpoint, Config, EvalArguments]:
    """Read the arguments twice: for the checkpoint, and then with the checkpoint's settings as defaults."""
    path, which = first_positional(argv), "auto"
    if path is None or not set(argv) & {"-h", "--help"}:
        first = parse(EvalArguments, argv, command="eval", description=__doc__)
        path, which = first.checkpoint, first.which
    checkpoint = load_checkpoint(path, None if which == "auto" else which)
    config = from_dict(checkpoint.info["config"])
    # What the labels were found to hold in training, so that a smaller set is read by the same rule.
    known = {"classes": checkpoint.info["classes"], "class_names": tuple(checkpoint.info["class_names"])}
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, **known))
    defaults = EvalArguments(checkpoint=path, data=config.data, eval=config.eval)
    return (
        checkpoint,
        config,
        parse(EvalArguments, argv, command="eval", description=__doc__, default=defaults),
    )


def _out_file(arguments: EvalArguments, checkpoint: Checkpoint) -> Path:
    """Where the results go; never a file that is there already."""
    if arguments.out is not None:
        if Path(arguments.out).exists():
            raise UsageError(f"--out {arguments.out} exists already; give another file")
        return Path(arguments.out)
    stem = "evaluation-frozen" if arguments.frozen else "evaluation"
    folder = checkpoint.path
    if folder.parent.name == "checkpoints":
        folder = folder.parent.parent  # the next save replaces the checkpoint's folder
    taken = len(list(folder.glob(f"{stem}*.json")))
    number = next(n for n in range(1, taken + 2) if not (folder / _numbered(stem, n)).exists())
    return folder / _numbered(stem, number)


def _numbered(stem: str, number: int) -> str:
    return f"{stem}.json" if number == 1 else f"{stem}-{number}.json"


def _check_classes(checkpoint: Checkpoint, classes: int) -> None:
    if checkpoint.info["classes"] != classes:
        raise DataError(
            f"the data has {classes} classes, {checkpoint.path} {checkpoint.info['classes']}; "
            "give the data it was trained for, or --data.classes"
        )


def _announce(engine: Engine, checkpoint: Checkpoint, description: str) -> None:
    print(f"checkpoint: {checkpoint.path} (step {checkpoint.info['step']})")
    print(f"backbone: {engine.net.backbone.origin}")
    print(f"data: {description}", flush=True)


def _record(
    arguments: EvalArguments, checkpoint: Checkpoint, config: Config, engine: Engine, result: Evaluation
) -> dict[str, Any]:
    return {
        "checkpoint": str(checkpoint.path),
        "step": checkpoint.info["step"],
        "frozen": arguments.frozen,
        "backbone": engine.net.backbone.origin,
        "warning": RANDOM_WARNING if engine.net.backbone.is_random else None,
        "preset": config.preset,
        "settings": config_hash(config),
        "seed": config.train.seed,
        "crf": config.eval.crf if result.crf else "none",
        "classes": list(checkpoint.info["class_names"]),
        "device": device_name(engine.device),
        "versions": {"ppap": __version__, "torch": torch.__version__},
        "scores": result.to_dict(),
    }


def _write(out: Path, record: dict[str, Any]) -> None:
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(record, indent=2) + "\n")
    except OSError as error:
        raise DataError(f"cannot write {out} ({error.strerror or error}); give another --out") from None


if __name__ == "__main__":
    sys.exit(run(main))
