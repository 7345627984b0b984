"""Named runs: a preset is a function that returns the whole config; options change single fields.

Values of the published code carry the table they come from (arXiv 2407.12463 and its code).
"""

from collections.abc import Callable

from ppap.config import (
    CompareConfig,
    Config,
    DataConfig,
    EvalConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
    TrainConfig,
)
from ppap.errors import unknown_name


def demo() -> Config:
    """Generated scenes and the embedded backbone: PPAP beside its baselines in three minutes on a CPU."""
    return Config(
        preset="demo",
        data=DataConfig(
            kind="scenes", resolution=128, eval_resolution=128, scenes_size=128, cache_features=True
        ),
        model=ModelConfig(weights="embedded"),
        loss=LossConfig(phi0=0.8, psi0=0.55, steps=5, temperature=0.1, chunk=256, anchor_divisor=8),
        optim=OptimConfig(lr=3e-3, cluster_lr=5e-3, linear_lr=5e-3),
        eval=EvalConfig(batch_size=16, pictures=4),
        compare=CompareConfig(rows=("colour", "frozen", "fixed", "ppap"), fixed_phi0=0.6),
        train=TrainConfig(batch_size=16, steps=150, val_every=0, save_every=50),
    )


def folder() -> Config:
    """A folder of images with the values published for COCO-Stuff and DINO ViT-S/16."""
    return Config(
        preset="folder",
        data=DataConfig(kind="folder"),
        model=ModelConfig(),
        loss=LossConfig(
            phi0=0.55, psi0=0.15, steps=2, sigma_pos=3.0, sigma_amb=4.0, temperature=0.8, anchor_divisor=4
        ),
        optim=OptimConfig(name="adamw", lr=1e-3, weight_decay=0.01, linear_lr=1e-3, cluster_lr=1e-3),
        train=TrainConfig(batch_size=64, epochs=5, val_every=100),
    )


def camvid() -> Config:
    """CamVid frames (11 classes) with a small ViT that ppap pretrain made of them; give --data.root."""
    names = "sky building pole road pavement tree sign fence car pedestrian bicyclist"
    return Config(
        preset="camvid",
        data=DataConfig(
            kind="folder",
            classes=11,
            class_names=tuple(names.split()),
            ignore_ids=(11, 255),
            resolution=224,
            eval_resolution=224,
            interpolation="bilinear",
            cache_features=True,
        ),
        model=ModelConfig(weights="runs/camvid-vit/backbone"),
        loss=LossConfig(phi0=0.85, psi0=0.65, steps=5, temperature=0.1, anchor_divisor=16),
        optim=OptimConfig(lr=3e-3, cluster_lr=5e-3, linear_lr=5e-3),
        compare=CompareConfig(rows=("colour", "frozen", "fixed", "ppap"), fixed_phi0=0.75),
        train=TrainConfig(batch_size=8, steps=200, val_every=0),
    )


PRESETS: dict[str, Callable[[], Config]] = {"demo": demo, "folder": folder, "camvid": camvid}


def preset(name: str) -> Config:
    """The config called `name`.

    Raises:
        UsageError: there is none; the message names the nearest.
    """
    if name not in PRESETS:
        raise unknown_name("preset", name, PRESETS)
    return PRESETS[name]()


def describe() -> str:
    """One line per preset, for help texts."""
    return "\n".join(f"  {name:<10} {make.__doc__.strip()}" for name, make in PRESETS.items())
