"""``ppap analyze backbone``: whether a backbone suits the images, before any training."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ppap.analysis import backbone_pictures as pictures
from ppap.analysis import backbone_report
from ppap.analysis.arguments import (
    AnalysisArguments,
    Out,
    check_seed,
    check_seeds,
    make_folder,
    new_folder,
    parse_with_preset,
)
from ppap.analysis.backbone import Maps, aim_of, label_free, look, survey_of
from ppap.analysis.backbone_labels import chance, frozen_scores, purity
from ppap.analysis.backbone_pictures import Scene
from ppap.analysis.backbone_report import Findings
from ppap.analysis.features import backbone_weights
from ppap.cli import first_positional
from ppap.data import Datasets, build_datasets
from ppap.errors import DataError
from ppap.methods.choices import CANDIDATES, auto_condition, block_rate
from ppap.methods.engine import pick_device
from ppap.methods.guidance import Survey
from ppap.nets.conditioning import Condition, fit, position_r2, spectrum
from ppap.nets.model import PPAPNet, build_net
from ppap.reports.provenance import provenance
from ppap.reports.strips import spread
from ppap.settings.checks import parse_condition
from ppap.settings.config import Config
from ppap.stopping import each

TEXT = """Say whether a backbone suits the images, before any training: can its patches form sets, as they are
or conditioned, do neighbours of other images look alike, which condition, thresholds and learning rate suit.

Every candidate of --model.condition is measured without labels; with labels also by the purity of
neighbours and sets, and by frozen cluster and linear scores. Labels choose nothing.

Writes backbone.md, backbone.json, spectrum.png, similarities.png, neighbours.png and clusters.png. Two
minutes on two cores for 128 images of 224 pixels under a small ViT of patch 14; twice that with labels."""


@dataclass(frozen=True, kw_only=True)
class BackboneArguments(AnalysisArguments):
    """Options of ``ppap analyze backbone``; data, model and loss default to those of the preset."""

    out: Out = ""
    """New folder for backbone.md, backbone.json and the pictures."""
    images: int = 128
    """Training images at most, spread over the set, and as many validation images, that are looked at. Where
    these are all, and --data.cache-features is on, the features are kept for the next time."""
    anchors: int = 512
    """Labelled patches, drawn at random, whose neighbours and sets are measured."""
    conditions: tuple[str, ...] = CANDIDATES
    """Candidates of --model.condition to measure; none and what auto chooses are always among them."""
    seed: int = 0
    """Seed of all that is drawn at random, but for k-means."""
    seeds: tuple[int, ...] = (0,)
    """Of k-means: one frozen cluster score each."""
    queries: int = 5
    """Patches whose neighbours are drawn."""
    neighbours: int = 6
    """Images drawn beside each."""
    pictures: int = 5
    """Images whose clusters are drawn."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed("seed", self.seed)
        check_seeds(self.seeds)
        for name, least in (("queries", 1), ("neighbours", 1), ("pictures", 1), ("images", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"--{name} is {getattr(self, name)}; give at least {least}")
        for condition in self.conditions:
            try:
                parse_condition(condition)
            except ValueError as error:
                raise ValueError(str(error).replace("--model.condition is", "--conditions has")) from None


def main(argv: Sequence[str]) -> None:
    """Command ``analyze backbone``."""
    arguments: BackboneArguments = parse_with_preset(argv, BackboneArguments, "backbone", TEXT)
    out = new_folder(arguments.out)
    device = pick_device(arguments.device)
    config = arguments.config(arguments.seed)
    data = build_datasets(config.data)
    if len(data.train) < 2:
        raise DataError("one training image has no neighbours in others; give more images")
    torch.manual_seed(arguments.seed)
    net = build_net(config.model).to(device)
    train = look(net, data.train, arguments.images, config, device)
    seen = survey_of(net, train, config)
    found, conditions = measure(net, seen, config, arguments.conditions, data.train.classes)
    found = replace(
        found,
        facts=_facts(arguments, data, train, seen.sample),
        command=training_command(argv, found),
        **(by_labels(net, train, data, found, conditions, arguments) if data.train.labelled else {}),
    )
    make_folder(out)
    shown = {name: conditions[name] for name in dict.fromkeys(("none", found.chosen))}
    scene = Scene(data.train, train, net.backbone.patch_size, arguments.seed)
    pictures.draw_spectrum(out / "spectrum.png", seen.split.all, shown)
    pictures.draw_similarities(out / "similarities.png", scene, shown, found.rows)
    near = pictures.draw_neighbours(
        out / "neighbours.png", scene, shown, arguments.queries, arguments.neighbours
    )
    drawn = spread(len(train.indices), arguments.pictures)
    pictures.draw_clusters(out / "clusters.png", scene, shown, data.train.classes, drawn, config.data.kind)
    extra = {"neighbours": near, "provenance": provenance(config, device, backbone_weights(net))}
    print(f"{backbone_report.write(out, found, extra)}\nwritten: {out}")


def measure(
    net: PPAPNet, seen: Survey, config: Config, asked: Sequence[str], classes: int
) -> tuple[Findings, dict[str, Condition]]:
    """Everything that needs no label, and the maps of all candidates.

    Args:
        net: the network, for its origin and its last block.
        seen: the training images.
        config: loss, dropout and seed; a condition that it names is a candidate.
        asked: further candidates.
        classes: clusters of the segmentation.

    Raises:
        UsageError: a candidate that would leave nothing of the features.
        NumberError: features that are not finite, or all the same.
    """
    clusters = classes + config.train.extra_clusters
    chosen, given = auto_condition(clusters), config.model.condition
    names = dict.fromkeys(("none", *([] if given == "auto" else [given]), *asked, chosen))
    conditions = {name: fit(name, seen.split) for name in names}
    rows = {
        name: label_free(seen, name, condition, config, clusters)
        for name, condition in each(tqdm(conditions.items(), desc="conditions", leave=False, disable=None))
    }
    values, _ = spectrum(seen.split.all)
    found = Findings(
        origin=net.backbone.origin,
        is_random=net.backbone.is_random,
        facts=[],
        aim=aim_of(config, clusters),
        position=position_r2(seen.split),
        shares=(values / values.sum()).tolist(),
        chosen=chosen,
        rate=block_rate(net.backbone),
        rows=rows,
    )
    return found, conditions


def by_labels(
    net: PPAPNet,
    train: Maps,
    data: Datasets,
    found: Findings,
    conditions: Mapping[str, Condition],
    arguments: BackboneArguments,
) -> dict[str, Any]:
    """Fields of :class:`Findings` that labels give."""
    patch, device = net.backbone.patch_size, next(net.parameters()).device
    config = arguments.config(arguments.seed)
    pure, frozen = {}, {}
    val = None
    if data.val is not None and data.val.labelled:
        val = look(net, data.val, arguments.images, config, device)
    for name, condition in each(tqdm(conditions.items(), desc="by labels", leave=False, disable=None)):
        pure[name] = purity(train, condition, found.rows[name], config, arguments.anchors)
        if val is not None:
            frozen[name] = frozen_scores(
                train, val, condition, patch, classes=data.train.classes, seeds=arguments.seeds
            )
    return {"purity": pure, "frozen": frozen, "chance": chance(train)}


def training_command(argv: Sequence[str], found: Findings) -> str:
    """The command that trains on the same data with the same backbone and what is suggested."""
    preset = first_positional(argv)
    rest, kept, keep = list(argv[1:] if preset else argv), [], False
    for word in rest:
        if word.startswith("--"):
            name = word.split("=")[0]
            keep = name.startswith(("--data.", "--model.", "--loss.")) and name not in _SUGGESTED
        if keep:
            kept.append(word)
    row = found.rows[found.chosen]
    values = (found.chosen, f"{row.phi0:g}", f"{row.psi0:g}", f"{found.rate:g}")
    suggested = [word for pair in zip(_SUGGESTED, values, strict=True) for word in pair]
    return shlex.join(["python", "-m", "ppap.train", preset or "demo", *kept, *suggested])


_SUGGESTED = ("--model.condition", "--loss.phi0", "--loss.psi0", "--optim.lr")


def _facts(arguments: BackboneArguments, data: Datasets, train: Maps, sample: Tensor) -> list[str]:
    """How it was measured, one sentence each."""
    height, width = sample.shape[2:]
    facts = [
        f"preset {arguments.preset}, {len(train.indices)} of {len(data.train)} training images, "
        f"{height} x {width} patches of {sample.shape[1]} channels each; {data.train.classes} clusters; "
        f"seed {arguments.seed}",
        f"thresholds and label-free figures: patches of {len(sample)} images, as the first batch of a run",
    ]
    if data.train.labelled:
        facts.append(
            f"by labels: {arguments.anchors} anchors; neighbours among all of these images, sets among "
            f"{min(arguments.config(0).train.batch_size, len(train.indices))}; "
            f"k-means with seeds {', '.join(map(str, arguments.seeds))}"
        )
    return facts
