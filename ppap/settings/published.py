"""Settings that HP and STEGO were published with, per data set.

HP: the option files of its code. STEGO: its one configuration file, of which a single block of shifts and
weights is active and the others are comments; which block made the paper's numbers is not stated there, nor
are sizes, rates or steps per data set.
"""

from dataclasses import replace
from typing import Any, NamedTuple

from ppap.errors import UsageError
from ppap.settings.config import Config, HPConfig, OptimConfig, StegoConfig

_HP_OPTIM = OptimConfig(name="adamw", lr=5e-4, weight_decay=0.1, linear_lr=1e-3, cluster_lr=5e-3)
_HP = {
    ("cocostuff27", "vits8"): (HPConfig(), {"epochs": 3, "val_every": 100}),
    ("cityscapes27", "vits8"): (
        HPConfig(temperature=0.6, renew_every=20, warmup=50, ema=0.999),
        {"epochs": 30, "val_every": 100},
    ),
    ("potsdam3", "vitb8"): (
        HPConfig(
            dim=256,
            temperature=0.4,
            consistency=0.0,
            negatives_kept=1.0,
            pool_size=1024,
            renew_every=20,
            warmup=100,
            ema=0.999,
        ),
        {"epochs": 10, "val_every": 50},
    ),
}

# Weights and shifts of an image with itself, a near one, and others.
_STEGO_BLOCKS = {
    "active": ((0.67, 0.25, 0.63), (0.18, 0.12, 0.46)),
    "cocostuff27-vits8": ((0.67, 0.25, 0.63), (0.08, 0.02, 0.66)),
    "cocostuff27-vits8-older": ((0.67, 0.25, 0.63), (0.08, 0.02, 0.16)),
    "cocostuff27-vitb8": ((0.1, 1.0, 0.1538476246), (0.12, 0.2, 1.0)),
    "cocostuff27-undated": ((0.29, 0.80, 0.72), (0.34, 0.04, 0.86)),
    "cocostuff27-moco": ((0.67, 0.25, 0.63), (0.32, 0.36, 0.26)),
    "cityscapes27": ((1.0, 0.5774534831, 0.9058762625), (0.45828472207, 0.1754346515, 0.3136124189)),
    "cityscapes27-undated": ((0.46, 0.18, 0.72), (0.25, 0.20, 0.25)),
    "potsdam3-vits8": ((0.67, 0.25, 0.63), (0.08, 0.02, 0.46)),
}
HP_ELSEWHERE, HP_RENEWAL = ("potsdam3", "vitb8"), 5
"""Block and `renew_every` for other data. On MSRC-21 this block was better than that for COCO-Stuff; a small
folder has epochs of fewer steps than any published number, with which the second pool would never be renewed
(docs/results/photographs.md)."""
STEGO_ELSEWHERE = "cityscapes27"
"""Block for other data: of five the best on MSRC-21 (docs/results/photographs.md)."""
_STEGO_OPTIM = OptimConfig(
    name="adam", lr=5e-4, weight_decay=0.0, clip_norm=None, linear_lr=5e-3, cluster_lr=5e-3, amp="off"
)
_STEGO_TRAIN = {"batch_size": 16, "steps": 5000, "val_every": 100}


class Published(NamedTuple):
    """Settings of a published run."""

    method: HPConfig | StegoConfig
    optim: OptimConfig
    train: dict[str, Any]
    """Fields of TrainConfig."""


def published_hp(dataset: str, backbone: str) -> Published:
    """HP's settings for a data set and backbone, such as ``("cocostuff27", "vits8")``.

    Raises:
        UsageError: it published none; the message lists those it did.
    """
    if (dataset, backbone) not in _HP:
        known = ", ".join(" with ".join(pair) for pair in _HP)
        raise UsageError(f"HP published no settings for {dataset} with {backbone}; there are {known}")
    section, train = _HP[dataset, backbone]
    return Published(section, _HP_OPTIM, {"batch_size": 64, "steps": None, **train})


def published_stego(block: str = "active") -> Published:
    """STEGO's configuration with one of its blocks.

    Args:
        block: active (the one that the file runs), ``cocostuff27-vits8``, ``cocostuff27-vits8-older``,
            ``cocostuff27-vitb8``, ``cocostuff27-undated``, ``cocostuff27-moco``, ``cityscapes27``,
            ``cityscapes27-undated`` or ``potsdam3-vits8``.

    Raises:
        UsageError: there is no such block.
    """
    if block not in _STEGO_BLOCKS:
        raise UsageError(f"STEGO has no block {block!r}; there are {', '.join(_STEGO_BLOCKS)}")
    weights, shifts = _STEGO_BLOCKS[block]
    names = ("self", "neighbour", "random")
    values = {f"weight_{name}": value for name, value in zip(names, weights, strict=True)}
    values |= {f"shift_{name}": value for name, value in zip(names, shifts, strict=True)}
    return Published(StegoConfig(**values), _STEGO_OPTIM, dict(_STEGO_TRAIN))


def hp_for(dataset: str) -> Published | None:
    """HP's settings for a data set, with the one backbone that it published for it; None = there are none."""
    return next((published_hp(*pair) for pair in _HP if pair[0] == dataset), None)


def stego_for(dataset: str, weights: str) -> Published | None:
    """STEGO's block for a data set and the backbone that ``--model.weights`` names; None = there is none."""
    blocks = {"cityscapes27": "cityscapes27", "potsdam3": "potsdam3-vits8"}
    if dataset == "cocostuff27":
        base = "vit_base" in weights or "vitbase" in weights
        blocks[dataset] = "cocostuff27-vitb8" if base else "cocostuff27-vits8"
    return published_stego(blocks[dataset]) if dataset in blocks else None


def hp_elsewhere(anchor_divisor: int) -> HPConfig:
    """HP for data that it published no settings for, with as many anchors as the other methods have."""
    section = published_hp(*HP_ELSEWHERE).method
    return replace(section, renew_every=HP_RENEWAL, anchor_divisor=anchor_divisor)


def stego_elsewhere() -> StegoConfig:
    """STEGO for data that it published no settings for."""
    return published_stego(STEGO_ELSEWHERE).method


def with_method(config: Config, method: str) -> Config:
    """A preset with another method, as ``--method`` gives it before other options are read.

    Where HP recolours images, a preset's cache of features is switched off for it. Where HP or STEGO
    published settings for the preset's data, ``optim`` and ``train`` follow them (the presets have the
    sections ``hp`` and ``stego``); elsewhere only the method changes. Among the preset's rows of a comparison
    it takes the place of PPAP.
    """
    rows = tuple(dict.fromkeys(method if row == "ppap" else row for row in config.compare.rows))
    config = replace(config, method=method, compare=replace(config.compare, rows=rows))
    if method == "hp" and config.hp.consistency > 0:
        config = replace(config, data=replace(config.data, cache_features=False))
    dataset, weights = config.data.kind, config.model.weights
    chosen = {"hp": hp_for(dataset), "stego": stego_for(dataset, weights)}.get(method)
    if chosen is None:
        return config
    return replace(config, optim=chosen.optim, train=replace(config.train, **chosen.train))
