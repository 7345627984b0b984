"""``ppap analyze compare``: image, truth and the masks of several runs side by side (the paper's Fig. 3)."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
import tyro

from ppap.analysis.arguments import Out, make_folder, new_folder
from ppap.cli import parse, required
from ppap.data import SegmentationDataset, build_datasets, class_colours
from ppap.data.ids import as_trained
from ppap.errors import DataError, UsageError
from ppap.evaluation.metrics import ConfusionMatrix, apply_assignment
from ppap.methods.engine import Engine, for_inference, load_engine, pick_device
from ppap.methods.table import TITLES
from ppap.pictures.drawing import strip
from ppap.reports.records import RANDOM_WARNING
from ppap.reports.strips import predict_crop, spread
from ppap.runs.checkpoint import Checkpoint, load_checkpoint
from ppap.settings.config import Config, DataConfig, from_dict

TEXT = """Draw validation images, their truth and the masks of several runs side by side (the paper's Fig.
3).

Clusters have the colour of the class they are matched to, by the matching that the run's checkpoint holds,
or by one over all validation images where it holds none. Writes compare.png and compare.json. Seconds,
beside the loading of the checkpoints."""


@dataclass(frozen=True, kw_only=True)
class CompareArguments:
    """Options of ``ppap analyze compare``; the data defaults to that of the first run."""

    runs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN [RUN ...]"), required()]
    """Run directories or checkpoint folders, of the same data."""
    out: Out = ""
    """New folder for compare.png and compare.json."""
    images: tuple[str, ...] = ()
    """Validation images, by name without suffix or by number from 0; empty = --count of them, spread
    evenly."""
    count: int = 4
    """Images without --images."""
    titles: tuple[str, ...] = ()
    """Heads of the runs' columns; empty = their methods."""
    probe: Literal["cluster", "linear"] = "cluster"
    """cluster = found without labels; linear = trained with labels."""
    cell: int = 200
    """Longer side of an image in the picture [pixels]."""
    device: str = "auto"
    """auto = cuda if there is one, else cpu; or a torch device such as cuda:1."""
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("no run is given; name one or more run directories")
        if self.titles and len(self.titles) != len(self.runs):
            raise ValueError(f"--titles has {len(self.titles)} for {len(self.runs)} runs; give one for each")
        for name, least in (("count", 1), ("cell", 16)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} is {getattr(self, name)}; give at least {least}")


class Column(NamedTuple):
    """One run in the picture."""

    title: str
    engine: Engine
    assignment: Sequence[int | None] | None
    """Class of each cluster; None = ids are classes already."""
    record: dict[str, Any]


def main(argv: Sequence[str]) -> None:
    """Command ``analyze compare``."""
    arguments, checkpoints = _parse(argv)
    out = new_folder(arguments.out)
    device = pick_device(arguments.device)
    dataset = build_datasets(arguments.data, ("val",)).val
    if dataset is None or not dataset.labelled:
        raise DataError(
            "there are no labelled validation images to compare on; give images/val and labels/val"
        )
    indices = chosen(dataset, arguments.images, arguments.count)
    titles = arguments.titles or _titles(checkpoints)
    columns = [
        _column(title, checkpoint, arguments, dataset, device)
        for title, checkpoint in zip(titles, checkpoints, strict=True)
    ]
    make_folder(out)
    rows = []
    for index in indices:
        sample, cells = dataset[index], [dataset.pixels(index)]
        cells.append(sample["label"])
        rows.append(cells + [_mask(column, sample["image"], arguments.probe) for column in columns])
    strip(
        rows,
        ["image", "truth", *(column.title for column in columns)],
        out / "compare.png",
        colours=class_colours(arguments.data.kind, dataset.classes, dataset.ids),
        names=dataset.class_names,
        cell=arguments.cell,
    )
    record = {
        "images": [dataset.name(index) for index in indices],
        "probe": arguments.probe,
        "runs": [column.record for column in columns],
    }
    (out / "compare.json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"written: {out}")
    for column in columns:
        if column.engine.net.backbone.is_random:
            print(f"{column.title}: {RANDOM_WARNING}")


def _parse(argv: Sequence[str]) -> tuple[CompareArguments, list[Checkpoint]]:
    """Read the arguments twice: for the runs, and then with the first one's data as default."""
    first = parse(CompareArguments, argv, command="analyze compare", description=TEXT)
    checkpoints = [load_checkpoint(path) for path in first.runs]
    shown = checkpoints[0].info
    for path, checkpoint in zip(first.runs, checkpoints, strict=True):
        if checkpoint.info["class_names"] != shown["class_names"]:
            raise UsageError(
                f"{path} was trained for other classes than {first.runs[0]}; compare runs of one data set"
            )
    config: Config = from_dict(shown["config"])
    # What the labels were found to hold in training, so that a smaller set is read by the same rule.
    defaults = CompareArguments(runs=first.runs, data=as_trained(config.data, shown))
    arguments = parse(CompareArguments, argv, command="analyze compare", description=TEXT, default=defaults)
    return arguments, checkpoints


def chosen(dataset: SegmentationDataset, asked: Sequence[str], count: int) -> list[int]:
    """Indices of the images to draw.

    Raises:
        UsageError: no image has such a name or number.
    """
    if not asked:
        return spread(len(dataset), count)
    names = {dataset.name(i): i for i in range(len(dataset))}
    found = []
    for text in asked:
        index = names.get(text, int(text) if text.isdecimal() and int(text) < len(dataset) else None)
        if index is None:
            raise UsageError(
                f"--images {text}: no validation image is called so; give names such as {dataset.name(0)!r}, "
                f"or numbers 0 to {len(dataset) - 1}"
            )
        found.append(index)
    return found


def _titles(checkpoints: Sequence[Checkpoint]) -> list[str]:
    """The methods of the runs; with their numbers where two have the same."""
    names = [TITLES[from_dict(checkpoint.info["config"]).method] for checkpoint in checkpoints]
    return [
        name if names.count(name) == 1 else f"{name} {names[: i + 1].count(name)}"
        for i, name in enumerate(names)
    ]


def _column(
    title: str,
    checkpoint: Checkpoint,
    arguments: CompareArguments,
    dataset: SegmentationDataset,
    device: torch.device,
) -> Column:
    config = for_inference(from_dict(checkpoint.info["config"]), device)
    engine = load_engine(checkpoint, device, config)
    assignment = None
    if arguments.probe == "cluster":
        assignment = checkpoint.info["assignment"] or _match(engine, dataset)
    record = {
        "title": title,
        "checkpoint": str(checkpoint.path),
        "step": checkpoint.info["step"],
        "selection": checkpoint.selection,
        "sha256": checkpoint.sha256,
        "backbone": checkpoint.info["origin"],
        "assignment": assignment,
    }
    return Column(title, engine, assignment, record)


def _match(engine: Engine, dataset: SegmentationDataset) -> list[int | None]:
    """The matching of clusters and classes over all images."""
    matrix = ConfusionMatrix(dataset.classes, max(dataset.classes, len(engine.cluster.clusters)))
    for i in range(len(dataset)):
        sample = dataset[i]
        matrix.update(predict_crop(engine, sample["image"])[0], sample["label"])
    return list(matrix.match())


def _mask(column: Column, image: torch.Tensor, probe: str) -> np.ndarray:
    """(H, W) int64 class ids of a normalised image; -1 for clusters without a class."""
    cluster, linear = predict_crop(column.engine, image)
    labels = linear if probe == "linear" else apply_assignment(cluster, column.assignment)
    return labels.numpy()
