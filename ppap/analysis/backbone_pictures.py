"""The pictures of ``ppap analyze backbone``: spectrum, similarities, neighbours over images, clusters.

Legend: n images, h w patch grid, N patches, D channels, K clusters.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ppap.analysis.backbone import LabelFree, Maps, draw, unit_rows
from ppap.analysis.backbone_labels import centres
from ppap.analysis.thresholds import BINS, histograms
from ppap.data import SegmentationDataset, class_colours
from ppap.evaluation.metrics import ConfusionMatrix, apply_assignment
from ppap.nets.conditioning import Condition, Moments, spectrum
from ppap.nets.model import patch_rows
from ppap.nets.probes import upsample
from ppap.pictures.drawing import strip

_QUERY, _RIGHT, _WRONG, _PLAIN = (255, 0, 255), (40, 200, 90), (235, 70, 60), (250, 200, 40)
_HEAD, _TEXT = 16, 12  # pixels: above a cell, and of its letters
_CELL = 168  # longer side of an image [pixels]
_ANCHORS = 512  # of the histograms


class Scene(NamedTuple):
    """What pictures are drawn of."""

    dataset: SegmentationDataset
    """Training images."""
    maps: Maps
    """Of some of them."""
    patch: int
    """Side of a patch [pixels]."""
    seed: int


def draw_spectrum(path: Path, moments: Moments, conditions: Mapping[str, Condition]) -> None:
    """Share of the variance of every component, by condition."""
    figure, (axis,) = _figure(1, (7.5, 4.2))
    D = moments.width
    cov = moments.covariance[:D, :D]
    for name, condition in conditions.items():
        matrix = condition.map.double()
        mapped = Moments(moments.count, moments.mean, moments.scatter.clone())
        mapped.scatter[:D, :D] = matrix.T @ cov @ matrix * moments.count
        values = spectrum(mapped)[0]
        shares = 100 * values / values.sum()
        axis.loglog(range(1, D + 1), shares.clamp(min=1e-4), label=_title(name), linewidth=1.8)
    axis.set(xlabel="principal component", ylabel="share of the variance [%]")
    _finish(figure, [axis], path)


def draw_similarities(path: Path, scene: Scene, conditions: Mapping[str, Condition], rows: Any) -> None:
    """Histograms of the cosines of two patches of one image and of two, a panel for each condition.

    Args:
        path: PNG to write.
        scene: whose patches.
        conditions: name -> map.
        rows: name -> :class:`LabelFree`, for its thresholds.
    """
    figure, axes = _figure(len(conditions), (5.6 * len(conditions), 4.2))
    anchors = draw(len(scene.maps.images), _ANCHORS, scene.seed)
    edges = np.linspace(-1, 1, BINS + 1)
    middle = (edges[1:] + edges[:-1]) / 2
    for axis, (name, condition) in zip(axes, conditions.items(), strict=True):
        found = histograms(unit_rows(scene.maps, condition), scene.maps.images, anchors)
        for values, label in zip(found, ("same image", "other images"), strict=True):
            axis.plot(middle, 100 * np.array(values), label=label, linewidth=1.8)
        own: LabelFree = rows[name]
        for value, label, style in ((own.phi0, "phi0", "--"), (own.psi0, "psi0", ":")):
            axis.axvline(value, color="0.3", linestyle=style, label=f"{label} = {value:.2f}")
        axis.set(title=_title(name), xlabel="cosine of two patches", ylabel="share of the pairs [%]")
        axis.set_xlim(-1, 1)
    _finish(figure, axes, path)


@torch.no_grad()
def draw_neighbours(
    path: Path, scene: Scene, conditions: Mapping[str, Condition], queries: int, count: int
) -> list[dict[str, Any]]:
    """A few patches and the most similar patch of each of the `count` images that are nearest to them.

    A row per query and condition. The query is framed in magenta; a neighbour in green where it has the
    query's class, in red where not, in yellow where a class is not known.

    Returns:
        Per row: condition, image and patch of the query, and per neighbour image, patch and cosine.
    """
    maps, patch, dataset = scene.maps, scene.patch, scene.dataset
    grid = (maps.features.shape[2], maps.features.shape[3])
    per_image, images = grid[0] * grid[1], len(maps.features)
    places = [(2 * i + 1) * images // (2 * queries) for i in range(queries)]
    within = draw(per_image, queries, scene.seed)  # a patch each, at different places
    within = within[draw(len(within), queries, scene.seed + 1).argsort()]
    chosen = [place * per_image + int(within[i % len(within)]) for i, place in enumerate(places)]
    classes = maps.classes if dataset.labelled else torch.full((images * per_image,), -1)
    units = {name: unit_rows(maps, condition) for name, condition in conditions.items()}
    rows, record = [], []
    for query in chosen:
        for name, unit in units.items():
            best, where = (unit @ unit[query]).view(images, per_image).max(dim=1)
            best[query // per_image] = -2
            order = best.topk(min(count, images - 1)).indices.tolist()
            cells = [_framed(dataset, maps, query, grid, patch, _QUERY, _title(name))]
            for image in order:
                found = image * per_image + int(where[image])
                colour = _frame_colour(classes[query], classes[found])
                cells.append(_framed(dataset, maps, found, grid, patch, colour, f"{best[image]:.2f}"))
            rows.append(cells)
            near = [
                {"image": dataset.name(maps.indices[i]), "patch": int(where[i]), "cosine": float(best[i])}
                for i in order
            ]
            own = {"image": dataset.name(maps.indices[query // per_image]), "patch": query % per_image}
            record.append({"condition": name, **own, "nearest": near})
    titles = ["query", *(f"nearest {i + 1}" for i in range(len(rows[0]) - 1))]
    strip(rows, titles, path, cell=max(max(cell.shape[:2]) for row in rows for cell in row))
    return record


@torch.no_grad()
def draw_clusters(
    path: Path,
    scene: Scene,
    conditions: Mapping[str, Condition],
    clusters: int,
    places: Sequence[int],
    kind: str,
) -> None:
    """Images beside k-means' clusters of their patches under each condition, and the truth where it is known.

    Clusters have the colour of the class that they are matched to over all images of `scene`; without labels
    those of the first condition have any, and the others that of the cluster they share most pixels with.

    Args:
        path: PNG to write.
        scene: images whose patches are clustered.
        conditions: name -> map.
        clusters: K.
        places: of the images that are drawn, among those of ``scene.maps``.
        kind: of the data, for its colours.
    """
    maps, patch, dataset = scene.maps, scene.patch, scene.dataset
    reference = maps.classes if dataset.labelled else None
    columns = []
    for condition in conditions.values():
        code = condition(maps.features)
        rows = patch_rows(code)
        own = centres(rows, clusters, scene.seed)
        ids = (rows @ own.T).argmax(dim=1)
        if reference is None:
            reference, assignment = ids, tuple(range(clusters))
        else:
            matrix = ConfusionMatrix(clusters)
            matrix.update(ids, reference)
            assignment = matrix.match()
        columns.append((code[list(places)], own, assignment))
    size, sheet = tuple(maps.labels.shape[1:]), []
    for row, place in enumerate(places):
        cells = [dataset.pixels(maps.indices[place])]
        if dataset.labelled:
            cells.append(maps.labels[place].long())
        for code, own, assignment in columns:
            products = F.conv2d(code[row : row + 1], own[:, :, None, None])
            scores = upsample(products, patch, size)[0]
            cells.append(apply_assignment(scores.argmax(dim=0), assignment))
        sheet.append(cells)
    titles = ["image", *(["truth"] if dataset.labelled else []), *map(_title, conditions)]
    names = dataset.class_names if dataset.labelled else ()
    strip(sheet, titles, path, colours=class_colours(kind, clusters), names=names)


def _framed(
    dataset: SegmentationDataset,
    maps: Maps,
    place: int,
    grid: tuple[int, int],
    patch: int,
    colour: tuple[int, int, int],
    text: str,
) -> np.ndarray:
    """The image of a patch, with a frame about it and words above: (H, W, 3) uint8."""
    image, within = divmod(place, grid[0] * grid[1])
    picture = Image.fromarray(dataset.pixels(maps.indices[image]))
    scale = _CELL / max(picture.size)
    picture = picture.resize([max(1, round(side * scale)) for side in picture.size], Image.Resampling.LANCZOS)
    row, column = divmod(within, grid[1])
    side = patch * scale
    box = [round(v) for v in (column * side, row * side, (column + 1) * side, (row + 1) * side)]
    pen = ImageDraw.Draw(picture)
    pen.rectangle((box[0] - 4, box[1] - 4, box[2] + 3, box[3] + 3), outline=(0, 0, 0), width=1)
    pen.rectangle((box[0] - 3, box[1] - 3, box[2] + 2, box[3] + 2), outline=colour, width=3)
    sheet = Image.new("RGB", (picture.width, picture.height + _HEAD), (255, 255, 255))
    sheet.paste(picture, (0, _HEAD))
    ImageDraw.Draw(sheet).text((2, 1), text, fill=(0, 0, 0), font=ImageFont.load_default(size=_TEXT))
    return np.asarray(sheet)


def _frame_colour(query: Tensor, found: Tensor) -> tuple[int, int, int]:
    if query < 0 or found < 0:
        return _PLAIN
    return _RIGHT if query == found else _WRONG


def _title(name: str) -> str:
    return "raw" if name == "none" else name


def _figure(panels: int, size: tuple[float, float]) -> tuple[Any, Sequence[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, panels, squeeze=False)[0]


def _finish(figure: Any, axes: Sequence[Any], path: Path) -> None:
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    figure.savefig(path)
