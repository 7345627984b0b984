"""``ppap analyze sets``: how large and how pure the sets of PPAP, HP and others are (Table 6, Fig. 1b)."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ppap.analysis import set_quality, set_report
from ppap.analysis.arguments import (
    AnalysisArguments,
    Out,
    check_seeds,
    make_folder,
    new_folder,
    parse_with_preset,
)
from ppap.analysis.features import (
    LabelRule,
    Patches,
    backbone_weights,
    prepare,
    reference_pool,
    training_patches,
)
from ppap.analysis.paper import setting_of
from ppap.analysis.set_quality import IgnoredRule, SetsOf, count_sets, deciles, quality
from ppap.analysis.set_report import SetResult
from ppap.data import SegmentationDataset, build_datasets
from ppap.errors import DataError
from ppap.methods.engine import pick_device
from ppap.methods.loss import PPAPLoss
from ppap.nets.clustering import cosine_kmeans
from ppap.nets.model import PPAPNet
from ppap.reports.provenance import provenance
from ppap.reports.records import RANDOM_WARNING
from ppap.settings.config import CompareConfig, Config

TEXT = """Measure positive and negative sets with labels: mean size and share of the anchor's class.

Rows: ppap ({s_T > phi_T} and {s_T < psi_T}), hp (reference pool of HP), kmeans (members of the anchor's
cluster, k = number of classes), fixed (above a fixed threshold), chance (every other patch). The sets are
formed as in a training step: on a batch of random training images, with channel dropout, of features
through --model.condition. What is auto is chosen once, for all seeds, and printed.

Writes sets.md, sets.json, sets.png and sets.pdf. Two cores take half a minute a seed for the demo, three
minutes for 64 images of 224 pixels under a small ViT of patch 8; most of it goes into HP's pool."""

_STARTS = 5  # of k-means


@dataclass(frozen=True, kw_only=True)
class SetArguments(AnalysisArguments):
    """Options of ``ppap analyze sets``; data, model and loss default to those of the preset."""

    out: Out = ""
    """New folder for sets.md, sets.json, sets.png and sets.pdf."""
    images: int = 64
    """Training images whose patches are compared (published: batches of 64)."""
    anchors: int = 3136
    """Patches, drawn at random, whose sets are measured (published: 3136 a step)."""
    seeds: tuple[int, ...] = (0,)
    """Each draws images, dropout, anchors, pool and the starts of k-means anew."""
    rows: tuple[Literal["ppap", "hp", "kmeans", "fixed", "chance"], ...] = tuple(set_report.TITLES)
    """Sets to measure."""
    pool: int = 2048
    """Patches in HP's reference pool (published: 2048, Potsdam 1024), one of each of as many training
    images; where there are fewer images, they come again."""
    patch_label: LabelRule = "majority"
    """Class of a patch: majority = its most frequent one, centre = that of its middle pixel, nearest = that
    of its upper left pixel, as nearest resizing takes it."""
    ignored: IgnoredRule = "exclude"
    """Patches without a class: exclude = they count in the sizes alone; wrong = as of another class."""
    dropout: bool = True
    """Channel dropout of the guidance, as in training."""
    memory_mib: int = 256
    """Limit of the dense masks of a chunk of anchors [MiB]."""
    compare: CompareConfig = field(default_factory=CompareConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seeds(self.seeds)
        for name in ("pool", "memory_mib"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}; give at least 1")
        if not self.rows or len(set(self.rows)) != len(self.rows):
            raise ValueError(f"--rows {' '.join(self.rows)}: name each row once, at least one")

    def config(self, seed: int) -> Config:
        """The preset's settings with those of the command line."""
        return replace(super().config(seed), compare=self.compare)


def main(argv: Sequence[str]) -> None:
    """Command ``analyze sets``."""
    measure_all(parse_with_preset(argv, SetArguments, "sets", TEXT))


def measure_all(arguments: SetArguments) -> None:
    """Measure what is asked for, write it, and print it.

    Raises:
        UsageError: the folder is taken, or no threshold gives sets of the size that is asked for.
        DataError: no training labels.
    """
    out = new_folder(arguments.out)
    device = pick_device(arguments.device)
    dataset = build_datasets(arguments.data, ("train",)).train
    if not dataset.labelled:
        raise DataError("the training images have no labels, by which sets are measured; give labels/train")
    net, config, *_ = prepare(arguments.config(arguments.seeds[0]), dataset, device)
    net.train(arguments.dropout)
    arguments = replace(arguments, model=config.model, loss=config.loss, compare=config.compare)
    make_folder(out)
    results: dict[str, list[SetResult]] = {}
    for number, seed in enumerate(arguments.seeds):
        print(f"seed {seed} ({number + 1} of {len(arguments.seeds)})", flush=True)
        for name, result in measure(net, dataset, arguments, seed).items():
            results.setdefault(name, []).append(result)
    warning = RANDOM_WARNING if net.backbone.is_random else None
    text = set_report.write(
        out,
        net.backbone.origin,
        [*_facts(arguments, dataset), *([warning] if warning else [])],
        results,
        setting_of(arguments.preset),
        {
            "provenance": provenance(config, device, backbone_weights(net)),
            "backbone": net.backbone.origin,
            "warning": warning,
            "seeds": list(arguments.seeds),
        },
    )
    print(f"{text}\nwritten: {out}")


def measure(
    net: PPAPNet, dataset: SegmentationDataset, arguments: SetArguments, seed: int
) -> dict[str, SetResult]:
    """All rows of one seed, in the order of the table."""
    torch.manual_seed(seed)  # channel dropout
    workers = arguments.data.workers
    patches = training_patches(
        net, dataset, arguments.images, seed=seed, rule=arguments.patch_label, workers=workers
    )
    anchors = draw_rows(len(patches.features), arguments.anchors, seed).to(patches.features.device)
    results = {}
    for name in (name for name in set_report.TITLES if name in arguments.rows):
        pool = None
        if name == "hp":
            pool = reference_pool(net, dataset, arguments.pool, seed=seed, workers=workers)
        sets_of = _sets(name, patches, anchors, arguments, (dataset.classes, seed), pool)
        counts = count_sets(
            sets_of,
            anchors,
            patches.labels,
            memory_budget=arguments.memory_mib * 2**20,
            title=set_report.TITLES[name],
        )
        results[name] = SetResult(quality(counts, arguments.ignored), deciles(counts, arguments.ignored))
    return results


def draw_rows(count: int, wanted: int, seed: int) -> Tensor:
    """At most `wanted` of `count` rows, drawn without replacement, ascending: (A,) int64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(count, generator=generator)[:wanted].sort().values


def _sets(
    name: str,
    patches: Patches,
    anchors: Tensor,
    arguments: SetArguments,
    clusters_and_seed: tuple[int, int],
    pool: Tensor | None,
) -> SetsOf:
    features = patches.features
    propagation = PPAPLoss(arguments.loss, 0).propagation
    if name == "ppap":
        return set_quality.propagated(features, anchors, propagation)
    if name == "fixed":
        still = replace(
            propagation, phi0=_fixed_phi0(arguments), trustworthy_positives=False, ambiguity_excluded=False
        )
        return set_quality.propagated(features, anchors, still)
    if name == "hp":
        return set_quality.hidden(features, anchors, pool)
    if name == "kmeans":
        clusters, seed = clusters_and_seed
        centres = cosine_kmeans(features, clusters, starts=_STARTS, seed=seed).centres.to(features.device)
        return set_quality.clustered((F.normalize(features, dim=1) @ centres.T).argmax(dim=1), anchors)
    return set_quality.clustered(torch.zeros_like(patches.labels), anchors)


def _fixed_phi0(arguments: SetArguments) -> float:
    """Threshold of the row fixed, as in ``--compare.rows fixed``."""
    own = arguments.compare.own_phi0
    return arguments.loss.phi0 if own is None else own


def _facts(arguments: SetArguments, dataset: SegmentationDataset) -> list[str]:
    """How it was measured, one sentence each."""
    loss, used = arguments.loss, min(arguments.images, len(dataset))
    seeds = ", ".join(map(str, arguments.seeds))
    facts = [
        f"preset {arguments.preset}, {used} of {len(dataset)} training images, "
        f"{arguments.anchors} anchors; seeds {seeds}"
        + (" (mean ± standard deviation)" if len(arguments.seeds) > 1 else ""),
        f"condition {arguments.model.condition}; "
        f"class of a patch: {arguments.patch_label}; patches without a class: {arguments.ignored}; "
        f"channel dropout {'on' if arguments.dropout else 'off'}",
        f"PPAP: phi0 {loss.phi0:g}, psi0 {loss.psi0:g}, T = {loss.steps}, sigma_pos {loss.sigma_pos:g}, "
        f"sigma_amb {loss.sigma_amb:g}",
    ]
    others = {
        "hp": f"HP: task-agnostic positives, pool of {arguments.pool} patches, all others negatives",
        "kmeans": f"k-means: k = {dataset.classes}, normalised features, tightest of {_STARTS} starts",
        "fixed": f"fixed threshold: phi0 {_fixed_phi0(arguments):g}, all others negatives",
    }
    return facts + [text for name, text in others.items() if name in arguments.rows]
