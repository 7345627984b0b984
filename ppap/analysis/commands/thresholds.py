"""``ppap analyze thresholds``: which phi0 and psi0 suit a backbone and a data set, without labels."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ppap.analysis import thresholds
from ppap.analysis.arguments import (
    AnalysisArguments,
    Out,
    check_seed,
    make_folder,
    new_folder,
    parse_with_preset,
)
from ppap.analysis.features import backbone_weights, training_patches
from ppap.data import build_datasets
from ppap.methods.engine import pick_device
from ppap.methods.loss import PPAPLoss
from ppap.nets.model import build_net
from ppap.reports.provenance import provenance
from ppap.reports.records import RANDOM_WARNING

TEXT = """Draw the similarities of patch pairs and the sizes of the sets over a grid of phi0 and psi0, and
suggest values without labels.

Writes thresholds.md, thresholds.json and thresholds.png. Half a minute on two cores for the demo."""


@dataclass(frozen=True, kw_only=True)
class ThresholdArguments(AnalysisArguments):
    """Options of ``ppap analyze thresholds``; data, model and loss default to those of the preset."""

    out: Out = ""
    """New folder for thresholds.md, thresholds.json and thresholds.png."""
    images: int = 64
    """Training images whose patches are compared, as in a training batch."""
    anchors: int = 512
    """Patches, drawn at random, whose sets are measured."""
    seed: int = 0
    """Seed of all that is drawn at random."""
    phi_grid: tuple[float, ...] = tuple(round(0.3 + 0.05 * i, 2) for i in range(14))
    """Values of phi0 to try [cosine]."""
    psi_grid: tuple[float, ...] = tuple(round(0.05 * i, 2) for i in range(15))
    """Values of psi0 to try [cosine]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed("seed", self.seed)
        for name in ("phi_grid", "psi_grid"):
            if not getattr(self, name):
                raise ValueError(f"--{name.replace('_', '-')} is empty; give at least one value")


def main(argv: Sequence[str]) -> None:
    """Command ``analyze thresholds``."""
    arguments: ThresholdArguments = parse_with_preset(argv, ThresholdArguments, "thresholds", TEXT)
    out = new_folder(arguments.out)
    device = pick_device(arguments.device)
    dataset = build_datasets(arguments.data, ("train",)).train
    torch.manual_seed(arguments.seed)
    net = build_net(arguments.model).to(device).train()
    patches = training_patches(
        net, dataset, arguments.images, seed=arguments.seed, workers=arguments.data.workers
    )
    loss = arguments.loss
    result = thresholds.analyse(
        patches.features,
        patches.images,
        PPAPLoss(loss, 0).propagation,
        arguments.phi_grid,
        arguments.psi_grid,
        clusters=dataset.classes,
        anchors=min(arguments.anchors, len(patches.features)),
        seed=arguments.seed,
    )
    make_folder(out)
    origin = provenance(arguments.config(arguments.seed), device, backbone_weights(net))
    thresholds.write(result, out, net.backbone.origin, (loss.phi0, loss.psi0), origin)
    print((out / "thresholds.md").read_text())
    print(f"written: {out}")
    if net.backbone.is_random:
        print(RANDOM_WARNING)
