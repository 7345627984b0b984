"""``ppap analyze positives``: which patches become positives of an anchor, step by step (Fig. 5)."""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from ppap.analysis.arguments import (
    AnalysisArguments,
    Out,
    check_seed,
    make_folder,
    new_folder,
    parse_with_preset,
)
from ppap.analysis.features import backbone_weights, prepare, reference_pool
from ppap.data import build_datasets
from ppap.methods.engine import pick_device
from ppap.methods.loss import PPAPLoss
from ppap.reports.positives import Example, Look, draw_positives
from ppap.reports.provenance import provenance
from ppap.reports.records import RANDOM_WARNING
from ppap.reports.strips import spread

TEXT = """Draw the positives of a few anchors after every step of the propagation, and HP's beside them (the
paper's Fig. 5).

Lit patches are in the set: green where they have the anchor's class, red where not, yellow where it is not
known; the anchor is framed. Writes positives.png and positives.json. Half a minute on two cores for the
demo, most of it for HP's pool."""


@dataclass(frozen=True, kw_only=True)
class PositiveArguments(AnalysisArguments):
    """Options of ``ppap analyze positives``; data, model and loss default to those of the preset."""

    out: Out = ""
    """New folder for positives.png and positives.json."""
    images: int = 6
    """Training images, spread over the set, whose patches are compared."""
    anchors: int = 4
    """Patches, drawn at random among those with positives, that are drawn."""
    seed: int = 0
    """Seed of all that is drawn at random."""
    width: int = 1600
    """Width of the picture at most [pixels]."""
    hidden: bool = True
    """A column with HP's positives."""
    pool: int = 2048
    """Patches in HP's reference pool (published: 2048, Potsdam 1024), one of each of as many training
    images; where there are fewer images, they come again."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_seed("seed", self.seed)
        if self.pool < 1:
            raise ValueError(f"--pool is {self.pool}; give at least 1")
        if self.width < 200:
            raise ValueError(f"--width is {self.width}; give at least 200 pixels")


def main(argv: Sequence[str]) -> None:
    """Command ``analyze positives``."""
    arguments: PositiveArguments = parse_with_preset(argv, PositiveArguments, "positives", TEXT)
    out = new_folder(arguments.out)
    device = pick_device(arguments.device)
    dataset = build_datasets(arguments.data, ("train",)).train
    net, config, *_ = prepare(arguments.config(arguments.seed), dataset, device)
    net.eval()
    pool = None
    if arguments.hidden:
        workers = arguments.data.workers
        pool = reference_pool(net, dataset, arguments.pool, seed=arguments.seed, workers=workers)
    make_folder(out)
    found = draw_positives(
        net,
        dataset,
        spread(len(dataset), arguments.images),
        PPAPLoss(config.loss, 0).propagation,
        out / "positives.png",
        Look(arguments.anchors, arguments.seed, arguments.width),
        pool=pool,
    )
    record = {
        "backbone": net.backbone.origin,
        "anchors": [example.to_dict() for example in found],
        "provenance": provenance(config, device, backbone_weights(net)),
    }
    (out / "positives.json").write_text(json.dumps(record, indent=2) + "\n")
    if not found:
        print(f"no patch has positives at phi0 = {config.loss.phi0:g}; nothing is drawn; lower --loss.phi0")
    else:
        print("\n".join(_lines(found)))
    print(f"written: {out}")
    if net.backbone.is_random:
        print(RANDOM_WARNING)


def _lines(found: Sequence[Example]) -> list[str]:
    """A table for the terminal: the sets after each step and, where they were asked for, HP's."""
    hidden = found[0].hidden is not None
    rows = [["anchor", *(f"step {t}" for t in range(len(found[0].positives))), *(["HP"] if hidden else [])]]
    for example in found:
        sets = [*example.positives, *([example.hidden] if hidden else [])]
        rows.append([f"patch {example.anchor}", *map(example.numbers, sets)])
    title = "positive patches, and how many percent of them have the anchor's class"
    return [title, *("  ".join(f"{cell:>10}" for cell in row) for row in rows)]
