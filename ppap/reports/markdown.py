"""``report.md`` of a run: what was run, how it went, the last scores, curves and a strip of images."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from ppap.data import SegmentationDataset
from ppap.escaping import markdown, visible
from ppap.evaluation.comparison import FITTED, Row
from ppap.evaluation.evaluate import Evaluation
from ppap.evaluation.tables import table
from ppap.methods.engine import Engine
from ppap.nets.clustering import FINE
from ppap.pictures.curves import curves
from ppap.reports.provenance import device_name, versions
from ppap.reports.records import RANDOM_WARNING, summaries
from ppap.reports.strips import draw_comparison, draw_report_positives, draw_strip
from ppap.reports.terminal import sets_hint
from ppap.runs.rundir import RunDir
from ppap.settings.config import Config, config_hash


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
    lines = [f"# {markdown(run.path.name)}", ""]
    if engine.net.backbone.is_random:
        lines += [f"> **{RANDOM_WARNING}**", ""]
    lines += [
        f"- preset `{config.preset}`, method `{config.method}`, protocol {config.protocol}, "
        f"seed {config.train.seed}, "
        f"settings `{config_hash(config)}`",
        f"- backbone: {markdown(engine.net.backbone.origin)}",
        f"- device: {markdown(device_name(engine.device))}; "
        + ", ".join(f"{name} {version}" for name, version in versions().items()),
        *(f"- {markdown(fact)}" for fact in facts),
    ]
    if losses:
        first, last = losses[0], losses[-1]
        lines += [f"- loss {row['loss']:.3f} at step {row['step']}" for row in (first, last)]
        hint = sets_hint(last) if engine.method.propagation else None
        if hint:
            lines += ["", f"> **Step {last['step']}: {hint}**"]
    if comparison:
        spread = {name: row.scores.spread() for name, row in comparison.items()}
        lines += ["", "## Comparison", "", *comparison_lines(config, [summaries(comparison)], spread)]
        if has_strip:
            path = run.pictures / "comparison.png"
            draw_comparison(engine, dataset, comparison, config.eval.pictures, path)
            lines += ["", "![images, truth and clusters of every row](pictures/comparison.png)"]
    lines += ["", "## Scores", "", _scores_text(config), "", *score_lines(evaluation, dataset.class_names)]
    lines += ["", "## Curves", "", "![curves](pictures/curves.png)"]
    if has_strip:
        lines += ["", "## Images", "", "![images](pictures/strip.png)"]
    if has_strip and draw_report_positives(engine, dataset, run.pictures / "positives.png"):
        lines += ["", "## Positives", "", *_POSITIVES_TEXT, "", "![positives](pictures/positives.png)"]
    lines += ["", "## Next", "", *_next_steps(run, evaluation is not None, config)]
    run.write_text("report.md", "\n".join(lines) + "\n")


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
        lines.append(
            f"| {markdown(name)} | " + " | ".join("-" if v is None else f"{v:.1f}" for v in values) + " |"
        )
    return lines + [f"\n{note}" for note in evaluation.notes]


def _next_steps(run: RunDir, labelled: bool, config: Config) -> list[str]:
    path = visible(str(run.path), one_line=True)
    commands = [f"python -m ppap.predict {path} IMAGES --out masks"]
    if labelled:
        commands.append(f"python -m ppap.eval {path}")
    else:
        commands.insert(0, f"python -m ppap.atlas {path}")  # where clusters get their names
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


def _scores_text(config: Config) -> str:
    init = config.eval.cluster_init
    clusters = "clusters" if init == "random" else f"the clusters of {FITTED[init]} on its code"
    return (
        f"Of the linear probe that was trained along with the network and {clusters}, as `ppap eval` "
        "measures them. The comparison, where there is one, fits probes of its own to every row."
    )


_POSITIVES_TEXT = (
    "Anchors (framed) and their positives among the frozen features, by propagation step. Lit patches are in",
    "the set: green where they have the anchor's class, red where not (yellow where the class is not known).",
    "Above each picture: the number of patches in the set, and how many percent of them have that class.",
)


def comparison_lines(
    config: Config,
    results: Sequence[Mapping[str, Mapping[str, float]]],
    spread: Mapping[str, Mapping[str, float]] = MappingProxyType({}),
) -> list[str]:
    """The table of one or more seeds, and how it was made; `spread` as :func:`table` has it."""
    compare, lines = config.compare, table(results, spread=spread)
    with_crf = all("crf/cluster_miou" in row for row in results[0].values())
    if with_crf:
        lines += ["", *table(results, crf=True)]
    if len(results) > 1:
        lines += ["", f"Mean ± standard deviation of {len(results)} seeds."]
    clusters = {
        "kmeans": f"clusters by k-means, the best of {compare.starts} starts",
        "linkage": f"clusters by average linkage of {FINE} times as many small ones that k-means finds",
        "random": f"of {compare.starts} cluster probes the one with the least loss",
    }[config.eval.cluster_init]
    if compare.clusterings > 1 and config.eval.cluster_init != "random":
        deviations = " ± standard deviation" if any(spread.values()) else ""
        clusters += f", mean{deviations} of the scores of {compare.clusterings} clusterings"
        clusters += " (with CRF: of the first)" if with_crf else ""
    lines += [
        "",
        f"Every row's probes: {compare.steps} steps of {compare.batch_size} images, Adam from {compare.lr:g} "
        f"to 0, the same seed; {clusters}, which no label enters. Clusters are matched to classes once, for "
        "the score.",
    ]
    return lines
