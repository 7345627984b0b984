"""Semantic segmentation by nearest neighbours: the evaluation of ImageNet-S ("distance matching").

A bank holds one embedding per labelled training image and id that occurs in it: the mean of the feature map
under that id's mask. Every position of a validation image takes the class that weighs most among its k
nearest embeddings. Nothing is trained and nothing is matched: the ids are those of the labels. Scores are
computed at the images' original sizes over C + 1 ids, id 0 ("other") among them; an id that is absent counts
as 0.

Legend: D channels, h w positions of the up-sampled map, H W pixels of an image, M embeddings, P positions,
k neighbours, L = C + 1 ids.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from ppap.data import SegmentationDataset
from ppap.data.loading import whole_loader
from ppap.data.transforms import Geometry, normalise, resized_size
from ppap.errors import DataError, NumberError, UsageError
from ppap.evaluation.metrics import ConfusionMatrix
from ppap.methods.engine import Engine
from ppap.settings.config import NeighboursConfig
from ppap.stopping import each

MapOf = Callable[[Tensor], Tensor]
"""Image (1, 3, H, W) on the device -> feature map (1, D, h, w)."""

# Bank columns are taken in parts that leave room for at least so many positions in the memory budget.
_MIN_POSITIONS = 64


class Bank(NamedTuple):
    """Embeddings of the labelled training images."""

    rows: Tensor
    """(M, D) float32, L2-normalised."""
    labels: Tensor
    """(M,) int64 ids 0..C."""


@dataclass(frozen=True)
class IdScores:
    """Scores over all ids, absent ones included; percentages are 0 to 100."""

    miou: float
    """Mean of `iou` [%]."""
    accuracy: float
    """Correct pixels in all counted pixels [%]."""
    iou: tuple[float, ...]
    """TP / (T + P - TP + 1e-10) per id [%]; 0 for an id in neither truth nor prediction."""
    pixels: int
    """Number of counted pixels."""


@dataclass(frozen=True)
class NeighbourEvaluation:
    """Result of :func:`evaluate_neighbours`."""

    scores: IdScores
    rematched: IdScores | None
    """After an assignment of predicted to true ids by the images they occur in; None = not asked for."""
    embeddings: int
    """Size M of the bank."""
    notes: tuple[str, ...] = ()
    """What a reader must know."""

    def summary(self) -> dict[str, float]:
        """Flat numbers [%]: ``neighbours_miou``, ``neighbours_accuracy``; ``rematched_*`` if asked for."""
        flat = {"neighbours_miou": self.scores.miou, "neighbours_accuracy": self.scores.accuracy}
        if self.rematched is not None:
            flat |= {"rematched_miou": self.rematched.miou, "rematched_accuracy": self.rematched.accuracy}
        return flat


def map_source(engine: Engine, tensor: str) -> MapOf:
    """What is compared: ``code`` (trained features), ``z`` (their projection) or ``guidance`` (frozen).

    Raises:
        UsageError: z of a method that has no projection.
    """
    if tensor == "code":
        return engine.code
    if tensor == "guidance":
        return engine.frozen_code
    if not engine.net.has_embedding:
        raise UsageError(
            f"--eval.neighbours.tensor is z, which method {engine.config.method} does not have; "
            "give code or guidance"
        )

    @torch.no_grad()
    def projected(image: Tensor) -> Tensor:
        engine.eval()
        with torch.autocast(engine.device.type, dtype=engine.amp, enabled=engine.amp is not None):
            frozen = engine.net.frozen(image)
            z = engine.net.embedding(frozen)
        return z.float().unflatten(0, (len(image), *frozen.grid)).permute(0, 3, 1, 2)

    return projected


class _Whole(Dataset[dict[str, Any]]):
    """Uncropped pictures of a split, resized for the network, and their ids at original size."""

    def __init__(self, dataset: SegmentationDataset, settings: NeighboursConfig, patch_size: int) -> None:
        self.dataset, self.settings, self.patch = dataset, settings, patch_size

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, i: int) -> dict[str, Any]:
        picture, ids = self.dataset.load(i)
        if ids is None:
            raise DataError(f"{self.dataset.name(i)} has no mask; give the segmentation folder beside it")
        pixels = fit(picture, self.settings, self.patch)
        return {"image": normalise(pixels), "ids": torch.from_numpy(ids.astype(np.int64)), "index": i}


def fit(picture: Image.Image, settings: NeighboursConfig, patch_size: int) -> np.ndarray:
    """The picture (H, W, 3) uint8 that the network sees: its shorter side resized, its sides fitted."""
    if settings.fit == "resize":
        size = resized_size(*picture.size, settings.resolution)
        fitted = tuple(max(round(side / patch_size), 1) * patch_size for side in size)
        return np.array(picture.resize(fitted, Image.Resampling.BILINEAR))
    pixels = Geometry(settings.resolution, "bilinear").whole(picture)
    if settings.fit == "floor":
        height, width = (max(side // patch_size, 1) * patch_size for side in pixels.shape[:2])
        return pixels[:height, :width]
    return pixels


@torch.no_grad()
def position_features(map_of: MapOf, image: Tensor, settings: NeighboursConfig, patch_size: int) -> Tensor:
    """The feature map of an image (1, 3, H, W), up-sampled bilinearly: (D, h, w) float32.

    Raises:
        NumberError: a feature is not finite.
    """
    features = map_of(image).float()
    if not torch.isfinite(features).all():
        raise NumberError("the network's features are not finite; the checkpoint or the input is damaged")
    size = tuple(side * settings.upsample for side in features.shape[2:])
    features = F.interpolate(features, size=size, mode="bilinear", align_corners=False)[0]
    # Where the network added pixels to the image, the positions beyond it are cut off.
    height, width = (-(-side * settings.upsample // patch_size) for side in image.shape[2:])
    return features[:, :height, :width]


def masked_means(features: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Mean feature under each id, and the ids.

    Args:
        features: (D, h, w) float32.
        ids: (H, W) int64 at the picture's size, negative = ignored; resized by nearest neighbour.

    Returns:
        (U, D) L2-normalised and (U,) int64 ascending: the ids that the resized mask holds.
    """
    size = tuple(features.shape[1:])
    resized = F.interpolate(ids[None, None].float(), size=size, mode="nearest")[0, 0].long()
    resized = resized.to(features.device)
    present = resized[resized >= 0].unique()
    inside = (resized.flatten() == present[:, None]).float()
    means = inside @ features.flatten(1).T / inside.sum(dim=1, keepdim=True)
    return F.normalize(means, dim=1), present


def build_bank(
    map_of: MapOf,
    dataset: SegmentationDataset,
    settings: NeighboursConfig,
    *,
    patch_size: int,
    device: torch.device,
    workers: int | None = 0,
) -> Bank:
    """Embeddings of all images of a labelled split.

    Args:
        map_of: see :func:`map_source`.
        dataset: the labelled training images (``train-semi`` of ImageNet-S).
        settings: resolution, fit and up-sampling.
        patch_size: side of a patch [pixels].
        device: where the network is.
        workers: loader processes; None = one for each core, at most 8.

    Raises:
        DataError: a mask is missing, or none holds a labelled pixel.
        NumberError: a feature is not finite.
    """
    rows, labels = [], []
    loader = whole_loader(_Whole(dataset, settings, patch_size), workers)
    for item in each(tqdm(loader, desc="bank", unit="image", leave=False, disable=None)):
        features = position_features(map_of, item["image"][None].to(device), settings, patch_size)
        means, ids = masked_means(features, item["ids"])
        rows.append(means)
        labels.append(ids)
    if not sum(map(len, labels)):
        raise DataError("no training mask holds a labelled pixel: nothing to compare with; check the masks")
    return Bank(torch.cat(rows), torch.cat(labels))


@torch.no_grad()
def classify(
    queries: Tensor, bank: Bank, *, k: int = 10, temperature: float = 0.07, memory: int = 2**28
) -> Tensor:
    """The id that weighs most among the k nearest embeddings of each query.

    An id weighs the sum of exp(cosine / temperature) over its neighbours among the k; of ids with equal
    weight the one with the nearest neighbour is taken.

    Args:
        queries: (P, D) float32, L2-normalised.
        bank: M embeddings; with fewer than k all of them are neighbours.
        k: neighbours.
        temperature: of the weights.
        memory: limit of all temporaries [bytes].

    Returns:
        (P,) int64 ids.
    """
    k = min(k, len(bank.rows))
    columns = min(len(bank.rows), max(k, memory // (16 * _MIN_POSITIONS)))
    # Per position: a tile of cosines and what topk makes of it, the best so far, and k x k comparisons.
    positions = max(1, memory // (8 * columns + 64 * k + 6 * k * k))
    found = []
    for part in queries.split(positions):
        best = torch.full((len(part), k), -torch.inf, device=part.device)
        nearest = torch.zeros((len(part), k), dtype=torch.int64, device=part.device)
        for start in range(0, len(bank.rows), columns):
            cosines, index = (part @ bank.rows[start : start + columns].T).topk(
                min(k, len(bank.rows) - start), dim=1
            )
            best, order = torch.cat([best, cosines], dim=1).topk(k, dim=1)
            nearest = torch.cat([nearest, index + start], dim=1).gather(1, order)
        ids = bank.labels[nearest]
        # The largest weight is 1: exp(cosine / temperature) of any temperature stays finite.
        weights = ((best - best[:, :1]) / temperature).exp()
        same = ids[:, :, None] == ids[:, None, :]
        winner = (same * weights[:, None, :]).sum(dim=2).argmax(dim=1)
        found.append(ids.gather(1, winner[:, None])[:, 0])
    return torch.cat(found)


def evaluate_neighbours(
    map_of: MapOf,
    bank: Bank,
    dataset: SegmentationDataset,
    settings: NeighboursConfig,
    *,
    patch_size: int,
    device: torch.device,
    workers: int | None = 0,
    masks: Path | None = None,
) -> NeighbourEvaluation:
    """Label every validation image by nearest neighbours and score it at its original size.

    Args:
        map_of: as for the bank.
        bank: see :func:`build_bank`.
        dataset: validation images with masks; ids 0..C, -1 = ignored.
        settings: of the whole procedure.
        patch_size: side of a patch [pixels].
        device: where network and bank are.
        workers: loader processes; None = one for each core, at most 8.
        masks: new folder for the predictions as RGB PNG, ``NAME.png``, id = R + 256 G; None = not written.

    Raises:
        DataError: a mask is missing, no pixel is labelled, or a file cannot be written.
        NumberError: a feature is not finite.
    """
    matrix = ConfusionMatrix(dataset.classes)
    together = torch.zeros(dataset.classes, dataset.classes, dtype=torch.int64)
    loader = whole_loader(_Whole(dataset, settings, patch_size), workers)
    for item in each(tqdm(loader, desc="neighbours", unit="image", leave=False, disable=None)):
        features = position_features(map_of, item["image"][None].to(device), settings, patch_size)
        queries = F.normalize(features.flatten(1).T, dim=1)
        found = classify(
            queries, bank, k=settings.k, temperature=settings.temperature, memory=settings.memory_mib * 2**20
        )
        truth = item["ids"]
        found = found.reshape(1, 1, *features.shape[1:]).float()
        labels = F.interpolate(found, size=tuple(truth.shape), mode="nearest")[0, 0].long().cpu()
        matrix.update(labels, truth)
        counted = truth >= 0
        together[labels[counted].unique()[:, None], truth[counted].unique()[None]] += 1
        if masks is not None:
            save_mask(labels, masks / f"{dataset.name(int(item['index']))}.png")
    notes = ()
    if len(bank.rows) < settings.k:
        notes = (f"the bank has {len(bank.rows)} embeddings, fewer than k = {settings.k}: all were taken",)
    rematched = None
    if settings.rematch:
        rematched = id_scores(matrix.counts[np.argsort(image_level_match(together))])
    return NeighbourEvaluation(id_scores(matrix.counts), rematched, len(bank.rows), notes)


def id_scores(counts: Tensor) -> IdScores:
    """Scores of counts (L, L) int64 [predicted id, true id]: the mean is over all L ids.

    Raises:
        DataError: no pixel was counted.
    """
    pixels = int(counts.sum())
    if pixels == 0:
        raise DataError("no labelled pixel to evaluate; check the validation masks")
    correct = counts.diagonal().double()
    union = counts.sum(dim=0) + counts.sum(dim=1) - correct
    iou = 100 * correct / (union + 1e-10)
    return IdScores(float(iou.mean()), 100 * float(correct.sum()) / pixels, tuple(iou.tolist()), pixels)


def image_level_match(together: Tensor) -> np.ndarray:
    """Which true id each predicted id stands for, by the number of images in which both occur.

    Args:
        together: (L, L) int64 [predicted id, true id]; id 0 ("other") is left out and stands for itself.

    Returns:
        (L,) ids, a permutation.
    """
    _, matched = linear_sum_assignment(together[1:, 1:].numpy(), maximize=True)
    return np.concatenate([[0], matched + 1])


def save_mask(labels: Tensor, path: Path) -> None:
    """Write ids (H, W) as an RGB PNG with id = R + 256 G, the layout of ImageNet-S.

    Raises:
        DataError: the file cannot be written.
    """
    ids = labels.numpy()
    rgb = np.stack([ids % 256, ids // 256, np.zeros_like(ids)], axis=-1).astype(np.uint8)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rgb).save(path)
    except OSError as error:
        raise DataError(
            f"cannot write {path} ({error.strerror or error}); give another --eval.neighbours.masks"
        ) from None
