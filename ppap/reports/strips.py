"""The pictures of a report: images beside their truth and what a network makes of them."""

import math
from collections.abc import Mapping
from pathlib import Path

import torch

from ppap.data import SegmentationDataset, class_colours
from ppap.evaluation.comparison import Row
from ppap.evaluation.evaluate import Evaluation, pixel_products
from ppap.evaluation.metrics import apply_assignment
from ppap.methods.engine import Engine
from ppap.methods.table import TITLES
from ppap.pictures.drawing import strip
from ppap.reports.positives import draw_positives
from ppap.stopping import each

_POSITIVE_IMAGES = 6  # in the picture of positives


def draw_comparison(
    engine: Engine, dataset: SegmentationDataset, comparison: Mapping[str, Row], count: int, path: Path
) -> None:
    """Image | truth | clusters of every row, of `count` images over the set."""
    patch, rows = engine.net.backbone.patch_size, []
    for index in each(spread(len(dataset), count)):
        sample, cells = dataset[index], [dataset.pixels(index)]
        size = tuple(sample["label"].shape)
        cells.append(sample["label"])
        for row in comparison.values():
            code = row.code_of(sample["image"][None].to(engine.device))
            clusters = pixel_products(code, row.probes, patch, size)[0][0].argmax(dim=0).cpu()
            cells.append(apply_assignment(clusters, row.scores.plain["cluster"].assignment))
        rows.append(cells)
    titles = ["image", "truth", *(TITLES[name] for name in comparison)]
    strip(
        rows,
        titles,
        path,
        colours=class_colours(engine.config.data.kind, dataset.classes, dataset.ids),
        names=dataset.class_names,
    )


def draw_report_positives(engine: Engine, dataset: SegmentationDataset, path: Path) -> bool:
    """Draw the propagation's positives on a few images; False where there are none to draw."""
    propagation = engine.method.propagation
    if propagation is None:
        return False
    indices = spread(len(dataset), _POSITIVE_IMAGES)
    return bool(draw_positives(engine.net.eval(), dataset, indices, propagation, path))


def draw_strip(
    engine: Engine, dataset: SegmentationDataset, evaluation: Evaluation | None, count: int, path: Path
) -> None:
    """Image | truth | clusters | linear of `count` images over the set, as far as there are labels."""
    assignment = evaluation.plain["cluster"].assignment if evaluation else None
    with_linear = dataset.labelled and evaluation is not None and "linear" in evaluation.plain
    ids = dataset.classes if assignment else len(engine.cluster.clusters)
    colours = class_colours(engine.config.data.kind, ids, dataset.ids)
    rows = []
    for index in each(spread(len(dataset), count)):
        sample, picture = dataset[index], dataset.pixels(index)
        cluster, linear = predict_crop(engine, sample["image"])
        row = [picture]
        if dataset.labelled:
            row.append(sample["label"])
        row.append(apply_assignment(cluster, assignment) if assignment else cluster)
        if with_linear:
            row.append(linear)
        rows.append(row)
    titles = ["image", *(["truth"] if dataset.labelled else []), "clusters"]
    titles += ["linear"] if with_linear else []
    strip(rows, titles, path, colours=colours, names=dataset.class_names if dataset.labelled else ())


def predict_crop(engine: Engine, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cluster and class ids (H, W) int64 on the CPU of one normalised image (3, H, W)."""
    code = engine.code(image[None].to(engine.device))
    size = (image.shape[1], image.shape[2])
    scores = pixel_products(code, engine.probes, engine.net.backbone.patch_size, size)
    return scores[0][0].argmax(dim=0).cpu(), scores[1][0].argmax(dim=0).cpu()


def spread(length: int, count: int) -> list[int]:
    """At most `count` indices spread evenly over 0..length-1."""
    count = min(count, length)
    return [math.floor((i + 0.5) * length / count) for i in range(count)]
