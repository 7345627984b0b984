"""The atlas: one page, with nothing outside it, on which a person gives the clusters of a run names.

``ppap/assets/atlas`` has the page, its style and its script, ``ppap.reports.regions`` what it shows; the
file that it saves is read by ``ppap.evaluation.names``.
"""

import base64
import importlib.resources
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from ppap.data import build_datasets
from ppap.data.images import read_image
from ppap.data.limits import set_max_pixels
from ppap.data.transforms import Geometry
from ppap.errors import DataError, UsageError
from ppap.escaping import visible
from ppap.evaluation.names import default_colours, probe_checksum
from ppap.evaluation.predictor import MAX_TOKENS, Predictor
from ppap.reports.masks import find_images
from ppap.reports.measure import settings_of
from ppap.reports.records import RANDOM_WARNING
from ppap.reports.regions import THUMB, Gathered, Picture, gather
from ppap.reports.strips import spread
from ppap.runs.checkpoint import load_checkpoint

LIMIT = 9_000_000
"""Bytes of all crops of a page together, in the form they have there."""
_NEAR = 5  # similar clusters named
_USUAL = 6_000  # bytes of a crop
_FORMS = ((THUMB, 82), (THUMB, 65), (96, 60), (64, 50), (48, 40))  # side [pixels], quality of JPEG


@dataclass(frozen=True, kw_only=True)
class AtlasOptions:
    """What an atlas shows."""

    most: int = 200
    """Images at most, spread over those that there are."""
    resolution: int = 320
    """Shorter side that the network sees of images given by their path [pixels]."""
    typical: int = 12
    """Regions of each cluster, the nearest to its centre."""
    doubtful: int = 4
    """Regions of each cluster that lie nearest to another one."""

    def __post_init__(self) -> None:
        for name, least in (("most", 1), ("resolution", 1), ("typical", 1), ("doubtful", 0)):
            if getattr(self, name) < least:
                raise UsageError(f"--{name} is {getattr(self, name)}; give at least {least}")


def make_atlas(predictor: Predictor, checkpoint: str, images: Sequence[str], options: AtlasOptions) -> str:
    """The page, HTML.

    Args:
        predictor: the trained network of `checkpoint`.
        checkpoint: run directory or checkpoint folder.
        images: files and folders; empty = the validation images of the run, or its training images, with
            their labels if there are any.
        options: how much of it.

    Raises:
        DataError: there are no images, or none that can be read.
    """
    if images:
        count, pictures, bad = _given(predictor, images, options)
    else:
        count, pictures, bad = _own(checkpoint, options)
    clusters = len(predictor.engine.cluster.clusters)
    typical, doubtful = _counts(clusters, options)
    found = gather(
        predictor, tqdm(pictures, total=count, unit="image", disable=None), count, typical, doubtful
    )
    if not found.images:
        raise DataError(f"no image can be read: {bad[0]}")
    for reason in bad:
        print(f"left out: {reason}")
    return page(_content(predictor, checkpoint, found, (typical + doubtful) * clusters))


def _given(
    predictor: Predictor, images: Sequence[str], options: AtlasOptions
) -> tuple[int, Iterator[Picture], list[str]]:
    files, bad = list(find_images(images).values()), []
    files = [files[i] for i in spread(len(files), options.most)]
    geometry = Geometry(options.resolution, predictor.engine.config.data.interpolation)
    set_max_pixels(predictor.max_pixels)

    def pictures() -> Iterator[Picture]:
        for path in files:
            try:
                image = read_image(path, predictor.reading)
                predictor.seen_size(*image.size, options.resolution, MAX_TOKENS)
            except (DataError, UsageError) as error:
                bad.append(str(error) if isinstance(error, DataError) else f"{path}: {error}")
                continue
            yield Picture(geometry.whole(image))

    return len(files), pictures(), bad


def _own(checkpoint: str, options: AtlasOptions) -> tuple[int, Iterator[Picture], list[str]]:
    datasets = build_datasets(settings_of(load_checkpoint(checkpoint)).data)
    dataset = datasets.val if datasets.val is not None else datasets.train
    print(f"data: {datasets.description}")
    places = spread(len(dataset), options.most)

    def pictures() -> Iterator[Picture]:
        for i in places:
            yield Picture(dataset.pixels(i), dataset[i]["label"].numpy() if dataset.labelled else None)

    return len(places), pictures(), []


def _counts(clusters: int, options: AtlasOptions) -> tuple[int, int]:
    """Typical and doubtful regions of each cluster that a page of bounded size has room for."""
    room = max(2, LIMIT // (clusters * _USUAL))
    if options.typical + options.doubtful <= room:
        return options.typical, options.doubtful
    doubtful = min(options.doubtful, room // 4)
    return min(options.typical, room - doubtful), doubtful


def _content(predictor: Predictor, checkpoint: str, found: Gathered, crops: int) -> dict[str, Any]:
    """What the page's script reads."""
    colours, shares = default_colours(len(found.pixels)), found.pixels / max(1, found.pixels.sum())
    alike, merges, most = found.similarity(), found.merges(), LIMIT // max(1, crops)
    clusters = []
    for k in range(len(shares)):
        others = [other for other in np.argsort(-np.nan_to_num(alike[k], nan=-2)) if other != k]
        near = [(int(other), float(alike[k, other])) for other in others if np.isfinite(alike[k, other])]
        clusters.append(
            {
                "share": float(shares[k]),
                "colour": "#" + bytes(colours[k].tolist()).hex(),
                "class": _class_of(predictor, found, k),
                "typical": [_as_uri(one, most) for one in found.typical[k]],
                "doubtful": [_as_uri(one, most) for one in found.doubtful[k]],
                "near": near[:_NEAR],
                "merges": [
                    {"with": large, "cosine": cosine, "border": border}
                    for small, large, cosine, border in merges
                    if small == k
                ],
            }
        )
    run = visible(str(checkpoint), one_line=True)
    return {
        "about": f"{len(clusters)} clusters of {run}, in {found.images} images. "
        f"Backbone: {predictor.origin}.",
        "warning": RANDOM_WARNING if predictor.engine.net.backbone.is_random else None,
        "probe": probe_checksum(predictor.engine.cluster.clusters),
        "clusters": clusters,
    }


def _class_of(predictor: Predictor, found: Gathered, cluster: int) -> dict[str, Any] | None:
    """The class that most labelled pixels of a cluster have, or the one it was matched to in training."""
    counts = found.classes[cluster]
    if counts.sum():
        best = int(counts.argmax())
        return {"name": predictor.class_names[best], "share": float(counts[best] / counts.sum())}
    matched = predictor.assignment[cluster] if predictor.assignment is not None else None
    return None if matched is None else {"name": predictor.class_names[matched], "share": None}


def _as_uri(picture: np.ndarray, most: int) -> str:
    """A crop as text of at most `most` characters, if any of the forms makes it so small."""
    text = ""
    for side, quality in _FORMS:
        buffer = io.BytesIO()
        image = Image.fromarray(picture)
        image = image if side == THUMB else image.resize((side, side), Image.Resampling.BOX)
        image.save(buffer, "JPEG", quality=quality, optimize=True)
        text = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
        if len(text) <= most:
            break
    return text


def page(content: dict[str, Any]) -> str:
    """The page with its content: one file, which loads nothing."""
    folder = importlib.resources.files("ppap").joinpath("assets/atlas")
    html, style, script = (
        folder.joinpath(f"atlas.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js")
    )
    # A name may hold "</script>": no "<" is left that could end the element, or open a comment in it.
    data = json.dumps(content, allow_nan=False).replace("<", "\\u003c")
    for mark, text in (("/*STYLE*/", style), ("/*SCRIPT*/", script), ("/*DATA*/", data)):
        html = html.replace(mark, text, 1)
    return html


def default_path(checkpoint: str) -> Path:
    """Where an atlas goes without ``--out``: into the run."""
    folder = Path(checkpoint)
    if folder.resolve().parent.name == "checkpoints":
        folder = folder.resolve().parent.parent  # the next save replaces the checkpoint's folder
    return folder / "atlas.html"
