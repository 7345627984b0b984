"""Settings that choose themselves before training, without labels: ``auto`` of condition, thresholds and
rate.

What is chosen is printed with its reasons, stored with every checkpoint, and taken from there when a run goes
on. Legend: K clusters, N patches, D channels.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import LayerScale
from torch import Tensor, nn
from torch.utils.data import Dataset

from ppap.methods import guidance
from ppap.methods.guidance import Survey
from ppap.methods.thresholds import SetSizes, check_size
from ppap.nets.backbone import Backbone
from ppap.nets.clustering import dense_score
from ppap.nets.conditioning import Condition, fit, position_r2, spectrum
from ppap.nets.model import Network, patch_rows
from ppap.runs.randomness import own_randomness
from ppap.settings.config import Config, LossConfig
from ppap.settings.methods import HEADS, Method

THRESHOLDED = {"ppap", "fixed", "tps", "ans", "random"}
"""Methods whose sets thresholds make."""
HEAD_RATE = 5e-4
"""Rate of a head on frozen features: what HP and STEGO were published with."""
BLOCK_RATE, SCALED_BLOCK_RATE = 1e-3, 3e-4
"""Rates of a copied block, without and with a layer scale. The first is PPAP's; in DINOv2, whose blocks
multiply what they add by up to 7, its code forgets within 100 steps what the frozen features know
(docs/conditioning.md). """


@dataclass(frozen=True)
class Choices:
    """Values in the place of auto; None = the setting was given, or is not used."""

    condition: str | None = None
    phi0: float | None = None
    psi0: float | None = None
    fixed_phi0: float | None = None
    """Threshold of sets without propagation: of the same size as PPAP's."""
    lr: float | None = None
    """Rate of a copied block; heads on frozen features have ``HEAD_RATE``."""
    reasons: tuple[str, ...] = field(default=(), compare=False)
    """Lines for people: every candidate with its figures, and the sizes of the sets."""

    def apply(self, config: Config) -> Config:
        """``config`` with these values in the place of auto."""
        # The positives of these do not propagate.
        still = config.method in ("fixed", "ans") and config.compare.fixed_phi0 != "same"
        values = {
            "model": {"condition": self.condition},
            "loss": {"phi0": self.fixed_phi0 if still else self.phi0, "psi0": self.psi0},
            "optim": {"lr": self.rate(config.method)},
        }
        for part, own in values.items():
            given = getattr(config, part)
            found = {n: v for n, v in own.items() if v is not None and getattr(given, n) == "auto"}
            config = replace(config, **{part: replace(given, **found)})
        return config

    def rate(self, method: Method) -> float | None:
        """What a method trains with in the place of auto; None = the rate was given."""
        return HEAD_RATE if method in HEADS and self.lr is not None else self.lr

    def to_dict(self) -> dict[str, Any]:
        """As plain containers, for a checkpoint."""
        return {**asdict(self), "reasons": list(self.reasons)}

    def summary(self, method: Method = "ppap") -> str:
        """The values in one line, such as ``condition clip:0.03, phi0 0.42``; empty if nothing was chosen.

        Args:
            method: of the run; one with a head has no thresholds, and a rate of its own.
        """
        every = {**asdict(self), "lr": self.rate(method)}
        own = {name: value for name, value in every.items() if value is not None and name != "reasons"}
        if method in HEADS:
            own = {name: own[name] for name in ("condition", "lr") if name in own}
        return ", ".join(
            f"{name.replace('_', ' ')} {value if isinstance(value, str) else format(value, 'g')}"
            for name, value in own.items()
        )

    @classmethod
    def from_dict(cls, values: dict[str, Any] | None) -> "Choices":
        """Inverse of :meth:`to_dict`; nothing chosen for None, in checkpoints of older versions."""
        values = values or {}
        return cls(**{**values, "reasons": tuple(values.get("reasons", ()))})


def autos(config: Config) -> list[str]:
    """Options that are auto."""
    options = {
        "model.condition": config.model.condition,
        "loss.phi0": config.loss.phi0,
        "loss.psi0": config.loss.psi0,
        "optim.lr": config.optim.lr,
    }
    return [name for name, value in options.items() if value == "auto"]


def _needs_survey(config: Config) -> bool:
    """Whether the training images must be looked at before the network can be built."""
    return config.model.condition != "none" or "auto" in (config.loss.phi0, config.loss.psi0)


def choose(
    config: Config, backbone: Backbone, survey: Survey | None, clusters: int
) -> tuple[Choices, Condition | None]:
    """Every setting that is auto, and the map of ``--model.condition``.

    Args:
        config: settings of the run.
        backbone: frozen network; whether it has a layer scale decides the rate.
        survey: of the training images; None where no condition and no threshold asks for it.
        clusters: clusters K of the segmentation, for the sizes of the sets.

    Returns:
        The choices, and the map on the CPU; None = features as they are.

    Raises:
        UsageError: no threshold gives sets of the size that is asked for; the message names a condition to
            try. More components are dropped than there are.
        NumberError: features that are not finite, or all the same.
    """
    chosen = Choices(lr=block_rate(backbone) if config.optim.lr == "auto" else None)
    if survey is None:
        return chosen, None
    name, reasons = config.model.condition, []
    if name == "auto":
        name = auto_condition(clusters)
        reasons += candidates(survey, clusters, name)
        chosen = replace(chosen, condition=name)
    condition = None if name == "none" else fit(name, survey.split)
    if "auto" in (config.loss.phi0, config.loss.psi0):
        if THRESHOLDED.isdisjoint({config.method, *config.compare.rows}):
            unused = LossConfig()
            chosen = replace(chosen, phi0=unused.phi0, psi0=unused.psi0)
        else:
            patches = as_compared(survey.sample, condition, config).to(next(backbone.parameters()).device)
            chosen, lines = _thresholds(config, chosen, patches, clusters)
            reasons += lines
    return replace(chosen, reasons=tuple(reasons)), condition


def look_and_choose(
    config: Config,
    net: Network,
    source: Callable[[], Dataset[dict[str, Any]]],
    device: torch.device,
    clusters: int,
) -> tuple[Choices, Condition | None]:
    """:func:`choose` after a look at the training images, where that is needed; the choices are printed.

    Args:
        config: settings of the run.
        net: on `device`.
        source: gives the training images, or their cached features; called if they are looked at.
        device: where it computes.
        clusters: as for :func:`choose`.

    Raises:
        UsageError, NumberError, DataError: see :func:`choose` and :func:`ppap.methods.guidance.survey`.
    """
    seen = guidance.survey(net, source(), config, device) if _needs_survey(config) else None
    choices, condition = choose(config, net.backbone, seen, clusters)
    for line in choices.reasons:
        print(line, flush=True)
    return choices, condition


def auto_condition(clusters: int) -> str:
    """``clip:S`` with S = 1 / (4 K): K clusters need about K directions, of which none may drown the others.

    Chosen by the purity of sets on four sets of labelled photographs (docs/conditioning.md), where
    whitening and removing components are each good on one and bad on another.
    """
    share = float(f"{1 / (4 * clusters):.2g}")
    return f"clip:{share:g}" if clusters > 1 else "centre"


CANDIDATES = ("none", "centre", "whiten:0.5", "position")
"""Conditions that are looked at beside the chosen one."""


class Figures(NamedTuple):
    """What can be said of conditioned features without labels."""

    median: float
    """Of the cosines of two patches."""
    most: float
    """95 % of the cosines are below it."""
    separation: float
    """How far K clusters stand apart, see :func:`ppap.nets.clustering.dense_score`."""
    rank: float
    """Effective number of directions."""


def figures(survey: Survey, condition: Condition, clusters: int) -> Figures:
    """Of the survey's batch."""
    rows = F.normalize(patch_rows(condition(survey.sample)), dim=1)
    cosines = (rows[:: max(len(rows) // 256, 1)] @ rows.T).flatten()
    half, most = (cosines.kthvalue(max(int(q * len(cosines)), 1)).values.item() for q in (0.5, 0.95))
    return Figures(half, most, *dense_score(rows, max(clusters, 2)))


def candidates(survey: Survey, clusters: int, chosen: str) -> list[str]:
    """A table of conditions with label-free figures of the survey's batch, the chosen one marked."""
    values, _ = spectrum(survey.split.all)
    shares = 100 * values / values.sum()
    row, column = position_r2(survey.split)
    lines = [
        f"condition: features of {survey.images} images; leading components carry "
        + ", ".join(f"{share:.1f}" for share in shares[:5].tolist())
        + f" % of the variance; R² of a patch's row and column read from features: {row:.2f}, {column:.2f}",
        f"  {'condition':<12} {'cosines: median':>15} {'95 %':>6} {'separation':>11} {'rank':>6}",
    ]
    for name in dict.fromkeys((*CANDIDATES, chosen)):
        found = figures(survey, fit(name, survey.split), clusters)
        mark = "  <- chosen" if name == chosen else ""
        lines.append(
            f"  {name:<12} {found.median:>15.2f} {found.most:>6.2f} {found.separation:>11.3f} "
            f"{found.rank:>6.1f}{mark}"
        )
    rule = f"1 / (4 K) for K = {clusters} clusters" if clusters > 1 else "too few clusters to clip for"
    return [
        *lines,
        f"  chosen by the number of clusters alone ({rule}), not by these figures: docs/conditioning.md",
    ]


def block_rate(backbone: Backbone) -> float:
    """Learning rate that suits a copy of the last block."""
    return SCALED_BLOCK_RATE if has_layer_scale(backbone.vit.blocks[-1]) else BLOCK_RATE


def has_layer_scale(block: nn.Module) -> bool:
    """Whether a block of timm multiplies what it adds channel by channel (DINOv2, DINOv3, CaiT's kin)."""
    own = getattr(block, "gamma_1", None) is not None  # timm's EvaBlock
    return own or any(isinstance(part, LayerScale) for part in block.modules())


def _thresholds(config: Config, chosen: Choices, patches: Tensor, clusters: int) -> tuple[Choices, list[str]]:
    """Thresholds that are auto, and the sizes that they give."""
    loss, name = config.loss, chosen.condition or config.model.condition
    sizes = SetSizes(patches, loss, config.train.seed)
    aim = min(loss.positives / clusters, 0.5)
    given = loss.phi0
    lines = [f"thresholds: {len(patches)} patches, {len(sizes.anchors)} anchors, without labels"]
    if given == "auto":
        found = sizes.phi0(aim)
        check_size(found, aim, name, f"try {remedy(name, clusters)}, or give a number")
        still = sizes.phi0(aim, steps=0)
        given = found.value
        chosen = replace(chosen, phi0=found.value)
        lines.append(
            f"  phi0 {found.value:g}: positives {100 * found.size:.2g} % of the patches "
            f"(aim {100 * aim:.2g} %, {loss.positives:g} average clusters)"
        )
        chosen = replace(chosen, fixed_phi0=still.value)
        lines.append(f"  phi0 {still.value:g} without propagation: positives {100 * still.size:.2g} %")
    if loss.psi0 == "auto":
        psi0 = sizes.psi0(given)
        chosen = replace(chosen, psi0=psi0)
        lines.append(
            f"  psi0 {psi0:g}: negatives {100 * sizes.negatives(given).share(psi0):.3g} % of the patches"
        )
    return chosen, lines


def as_compared(sample: Tensor, condition: Condition | None, config: Config) -> Tensor:
    """The survey's batch as the loss will see it, channel dropout too: (N, D) fp32."""
    maps, share = sample if condition is None else condition(sample), config.model.guidance_dropout
    with own_randomness():
        torch.manual_seed(config.train.seed)
        return patch_rows(F.dropout2d(maps, share, training=True)).contiguous()


def remedy(condition: str, clusters: int) -> str:
    """Another condition to try, as an option."""
    share = auto_condition(clusters)
    return f"--model.condition {share if condition != share else 'whiten:0.5'}"
