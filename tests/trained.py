"""A run on a small folder of images and labels."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from ppap.train import main as train

VIT = [
    "--model.weights=random",
    "--model.backbone=vit_tiny_patch16_224",
    "--model.patch-size=8",
    "--model.width=24",
    "--model.depth=2",
    "--model.heads=2",
    "--model.image-size=32",
    "--model.condition=none",
]
SMALL = [
    "--data.resolution=32",
    "--data.eval-resolution=32",
    "--data.workers=0",
    "--data.no-cache-features",
    "--loss.phi0=0.55",
    "--loss.psi0=0.15",
    "--loss.chunk=16",
    "--optim.lr=1e-3",
    "--train.batch-size=2",
    "--train.device=cpu",
    "--eval.pictures=1",
    "--compare.rows",  # none
]


def striped_folder(root: Path, ids: Sequence[int], count: int = 3, size: int = 40) -> Path:
    """images/{train,val} with labels/{train,val}: an id is a stripe, its place in `ids` the colour."""
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for k in range(count):
            place = (np.arange(size) * len(ids) // size + k) % len(ids)
            place = np.broadcast_to(place, (size, size))
            colours = np.linspace(20, 200, len(ids)).astype(int)[place]
            image = np.stack([colours, 220 - colours, 0 * colours + 90], -1)
            image = image + rng.integers(0, 30, image.shape)
            for kind, pixels in (("images", image), ("labels", np.asarray(ids)[place])):
                (root / kind / split).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels.astype(np.uint8)).save(root / kind / split / f"{split}{k}.png")
    return root


def tiny_folder_run(
    folder: Path, ids: Sequence[int] = (0, 1, 2), options: Sequence[str] = (), steps: int = 4
) -> Path:
    """Train a few steps on :func:`striped_folder` below `folder`; the run directory."""
    root = folder / "data"
    if not root.exists():
        striped_folder(root, ids)
    return folder_run(root, folder / "run", [*options, f"--train.steps={steps}"])


def folder_run(root: Path, run: Path, options: Sequence[str] = ()) -> Path:
    """Train on the folder `root` into `run`, 4 steps unless the options say otherwise."""
    train(["folder", *VIT, *SMALL, f"--data.root={root}", f"--train.out={run}", "--train.steps=4", *options])
    return run
