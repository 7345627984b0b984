"""``sets.{json,md}`` and the figure of ``ppap analyze sets``: Table 6 and Fig. 1b over several seeds."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ppap.analysis.paper import Setting, set_quality, text
from ppap.analysis.set_quality import Decile, Quality
from ppap.escaping import markdown
from ppap.evaluation.tables import mean_and_deviation, spread_text

TITLES = {
    "ppap": "PPAP",
    "hp": "HP",
    "kmeans": "k-means",
    "fixed": "fixed threshold",
    "chance": "every patch",
}
"""Row -> its name for people, in the order of the table."""


@dataclass(frozen=True)
class SetResult:
    """One row of one seed."""

    quality: Quality
    deciles: list[Decile]


Results = dict[str, list[SetResult]]
"""Row -> one result per seed."""


def table_lines(results: Results, setting: Setting | None) -> list[str]:
    """Table 6 as Markdown: sizes and shares of every row, the paper's numbers below where it has them."""
    heads = ("|P|", "true in P", "macro", "|N|", "false in N", "macro", "no P")
    heads = [head.replace("|", "\\|") for head in heads]
    lines = ["| sets | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
    columns = ("positives", "true_micro", "true_macro", "negatives", "false_micro", "false_macro")
    for name, seeds in results.items():
        cells = [
            spread_text(
                [getattr(result.quality, column) for result in seeds], 0 if column.endswith("tives") else 1
            )
            for column in (*columns, "without_positives")
        ]
        lines.append(f"| {TITLES[name]} | " + " | ".join(cells) + " |")
    for method, cells in (set_quality(setting) if setting else {}).items():
        positives, true, negatives, false = cells.values()
        values = (text(positives, 0), text(true), "", text(negatives, 0), text(false), "", "")
        lines.append(f"| paper: {method} | " + " | ".join(values) + " |")
    return lines


def decile_lines(results: Results) -> list[str]:
    """Fig. 1b as a table: micro precision of the anchors with the smallest sets, mean over the seeds."""
    rows = {name: seeds for name, seeds in results.items() if all(seed.deciles for seed in seeds)}
    if not rows:
        return []
    shares = [point.share for point in next(iter(rows.values()))[0].deciles]
    head = "| positives [%] of the first | " + " | ".join(f"{share} %" for share in shares) + " |"
    lines = [head, "|---|" + "---:|" * len(shares)]
    for name in rows:
        means = [mean_and_deviation(column) for column in _decile_columns(rows[name], "precision_micro")]
        lines.append(
            f"| {TITLES[name]} | " + " | ".join("-" if m is None else f"{m[0]:.1f}" for m in means) + " |"
        )
    return lines


def _decile_columns(seeds: Sequence[SetResult], name: str) -> list[list[float | None]]:
    """For every decile the values of all seeds."""
    points = zip(*(seed.deciles for seed in seeds), strict=True)
    return [[getattr(point, name) for point in column] for column in points]


def record(results: Results) -> dict[str, Any]:
    """Every seed's numbers, and mean and standard deviation, as plain containers."""
    rows = {}
    for name, seeds in results.items():
        summary = {
            field.name: mean_and_deviation([getattr(result.quality, field.name) for result in seeds])
            for field in fields(Quality)
        }
        rows[name] = {
            "summary": {
                key: None if value is None else {"mean": value[0], "std": value[1]}
                for key, value in summary.items()
            },
            "seeds": [asdict(result) for result in seeds],
        }
    return rows


def write(
    folder: Path,
    title: str,
    facts: Sequence[str],
    results: Results,
    setting: Setting | None,
    extra: dict[str, Any],
) -> str:
    """``sets.json``, ``sets.md`` and, where labels are known, ``sets.{png,pdf}`` in an existing folder.

    Args:
        folder: where.
        title: heading, such as the backbone's origin.
        facts: how it was measured, one sentence each.
        results: rows in the order of the table.
        setting: the paper's benchmark that this repeats; None = another.
        extra: further keys of the JSON.

    Returns:
        The text of ``sets.md``.
    """
    values = {**extra, "facts": list(facts), "rows": record(results)}
    (folder / "sets.json").write_text(json.dumps(values, indent=2) + "\n")
    lines = [
        f"# Positive and negative sets: {markdown(title)}",
        "",
        *(f"- {markdown(fact)}" for fact in facts),
        "",
    ]
    lines += [*table_lines(results, setting), "", *_LEGEND, ""]
    deciles = decile_lines(results)
    if deciles:
        draw(results, folder / "sets.png", title)
        draw(results, folder / "sets.pdf", title)
        lines += [*deciles, "", "![mean size and precision of the smallest sets](sets.png)"]
    content = "\n".join(lines) + "\n"
    (folder / "sets.md").write_text(content, encoding="utf-8")
    return content


_LEGEND = (
    "\\|P\\| and \\|N\\|: mean sizes [patches], without the anchor. True in P, false in N: patches of the",
    "anchor's class [%] over all pairs (micro), and as a mean over anchors (macro). No P: anchors without",
    "positives [%]. Every patch: all others as positives, which is what chance gives.",
)


def draw(results: Results, path: Path, title: str) -> None:
    """Fig. 1b, a panel per row: bars = mean |P| of the first q % of the anchors, line = precision of their P.

    Args:
        results: rows; those without deciles, and "chance", are left out.
        path: PNG or PDF.
        title: above the panels.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = {name: s for name, s in results.items() if name != "chance" and all(r.deciles for r in s)}
    if not rows:
        return
    figure = Figure(figsize=(1 + 3.1 * len(rows), 3.4), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10)
    panels = figure.subplots(1, len(rows), squeeze=False, sharey=True)[0]
    for axis, (name, seeds) in zip(panels, rows.items(), strict=True):
        shares = [point.share for point in seeds[0].deciles]
        sizes = [mean_and_deviation(column)[0] for column in _decile_columns(seeds, "positives")]
        bars = axis.twinx()
        bars.bar(shares, sizes, width=7, color="0.82")
        bars.set_ylabel("mean |P| [patches]", color="0.45", fontsize=9)
        bars.tick_params(axis="y", labelsize=8, colors="0.45")
        axis.set_zorder(bars.get_zorder() + 1)  # the line before the bars
        axis.patch.set_visible(False)
        points = [mean_and_deviation(column) for column in _decile_columns(seeds, "precision_micro")]
        known = [(share, *point) for share, point in zip(shares, points, strict=True) if point is not None]
        if known:
            x, mean, deviation = zip(*known, strict=True)
            spread = [value or 0.0 for value in deviation]
            axis.errorbar(x, mean, spread if any(spread) else None, color="#0072b2", marker="o", ms=4)
        axis.set(title=TITLES[name], xlabel="anchors with the smallest P [%]", ylim=(0, 100))
        for side in (axis, bars):
            side.spines[["top"]].set_visible(False)
    panels[0].set_ylabel("patches of the anchor's class in P [%]", color="#0072b2")
    figure.savefig(path)
