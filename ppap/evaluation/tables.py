"""Markdown tables of scores: rows of one run or of several seeds."""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType

import numpy as np

from ppap.evaluation.comparison import FITTED
from ppap.evaluation.evaluate import UNREFINED
from ppap.methods.table import TITLES

SCORES = ("cluster_accuracy", "cluster_miou", "linear_accuracy", "linear_miou")
"""Keys of a summary of scores, in the order of the paper's tables; with CRF they begin with ``crf/``."""

Summary = Mapping[str, float]
"""Score name -> percent, as :meth:`ppap.evaluation.evaluate.Evaluation.summary` gives it."""


def mean_and_deviation(values: Sequence[float | None]) -> tuple[float, float | None] | None:
    """Mean and standard deviation of the values that exist; None where there are too few."""
    known = np.array([value for value in values if value is not None])
    if not len(known):
        return None
    return float(known.mean()), float(known.std(ddof=1)) if len(known) > 1 else None


def spread_text(values: Sequence[float | None], digits: int = 1) -> str:
    """``mean ± deviation``; the number alone where there is one, ``-`` where there is none."""
    found = mean_and_deviation(values)
    if found is None:
        return "-"
    mean, deviation = found
    return f"{mean:,.{digits}f}" + ("" if deviation is None else f" ± {deviation:,.{digits}f}")


def has_crf(rows: Mapping[str, Sequence[Summary]]) -> bool:
    """Whether every run of every row has scores with CRF."""
    return all(f"crf/{SCORES[0]}" in summary for seeds in rows.values() for summary in seeds)


def other_ways(summaries: Iterable[Summary], *, crf: bool = False) -> dict[str, str]:
    """Keys of the mIoU by other ways than that of the runs, where it was measured -> heads of their columns.

    Without CRF by other ways to find clusters; with it that of the very same clusters without.
    """
    measured = {key for summary in summaries for key in summary}
    keys = {f"{name}/cluster_miou": f"cluster mIoU by {title}" for name, title in FITTED.items()}
    if crf:
        keys = {UNREFINED: "of the same clusters without CRF"}
    return {key: head for key, head in keys.items() if key in measured}


def score_lines(
    rows: Mapping[str, Sequence[Summary]],
    *,
    crf: bool = False,
    spread: Mapping[str, Summary] = MappingProxyType({}),
    extra: Mapping[str, Mapping[str, str]] = MappingProxyType({}),
) -> list[str]:
    """A Markdown table: a row per name, four scores as mean ± deviation over its runs, ``-`` = not measured.

    Behind the cluster mIoU stands what :func:`other_ways` finds.

    Args:
        rows: name -> summaries of its runs.
        crf: the scores with CRF.
        spread: name -> standard deviations of the scores, shown where there is a single run.
        extra: further columns: head -> row name -> text.
    """
    heads = {("crf/" if crf else "") + key: key.replace("_", " ").replace("miou", "mIoU") for key in SCORES}
    others = other_ways((summary for runs in rows.values() for summary in runs), crf=crf)
    keys = [*heads][:2] + [*others] + [*heads][2:]
    titles = ["with CRF [%]" if crf else "[%]", *((heads | others)[key] for key in keys), *extra]
    lines = ["| " + " | ".join(titles) + " |", "|---|" + "---:|" * (len(titles) - 1)]
    for name, runs in rows.items():
        cells = [spread_text([summary.get(key) for summary in runs]) for key in keys]
        if len(runs) == 1:
            deviations = [spread.get(name, {}).get(key) for key in keys]
            cells = [
                cell if deviation is None else f"{cell} ± {deviation:.1f}"
                for cell, deviation in zip(cells, deviations, strict=True)
            ]
        cells += [column.get(name, "") for column in extra.values()]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return lines


def table(
    results: Sequence[Mapping[str, Summary]],
    *,
    crf: bool = False,
    spread: Mapping[str, Summary] = MappingProxyType({}),
) -> list[str]:
    """:func:`score_lines` of a comparison's rows, in the order of :data:`TITLES`.

    Args:
        results: one per seed: row name -> summary.
        crf: the scores with CRF instead of those without.
        spread: row name -> :meth:`Evaluation.spread`, shown where there is one seed.
    """
    names = [name for name in TITLES if name in results[0]]
    rows = {TITLES[name]: [result[name] for result in results] for name in names}
    return score_lines(rows, crf=crf, spread={TITLES[name]: spread[name] for name in names if name in spread})
