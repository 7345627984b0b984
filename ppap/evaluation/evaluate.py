"""Both probes over a labelled set: scores per pixel, labels without and with CRF, one matching at the end.

Legend: B images, D channels, h w patch grid, H W pixels, C classes, K clusters. Order of operations as
published: the code is resized to the image, then probed; metrics are computed at the validation crop's size.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import fmean, stdev
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, Subset
from tqdm import tqdm

from ppap.data import SegmentationDataset, val_loader
from ppap.data.transforms import denormalise, to_uint8
from ppap.errors import DataError, NumberError
from ppap.evaluation.crf import CRFTask, crf_device, require_crf, run_crf
from ppap.evaluation.metrics import ConfusionMatrix, Scores
from ppap.nets.probes import ClusterProbe, LinearProbe, upsample
from ppap.parallel import add_, share, together, world
from ppap.settings.config import EvalConfig
from ppap.stopping import check, each

# The cluster probe's cosines become class scores for the CRF as log-softmax(2 cos).
CLUSTER_SHARPNESS = 2.0
# Channels of the code resized at a time while its length per pixel is computed.
_CHANNELS = 64
# Scores per pixel that are held at a time where they are only counted: 256 MiB in fp32.
_SCORES = 2**26
PROBES = ("cluster", "linear")
UNREFINED = "crf/without/cluster_miou"
"""Of the one clustering that has scores with CRF, where others are means: its mIoU without."""
_EXTRA = {"many-to-one": "each counts as its most frequent class", "left-out": "their pixels left out"}
_PREFIXES = ("", "crf/")

BatchCode = Callable[[dict[str, Tensor]], Tensor]
"""Batch of images or of cached tokens -> code (B, D, h, w)."""


@dataclass
class Evaluation:
    """Scores of both probes, without CRF and, where it ran, with."""

    plain: dict[str, Scores]
    """Probe name -> scores without CRF."""
    crf: dict[str, Scores] = field(default_factory=dict)
    """Probe name -> scores with CRF; empty where it did not run."""
    majority: Scores | None = None
    """Cluster probe without CRF, every cluster given its most frequent class: an optimistic extra."""
    empty_clusters: int = 0
    """Clusters that no labelled pixel of the validation images falls into."""
    notes: list[str] = field(default_factory=list)
    """What a reader must know, such as why there are no scores with CRF."""
    counts: dict[str, ConfusionMatrix] = field(default_factory=dict, compare=False, repr=False)
    """``cluster``, ``linear``, ``crf/cluster`` ... -> pixels of each prediction and class."""
    clusterings: dict[str, list[Scores]] = field(default_factory=dict)
    """Of further cluster probes, without CRF, by name: of "" the summary has the mean over them and the first
    one, of others the mean over them alone."""

    def summary(self) -> dict[str, float]:
        """Flat numbers [%], such as ``cluster_miou``, ``crf/linear_accuracy``, ``linkage/cluster_miou``."""
        flat = {}
        for prefix, scores in (("", self.plain), ("crf/", self.crf)):
            for probe, score in scores.items():
                flat[f"{prefix}{probe}_miou"] = score.miou
                flat[f"{prefix}{probe}_accuracy"] = score.accuracy
        if self.crf and self.clusterings:  # with CRF the first clustering alone is measured
            flat[UNREFINED] = flat["cluster_miou"]
        return {**flat, **self._over_clusterings(fmean)}

    def spread(self) -> dict[str, float]:
        """Standard deviations [points] over the clusterings that scores of :meth:`summary` are means of."""
        return self._over_clusterings(stdev)

    def _over_clusterings(self, statistic: Callable[[Sequence[float]], float]) -> dict[str, float]:
        """A statistic of the cluster scores of several clusterings; nothing where there is but one."""
        flat = {}
        for name, scores in self.clusterings.items():
            every = scores if name else [self.plain["cluster"], *scores]
            prefix = f"{name}/" if name else ""
            flat[f"{prefix}cluster_miou"] = statistic([score.miou for score in every])
            flat[f"{prefix}cluster_accuracy"] = statistic([score.accuracy for score in every])
        return flat

    def to_dict(self) -> dict[str, Any]:
        """Everything, as plain containers for JSON."""
        parts = {"plain": self.plain, "crf": self.crf}
        out = {part: {k: asdict(score) for k, score in scores.items()} for part, scores in parts.items()}
        out["clusterings"] = {
            k: [asdict(score) for score in scores] for k, scores in self.clusterings.items()
        }
        out["majority_vote"] = asdict(self.majority) if self.majority else None
        return {**out, "empty_clusters": self.empty_clusters, "notes": self.notes}


def evaluate(
    code_of: BatchCode,
    probes: tuple[ClusterProbe, LinearProbe | None],
    dataset: SegmentationDataset,
    config: EvalConfig,
    *,
    patch_size: int,
    device: torch.device,
    workers: int | None = 0,
    should_stop: Callable[[], bool] = lambda: False,
    source: Dataset[dict[str, Any]] | None = None,
    clusterings: Mapping[str, Sequence[ClusterProbe]] = MappingProxyType({}),
) -> Evaluation:
    """Measure the probes on all images of a labelled dataset; ranks share them, and have the same result.

    Args:
        code_of: batch of `source` -> code on `device`; called without gradient.
        probes: cluster and linear probe, on `device`; a linear probe that never saw a label is None, and has
            no scores.
        dataset: labelled images.
        config: batch size, CRF, and what clusters without a class count as.
        patch_size: side p of a patch [pixels].
        device: where images go.
        workers: loader processes; None = one for each core, at most 8.
        should_stop: asked after each batch; True ends the evaluation with InterruptedError.
        source: what is read in place of the images: their cached features; None = the images.
        clusterings: further cluster probes, which are measured without CRF, see :class:`Evaluation`.

    Raises:
        UsageError: the CRF cannot run on `device`.
        DataError: the dataset has no labels, or no labelled pixel.
        NumberError: the code is not finite.
    """
    require_crf(config.crf, device)
    further: list[tuple[ClusterProbe, None]] = [
        (probe, None) for several in clusterings.values() for probe in several
    ]
    if config.crf == "none":
        pairs = [probes, *further]
        passing = {"patch_size": patch_size, "device": device, "workers": workers, "should_stop": should_stop}
        result, *others = evaluate_each(code_of, pairs, dataset, config, source=source, **passing)
        return replace(result, clusterings=_by_name(clusterings, others))
    counts, counts_of_others = _counts(probes, dataset), [_counts(pair, dataset) for pair in further]
    batches = _batches(code_of, source or dataset, config.batch_size, device, workers, should_stop)
    if further:
        batches = _counting(batches, further, patch_size, counts_of_others, device)
    picture, where = _picture_source(dataset, config.crf_image), crf_device(config.crf, device)
    tasks = _crf_tasks(batches, probes, patch_size, counts, picture, where)

    def count() -> None:
        for result in run_crf(tasks, config.crf):
            for probe, labels in zip(_names(probes), result.labels, strict=True):
                counts[f"crf/{probe}"].update(labels, result.payload)

    together(count)
    without = replace(config, crf="none")
    others = [_evaluation(own, dataset, without) for own in counts_of_others]
    return replace(_evaluation(counts, dataset, config), clusterings=_by_name(clusterings, others))


def _by_name(
    clusterings: Mapping[str, Sequence[ClusterProbe]], evaluations: Sequence[Evaluation]
) -> dict[str, list[Scores]]:
    """Scores of the cluster probes, which stand in the same order in both."""
    scores = iter(one.plain["cluster"] for one in evaluations)
    return {name: [next(scores) for _ in probes] for name, probes in clusterings.items()}


def evaluate_each(
    code_of: BatchCode,
    probes: Sequence[tuple[ClusterProbe, LinearProbe | None]],
    dataset: SegmentationDataset,
    config: EvalConfig,
    *,
    patch_size: int,
    device: torch.device,
    workers: int | None = 0,
    should_stop: Callable[[], bool] = lambda: False,
    source: Dataset[dict[str, Any]] | None = None,
) -> list[Evaluation]:
    """:func:`evaluate` without CRF of several pairs of probes, in one pass of the network over the images."""
    counts = [_counts(pair, dataset) for pair in probes]

    def count() -> None:
        batches = _batches(code_of, source or dataset, config.batch_size, device, workers, should_stop)
        for _ in _counting(batches, probes, patch_size, counts, device):
            pass

    together(count)
    return [_evaluation(own, dataset, replace(config, crf="none")) for own in counts]


def _names(probes: tuple[ClusterProbe, LinearProbe | None]) -> tuple[str, ...]:
    return PROBES if probes[1] is not None else PROBES[:1]


def _counts(probes, dataset: SegmentationDataset) -> dict[str, ConfusionMatrix]:
    """Empty counts of all scores of a pair of probes.

    Raises:
        DataError: the images have no labels.
    """
    if not dataset.labelled:
        raise DataError("these images have no labels: nothing to measure; give labels/val beside images/val")
    clusters = {"cluster": len(probes[0].clusters), "linear": dataset.classes}
    return {
        f"{prefix}{p}": ConfusionMatrix(dataset.classes, clusters[p])
        for prefix in _PREFIXES
        for p in _names(probes)
    }


def _evaluation(counts: dict[str, ConfusionMatrix], dataset, config: EvalConfig) -> Evaluation:
    """Scores of what all ranks counted, and what a reader must know of them."""
    if world().several:
        add_(*(matrix.counts for matrix in counts.values()))
    result = _scores(counts, dataset, config.unmatched, config.crf != "none")
    clusters, how = counts["cluster"].clusters, _EXTRA.get(config.unmatched)
    extra = clusters - dataset.classes
    if extra and how:
        result.notes.append(
            f"{clusters} clusters for {dataset.classes} classes: {extra} beyond one to one, {how}"
        )
    if "linear" not in counts:
        result.notes.append("no linear probe: it was trained without labels")
    return result


def _scores(counts, dataset, unmatched, with_crf) -> Evaluation:
    drop = unmatched == "drop"

    def of(prefix: str) -> dict[str, Scores]:
        cluster, linear = counts[f"{prefix}cluster"], counts.get(f"{prefix}linear")
        assignment = cluster.match(drop_unmatched=drop)
        if unmatched == "many-to-one":
            pairs = zip(assignment, cluster.majority_vote(), strict=True)
            assignment = tuple(vote if one is None else one for one, vote in pairs)
        elif unmatched == "left-out":
            cluster = cluster.without([k for k, one in enumerate(assignment) if one is None])
        found = {"cluster": cluster.scores(assignment, names=dataset.class_names, drop_unmatched=drop)}
        return found | ({"linear": linear.scores(names=dataset.class_names)} if linear else {})

    majority = counts["cluster"].scores(counts["cluster"].majority_vote(), names=dataset.class_names)
    empty = int((counts["cluster"].counts.sum(dim=1) == 0).sum())
    notes = [f"clusters without a labelled pixel: {empty} of {counts['cluster'].clusters}"] if empty else []
    return Evaluation(of(""), of("crf/") if with_crf else {}, majority, empty, notes, counts)


def _batches(code_of, dataset, batch_size, device, workers, should_stop) -> Iterator[tuple[dict, Tensor]]:
    """(batch, code) of all images; progress on a terminal."""
    if world().several:
        own = share(len(dataset))
        dataset = Subset(dataset, range(own.start, own.stop))
    loader = val_loader(dataset, batch_size, workers, pin_memory=device.type == "cuda")
    for batch in each(tqdm(loader, desc="evaluate", unit="batch", leave=False, disable=None)):
        with torch.no_grad():
            code = code_of(batch)
        if not torch.isfinite(code).all():
            raise NumberError("the network's code is not finite; check the images and the weights")
        yield batch, code
        if should_stop():
            raise InterruptedError


def _counting(batches, probes, patch_size, counts, device) -> Iterator[tuple[dict, Tensor]]:
    """The batches, counted on the way for several pairs of probes without CRF."""
    for batch, code in batches:
        labels = batch["label"].to(device, non_blocking=True)
        for pair, own in zip(probes, counts, strict=True):
            _count_plain(code, labels, pair, patch_size, own)
        yield batch, code


def _crf_tasks(batches, probes, patch_size, counts, picture, where) -> Iterator[CRFTask]:
    """The CRF's work on `where`, on the images that `picture` gives; counts labels without CRF on the way."""
    for batch, code in batches:
        size = tuple(batch["label"].shape[1:])
        for i, index in enumerate(batch["index"].tolist()):
            check()
            truth, found = batch["label"][i], pixel_scores(code[i : i + 1], probes, patch_size, size)
            scores = _counted(found, counts, dim=0)
            for probe, score in scores.items():
                counts[probe].update(score.argmax(dim=0).cpu(), truth)
            sharp = {"cluster": CLUSTER_SHARPNESS, "linear": 1.0}
            log_probabilities = tuple(
                (sharp[probe] * score).log_softmax(dim=0).to(where) for probe, score in scores.items()
            )
            yield CRFTask(
                picture(index, batch["image"][i] if "image" in batch else None),
                log_probabilities,
                payload=truth,
            )


def _count_plain(code, labels, probes, patch_size, counts) -> None:
    """Counts a batch where the code is, as many images at once as their scores leave room for."""
    size = tuple(labels.shape[1:])
    images = max(_SCORES // (counts["cluster"].clusters * size[0] * size[1]), 1)
    for part, truth in zip(code.split(images), labels.split(images), strict=True):
        check()
        for probe, score in _counted(pixel_products(part, probes, patch_size, size), counts, dim=1).items():
            counts[probe].update(score.argmax(dim=1), truth)


def _counted(scores, counts, dim: int) -> dict[str, Tensor]:
    """Scores of the probes that are counted; of a probe for more classes than there are, those that are."""
    cluster, linear = scores
    if "linear" not in counts:
        return {"cluster": cluster}
    return {"cluster": cluster, "linear": linear.narrow(dim, 0, counts["cluster"].classes)}


def _picture_source(dataset: SegmentationDataset, choice: str) -> Callable[[int, Tensor | None], Any]:
    """(index, normalised image (3, H, W) if it was read) -> the (H, W, 3) uint8 picture that the CRF sees."""

    def published(index: int, image: Tensor | None) -> Any:
        image = dataset[index]["image"] if image is None else image
        return to_uint8(denormalise(image), truncate=True)

    return published if choice == "published" else lambda index, image: dataset.pixels(index)


@torch.no_grad()
def pixel_products(
    code: Tensor, probes: tuple[ClusterProbe, LinearProbe | None], patch_size: int, size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Products of the code, resized to the pixels, with unit cluster centres and with the linear probe.

    Products with a probe and bilinear resizing are both linear and commute, so the products are resized, not
    the code. The cosine divides those with centres by the length of the code, which no arg max needs.

    Args:
        code: (B, D, h, w).
        probes: cluster and linear probe; without the latter its logits are empty.
        patch_size: side of a patch [pixels].
        size: (H, W) [pixels].

    Returns:
        (B, K, H, W) and (B, C, H, W), fp32.
    """
    cluster, linear = probes
    centres = F.normalize(cluster.clusters.float(), dim=1)
    products = upsample(F.conv2d(code.float(), centres[:, :, None, None]), patch_size, size)
    if linear is None:
        return products, products[:, :0]
    return products, upsample(linear.logits(code), patch_size, size)


@torch.no_grad()
def pixel_scores(
    code: Tensor, probes: tuple[ClusterProbe, LinearProbe | None], patch_size: int, size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Cluster cosines (K, H, W) and linear logits (C, H, W) of the code resized to the pixels of one image.

    Args:
        code: (1, D, h, w).
        probes, patch_size, size: as for :func:`pixel_products`.
    """
    products, logits = pixel_products(code, probes, patch_size, size)
    square = torch.zeros(size, device=code.device)
    for part in code.float().split(_CHANNELS, dim=1):
        square += upsample(part, patch_size, size)[0].square_().sum(dim=0)
    return products[0] / square.sqrt().clamp(min=1e-12), logits[0]
