"""The runs: data sets, rows, and the settings that all rows share.

Settings were chosen on MSRC-21 and are the same on every other data set; what depends on the features
(condition, thresholds, rate) chooses itself without labels. All rows have the same images, steps, batches,
condition and probes.
"""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from ppap.analysis.study import Cell
from ppap.errors import UsageError, unknown_name
from ppap.settings.config import Amp, Config, of_seed
from ppap.settings.presets import folder

UNTRAINED = ("colour", "frozen", "conditioned")
"""Rows without a training of their own, measured together."""
TRAINED = ("fixed", "tps", "ans", "random", "hp", "stego", "ppap", "oracle")
CORE = (*UNTRAINED, "fixed", "hp", "stego", "ppap")
DATA_SETS = {"msrc21": "MSRC-21", "make3d": "Make3D", "camvid": "CamVid", "dubai": "Dubai"}
"""Folders of the published tables, in their order, and what their data sets are called."""
IGNORED = {"camvid": (11, 255)}
"""Data set -> ids that are no classes, where they are not 255 alone."""
SHARED = {
    "--steps": "train.steps",
    "--batch-size": "train.batch_size",
    "--weights": "model.weights",
    "--amp": "optim.amp",
}
"""Option -> setting of every run, whatever its data set."""
STEPS, BATCH = 400, 32
"""Of every trained row, as the preset has them."""
POOL = 256
"""Patches of HP's reference pool where sets are measured, one of each of as many images."""
RESOLUTION = 224
"""Side of the training crops [pixels]."""


def data_sets(data: Path) -> list[str]:
    """Folders of `data` that hold images.

    Raises:
        UsageError: there are none.
    """
    found = in_order(path.parent.name for path in data.glob("*/images"))
    if not found:
        raise UsageError(f"--data {data} has no */images; give a folder of data sets")
    return found


def in_order(names: Iterable[str]) -> list[str]:
    """Data sets as the tables have them: the published ones first."""
    return sorted(
        names, key=lambda name: (list(DATA_SETS).index(name) if name in DATA_SETS else len(DATA_SETS), name)
    )


def base_config(
    data: Path,
    name: str,
    weights: str,
    steps: int = STEPS,
    amp: Amp = "auto",
    batch: int = BATCH,
) -> Config:
    """Settings of all runs on one data set.

    Args:
        data: folder of the data sets, each with ``images/{train,val}`` and ``labels/{train,val}``.
        name: of the data set, a folder of `data`.
        weights: ``--model.weights``.
        steps: of a training.
        amp: ``--optim.amp``.
        batch: images of a step.

    Raises:
        UsageError: there is no such folder.
    """
    if name not in (found := data_sets(data)):
        raise unknown_name("data set", name, found)
    config = folder()
    return replace(
        config,
        data=replace(
            config.data,
            root=str(data / name),
            resolution=RESOLUTION,
            eval_resolution=RESOLUTION,
            ignore_ids=IGNORED.get(name, config.data.ignore_ids),
        ),
        model=replace(config.model, weights=weights),
        optim=replace(config.optim, amp=amp),
        eval=replace(config.eval, crf="native", pictures=4),
        train=replace(config.train, batch_size=batch, steps=steps, save_every=0),
    )


def cells(config: Config, rows: tuple[str, ...], seeds: tuple[int, ...]) -> dict[str, Cell]:
    """Runs of one data set, seed by seed, so that a table of all rows is there early: name -> run.

    A run is named ROW-SEED and measures that row alone, so that rows can be added later.
    """
    found = {}
    for seed in seeds:
        for row in (row for row in (*UNTRAINED, *TRAINED) if row in rows):
            one = replace(config, compare=replace(config.compare, rows=(row,)))
            if row in UNTRAINED:
                one = replace(one, method="frozen", train=replace(config.train, steps=1))
            else:
                one = replace(one, method=row)
            found[f"{row}-{seed}"] = Cell(f"{row}-{seed}", of_seed(one, seed), keep_checkpoints=False)
    return found
