"""``report.md`` of a run: what was run, how it went, the last scores, curves and a strip of images."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ppap.data import SegmentationDataset, class_colours
from ppap.evaluation.comparison import Row, table
from ppap.evaluation.crf import crf_implementation
from ppap.evaluation.evaluate import Evaluation, pixel_scores
from ppap.evaluation.metrics import Scores, apply_assignment
from ppap.methods.engine import Engine
from ppap.methods.table import TITLES
from ppap.pictures.drawing import curves, strip
from ppap.reports.positives import draw_positives
from ppap.reports.provenance import device_name, provenance, versions
from ppap.runs.checkpoint import Checkpoint
from ppap.runs.rundir import RunDir
from ppap.settings.config import Config, config_hash

_POSITIVE_IMAGES = 6  # in the picture of positives
RANDOM_WARNING = "backbone: random weights; results are meaningless"
FINAL_SCORES = "evaluation-final.json"
"""A run's own scores, of the selected checkpoint, without CRF."""


def write_report(
    run: RunDir,
    config: Config,
    engine: Engine,
    dataset: SegmentationDataset,
    evaluation: Evaluation | None,
    facts: Sequence[str] = (),
    comparison: Mapping[str, Row] | None = None,
) -> None:
    """Draw the pictures and write ``report.md``.

    Args:
        run: the run directory.
        config: its settings.
        engine: the trained network.
        dataset: images for the strip (validation images, or training images where there are none).
        evaluation: scores on them; None for images without labels.
        facts: further lines for the top of the report.
        comparison: rows of ``--compare.rows``, for a table and a strip of their own.
    """
    rows = run.rows()
    curves(_drawn(rows), run.pictures / "curves.png")
    has_strip = config.eval.pictures > 0
    if has_strip:
        draw_strip(engine, dataset, evaluation, config.eval.pictures, run.pictures / "strip.png")
    losses = [row for row in rows if "loss" in row]
    lines = [f"# Run {run.path.name}", ""]
    if engine.net.backbone.is_random:
        lines += [f"> **{RANDOM_WARNING}**", ""]
    lines += [
        f"- preset `{config.preset}`, method `{config.method}`, protocol {config.protocol}, "
        f"seed {config.train.seed}, "
        f"settings `{config_hash(config)}`",
        f"- backbone: {engine.net.backbone.origin}",
        f"- device: {device_name(engine.device)}; "
        + ", ".join(f"{name} {version}" for name, version in versions().items()),
        *(f"- {fact}" for fact in facts),
    ]
    if losses:
        first, last = losses[0], losses[-1]
        lines += [f"- loss {row['loss']:.3f} at step {row['step']}" for row in (first, last)]
        hint = sets_hint(last) if engine.method.propagation else None
        if hint:
            lines += ["", f"> **Step {last['step']}: {hint}**"]
    if comparison:
        lines += ["", "## Comparison", "", *comparison_lines(config, [summaries(comparison)])]
        if has_strip:
            path = run.pictures / "comparison.png"
            draw_comparison(engine, dataset, comparison, config.eval.pictures, path)
            lines += ["", "![images, truth and clusters of every row](pictures/comparison.png)"]
    lines += ["", "## Scores", "", _SCORES_TEXT, "", *score_lines(evaluation, dataset.class_names)]
    lines += ["", "## Curves", "", "![curves](pictures/curves.png)"]
    if has_strip:
        lines += ["", "## Images", "", "![images](pictures/strip.png)"]
    if has_strip and _draw_positives(engine, dataset, run.pictures / "positives.png"):
        lines += ["", "## Positives", "", *_POSITIVES_TEXT, "", "![positives](pictures/positives.png)"]
    lines += ["", "## Next", "", *_next_steps(run, evaluation is not None, config)]
    (run.path / "report.md").write_text("\n".join(lines) + "\n")


def _drawn(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Records without the linear probe's loss where it was 0 throughout, for want of labels."""
    if any(row.get("linear_loss") for row in rows):
        return list(rows)
    return [{key: row[key] for key in row if key != "linear_loss"} for row in rows]


def score_lines(evaluation: Evaluation | None, names: Sequence[str]) -> list[str]:
    """Markdown tables of an evaluation: scores, then IoU per class."""
    if evaluation is None:
        return ["No labels, hence no scores."]
    lines = ["| probe | CRF | accuracy [%] | mIoU [%] |", "|---|---|---:|---:|"]
    for name, scores in (("no", evaluation.plain), ("yes", evaluation.crf)):
        lines += [f"| {probe} | {name} | {s.accuracy:.2f} | {s.miou:.2f} |" for probe, s in scores.items()]
    lines += ["", "| IoU [%] | " + " | ".join(evaluation.plain) + " |"]
    lines.append("|---|" + "---:|" * len(evaluation.plain))
    for i, name in enumerate(names):
        values = [scores.iou[i] for scores in evaluation.plain.values()]
        lines.append(f"| {name} | " + " | ".join("-" if v is None else f"{v:.1f}" for v in values) + " |")
    return lines + [f"\n{note}" for note in evaluation.notes]


def sets_hint(row: Mapping[str, Any]) -> str | None:
    """What to do about a logged step of PPAP whose positive or negative sets were all empty."""
    if row.get("positives") == 0:
        return (
            "no anchor has a positive, so that the contrastive loss is 0; lower --loss.phi0 "
            "(ppap analyze thresholds suggests a value)"
        )
    if row.get("negatives") == 0:
        return (
            "no anchor has a negative, so that nothing is pushed apart; raise --loss.psi0 "
            "(ppap analyze thresholds suggests a value)"
        )
    return None


def _next_steps(run: RunDir, labelled: bool, config: Config) -> list[str]:
    commands = [f"python -m ppap.predict {run.path} IMAGES --out masks"]
    if labelled:
        commands.append(f"python -m ppap.eval {run.path}")
    lines = ["```", *commands, "```"]
    if config.data.kind == "scenes":
        lines += ["", *_OWN_IMAGES]
    return lines


_OWN_IMAGES = (
    "With your own images, `DIR` being any folder of them; with `images/{train,val}` and",
    "`labels/{train,val}` it is scored too. The backbone is DINO's, downloaded by timm:",
    "",
    "```",
    "python -m ppap.train folder --data.root DIR",
    "```",
    "",
    "Or pretrain a backbone on them, and find its thresholds without labels:",
    "",
    "```",
    "python -m ppap.pretrain folder --data.root DIR --train.out vit",
    "python -m ppap.analyze thresholds folder --data.root DIR --model.weights vit/backbone --out thresholds",
    "```",
)
_SCORES_TEXT = (
    "Of the probes that were trained along with the network, as `ppap eval` measures them. The comparison, "
    "where there is one, fits probes of its own to every row."
)
_POSITIVES_TEXT = (
    "Anchors (framed) and their positives among the frozen features, by propagation step. Lit patches are in",
    "the set: green where they have the anchor's class, red where not (yellow where the class is not known).",
    "Above each picture: the number of patches in the set, and how many percent of them have that class.",
)


def evaluation_record(
    config: Config, engine: Engine, checkpoint: Checkpoint, evaluation: Evaluation
) -> dict[str, Any]:
    """All of an evaluation of both probes, as plain containers for JSON."""
    crf = crf_implementation(config.eval.crf if evaluation.crf else "none", engine.device)
    return {
        **backbone_facts(engine),
        "provenance": provenance(config, engine.device, checkpoint, crf=crf),
        "summary": evaluation.summary(),
        "scores": evaluation.to_dict(),
    }


def backbone_facts(engine: Engine) -> dict[str, Any]:
    """Where the backbone came from, and the warning that random weights deserve."""
    backbone = engine.net.backbone
    return {"backbone": backbone.origin, "warning": RANDOM_WARNING if backbone.is_random else None}


def comparison_record(config: Config, engine: Engine, rows: Mapping[str, Row], step: int) -> dict[str, Any]:
    """All of a comparison, as plain containers for JSON; `step` is that of the run's network."""
    ran = any(row.scores.crf for row in rows.values())
    crf = crf_implementation(config.eval.crf if ran else "none", engine.device)
    why = "the last step, for every row alike"
    return {
        **backbone_facts(engine),
        "provenance": provenance(config, engine.device, engine.weights(), step=step, selection=why, crf=crf),
        "summary": summaries(rows),
        "scores": {name: row.scores.to_dict() for name, row in rows.items()},
    }


def summaries(rows: Mapping[str, Row]) -> dict[str, dict[str, float]]:
    """Row name -> its four scores [%]."""
    return {name: row.scores.summary() for name, row in rows.items()}


def comparison_lines(config: Config, results: Sequence[Mapping[str, Mapping[str, float]]]) -> list[str]:
    """The table of one or more seeds, and how it was made."""
    compare, lines = config.compare, table(results)
    if all("crf/cluster_miou" in row for row in results[0].values()):
        lines += ["", *table(results, crf=True)]
    if len(results) > 1:
        lines += ["", f"Mean ± standard deviation of {len(results)} seeds."]
    lines += [
        "",
        f"Every row's probes: {compare.steps} steps of {compare.batch_size} images, Adam from {compare.lr:g} "
        f"to 0, the same seed; of {compare.starts} cluster probes the one with the least loss, which no "
        "label enters. Clusters are matched to classes once, for the score.",
    ]
    return lines


def draw_comparison(
    engine: Engine, dataset: SegmentationDataset, comparison: Mapping[str, Row], count: int, path: Path
) -> None:
    """Image | truth | clusters of every row, of `count` images over the set."""
    patch, rows = engine.net.backbone.patch_size, []
    for index in spread(len(dataset), count):
        sample, cells = dataset[index], [dataset.pixels(index)]
        size = tuple(sample["label"].shape)
        cells.append(sample["label"])
        for row in comparison.values():
            code = row.code_of(sample["image"][None].to(engine.device))
            clusters = pixel_scores(code, row.probes, patch, size, with_length=False)[0].argmax(dim=0).cpu()
            cells.append(apply_assignment(clusters, row.scores.plain["cluster"].assignment))
        rows.append(cells)
    titles = ["image", "truth", *(TITLES[name] for name in comparison)]
    strip(
        rows,
        titles,
        path,
        colours=class_colours(engine.config.data.kind, dataset.classes),
        names=dataset.class_names,
    )


def _draw_positives(engine: Engine, dataset: SegmentationDataset, path: Path) -> bool:
    """Draw the propagation's positives on a few images; False where there are none to draw."""
    propagation = engine.method.propagation
    if propagation is None:
        return False
    indices = spread(len(dataset), _POSITIVE_IMAGES)
    return bool(draw_positives(engine.net.eval(), dataset, indices, propagation, path))


def draw_strip(
    engine: Engine, dataset: SegmentationDataset, evaluation: Evaluation | None, count: int, path: Path
) -> None:
    """Image | truth | clusters | linear of `count` images over the set; unlabelled: image | clusters."""
    assignment = evaluation.plain["cluster"].assignment if evaluation else None
    ids = dataset.classes if assignment else len(engine.cluster.clusters)
    colours = class_colours(engine.config.data.kind, ids)
    rows = []
    for index in spread(len(dataset), count):
        sample, picture = dataset[index], dataset.pixels(index)
        cluster, linear = predict_crop(engine, sample["image"])
        row = [picture]
        if dataset.labelled:
            row.append(sample["label"])
        row.append(apply_assignment(cluster, assignment) if assignment else cluster)
        if dataset.labelled:
            row.append(linear)
        rows.append(row)
    titles = ["image", "truth", "clusters", "linear"] if dataset.labelled else ["image", "clusters"]
    strip(rows, titles, path, colours=colours, names=dataset.class_names if dataset.labelled else ())


def predict_crop(engine: Engine, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cluster and class ids (H, W) int64 on the CPU of one normalised image (3, H, W)."""
    code = engine.code(image[None].to(engine.device))
    size = (image.shape[1], image.shape[2])
    scores = pixel_scores(code, engine.probes, engine.net.backbone.patch_size, size, with_length=False)
    return scores[0].argmax(dim=0).cpu(), scores[1].argmax(dim=0).cpu()


def spread(length: int, count: int) -> list[int]:
    """At most `count` indices spread evenly over 0..length-1."""
    count = min(count, length)
    return [math.floor((i + 0.5) * length / count) for i in range(count)]


def score_table(evaluation: Evaluation, names: Sequence[str]) -> str:
    """Plain-text table of all scores, per class too, for the terminal."""
    columns: list[tuple[str, Scores]] = [(probe, s) for probe, s in evaluation.plain.items()]
    columns += [(f"{probe}+CRF", s) for probe, s in evaluation.crf.items()]
    width = max(len("pixel accuracy"), *(len(name) for name in names))
    lines = [f"{'[%]':<{width}}  " + "  ".join(f"{title:>11}" for title, _ in columns)]

    def line(title: str, values: list[Any]) -> str:
        cells = ["-" if value is None else f"{value:.2f}" for value in values]
        return f"{title:<{width}}  " + "  ".join(f"{cell:>11}" for cell in cells)

    lines.append(line("pixel accuracy", [s.accuracy for _, s in columns]))
    lines.append(line("mIoU", [s.miou for _, s in columns]))
    lines += [line(name, [s.iou[i] for _, s in columns]) for i, name in enumerate(names)]
    return "\n".join(lines)
