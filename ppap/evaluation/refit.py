"""The noise of the cluster probe: fresh ones with other seeds on one finished code."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tqdm import tqdm

from ppap.data import SegmentationDataset
from ppap.evaluation.comparison import FITTED, codes_of, fit_probes, fitted_clusters
from ppap.evaluation.evaluate import BatchCode, evaluate_each
from ppap.methods.engine import Engine
from ppap.nets.feature_cache import Sources
from ppap.nets.probes import ClusterProbe, LinearProbe
from ppap.runs.randomness import own_randomness
from ppap.settings.config import Config
from ppap.stopping import each

_COLUMNS = {"cluster_accuracy": "cluster accuracy", "cluster_miou": "cluster mIoU"}


def refit_clusters(
    code_of: BatchCode,
    engine: Engine,
    sources: Sources,
    val: SegmentationDataset,
    config: Config,
    seeds: Sequence[int],
) -> list[dict[str, float]]:
    """Scores of one fresh cluster probe per seed, fitted to the code of the training images.

    Steps, rate and batches are those of the comparison, where probes are trained; each is a single start, so
    that its noise is seen whole.

    Args:
        code_of: batch -> code.
        engine: whose code it is; its own probes are not touched.
        sources: of the training images, to fit to, and of the validation images.
        val: labelled validation images.
        config: of the run.
        seeds: of all that is drawn for a probe, one each.

    Returns:
        Per seed ``cluster_accuracy`` and ``cluster_miou`` [%], without CRF.

    Raises:
        NumberError: the code is not finite.
        DataError: fewer patches than clusters.
    """
    one_start = replace(config, compare=replace(config.compare, starts=1))
    patch = engine.net.backbone.patch_size
    probes: list[tuple[ClusterProbe, LinearProbe | None]] = []
    with own_randomness():
        codes, labels = codes_of(code_of, sources.train, config.compare.images, config)
        for seed in each(tqdm(seeds, desc="refit", unit="probe", disable=None)):
            if config.eval.cluster_init != "random":
                found = fitted_clusters(codes, val.classes, one_start, seed, engine.device)
                probes.append((found, None))
                continue
            pair = fit_probes(
                codes, labels, val.classes, one_start, seed=seed, patch_size=patch, device=engine.device
            )
            probes.append(pair)
        found = evaluate_each(
            code_of,
            probes,
            val,
            config.eval,
            patch_size=patch,
            device=engine.device,
            workers=config.data.workers,
            source=sources.val,
        )
    return [{key: value for key, value in scores.summary().items() if "cluster" in key} for scores in found]


def refit_table(
    spread: Mapping[str, Mapping[str, Any]], own: Mapping[str, float], config: Config
) -> list[str]:
    """Markdown table of the refitted probes' scores beside those of the checkpoint's own probe.

    Args:
        spread: score name -> mean, std, min, max and values.
        own: the same scores of the checkpoint's own probe.
        config: how the probes were fitted.
    """
    settings = config.compare
    count = len(next(iter(spread.values()))["values"])
    lines = ["| cluster probe [%] | " + " | ".join(_COLUMNS.values()) + " |", "|---|---:|---:|"]
    for title, of in (
        (f"mean of {count} refitted", lambda key: spread[key]["mean"]),
        ("standard deviation", lambda key: spread[key]["std"]),
        ("least", lambda key: spread[key]["min"]),
        ("largest", lambda key: spread[key]["max"]),
        ("as scored above", lambda key: own[key]),
    ):
        cells = ["-" if of(key) is None else f"{of(key):.2f}" for key in _COLUMNS]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    if config.eval.cluster_init == "random":
        how = (
            f"{settings.steps} steps of {settings.batch_size} images on the finished code, Adam from "
            f"{settings.lr:g} to 0, without CRF. The checkpoint's own was trained along with it."
        )
    else:
        title = FITTED[config.eval.cluster_init]
        how = f"clusters by {title} from another seed on the finished code, without CRF."
    return [*lines, "", f"Each refitted probe: {how}"]
