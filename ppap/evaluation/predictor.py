"""A trained network that labels images of any size: ``ppap.load(path).predict(image)``."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from ppap.data import class_colours
from ppap.data.ids import reading_of
from ppap.data.images import AS_STORED, Reading, as_picture
from ppap.data.limits import at_most
from ppap.data.rasters import Whole
from ppap.data.transforms import Geometry, resized_size
from ppap.errors import UsageError
from ppap.evaluation.crf import require_crf
from ppap.evaluation.names import Names, read_names
from ppap.evaluation.tiles import OVERLAP, Tiling, label_tiles, labels_of
from ppap.evaluation.views import Looking, Lookout
from ppap.methods.engine import Engine, for_inference, load_engine, pick_device
from ppap.nets.shared_runs import local_run
from ppap.runs.checkpoint import load_checkpoint
from ppap.settings.config import from_dict

IntArray = npt.NDArray[np.uint8]

# A ViT attends between all pairs of tokens: memory grows with their square.
MAX_TOKENS = 16_384


class Predictor:
    """A trained network that labels images of any size.

    Attributes:
        class_names, class_ids: names of the classes, and the ids that masks have for them.
        origin: where the backbone's weights came from.
        named: what a user calls the clusters, see :meth:`name_clusters`; None = nobody named them.
    """

    def __init__(
        self,
        engine: Engine,
        class_names: Sequence[str],
        assignment: Sequence[int | None] | None,
        labelled: bool = True,
        ids: Sequence[int] = (),
        reading: Reading = AS_STORED,
        max_pixels: int | None = None,
    ) -> None:
        """Args: the network, names of the classes, class of each cluster (None = never matched), whether the
        linear probe has seen labels, the id that label files have for each class (empty = 0, 1, ...), how
        pictures are read, and the most pixels of one (None = as in training).
        """
        self.engine = engine
        self.labelled = labelled
        self.assignment = assignment
        self.origin = engine.net.backbone.origin
        self.class_names = tuple(class_names)
        self.reading = reading
        self.max_pixels = max_pixels or engine.config.data.max_pixels
        self.class_ids = tuple(ids) or tuple(range(len(self.class_names)))
        self.named: Names | None = None

    def name_clusters(self, path: str | Path) -> None:
        """Give clusters the names, ids, colours and merges of a ``names.json`` of the atlas.

        Raises:
            DataError: it cannot be read, or was made for another run.
        """
        self.named = read_names(path, self.engine.cluster.clusters)

    def names(self, probe: str = "cluster") -> tuple[str, ...]:
        """Names of the ids of a probe: a user's, else class names, or cluster 0, 1, ... without classes."""
        if probe != "linear" and self.named is not None:
            return tuple(region.name for region in self.named.regions)
        if probe == "linear" or self.assignment is not None:
            return self.class_names
        return tuple(f"cluster {k}" for k in range(len(self.engine.cluster.clusters)))

    def ids(self, probe: str = "cluster") -> tuple[int, ...]:
        """Ids that :meth:`predict` returns, one for each of :meth:`names`; -1 = none."""
        if probe != "linear" and self.named is not None:
            return self.named.ids()
        if probe == "linear" or self.assignment is not None:
            return self.class_ids
        return tuple(range(len(self.engine.cluster.clusters)))

    def colours(self, probe: str = "cluster") -> IntArray:
        """(names, 3) uint8 RGB, one for each of :meth:`names`."""
        if probe != "linear" and self.named is not None:
            return self.named.colours()
        colours: IntArray = class_colours(
            self.engine.config.data.kind, len(self.names(probe)), self.ids(probe)
        )
        return colours

    def grouping(self, probe: str = "cluster") -> tuple[tuple[int, ...], tuple[int, ...]]:
        """What becomes of the channels of a probe.

        Returns:
            The group of each channel: clusters that a user merged are one. The id of each group in masks;
            -1 = none.
        """
        if probe == "linear":
            return tuple(range(len(self.class_ids))), self.class_ids
        clusters = range(len(self.engine.cluster.clusters))
        if self.named is not None:
            ids = list(self.named.ids())
            groups = []
            for place in self.named.region_of:
                groups.append(len(ids) if place is None else place)
                ids += [-1] if place is None else []
            return tuple(groups), tuple(ids)
        if self.assignment is None:
            return tuple(clusters), tuple(clusters)
        return tuple(clusters), tuple(-1 if c is None else self.class_ids[c] for c in self.assignment)

    def lookout(self, probe: str = "cluster", **wanted: Any) -> Lookout:
        """What runs pictures through the network.

        Args:
            probe: as for :meth:`predict`.
            wanted: fields of ``ppap.evaluation.views.Looking``, beside `probe` and `groups`.

        Raises:
            UsageError: an unknown probe, one that this run could not train, or a CRF that cannot run here.
        """
        if probe not in ("cluster", "linear"):
            raise UsageError(f"probe is {probe!r}; valid: 'cluster', 'linear'")
        if probe == "linear" and not self.labelled:
            raise UsageError(
                "probe is 'linear', which this run could not train without labels; use 'cluster'"
            )
        require_crf(wanted.get("crf", "none"), self.engine.device, "--crf")
        return Lookout(self.engine, Looking(probe, self.grouping(probe)[0], **wanted))

    def table(self, lookout: Lookout) -> Tensor:
        """(channels,) int64: the id in masks of each channel of the views of :meth:`lookout`; -1 = none."""
        ids = self.grouping(lookout.how.probe)[1]
        return torch.tensor([ids[group] for group in lookout.how.channels])

    @property
    def geometry(self) -> Geometry:
        """How pictures are resized; its resolution is that of the training."""
        data = self.engine.config.data
        return Geometry(data.resolution, data.interpolation)

    @torch.no_grad()
    def predict(
        self,
        image: str | Path | Image.Image | np.ndarray | Tensor,
        *,
        probe: Literal["cluster", "linear"] = "cluster",
        resolution: int = 320,
        max_tokens: int = MAX_TOKENS,
        tile: int | None = None,
        crf: Literal["native", "pydensecrf", "none"] = "none",
    ) -> Tensor:
        """Label map of an image.

        Args:
            image: path, PIL image of any size and mode, or an array or tensor (H, W, 3) of uint8 or uint16;
                read as in training and by ``ppap predict``: upright by its EXIF rotation, 16 bits scaled.
            probe: ``cluster``, trained without labels (ids are classes where the checkpoint knows the
                matching), or ``linear``.
            resolution: shorter side that the network sees [pixels].
            max_tokens: most patches per image, or per tile.
            tile: the network sees overlapping tiles of so many pixels a side, each at `resolution`, in
                place of the whole image; None = the whole.
            crf: dense CRF at the pixels that the network sees, as in ``ppap eval``.

        Returns:
            (H, W) int64 ids on the CPU, at the size of the image: those of :meth:`ids`, that is of the label
            files the run was trained with, or of a user's names; -1 = no class.

        Raises:
            UsageError: an unknown probe, more patches than `max_tokens`, a CRF that cannot run, or another
                kind of image.
            DataError: the image cannot be read, or has more pixels than ``max_pixels``.
        """
        lookout = self.lookout(probe, crf=crf)
        with at_most(self.max_pixels):
            image = as_picture(image, self.reading)
        table, geometry = self.table(lookout), replace(self.geometry, resolution=resolution)
        if tile is not None:
            tiling = self.tiling(tile, resolution, max_tokens)
            bands = label_tiles(Whole(image), lookout, tiling, geometry)
            return torch.from_numpy(labels_of(bands, image.size, table))
        self.seen_size(image.width, image.height, resolution, max_tokens)
        view = lookout.look([geometry.whole(image)])[0].view
        return table[view.best((image.height, image.width)).cpu()]

    def tiling(
        self, tile: int, resolution: int, max_tokens: int = MAX_TOKENS, overlap: float = OVERLAP
    ) -> Tiling:
        """How pictures are cut into tiles of `tile` pixels a side, which the network sees at `resolution`.

        Raises:
            UsageError: a tile has more than `max_tokens` patches, or none.
        """
        self.seen_size(tile, tile, resolution, max_tokens)
        return Tiling(tile, resolution, overlap)

    def seen_size(self, width: int, height: int, resolution: int, max_tokens: int) -> tuple[int, int]:
        """(width, height) [pixels] at which the network sees an image.

        Raises:
            UsageError: more than `max_tokens` patches.
        """
        seen = resized_size(width, height, resolution)
        patch = self.engine.net.backbone.patch_size
        tokens = -(-seen[0] // patch) * -(-seen[1] // patch)
        if tokens > max_tokens:
            raise UsageError(
                f"an image of {width} x {height} pixels gives {tokens} patches of {patch} pixels at "
                f"--resolution {resolution}, the limit is {max_tokens} (--max-tokens); lower --resolution"
            )
        return seen


def load(
    path: str | Path,
    device: str = "auto",
    *,
    max_pixels: int | None = None,
    names: str | Path | None = None,
) -> Predictor:
    """A trained network, ready to predict.

    Args:
        path: run directory, checkpoint folder, or ``hf-hub:OWNER/NAME``, what ``ppap push`` shared.
        device: ``auto`` or a torch device name.
        max_pixels: images of more are refused before they are decoded; None = ``--data.max-pixels`` of the
            run, by default 200 million.
        names: ``names.json`` of the run's atlas: masks have its ids, and merged clusters are one region.

    Raises:
        DataError: no such checkpoint, a damaged one, or names of another run.
        UsageError: the device is not here.

    Example:
        >>> labels = ppap.load("runs/mine").predict("photo.jpg")
        >>> named = ppap.load("runs/mine", names="names.json").predict("photo.jpg")
    """
    checkpoint = load_checkpoint(local_run(path))
    chosen = pick_device(device)
    config = for_inference(from_dict(checkpoint.info["config"]), chosen)
    engine = load_engine(checkpoint, chosen, config)
    info = checkpoint.info
    predictor = Predictor(
        engine,
        info["class_names"],
        info["assignment"],
        info["labelled"],
        info.get("label_ids") or (),
        reading_of(info),
        max_pixels,
    )
    if names is not None:
        predictor.name_clusters(names)
    return predictor
