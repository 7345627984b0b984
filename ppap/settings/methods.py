"""Settings of the methods beside PPAP; parts of ``ppap.settings.config.Config``."""

import math
from dataclasses import dataclass
from typing import Literal

from ppap.settings.checks import check_field

Method = Literal["ppap", "frozen", "fixed", "tps", "ans", "random", "oracle", "hp", "stego"]
"""Names of all methods; ``ppap.methods.table`` has what they are."""
HEADS: tuple[Method, ...] = ("hp", "stego")
"""Methods that train a head on frozen features, each with a section of settings of its name."""


@dataclass(frozen=True, kw_only=True)
class HPConfig:
    """Method hp: Hidden Positives (CVPR 2023); the defaults are its values for COCO-Stuff."""

    dim: int = 512
    """Channels E of the code (published: 512, Potsdam 256)."""
    temperature: float = 0.8
    """Temperature tau of the softmax (published: 0.8, Cityscapes 0.6, Potsdam 0.4)."""
    base_temperature: float = 0.07
    """The loss is multiplied by temperature / base_temperature (published code)."""
    consistency: float = 0.05
    """Weight alpha of the distance to the embedding of the recoloured image; 0 = off (Potsdam)."""
    augment: Literal["published", "pixels"] = "published"
    """Recolouring for the consistency. published = of the normalised image, where jitter clamps to 0..1 and
    so sets all that is darker than the mean colour to it; pixels = of the image before normalisation."""
    negatives_kept: float = 0.02
    """Share rho of random patches in the denominator beside the positives (published: 0.02, Potsdam 1)."""
    pool_size: int = 2048
    """Patches M of a reference pool, each of another image while there are enough (Potsdam 1024)."""
    renew_every: int = 100
    """Steps, within an epoch, between renewals of the task-specific pool (Cityscapes and Potsdam 20)."""
    warmup: int = 1000
    """Steps before the weight of task-specific positives rises from 0 to 1 at the end of the run (Cityscapes
    50, Potsdam 100)."""
    ema: float = 0.99
    """Decay of the averaged head that finds task-specific positives (Cityscapes and Potsdam 0.999)."""
    reweighting: bool = True
    """Weight anchors by their number of positives."""
    anchor_divisor: int = 1
    """One patch in this many is an anchor (published: every patch)."""
    dropout: float = 0.1
    """Share of channels dropped per image, in seven places."""

    def __post_init__(self) -> None:
        for name in ("dim", "pool_size", "renew_every", "anchor_divisor"):
            value = getattr(self, name)
            check_field(value >= 1, f"hp.{name.replace('_', '-')}", value, "give at least 1")
        for name in ("temperature", "base_temperature"):
            value = getattr(self, name)
            ok = value > 0 and math.isfinite(value)
            check_field(ok, f"hp.{name.replace('_', '-')}", value, "give a finite positive number")
        ok = self.consistency >= 0 and math.isfinite(self.consistency)
        check_field(ok, "hp.consistency", self.consistency, "give 0 or a finite positive number")
        for name in ("negatives_kept", "ema"):
            value = getattr(self, name)
            check_field(0 <= value <= 1, f"hp.{name.replace('_', '-')}", value, "give a number from 0 to 1")
        check_field(self.warmup >= 0, "hp.warmup", self.warmup, "give 0 or more")
        check_field(0 <= self.dropout < 1, "hp.dropout", self.dropout, "give 0 <= p < 1")


@dataclass(frozen=True, kw_only=True)
class StegoConfig:
    """Method stego: STEGO (ICLR 2022); the defaults are the block its configuration file has for COCO-Stuff
    and ViT-S. ppap.settings.published has its other blocks."""

    dim: int = 70
    """Channels E of the code."""
    samples: int = 11
    """Side S of the S x S random points of an image that are compared."""
    neighbours: int = 7
    """The positive image is one of this many nearest images, drawn anew each time."""
    negative_draws: int = 5
    """Random re-orderings of the batch whose images are negatives."""
    weight_self: float = 0.67
    """Weight of an image with itself."""
    weight_neighbour: float = 0.25
    """Weight of an image with a near one."""
    weight_random: float = 0.63
    """Weight of an image with others of the batch."""
    shift_self: float = 0.08
    """Feature correlation b above which points of an image are pulled together."""
    shift_neighbour: float = 0.02
    """The same, of near images."""
    shift_random: float = 0.66
    """The same, of other images."""
    pointwise: bool = True
    """Subtract from each point's correlations their mean."""
    zero_clamp: bool = True
    """Take negative correlations of codes as 0."""
    dropout: float = 0.1
    """Share of channels dropped per image, in the head and in the features that are compared."""

    def __post_init__(self) -> None:
        for name in ("dim", "samples", "neighbours", "negative_draws"):
            value = getattr(self, name)
            check_field(value >= 1, f"stego.{name.replace('_', '-')}", value, "give at least 1")
        for term in ("self", "neighbour", "random"):
            for name in (f"weight_{term}", f"shift_{term}"):
                value = getattr(self, name)
                ok = math.isfinite(value) and (value >= 0 or name.startswith("shift"))
                check_field(
                    ok, f"stego.{name.replace('_', '-')}", value, "give a finite number, a weight >= 0"
                )
        check_field(0 <= self.dropout < 1, "stego.dropout", self.dropout, "give 0 <= p < 1")
