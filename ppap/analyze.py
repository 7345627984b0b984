"""Analyses: ``python -m ppap.analyze thresholds [PRESET] [--section.field value ...]``."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ppap.analysis import thresholds
from ppap.cli import first_positional, parse, run
from ppap.config import Config, DataConfig, LossConfig, ModelConfig
from ppap.data import build_datasets, train_loader
from ppap.engine import pick_device
from ppap.errors import UsageError, unknown_name
from ppap.loss import PPAPLoss
from ppap.model import build_net, patch_rows
from ppap.presets import describe, preset
from ppap.report import RANDOM_WARNING


@dataclass(frozen=True, kw_only=True)
class ThresholdArguments:
    """Options of ``ppap analyze thresholds``; data, model and loss default to those of the preset."""

    out: str = ""
    """New folder for thresholds.md, thresholds.json and thresholds.png; must be given."""
    images: int = 64
    """Training images whose patches are compared, as in a training batch."""
    anchors: int = 512
    """Patches, drawn at random, whose sets are measured."""
    phi_grid: tuple[float, ...] = tuple(round(0.3 + 0.05 * i, 2) for i in range(13))
    """Values of phi0 to try [cosine]."""
    psi_grid: tuple[float, ...] = tuple(round(0.05 * i, 2) for i in range(13))
    """Values of psi0 to try [cosine]."""
    seed: int = 0
    """Seed of images, anchors and dropout."""
    device: str = "auto"
    """auto = cuda if there is one, else cpu; or a torch device such as cuda:1."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)


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
    return "analyses:\n  thresholds  which phi0 and psi0 suit a backbone and a data set, without labels"


def analyze_thresholds(argv: Sequence[str]) -> None:
    """Draw similarities and set sizes over a grid of thresholds, and suggest values."""
    named = first_positional(argv)
    start: Config = preset(named or "demo")
    defaults = ThresholdArguments(data=start.data, model=start.model, loss=start.loss)
    description = (
        "Draw the similarities of patch pairs and the sizes of the sets over a grid of phi0 and psi0, and "
        f"suggest values without labels.\n\nPresets (default: demo):\n{describe()}"
    )
    arguments = parse(
        ThresholdArguments,
        argv[1:] if named else argv,
        command="analyze thresholds",
        description=description,
        default=defaults,
    )
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
        anchors=min(arguments.anchors, len(features)),
        seed=arguments.seed,
    )
    out.mkdir(parents=True, exist_ok=True)
    thresholds.write(result, out, f"{net.backbone.origin}", (loss.phi0, loss.psi0))
    print((out / "thresholds.md").read_text())
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


ANALYSES = {"thresholds": analyze_thresholds}


if __name__ == "__main__":
    sys.exit(run(main))
