"""What ``ppap eval`` measures of a checkpoint: its record for JSON, and lines for the terminal."""

import contextlib
import dataclasses
import functools
import json
import os
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ppap.data import Datasets, SegmentationDataset, build_datasets
from ppap.data.base import SPLITS
from ppap.data.ids import as_trained, trained_without_labels
from ppap.errors import DataError, UsageError
from ppap.evaluation.comparison import settle_clusters
from ppap.evaluation.crf import native_crf_missing, require_crf
from ppap.evaluation.evaluate import Evaluation, evaluate
from ppap.evaluation.frozen import train_frozen_probes
from ppap.evaluation.names import Names, read_names
from ppap.evaluation.neighbours import NeighbourEvaluation, build_bank, evaluate_neighbours, map_source
from ppap.evaluation.refit import refit_clusters, refit_table
from ppap.evaluation.tables import table
from ppap.methods.engine import Engine, for_inference, load_engine, pick_device
from ppap.nets.feature_cache import CachedFeatures, Sources, kept_source, source_of
from ppap.parallel import world
from ppap.reports.provenance import provenance
from ppap.reports.records import (
    RANDOM_WARNING,
    backbone_facts,
    evaluation_record,
    shared_provenance,
    spread_of,
)
from ppap.reports.terminal import score_table
from ppap.runs.checkpoint import Checkpoint
from ppap.settings.config import Config, DataConfig, EvalConfig, from_dict

# Beyond this many classes the terminal shows no line per class; the JSON file has them all.
_LISTED_CLASSES = 100


@dataclass(frozen=True, kw_only=True)
class MeasureOptions:
    """How a checkpoint is measured."""

    frozen: bool = False
    """Measure the frozen backbone instead: train both probes on its features first (the paper's DINO
    rows).
    """
    frozen_steps: int | None = None
    """Training steps of the probes with --frozen; None = as many as the checkpoint was trained."""
    refit_clusters: int = 0
    """Fit this many fresh cluster probes, each with a seed of its own, to the finished code, and show how far
    their scores lie apart; 0 = off. They are fitted as the comparison's are."""
    names: str | None = None
    """names.json of `ppap atlas`: also show the scores of its names, where every cluster counts as the class
    that it is called, and one that is ignored or called otherwise as wrong."""
    device: str = "auto"
    """auto = cuda if there is one, else cpu; or a torch device such as cuda:1."""
    data: DataConfig = field(default_factory=DataConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        if self.frozen_steps is not None and self.frozen_steps < 1:
            raise ValueError(f"--frozen-steps is {self.frozen_steps}; give at least 1")
        if self.refit_clusters < 0:
            raise ValueError(f"--refit-clusters is {self.refit_clusters}; give 0 or more")


def settings_of(checkpoint: Checkpoint) -> Config:
    """A checkpoint's settings, with the classes its labels were found to hold in training.

    So a smaller set is read by the same rule. Where there were none, the labels at hand decide. No folder
    that would be written comes from a checkpoint, which may be another person's.
    """
    config = from_dict(checkpoint.info["config"])
    near = dataclasses.replace(config.eval.neighbours, masks=None)
    config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, neighbours=near))
    data = dataclasses.replace(as_trained(config.data, checkpoint.info), cache_dir=None)
    if data.kind == "folder" and trained_without_labels(checkpoint.info):
        data = dataclasses.replace(data, classes=None)
    return dataclasses.replace(config, data=data)


def _by_neighbours(arguments: MeasureOptions) -> bool:
    chosen = arguments.eval.protocol
    return chosen == "neighbours" or (chosen == "auto" and arguments.data.kind == "imagenet_s")


def check_protocol(arguments: MeasureOptions, runs: int) -> None:
    """Refuse what cannot be combined, before any work."""
    if arguments.names is not None and (arguments.frozen or _by_neighbours(arguments)):
        other = "--frozen" if arguments.frozen else "--eval.protocol neighbours"
        raise UsageError(f"--names are of the run's own clusters, which {other} does not measure")
    if not _by_neighbours(arguments):
        return
    if arguments.refit_clusters:
        raise UsageError("--refit-clusters measures a probe; add --eval.protocol probes")
    masks = arguments.eval.neighbours.masks
    if masks is not None and runs > 1:
        raise UsageError(f"--eval.neighbours.masks {masks} is one folder for {runs} runs; name one run")
    if masks is not None and Path(masks).exists():
        raise UsageError(f"--eval.neighbours.masks {masks} exists already; give a new folder")


Measured = tuple[dict[str, Any], list[str]]
"""A record of results, and its lines for the terminal."""


def measure(checkpoint: Checkpoint, arguments: MeasureOptions) -> Measured:
    """Measure one checkpoint, telling on the way what and how.

    Args:
        checkpoint: of a training run.
        arguments: its data and eval settings replace those of the run (:func:`settings_of` has them).

    Raises:
        UsageError, DataError, NumberError: see the parts.
    """
    config = dataclasses.replace(settings_of(checkpoint), data=arguments.data, eval=arguments.eval)
    device = pick_device(arguments.device)
    neighbours = _by_neighbours(arguments)
    if not neighbours:
        require_crf(config.eval.crf, device)
    renewed = _clusters_are_renewed(checkpoint, arguments)
    fitted = neighbours or arguments.frozen or bool(arguments.refit_clusters) or renewed
    if fitted and world().several:
        raise UsageError(
            "--frozen, --refit-clusters, --eval.cluster-init and neighbours fit something to the training "
            "images, in one process: start this without torchrun"
        )
    datasets = _datasets(config, neighbours, fitted)
    _check_classes(checkpoint, datasets.val.classes)
    engine = load_engine(checkpoint, device, for_inference(config, device))
    print(f"checkpoint: {checkpoint.path} (step {checkpoint.info['step']}: {checkpoint.selection})")
    print(f"backbone: {engine.net.backbone.origin}")
    print(f"data: {datasets.description}")
    reason = "chosen for imagenet_s" if arguments.eval.protocol == "auto" else "--eval.protocol"
    print(f"protocol: neighbours ({reason})" if neighbours else "protocol: probes", flush=True)
    if neighbours:
        record, lines = _measure_neighbours(engine, checkpoint, config, datasets, arguments.frozen)
    else:
        record, lines = _measure_probes(engine, checkpoint, config, datasets, arguments)
    if engine.net.backbone.is_random:
        lines.append(RANDOM_WARNING)
    classes = {"classes": list(datasets.val.class_names), "label_ids": list(datasets.val.ids)}
    return {**record, "frozen": arguments.frozen, **classes}, lines


def _clusters_are_renewed(checkpoint: Checkpoint, arguments: MeasureOptions) -> bool:
    """Whether fitted centres are to replace those of the run.

    Raises:
        UsageError: centres that train along with the network are to replace fitted ones.
    """
    stored, asked = settings_of(checkpoint).eval.cluster_init, arguments.eval.cluster_init
    if asked == "random" and stored != asked:
        raise UsageError(
            f"--eval.cluster-init random: this run's centres are those of {stored}; leave it out"
        )
    return stored != asked


def _datasets(config: Config, neighbours: bool, fitted: bool) -> Datasets:
    """Validation images and, where something is fitted, training images."""
    data = config.data
    if neighbours and data.kind == "imagenet_s":
        data = dataclasses.replace(data, imagenet_s_train="train-semi")
    datasets = build_datasets(data, SPLITS if fitted else ("val",))
    if datasets.val is None or not datasets.val.labelled:
        raise DataError(
            "there are no validation labels, so nothing can be measured; give images/val and labels/val. "
            f"What was found: {datasets.description}"
        )
    if neighbours and not datasets.train.labelled:
        raise DataError(
            "there are no training labels, so there are no neighbours to compare with; give labels/train, "
            f"or --eval.protocol probes. What was found: {datasets.description}"
        )
    return datasets


def _measure_probes(
    engine: Engine, checkpoint: Checkpoint, config: Config, datasets: Datasets, arguments: MeasureOptions
) -> Measured:
    dataset, code_of = datasets.val, engine.code_of
    trained = checkpoint.info["labelled"]
    named = None

    @functools.cache
    def material() -> SegmentationDataset | CachedFeatures:
        return source_of(config, datasets.train, engine.net, engine.device)

    if arguments.names is not None:
        if _clusters_are_renewed(checkpoint, arguments):
            raise UsageError("--names are of the run's own clusters; leave out --eval.cluster-init")
        named = read_names(arguments.names, engine.cluster.clusters)
        named.classes(dataset.class_names)  # refuses names of which none is a class
    if arguments.frozen:
        trained = datasets.train.labelled
        train_frozen_probes(engine, material(), arguments.frozen_steps or checkpoint.info["step"])
        code_of = engine.frozen_code_of
    elif _clusters_are_renewed(checkpoint, arguments):
        print(
            f"clusters: fitted anew to the codes of the training images, by {config.eval.cluster_init}",
            flush=True,
        )
        settle_clusters(engine, code_of, material())
    settings = config.eval
    if trained_without_labels(checkpoint.info):
        settings = dataclasses.replace(settings, unmatched=settings.extra_clusters)
    source = kept_source(config, dataset, engine.net)
    result = evaluate(
        code_of,
        (engine.cluster, engine.linear if trained else None),
        dataset,
        settings,
        patch_size=engine.net.backbone.patch_size,
        device=engine.device,
        workers=config.data.workers,
        source=source,
    )
    if not result.crf and (missing := native_crf_missing(engine.device)):
        result.notes.append(missing)
    names = dataset.class_names if dataset.classes <= _LISTED_CLASSES else ()
    record = evaluation_record(config, engine, checkpoint, result)
    lines = [score_table(result, names), *result.notes]
    if result.crf:
        lines.insert(1, f"CRF by {record['provenance']['crf']}")
    if named is not None:
        record["named"], found = _named_scores(result, named, dataset.class_names)
        lines += ["", *found]
    if arguments.refit_clusters:
        numbers = range(config.train.seed + 1, config.train.seed + 1 + arguments.refit_clusters)
        summaries = refit_clusters(code_of, engine, Sources(material(), source), dataset, config, numbers)
        spread = spread_of(summaries)
        lines += ["", *refit_table(spread, result.summary(), config)]
        record["refit_clusters"] = {"seeds": list(numbers), **spread}
    return record, lines


def _named_scores(result: Evaluation, named: Names, classes: Sequence[str]) -> Measured:
    """Scores of clusters under a user's names, without and with CRF."""
    assignment, record, lines = named.classes(classes), {**named.record()}, []
    for prefix, title in (("", ""), ("crf/", "+CRF")) if result.crf else (("", ""),):
        scores = result.counts[f"{prefix}cluster"].scores(assignment, names=classes)
        record[f"{prefix}cluster"] = asdict(scores)
        numbers = f"pixel accuracy {scores.accuracy:.2f} %, mIoU {scores.miou:.2f} %"
        lines.append(f"clusters by their names{title}: {numbers}")
    none = [k for k, c in enumerate(assignment) if c is None]
    counted = result.counts["cluster"].counts
    if none:
        share = 100 * int(counted[none].sum()) / int(counted.sum())
        lines.append(f"{len(none)} clusters with no class's name count as wrong: {share:.2f} % of the pixels")
    return record, lines


def _measure_neighbours(
    engine: Engine, checkpoint: Checkpoint, config: Config, datasets: Datasets, frozen: bool
) -> Measured:
    settings = config.eval.neighbours
    if frozen:
        settings = dataclasses.replace(settings, tensor="guidance")
        config = dataclasses.replace(config, eval=dataclasses.replace(config.eval, neighbours=settings))
    source = map_source(engine, settings.tensor)
    common = {
        "patch_size": engine.net.backbone.patch_size,
        "device": engine.device,
        "workers": config.data.workers,
    }
    bank = build_bank(source, datasets.train, settings, **common)
    masks = None if settings.masks is None else Path(settings.masks)
    result = evaluate_neighbours(source, bank, datasets.val, settings, masks=masks, **common)
    lines = _neighbour_lines(result, datasets.val.class_names)
    if masks is not None:
        lines.append(f"masks: {masks}")
    record = {
        **backbone_facts(engine),
        "provenance": provenance(config, engine.device, checkpoint),
        "summary": result.summary(),
        "scores": asdict(result),
    }
    return record, lines


def _neighbour_lines(result: NeighbourEvaluation, names: Sequence[str]) -> list[str]:
    width = max(map(len, names))
    lines = [f"{result.embeddings} embeddings; mean over all {len(names)} ids, absent ones counted as 0"]
    scores = {"": result.scores} | ({", re-matched": result.rematched} if result.rematched else {})
    for title, score in scores.items():
        lines.append(f"mIoU{title} {score.miou:.2f} %, pixel accuracy{title} {score.accuracy:.2f} %")
    if len(names) <= _LISTED_CLASSES:
        iou = result.scores.iou
        lines += [f"{name:<{width}}  {value:6.2f}" for name, value in zip(names, iou, strict=True)]
    return [*lines, *result.notes]


def of_set(records: Sequence[dict[str, Any]]) -> Measured:
    """One record of several runs: means and standard deviations, and every run's own scores."""
    summaries = [record["summary"] for record in records]
    spread = spread_of(summaries)
    origin = shared_provenance([record["provenance"] for record in records])
    numbers = ", ".join(map(str, origin["seed"]))
    lines = ["", f"{len(records)} runs, seeds {numbers}: mean ± standard deviation"]
    if "cluster_miou" in spread:
        rows = [{origin["method"]: summary} for summary in summaries]
        lines += table(rows)
        lines += table(rows, crf=True) if "crf/cluster_miou" in spread else []
    else:
        for name, values in spread.items():
            deviation = "" if values["std"] is None else f" ± {values['std']:.2f}"
            lines.append(f"{name:<22} {values['mean']:.2f}{deviation}")
    shared = {key: records[0][key] for key in ("backbone", "warning", "frozen", "classes", "label_ids")}
    runs = [{key: record[key] for key in record if key not in shared} for record in records]
    return {**shared, "provenance": origin, "summary": spread, "runs": runs}, lines


def _check_classes(checkpoint: Checkpoint, classes: int) -> None:
    if trained_without_labels(checkpoint.info):
        clusters = checkpoint.tensors["cluster.clusters"].shape[0]
        if classes > clusters:
            raise DataError(
                f"the labels have {classes} classes, {checkpoint.path} was trained without labels to "
                f"{clusters} clusters; train with --data.classes {classes} or more"
            )
        return
    if checkpoint.info["classes"] != classes:
        raise DataError(
            f"the data has {classes} classes, {checkpoint.path} {checkpoint.info['classes']}; "
            "give the data it was trained for, or --data.classes"
        )


def check_writable(out: Path) -> None:
    """Refuse a file of results that could not be written, before the work that it is for; nothing is made.

    Raises:
        DataError: its folder is none, cannot be made, or cannot be written.
    """
    folder = out.parent
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir():
        raise _unwritable(out, f"{folder} is no folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise _unwritable(out, f"no permission to write in {folder}")


def write_record(out: Path, record: dict[str, Any]) -> None:
    """Write a record of results as JSON, whole or not at all, to a new file.

    Raises:
        FileExistsError: it is there already.
        DataError: the disk refuses.
    """
    text = json.dumps(record, indent=2) + "\n"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # among them that a parent is a file: FileExistsError, but not of `out`
        raise _unwritable(out, error.strerror or error) from None
    aside = out.with_name(f".{uuid.uuid4().hex}.new")  # several may write at once
    try:
        aside.write_text(text)
        _publish(aside, out)
    except FileExistsError:
        raise
    except OSError as error:
        raise _unwritable(out, error.strerror or error) from None
    finally:
        with contextlib.suppress(OSError):
            aside.unlink(missing_ok=True)


def _publish(aside: Path, out: Path) -> None:
    """Give a whole file the name `out`, which no file has.

    Raises:
        FileExistsError: one has it.
        OSError: the disk refuses.
    """
    try:
        os.link(aside, out)
    except FileExistsError:
        raise
    except OSError:  # no hard links on this file system: take the name, then put the file there
        out.open("x").close()
        try:
            os.replace(aside, out)
        except OSError:
            out.unlink()
            raise


def _unwritable(out: Path, reason: Any) -> DataError:
    return DataError(f"cannot write {out} ({reason}); give another --out")
