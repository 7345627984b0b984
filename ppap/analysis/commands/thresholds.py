"""``ppap analyze thresholds``: which phi0 and psi0 suit a backbone and a data set, without labels."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ppap.analysis import thresholds
from ppap.analysis.arguments import (
    AnalysisArguments,
    Out,
    check_seed,
    make_folder,
    new_folder,
    parse_with_preset,
)
from ppap.analysis.features import backbone_weights, prepare, training_patches
from ppap.data import build_datasets
from ppap.errors import UsageError
from ppap.methods.choices import remedy
from ppap.methods.engine import pick_device
from ppap.methods.loss import PPAPLoss
from ppap.methods.thresholds import Phi0, SetSizes, check_size
from ppap.reports.provenance import provenance
from ppap.reports.records import RANDOM_WARNING

TEXT = """Draw the similarities of patch pairs and the sizes of the sets over a grid of phi0 and psi0, and
suggest values without labels, for features through --model.condition.

The rule is that of --loss.phi0 auto and --loss.psi0 auto; here it takes the best values of the grid.

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
    phi_grid: tuple[float, ...] | None = None
    """Values of phi0 to try [cosine]; None = about the one that auto finds, that one among them."""
    psi_grid: tuple[float, ...] | None = None
    """Values of psi0 to try [cosine]; None = likewise."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed("seed", self.seed)
        for name in ("phi_grid", "psi_grid"):
            if getattr(self, name) == ():
                raise ValueError(f"--{name.replace('_', '-')} is empty; give at least one value")


def main(argv: Sequence[str]) -> None:
    """Command ``analyze thresholds``."""
    arguments: ThresholdArguments = parse_with_preset(argv, ThresholdArguments, "thresholds", TEXT)
    out = new_folder(arguments.out)
    device = pick_device(arguments.device)
    dataset = build_datasets(arguments.data, ("train",)).train
    config = arguments.config(arguments.seed)
    given = replace(
        config, loss=replace(config.loss, phi0=0.0, psi0=0.0), optim=replace(config.optim, lr=1e-3)
    )
    net, settled, _, source = prepare(given, dataset, device)  # the condition alone is to choose here
    patches = training_patches(
        net, source, arguments.images, seed=arguments.seed, workers=arguments.data.workers
    )
    loss, clusters = config.loss, dataset.classes
    aim = min(loss.positives / clusters, 0.5)
    sizes = SetSizes(patches.features, loss, arguments.seed)
    found, still = sizes.phi0(aim), sizes.phi0(aim, steps=0)
    result = thresholds.analyse(
        patches.features,
        patches.images,
        PPAPLoss(given.loss, 0).propagation,
        arguments.phi_grid or thresholds.around(found.value, still.value),
        arguments.psi_grid or thresholds.around(sizes.psi0(found.value)),
        clusters=clusters,
        positives=loss.positives,
        anchors=min(arguments.anchors, len(patches.features)),
        seed=arguments.seed,
    )
    make_folder(out)
    condition = settled.model.condition
    origin = provenance(replace(config, model=settled.model), device, backbone_weights(net))
    facts = [
        f"Condition: {condition}. The settings have phi0 {loss.phi0} and psi0 {loss.psi0}.",
        *_jump(found, aim, condition, clusters),
    ]
    thresholds.write(result, out, net.backbone.origin, facts, origin)
    print((out / "thresholds.md").read_text())
    print(f"written: {out}")
    if net.backbone.is_random:
        print(RANDOM_WARNING)


def _jump(found: Phi0, aim: float, condition: str, clusters: int) -> list[str]:
    """What to say where no threshold gives sets of the size aimed for; training with auto would refuse it."""
    try:
        check_size(found, aim, condition, f"give {remedy(condition, clusters)}")
    except UsageError as error:
        return [f"**{error}**"]
    return []
