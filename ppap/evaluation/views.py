"""What the network makes of a picture, or of a tile of one: scores that any size of mask can be had from.

Legend: C channels (clusters, classes or regions), h w patch grid, H W pixels that the network saw.
"""

import collections
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ppap.data.transforms import normalise
from ppap.errors import NumberError
from ppap.evaluation.crf import CRFTask, crf_device, run_crf
from ppap.evaluation.evaluate import CLUSTER_SHARPNESS, pixel_scores
from ppap.methods.engine import Engine
from ppap.nets.probes import upsample


@dataclass(frozen=True)
class View:
    """Scores of one picture or tile; the largest decides."""

    scores: Tensor
    """(C, h, w): products with the code, or (C, H, W): probabilities."""
    length: Tensor | None
    """(h, w) length of the code, by which products of several tiles are made comparable."""
    full: tuple[int, int]
    """(height, width) [pixels] that the grid of scores covers."""
    seen: tuple[int, int]
    """(H, W) that the network saw: `full` without the pixels added to fill the last patches."""

    def at(self, channel: int, size: tuple[int, int]) -> Tensor:
        """(height, width) scores of a channel at the pixels of a picture of `size`."""
        return self._resized(self.scores[channel], size)

    def weight(self, size: tuple[int, int]) -> Tensor | None:
        """(height, width): what scores are divided by before those of several tiles are added; None = 1."""
        return None if self.length is None else self._resized(self.length, size).clamp(min=1e-12)

    def _resized(self, values: Tensor, size: tuple[int, int]) -> Tensor:
        values = values[None, None]
        if values.shape[2:] != self.full:
            values = F.interpolate(values, size=self.full, mode="bilinear", align_corners=False)
        values = values[:, :, : self.seen[0], : self.seen[1]]
        if values.shape[2:] != size:
            values = F.interpolate(values, size=size, mode="bilinear", align_corners=False)
        return values[0, 0]

    def best(self, size: tuple[int, int]) -> Tensor:
        """(height, width) int64, the channel with the largest score; one at a time, which bounds memory."""
        best = torch.full(size, -torch.inf, device=self.scores.device)
        labels = torch.zeros(size, dtype=torch.int64, device=self.scores.device)
        for channel in range(len(self.scores)):
            score = self.at(channel, size)
            labels[score > best] = channel
            best = torch.maximum(best, score)
        return labels


@dataclass(frozen=True)
class Seen:
    """All that is kept of a picture that went through the network."""

    view: View
    probabilities: Tensor | None = None
    """(groups, H, W) float32 on the CPU; None = not asked for."""
    code: Tensor | None = None
    """(E, h, w) float32 on the CPU; None = not asked for."""


@dataclass(frozen=True)
class Looking:
    """How pictures go through the network."""

    probe: str
    groups: tuple[int, ...]
    """Group of each channel of the probe: channels of one group are one region, whose probability is theirs
    together."""
    crf: str = "none"
    """Dense CRF at the pixels that the network saw, as in the evaluation."""
    smooth: int = 1
    """Scores are means over so many frames, this one and those before it."""
    probabilities: bool = False
    """Keep probabilities."""
    code: bool = False
    """Keep the code."""

    @property
    def maps(self) -> bool:
        """Whether a mask follows from probabilities, not from products with the code."""
        return self.crf != "none" or self.smooth > 1

    @property
    def channels(self) -> tuple[int, ...]:
        """Group of each channel of a view."""
        return tuple(range(1 + max(self.groups))) if self.maps else self.groups


class Lookout:
    """Runs pictures through an engine, and remembers frames where scores are means over several."""

    def __init__(self, engine: Engine, how: Looking) -> None:
        """Args: the network, and what is wanted of it."""
        self.engine, self.how = engine, how
        self._frames: dict[Hashable, collections.deque[Tensor]] = {}

    @torch.no_grad()
    def look(self, pixels: Sequence[np.ndarray], sequence: Hashable = None) -> list[Seen]:
        """What the network makes of pictures of one size.

        Args:
            pixels: (H, W, 3) uint8 each, all of one size, resized as the network is to see them.
            sequence: which frames belong together, in the order of the calls.

        Raises:
            NumberError: the code is not finite.
        """
        how, engine = self.how, self.engine
        images = torch.stack([normalise(one) for one in pixels]).to(engine.device)
        codes = engine.code(images)
        if not torch.isfinite(codes).all():
            raise NumberError("the network's code is not finite; check the image and the weights")
        wanted = self._probabilities(codes, pixels, sequence) if how.maps or how.probabilities else []
        found = []
        for i in range(len(pixels)):
            seen = (pixels[i].shape[0], pixels[i].shape[1])
            if how.maps:
                view = View(wanted[i], None, seen, seen)
            else:
                view = self._products(codes[i : i + 1], seen)
            kept = wanted[i].cpu() if how.probabilities else None
            found.append(Seen(view, kept, codes[i].cpu() if how.code else None))
        return found

    def _products(self, code: Tensor, seen: tuple[int, int]) -> View:
        engine, patch = self.engine, self.engine.net.backbone.patch_size
        full = (code.shape[2] * patch, code.shape[3] * patch)
        if self.how.probe == "linear":
            return View(engine.linear.logits(code)[0], None, full, seen)
        centres = F.normalize(engine.cluster.clusters.float(), dim=1)
        scores = F.conv2d(code, centres[:, :, None, None])[0]
        return View(scores, torch.linalg.vector_norm(code[0], dim=0), full, seen)

    def _probabilities(self, codes: Tensor, pixels: Sequence[np.ndarray], sequence: Hashable) -> list[Tensor]:
        """(groups, H, W) of each picture: after the mean over frames, and after the CRF."""
        how, maps = self.how, []
        for code, one in zip(codes, pixels, strict=True):
            values = self._grouped(self._softmax(code[None], (one.shape[0], one.shape[1])))
            maps.append(self._smoothed(values, sequence))
        if how.crf == "none":
            return maps
        where = crf_device(how.crf, self.engine.device)
        tiny = torch.finfo(torch.float32).tiny
        tasks = (
            CRFTask(one, (values.clamp(min=tiny).log().to(where),))
            for one, values in zip(pixels, maps, strict=True)
        )
        return [found.maps[0].to(self.engine.device) for found in run_crf(tasks, how.crf, maps=True)]

    def _softmax(self, code: Tensor, seen: tuple[int, int]) -> Tensor:
        """(channels, H, W): what the evaluation's CRF takes as probabilities."""
        engine, patch = self.engine, self.engine.net.backbone.patch_size
        if self.how.probe == "linear":
            return upsample(engine.linear.logits(code), patch, seen)[0].softmax(dim=0)
        cosines = pixel_scores(code, (engine.cluster, None), patch, seen)[0]
        return (CLUSTER_SHARPNESS * cosines).softmax(dim=0)

    def _grouped(self, values: Tensor) -> Tensor:
        count = 1 + max(self.how.groups)
        if self.how.groups == tuple(range(count)):
            return values
        places = torch.tensor(self.how.groups, device=values.device)
        return values.new_zeros(count, *values.shape[1:]).index_add_(0, places, values)

    def _smoothed(self, values: Tensor, sequence: Hashable) -> Tensor:
        if self.how.smooth == 1:
            return values
        frames = self._frames.setdefault(sequence, collections.deque(maxlen=self.how.smooth))
        if frames and frames[-1].shape != values.shape:  # frames of another size are another film
            frames.clear()
        frames.append(values)
        return torch.stack(tuple(frames)).mean(dim=0)
