"""Tiny runs that several test files train, measure and predict with."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from ppap.runs import checkpoint
from ppap.settings.config import Config
from ppap.settings.presets import demo
from ppap.train import main as train

# A backbone of two blocks on scenes of 32 pixels: a step takes milliseconds.
TINY = [
    "demo",
    "--data.scenes-train=12",
    "--data.scenes-val=4",
    "--data.scenes-size=32",
    "--data.resolution=32",
    "--data.eval-resolution=32",
    "--data.workers=0",
    "--data.no-cache-features",
    "--model.weights=random",
    "--model.backbone=vit_tiny_patch16_224",
    "--model.patch-size=8",
    "--model.width=24",
    "--model.depth=2",
    "--model.heads=2",
    "--model.image-size=32",
    "--model.condition=none",
    # Fixed here, so that no test depends on what the demo's settings happen to be.
    "--loss.phi0=0.55",
    "--loss.psi0=0.15",
    "--loss.steps=2",
    "--loss.temperature=0.3",
    "--loss.anchor-divisor=4",
    "--loss.chunk=16",
    "--optim.lr=1e-3",
    "--optim.linear-lr=1e-3",
    "--optim.cluster-lr=1e-3",
    "--train.batch-size=4",
    "--train.log-every=1",
    "--train.val-every=3",
    "--train.save-every=2",
    "--train.device=cpu",
    "--eval.batch-size=3",
    "--eval.pictures=2",
    "--eval.cluster-init=random",
    "--compare.rows",  # none
]


def settled_demo() -> Config:
    """The preset ``demo`` with numbers where it leaves the choice to the run."""
    config = demo()
    return replace(
        config,
        model=replace(config.model, condition="none"),
        loss=replace(config.loss, phi0=0.8, psi0=0.55),
        optim=replace(config.optim, lr=3e-3),
        eval=replace(config.eval, cluster_init="random"),
    )


def tiny_run(out: Path, *options: str) -> Path:
    """Train 6 steps into `out` unless the options say otherwise."""
    train([*TINY, f"--train.out={out}", "--train.steps=6", *options])
    return out


def make_folder(root: Path, *, labels: bool = True, count: int = 6, size: tuple[int, int] = (40, 50)) -> Path:
    """A small data set in the folder layout, ids 0..2 and 9 = ignored."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        (root / "images" / split).mkdir(parents=True)
        if labels:
            (root / "labels" / split).mkdir(parents=True)
        for i in range(count):
            ids = np.repeat(rng.integers(0, 3, (size[0] // 10, 1)), 10, axis=0).repeat(size[1], axis=1)
            noise = rng.integers(0, 60, (*size, 3))
            image = np.stack([60 * ids, 255 - 60 * ids, 30 + 0 * ids], axis=-1).clip(0, 190) + noise
            Image.fromarray(image.astype(np.uint8)).save(root / "images" / split / f"{split}{i}.jpg")
            ids[:2] = 9
            if labels:
                Image.fromarray(ids.astype(np.uint8)).save(root / "labels" / split / f"{split}{i}.png")
    return root


def edit_info(folder: Path, change: Callable[[dict], None]) -> None:
    """Change the config.json of a checkpoint and make its checksum right again."""
    info = json.loads((folder / "config.json").read_text())
    change(info)
    (folder / "config.json").write_text(json.dumps(info))
    manifest = {name: checkpoint.sha256_of(folder / name) for name in checkpoint.FILES}
    (folder / "manifest.json").write_text(json.dumps(manifest))
