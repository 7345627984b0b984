"""Fig. 4: scores over the values of each hyper-parameter."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ppap.evaluation.tables import SCORES, Summary, mean_and_deviation

Points = Mapping[float, Sequence[Summary]]
"""Value -> summaries of the runs that have it."""

_COLOURS = ("#0072b2", "#56b4e9", "#d55e00", "#e69f00")
_GREEK = {"sigma_pos": "σ_pos", "sigma_amb": "σ_amb", "phi0": "Φ₀", "psi0": "Ψ₀"}


def draw(curves: Mapping[str, Points], base: Mapping[str, float], path: Path, title: str, crf: bool) -> None:
    """A panel per hyper-parameter, a line per score; a band of one deviation where there are several runs.

    Args:
        curves: hyper-parameter -> points.
        base: hyper-parameter -> the preset's value, drawn as a dashed line.
        path: PNG or PDF.
        title: above the panels.
        crf: draw the scores with CRF.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1 + 3 * len(curves), 3.6), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=10)
    panels = figure.subplots(1, len(curves), squeeze=False, sharey=True)[0]
    for axis, (name, points) in zip(panels, curves.items(), strict=True):
        values = sorted(points)
        for score, colour in zip(SCORES, _COLOURS, strict=True):
            key = f"crf/{score}" if crf else score
            spread = [mean_and_deviation([summary[key] for summary in points[v]]) for v in values]
            mean = np.array([m for m, _ in spread])
            deviation = np.array([d or 0.0 for _, d in spread])
            label = score.replace("_", " ").replace("miou", "mIoU")
            axis.plot(values, mean, color=colour, marker="o", ms=4, label=label)
            if deviation.any():
                axis.fill_between(values, mean - deviation, mean + deviation, color=colour, alpha=0.15, lw=0)
        axis.axvline(base[name], color="0.6", linestyle="--", linewidth=1, zorder=0)
        axis.set_xlabel(_GREEK.get(name, name))
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("score with CRF [%]" if crf else "score [%]")
    panels[0].set_ylim(0, 100)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncol=4, frameon=False)
    figure.savefig(path)
