"""What clusters look like over a set of pictures: shares, neighbours, typical and doubtful regions."""

import heapq
import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage

from ppap.evaluation.predictor import Predictor
from ppap.evaluation.views import Looking, Lookout
from ppap.nets.probes import upsample
from ppap.stopping import each

THUMB = 128  # side [pixels]
_LEAST = 0.004  # share of an image that a region has to be shown
_MARGIN = 0.2  # of a region's longer side that a crop shows around it
_SMALLEST = 32  # side of a crop [pixels]


@dataclass(frozen=True)
class Picture:
    """An image as the network sees it."""

    pixels: np.ndarray
    """(H, W, 3) uint8."""
    label: np.ndarray | None = None
    """(H, W) ids 0..C-1, -1 = ignored; None = no labels."""


@dataclass
class Gathered:
    """What a set of pictures shows of K clusters."""

    pixels: np.ndarray
    """(K,) int64 pixels of each cluster."""
    borders: np.ndarray
    """(K, K) int64 pairs of neighbouring pixels, symmetric, 0 on the diagonal."""
    classes: np.ndarray
    """(K, C) int64 labelled pixels."""
    codes: torch.Tensor
    """(K, E) sums of the unit codes of the patches nearest to each centre."""
    typical: list[list[np.ndarray]] = field(default_factory=list)
    """For each cluster (side, side, 3) uint8 crops, the region outlined, nearest to the centre first."""
    doubtful: list[list[np.ndarray]] = field(default_factory=list)
    """The same, those first that lie nearest to a second centre."""
    images: int = 0

    def similarity(self) -> np.ndarray:
        """(K, K) cosine of the clusters' mean codes; NaN where one has no patch."""
        rows = F.normalize(self.codes.double(), dim=1)
        found = (rows @ rows.T).numpy()
        empty = (self.codes.norm(dim=1) == 0).numpy()
        found[empty] = found[:, empty] = np.nan
        return found

    def merges(self) -> list[tuple[int, int, float, float]]:
        """Pairs that may be one thing, the most similar first: cluster, the larger one, cosine, border.

        Their similarity is larger than the mean over all pairs by a standard deviation, each of the two is
        among the three most similar of the other, and the smaller one has more of its border with the larger
        one than the larger one's share of all other pixels would give. `border` is the share of the smaller
        one's border.
        """
        alike, found = self.similarity(), []
        np.fill_diagonal(alike, np.nan)
        pairs = alike[np.isfinite(alike)]
        least = pairs.mean() + pairs.std() if pairs.size else np.inf
        alike = np.nan_to_num(alike, nan=-np.inf)
        near = [{*np.argsort(-row)[:3].tolist()} for row in alike]
        total = self.pixels.sum()
        for a, b in itertools.combinations(range(len(self.pixels)), 2):
            small, large = sorted((a, b), key=lambda k: (self.pixels[k], k))
            border = self.borders[small, large] / max(1, self.borders[small].sum())
            chance = self.pixels[large] / max(1, total - self.pixels[small])
            if a in near[b] and b in near[a] and border > chance and alike[a, b] >= least:
                found.append((small, large, float(alike[a, b]), float(border)))
        return sorted(found, key=lambda pair: -pair[2])


class _Best:
    """The crops with the largest scores, a few of each."""

    def __init__(self, clusters: int, count: int) -> None:
        self.heaps: list[list[tuple[float, int, np.ndarray]]] = [[] for _ in range(clusters)]
        self.count, self.order = count, itertools.count()

    def wants(self, cluster: int, score: float) -> bool:
        heap = self.heaps[cluster]
        return self.count > 0 and (len(heap) < self.count or score > heap[0][0])

    def add(self, cluster: int, score: float, crop: np.ndarray) -> None:
        heapq.heappush(self.heaps[cluster], (score, -next(self.order), crop))
        if len(self.heaps[cluster]) > self.count:
            heapq.heappop(self.heaps[cluster])

    def crops(self) -> list[list[np.ndarray]]:
        return [
            [crop for _, _, crop in sorted(heap, key=lambda one: one[:2], reverse=True)]
            for heap in self.heaps
        ]


@torch.no_grad()
def gather(
    predictor: Predictor, pictures: Iterable[Picture], count: int, typical: int, doubtful: int
) -> Gathered:
    """Look at pictures, cluster by cluster, whatever a user named them.

    Args:
        predictor: the trained network.
        pictures: as it is to see them.
        count: number of pictures, over which regions are spread.
        typical, doubtful: regions of each cluster to keep.
    """
    engine = predictor.engine
    clusters, width = engine.cluster.clusters.shape
    found = Gathered(
        np.zeros(clusters, np.int64),
        np.zeros((clusters, clusters), np.int64),
        np.zeros((clusters, len(predictor.class_names)), np.int64),
        torch.zeros(clusters, width, dtype=torch.float64),
    )
    lookout = Lookout(engine, Looking("cluster", tuple(range(clusters)), code=True))
    best = _Best(clusters, typical), _Best(clusters, doubtful)
    share = tuple(max(1, math.ceil(wanted / max(1, count))) for wanted in (typical, doubtful))
    for picture in each(pictures):
        size = picture.pixels.shape[:2]
        seen = lookout.look([picture.pixels])[0]
        labels = seen.view.best(size).cpu().numpy()
        _count(found, labels, picture.label)
        code = seen.code[None].to(engine.device)
        cosines = engine.cluster.logits(code)[0]
        found.codes.index_add_(
            0, cosines.argmax(0).flatten().cpu(), F.normalize(code[0].flatten(1).T, dim=1).cpu().double()
        )
        top = cosines.topk(min(2, clusters), dim=0).values
        maps = torch.stack((top[0], top[-1] - top[0]))[None]  # near to the centre, near to a second one
        near, between = upsample(maps, engine.net.backbone.patch_size, size)[0].cpu().numpy()
        for cluster in np.unique(labels):
            _regions(picture.pixels, labels == cluster, int(cluster), (near, between), best, share)
        found.images += 1
    found.typical, found.doubtful = best[0].crops(), best[1].crops()
    return found


def _count(found: Gathered, labels: np.ndarray, truth: np.ndarray | None) -> None:
    clusters = len(found.pixels)
    found.pixels += np.bincount(labels.ravel(), minlength=clusters)
    for one, other in ((labels[:, 1:], labels[:, :-1]), (labels[1:], labels[:-1])):
        differ = one != other
        pairs = np.bincount(one[differ] * clusters + other[differ], minlength=clusters * clusters)
        pairs = pairs.reshape(clusters, clusters)
        found.borders += pairs + pairs.T
    if truth is not None:
        classes = found.classes.shape[1]
        kept = (truth >= 0) & (truth < classes)
        pairs = np.bincount(labels[kept] * classes + truth[kept], minlength=clusters * classes)
        found.classes += pairs.reshape(clusters, classes)


def _regions(
    pixels: np.ndarray,
    mask: np.ndarray,
    cluster: int,
    scores: tuple[np.ndarray, np.ndarray],
    best: tuple[_Best, _Best],
    share: tuple[int, ...],
) -> None:
    """Offer the connected regions of one cluster in one image to the best ones; none to both."""
    places, count = ndimage.label(mask)
    areas = np.bincount(places.ravel(), minlength=count + 1)[1:]
    large = np.flatnonzero(areas >= min(_LEAST * mask.size, areas.max())) + 1
    boxes, taken = ndimage.find_objects(places), set()
    for score, kept, most in zip(scores, best, share, strict=True):
        means = np.asarray(ndimage.mean(score, places, large))
        for i in np.argsort(-means, kind="stable")[:most]:
            number = int(large[i])
            if number not in taken and kept.wants(cluster, float(means[i])):
                taken.add(number)
                kept.add(cluster, float(means[i]), crop(pixels, places == number, boxes[number - 1]))


def crop(pixels: np.ndarray, mask: np.ndarray, box: tuple[slice, slice]) -> np.ndarray:
    """(THUMB, THUMB, 3) uint8: a square around a region, which is outlined; what is outside is darkened.

    Args:
        pixels: (H, W, 3) uint8.
        mask: (H, W) bool, the region.
        box: rows and columns that it lies in.
    """
    longer = max(side.stop - side.start for side in box)
    wanted = max(_SMALLEST, round(longer * (1 + 2 * _MARGIN)))
    starts, sides = [], []
    for side, length in zip(box, mask.shape, strict=True):
        sides.append(min(wanted, length))
        middle = (side.start + side.stop - sides[-1]) // 2
        starts.append(min(max(0, middle), length - sides[-1]))
    part = tuple(slice(start, start + side) for start, side in zip(starts, sides, strict=True))
    scale = THUMB / max(sides)
    size = (max(1, round(sides[1] * scale)), max(1, round(sides[0] * scale)))
    picture = np.array(Image.fromarray(pixels[part]).resize(size, Image.Resampling.BICUBIC))
    inside = np.array(Image.fromarray(mask[part]).resize(size, Image.Resampling.NEAREST))
    picture[~inside] //= 2  # which side of a line the region is
    picture[inside & ~ndimage.binary_erosion(inside, border_value=1)] = 255
    picture[~inside & ndimage.binary_dilation(inside)] = 0
    thumb = np.full((THUMB, THUMB, 3), 128, np.uint8)
    top, left = (THUMB - size[1]) // 2, (THUMB - size[0]) // 2
    thumb[top : top + size[1], left : left + size[0]] = picture
    return thumb
