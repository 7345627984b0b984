"""Markdown tables of scores over several seeds."""

from collections.abc import Mapping, Sequence

import numpy as np

from ppap.evaluation.comparison import other_ways

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


def score_lines(
    rows: Mapping[str, Sequence[Summary]],
    *,
    crf: bool = False,
    extra: Mapping[str, Mapping[str, str]] | None = None,
) -> list[str]:
    """A Markdown table: a row per name, the four scores as mean ± deviation over its runs.

    Without CRF the mIoU by the other way to find clusters stands behind them, where runs have it.

    Args:
        rows: name -> summaries of its runs.
        crf: the scores with CRF.
        extra: further columns: head -> row name -> text.
    """
    extra = extra or {}
    others = {} if crf else other_ways(summary for seeds in rows.values() for summary in seeds)
    heads = [*(name.replace("_", " ").replace("miou", "mIoU") for name in SCORES), *others.values(), *extra]
    lines = [
        f"| {'with CRF [%]' if crf else '[%]'} | " + " | ".join(heads) + " |",
        "|---|" + "---:|" * len(heads),
    ]
    for name, seeds in rows.items():
        keys = [*(f"crf/{key}" if crf else key for key in SCORES), *others]
        cells = [spread_text([summary.get(key) for summary in seeds]) for key in keys]
        cells += [column.get(name, "") for column in extra.values()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines
