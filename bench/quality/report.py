"""``quality.md``, ``quality.json`` and ``quality.png``: every row's scores, and how far PPAP is from them."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from bench.quality.settings import DATA_SETS, POOL, TRAINED, UNTRAINED
from ppap.analysis import set_report
from ppap.evaluation.tables import has_crf, mean_and_deviation, other_ways, score_lines, spread_text
from ppap.methods.table import TITLES

Rows = Mapping[str, Mapping[int, Mapping[str, float]]]
"""Row -> seed -> scores [%]."""
SCORE = "cluster_miou"
ORDER = tuple(name for name in TITLES if name in (*UNTRAINED, *TRAINED))


class Difference(NamedTuple):
    """Of the means of two rows, over seeds."""

    mean: float
    """[points]."""
    deviation: float
    """Root of the sum of the two variances; NaN for one seed."""

    @property
    def clear(self) -> bool:
        """Whether it is more than two standard deviations, in whichever direction."""
        return abs(self.mean) > 2 * self.deviation

    def __str__(self) -> str:
        spread = "" if math.isnan(self.deviation) else f" ± {self.deviation:.1f}"
        return f"{round(self.mean, 1) + 0.0:+.1f}{spread}"  # + 0.0: no "-0.0"


def difference(a: Sequence[float], b: Sequence[float]) -> Difference:
    """Row `a` minus row `b`."""
    spread = [np.var(values, ddof=1) if len(values) > 1 else np.nan for values in (a, b)]
    return Difference(float(np.mean(a) - np.mean(b)), float(np.sqrt(sum(spread))))


def values(row: Mapping[int, Mapping[str, float]], key: str = SCORE) -> list[float]:
    """One score of all seeds of a row."""
    return [scores[key] for scores in row.values()]


def overview_lines(results: Mapping[str, Rows]) -> list[str]:
    """Methods x data sets: the cluster mIoU, by every way that clusters were found.

    In brackets stands the number of seeds where it is not that of most cells, or the larger of two such.
    """
    summaries = [scores for rows in results.values() for seeds in rows.values() for scores in seeds.values()]
    counts = [len(seeds) for rows in results.values() for seeds in rows.values()]
    usual = max(sorted(counts, reverse=True), key=counts.count, default=0)
    of = f"Means ± standard deviations of {usual} seeds" if usual > 1 else "Scores of one seed"
    lines = [f"{of}, in brackets of how many where they are not; empty: not measured.", ""]
    for key, head in {SCORE: "cluster mIoU", **other_ways(summaries)}.items():
        lines += [f"| {head} [%] | " + " | ".join(DATA_SETS.get(name, name) for name in results) + " |"]
        lines += ["|---|" + "---:|" * len(results)]
        for row in _rows_of(results):
            cells = [_cell(rows.get(row, {}), key, usual) for rows in results.values()]
            lines.append(f"| {TITLES[row]} | " + " | ".join(cells) + " |")
        lines.append("")
    return lines


def _rows_of(results: Mapping[str, Rows]) -> list[str]:
    """Rows that any data set has, in the order of tables."""
    return [row for row in ORDER if any(row in rows for rows in results.values())]


def _cell(row: Mapping[int, Mapping[str, float]], key: str, usual: int) -> str:
    """Mean and deviation of one score, and of how many seeds where they are not as many as usual."""
    found = [scores[key] for scores in row.values() if key in scores]
    if not found:
        return ""
    return spread_text(found) + (f" ({len(found)})" if len(found) != usual else "")


def dataset_lines(name: str, rows: Rows, sets: Mapping[str, Any] | None) -> list[str]:
    """The section of one data set."""
    titles = {TITLES[row]: list(rows[row].values()) for row in ORDER if row in rows}
    counts = {title: str(len(seeds)) for title, seeds in titles.items()}
    lines = [f"## {DATA_SETS.get(name, name)}", "", *score_lines(titles, extra={"seeds": counts})]
    if has_crf(titles):
        lines += ["", *score_lines(titles, crf=True)]
    if "ppap" in rows:
        lines += ["", *difference_lines(rows)]
    if sets:
        lines += ["", *set_lines(sets)]
    return [*lines, ""]


def difference_lines(rows: Rows) -> list[str]:
    """PPAP minus every other row, in cluster and linear mIoU."""
    lines = ["| PPAP minus [points] | cluster mIoU | linear mIoU |", "|---|---:|---:|"]
    for other in (name for name in ORDER if name in rows and name not in ("ppap", "colour", "oracle")):
        cells = []
        for key in (SCORE, "linear_miou"):
            found = difference(values(rows["ppap"], key), values(rows[other], key))
            cells.append(f"**{found}**" if found.clear else str(found))
        lines.append(f"| {TITLES[other]} | " + " | ".join(cells) + " |")
    return lines


def set_lines(sets: Mapping[str, Any]) -> list[str]:
    """Sizes and purity of the sets that the losses are formed from."""
    lines = [
        "| sets of a batch | positives [patches] | true: pairs / anchors [%] | negatives | false [%] |",
        "|---|---:|---:|---:|---:|",
    ]
    for name, row in sets.items():
        own = row["summary"]
        true = f"{_mean(own['true_micro'])} / {_mean(own['true_macro'])}"
        sizes = [_mean(own[key], 0) for key in ("positives", "negatives")]
        cells = [set_report.TITLES[name], sizes[0], true, sizes[1], _mean(own["false_micro"])]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, "", f"HP's sets are by a reference pool of {POOL} patches, each of another image."]


def _mean(value: Mapping[str, float] | None, digits: int = 1) -> str:
    """Mean of a figure of ``sets.json``; ``-`` where there is none."""
    mean = math.nan if value is None else value["mean"]
    return "-" if math.isnan(mean) else f"{mean:,.{digits}f}"


def write(out: Path, results: Mapping[str, Rows], sets: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    """All three files, of what is finished; returns the Markdown.

    Args:
        out: folder.
        results: data set -> rows.
        sets: data set -> rows of ``sets.json`` of ``ppap analyze sets``.
        facts: settings for the JSON; ``facts["lines"]`` stand above the tables.
    """
    lines = ["# Quality on labelled photographs", "", *(f"- {line}" for line in facts["lines"]), ""]
    lines += ["![cluster mIoU of every method and data set](quality.png)", "", *overview_lines(results)]
    for name, rows in results.items():
        lines += dataset_lines(name, rows, sets.get(name))
    text = "\n".join(lines)
    (out / "quality.md").write_text(text, encoding="utf-8")
    record = {"facts": facts, "results": results, "sets": sets}
    (out / "quality.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    draw(out / "quality.png", results)
    return text


COLOURS = {
    "colour": "#bbbbbb",
    "frozen": "#888888",
    "conditioned": "#555555",
    "fixed": "#e69f00",
    "tps": "#f0e442",
    "ans": "#cc79a7",
    "random": "#dddddd",
    "hp": "#009e73",
    "stego": "#56b4e9",
    "ppap": "#d55e00",
}


def draw(path: Path, results: Mapping[str, Rows]) -> None:
    """Bars of the cluster mIoU, with standard deviations of several seeds, a group per data set.

    Without the row that reads labels, which would take half of the axis; tables have it.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [name for name in _rows_of(results) if name != "oracle"]
    width = 2.2 + 2.2 * len(results)
    figure = Figure(figsize=(width, 3.8), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    groups = [[name for name in names if name in rows] for rows in results.values()]
    bar = 0.85 / max([1, *map(len, groups)])
    for row in names:
        shown = [(i, rows[row]) for i, rows in enumerate(results.values()) if row in rows]
        found = [mean_and_deviation(values(seeds)) for _, seeds in shown]
        # An error bar of length 0 would look like certainty: a single seed has none.
        means = [mean for mean, _ in found]
        spread = [np.nan if deviation is None else deviation for _, deviation in found]
        middle = [i + bar * (groups[i].index(row) - (len(groups[i]) - 1) / 2) for i, _ in shown]
        axis.bar(
            middle,
            means,
            bar,
            yerr=spread,
            capsize=2,
            color=COLOURS[row],
            label=TITLES[row],
            error_kw={"linewidth": 1},
        )
    axis.set_xticks(range(len(results)), [DATA_SETS.get(name, name) for name in results])
    axis.set_ylabel("cluster mIoU [%]")
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    if names:
        figure.legend(loc="outside lower center", ncol=min(4, int(width // 2)), frameon=False, fontsize=9)
    figure.savefig(path)
