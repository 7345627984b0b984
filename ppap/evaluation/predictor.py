"""A trained network that labels images of any size: ``ppap.load(path).predict(image)``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ppap.data.ids import reading_of
from ppap.data.images import AS_STORED, Reading, as_picture
from ppap.data.limits import at_most
from ppap.data.transforms import Geometry, normalise, resized_size
from ppap.errors import UsageError
from ppap.evaluation.metrics import apply_assignment
from ppap.methods.engine import Engine, for_inference, load_engine, pick_device
from ppap.runs.checkpoint import load_checkpoint
from ppap.settings.config import from_dict

# A ViT attends between all pairs of tokens: memory grows with their square.
MAX_TOKENS = 16_384


class Predictor:
    """A trained network that labels images of any size.

    Attributes:
        class_names, class_ids: names of the classes, and the ids that masks have for them.
        origin: where the backbone's weights came from.
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

    def names(self, probe: str = "cluster") -> tuple[str, ...]:
        """Names of the ids of a probe: class names, or cluster 0, 1, ... where clusters have no class."""
        if probe == "linear" or self.assignment is not None:
            return self.class_names
        return tuple(f"cluster {k}" for k in range(len(self.engine.cluster.clusters)))

    def ids(self, probe: str = "cluster") -> tuple[int, ...]:
        """Ids that :meth:`predict` returns, one for each of :meth:`names`; -1 = none."""
        if probe == "linear" or self.assignment is not None:
            return self.class_ids
        return tuple(range(len(self.engine.cluster.clusters)))

    @torch.no_grad()
    def predict(
        self,
        image: str | Path | Image.Image | np.ndarray | Tensor,
        *,
        probe: Literal["cluster", "linear"] = "cluster",
        resolution: int = 320,
        max_tokens: int = MAX_TOKENS,
    ) -> Tensor:
        """Label map of an image.

        Args:
            image: path, PIL image of any size and mode, or an array or tensor (H, W, 3) of uint8 or uint16;
                read as in training and by ``ppap predict``: upright by its EXIF rotation, 16 bits scaled.
            probe: ``cluster``, trained without labels (ids are classes where the checkpoint knows the
                matching), or ``linear``.
            resolution: shorter side that the network sees [pixels].
            max_tokens: most patches per image.

        Returns:
            (H, W) int64 ids on the CPU, at the size of the image: those of :meth:`ids`, that is of the label
            files the run was trained with; -1 = no class.

        Raises:
            UsageError: an unknown probe, more patches than `max_tokens`, or another kind of image.
            DataError: the image cannot be read, or has more pixels than ``max_pixels``.
        """
        if probe not in ("cluster", "linear"):
            raise UsageError(f"probe is {probe!r}; valid: 'cluster', 'linear'")
        if probe == "linear" and not self.labelled:
            raise UsageError(
                "probe is 'linear', which this run could not train without labels; use 'cluster'"
            )
        with at_most(self.max_pixels):
            image = as_picture(image, self.reading)
        width, height = self.seen_size(image.width, image.height, resolution, max_tokens)
        pixels = Geometry(resolution, self.engine.config.data.interpolation).whole(image)
        code = self.engine.code(normalise(pixels)[None].to(self.engine.device))
        labels = self._labels(code, probe, (height, width), (image.height, image.width)).cpu()
        if probe == "cluster" and self.assignment:
            labels = apply_assignment(labels, self.assignment)
        ids = torch.tensor([*self.ids(probe), -1])  # the last one for -1
        return ids[labels]

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

    def _labels(self, code: Tensor, probe: str, seen: tuple[int, int], size: tuple[int, int]) -> Tensor:
        """Ids with the largest score at each pixel; one class at a time, which bounds the memory."""
        engine, patch = self.engine, self.engine.net.backbone.patch_size
        if probe == "linear":
            scores = engine.linear.logits(code)
        else:
            centres = F.normalize(engine.cluster.clusters.float(), dim=1)
            scores = F.conv2d(code, centres[:, :, None, None])
        full = (code.shape[2] * patch, code.shape[3] * patch)
        best = torch.full(size, -torch.inf, device=code.device)
        labels = torch.zeros(size, dtype=torch.int64, device=code.device)
        for k in range(scores.shape[1]):
            at_seen = F.interpolate(scores[:, k : k + 1], size=full, mode="bilinear", align_corners=False)
            at_seen = at_seen[:, :, : seen[0], : seen[1]]
            score = F.interpolate(at_seen, size=size, mode="bilinear", align_corners=False)[0, 0]
            labels[score > best] = k
            best = torch.maximum(best, score)
        return labels


def load(path: str | Path, device: str = "auto", *, max_pixels: int | None = None) -> Predictor:
    """A trained network, ready to predict.

    Args:
        path: run directory or checkpoint folder.
        device: ``auto`` or a torch device name.
        max_pixels: images of more are refused before they are decoded; None = ``--data.max-pixels`` of the
            run, by default 200 million.

    Raises:
        DataError: no such checkpoint, or a damaged one.
        UsageError: the device is not here.

    Example:
        >>> labels = ppap.load("runs/mine").predict("photo.jpg")
    """
    checkpoint = load_checkpoint(path)
    chosen = pick_device(device)
    config = for_inference(from_dict(checkpoint.info["config"]), chosen)
    engine = load_engine(checkpoint, chosen, config)
    info = checkpoint.info
    return Predictor(
        engine,
        info["class_names"],
        info["assignment"],
        info["labelled"],
        info.get("label_ids") or (),
        reading_of(info),
        max_pixels,
    )
