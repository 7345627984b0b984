"""Analyses: ``python -m ppap.analyze {thresholds,positives} [PRESET] [--section.field value ...]``."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ppap.analysis import thresholds
from ppap.analysis.positives import draw_positives
from ppap.cli import first_positional, parse, run
from ppap.config import Config, DataConfig, LossConfig, ModelConfig
from ppap.data import build_datasets, train_loader
from ppap.engine import pick_device
from ppap.errors import UsageError, unknown_name
from ppap.loss import PPAPLoss
from ppap.model import build_net, patch_rows
from ppap.presets import describe, preset
from ppap.report import RANDOM_WARNING, spread


@dataclass(frozen=True, kw_only=True)
class AnalysisArguments:
    """Options of every analysis; data, model and loss default to those of the preset."""

    out: str = ""
    """New folder for the results; must be given."""
    images: int
    """Training images whose patches are compared."""
    anchors: int
    """Patches, drawn at random, that are looked at."""
    seed: int = 0
    """Seed of all that is drawn at random."""
    device: str = "auto"
    """auto = cuda if there is one, else cpu; or a torch device such as cuda:1."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)

    def __post_init__(self) -> None:
        for name in ("images", "anchors"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}; give at least 1")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"--seed is {self.seed}; give 0 to 2^63 - 1")


@dataclass(frozen=True, kw_only=True)
class ThresholdArguments(AnalysisArguments):
    """Options of ``ppap analyze thresholds``; data, model and loss default to those of the preset."""

    out: str = ""
    """New folder for thresholds.md, thresholds.json and thresholds.png; must be given."""
    images: int = 64
    """Training images whose patches are compared, as in a training batch."""
    anchors: int = 512
    """Patches, drawn at random, whose sets are measured."""
    phi_grid: tuple[float, ...] = tuple(round(0.3 + 0.05 * i, 2) for i in range(14))
    """Values of phi0 to try [cosine]."""
    psi_grid: tuple[float, ...] = tuple(round(0.05 * i, 2) for i in range(15))
    """Values of psi0 to try [cosine]."""


@dataclass(frozen=True, kw_only=True)
class PositiveArguments(AnalysisArguments):
    """Options of ``ppap analyze positives``; data, model and loss default to those of the preset."""

    out: str = ""
    """New folder for positives.png and positives.json; must be given."""
    images: int = 6
    """Training images, spread over the set, whose patches are compared."""
    anchors: int = 4
    """Patches, drawn at random among those with positives, that are drawn."""


def main(argv: Sequence[str]) -> None:
    """Command ``analyze``."""
    name = first_positional(argv)
    if name is None:
        print(f"usage: ppap analyze {{{','.join(ANALYSES)}}} [PRESET] [options]\n\n{_overview()}")
        if set(argv) & {"-h", "--help"}:
            sys.exit(0)
        raise UsageError(f"name an analysis: {', '.join(ANALYSES)}")
    if name not in ANALYSES:
        raise unknown_name("analysis", name, ANALYSES)
    ANALYSES[name](list(argv[1:]))


def _overview() -> str:
    lines = [f"  {name:<11} {analysis.__doc__.strip()}" for name, analysis in ANALYSES.items()]
    return "analyses:\n" + "\n".join(lines)


def _arguments(argv: Sequence[str], kind: type, name: str, text: str) -> Any:
    """Options of an analysis, with the data, model and loss of the preset it names."""
    named = first_positional(argv)
    start: Config = preset(named or "demo")
    return parse(
        kind,
        argv[1:] if named else argv,
        command=f"analyze {name} [PRESET]",
        description=f"{text}\n\nPresets (default: demo):\n{describe()}",
        default=kind(data=start.data, model=start.model, loss=start.loss),
    )


def analyze_thresholds(argv: Sequence[str]) -> None:
    """Which phi0 and psi0 suit a backbone and a data set, without labels."""
    text = (
        "Draw the similarities of patch pairs and the sizes of the sets over a grid of phi0 and psi0, and "
        "suggest values without labels."
    )
    arguments = _arguments(argv, ThresholdArguments, "thresholds", text)
    out = _new_folder(arguments.out)
    device = pick_device(arguments.device)
    dataset = build_datasets(arguments.data, ("train",)).train
    torch.manual_seed(arguments.seed)
    net = build_net(arguments.model).to(device).train()
    batch = next(iter(train_loader(dataset, arguments.images, arguments.seed, arguments.data.workers)))
    with torch.no_grad():
        streams = net(batch["image"].to(device))
    features = patch_rows(streams.guidance)
    per_image = streams.grid[0] * streams.grid[1]
    images = torch.arange(len(batch["image"]), device=device).repeat_interleave(per_image)
    loss = arguments.loss
    result = thresholds.analyse(
        features,
        images,
        PPAPLoss(loss, 0).propagation,
        arguments.phi_grid,
        arguments.psi_grid,
        clusters=dataset.classes,
        anchors=min(arguments.anchors, len(features)),
        seed=arguments.seed,
    )
    out.mkdir(parents=True, exist_ok=True)
    thresholds.write(result, out, f"{net.backbone.origin}", (loss.phi0, loss.psi0))
    print((out / "thresholds.md").read_text())
    print(f"written: {out}")
    if net.backbone.is_random:
        print(RANDOM_WARNING)


def analyze_positives(argv: Sequence[str]) -> None:
    """Which patches become positives of an anchor, step by step (the paper's Fig. 5)."""
    text = "Draw the positives of a few anchors after every step of the propagation (the paper's Fig. 5)."
    arguments = _arguments(argv, PositiveArguments, "positives", text)
    out = _new_folder(arguments.out)
    device = pick_device(arguments.device)
    dataset = build_datasets(arguments.data, ("train",)).train
    torch.manual_seed(arguments.seed)
    net = build_net(arguments.model).to(device).eval()
    out.mkdir(parents=True, exist_ok=True)
    found = draw_positives(
        net,
        dataset,
        spread(len(dataset), arguments.images),
        PPAPLoss(arguments.loss, 0).propagation,
        out / "positives.png",
        anchors=arguments.anchors,
        seed=arguments.seed,
    )
    record = {"backbone": net.backbone.origin, "anchors": [example.to_dict() for example in found]}
    (out / "positives.json").write_text(json.dumps(record, indent=2) + "\n")
    if not found:
        print(
            f"no patch has positives at phi0 = {arguments.loss.phi0:g}; nothing is drawn; lower --loss.phi0"
        )
    for example in found:
        print(f"patch {example.anchor}: positives by step " + " | ".join(example.describe()))
    print(f"written: {out}")
    if net.backbone.is_random:
        print(RANDOM_WARNING)


def _new_folder(path: str) -> Path:
    if not path:
        raise UsageError("--out is not given; name a new folder")
    out = Path(path)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"--out {out} exists already; give a new folder")
    return out


ANALYSES = {"thresholds": analyze_thresholds, "positives": analyze_positives}


if __name__ == "__main__":
    sys.exit(run(main))
