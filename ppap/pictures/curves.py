"""Losses and scores over the steps of a training, by matplotlib."""

import math
import numbers
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

from ppap.pictures.palette import palette


def curves(rows: Sequence[Mapping[str, Any]], path: str | PathLike) -> None:
    """Draw losses, accuracies and mIoUs over the training steps into a PNG, two panels a row.

    Args:
        rows: records as in metrics.jsonl: ``step`` and numbers, nested mappings joined by "/". Every name
            that contains "loss" has a panel of its own, since their scales differ; names with "accuracy" or
            "iou" share the last one [%]. Others, and values that are no finite number, are left out, and so
            are rows without ``step``. A panel with a single step has bars.
        path: file to write.

    Raises:
        ValueError: no row has a loss or a score.
    """
    panels = _curve_panels(rows)
    if not panels:
        raise ValueError("curves: no row has a step together with a loss, an accuracy or an IoU")
    # Loaded here: most users of this module draw no curves.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    height = -(-len(panels) // 2)
    figure = Figure(figsize=(11, 3.1 * height), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(height, 2, squeeze=False).ravel()
    colours = palette(256) / 255
    for axis, (label, lines) in zip(axes, panels.items(), strict=False):
        axis.spines[["top", "right"]].set_visible(False)
        if len({step for points in lines.values() for step, _ in points}) == 1:
            _bars(axis, label, lines, colours)
            continue
        for i, (name, points) in enumerate(sorted(lines.items())):
            marker = "o" if len(points) <= 30 else None
            steps, values = zip(*sorted(points), strict=True)
            style = {"color": colours[i % 256], "marker": marker, "markersize": 4, "linewidth": 1.6}
            axis.plot(steps, values, label=_words(name), **style)
        axis.set_ylabel(label, fontsize=12)
        axis.set_xlabel("training step", fontsize=12)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
        if len(lines) > 1:
            axis.legend(fontsize=10, frameon=False)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    figure.savefig(path)


def _bars(axis: Any, label: str, lines: Mapping[str, Sequence[tuple[float, float]]], colours: Any) -> None:
    """What was measured once has no curve: a bar and the number each."""
    names = sorted(lines)
    values = [lines[name][0][1] for name in names]
    places = range(len(names))
    bars = axis.barh(places, values, color=colours[: len(names)], height=0.6)
    axis.bar_label(bars, fmt="%.2f", padding=4, fontsize=10)
    axis.set_yticks(places, [_words(name) for name in names])
    axis.invert_yaxis()
    axis.margins(x=0.15, y=0.4 if len(names) == 1 else 0.1)
    axis.set_xlabel(f"{label}, step {lines[names[0]][0][0]:g}", fontsize=12)


def _curve_panels(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Axis label -> name -> (step, value) points, the scores last."""
    losses: dict[str, dict[str, list[tuple[float, float]]]] = {}
    scores: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        flat = _flatten(row)
        step = flat.pop("step", None)
        for name, value in flat.items() if step is not None else ():
            if "loss" in name:
                losses.setdefault(_words(name), {}).setdefault(name, []).append((step, value))
            elif "accuracy" in name or "iou" in name:
                scores.setdefault(name, []).append((step, value))
    return {**losses, "score [%]": scores} if scores else losses


def _words(name: str) -> str:
    """A name of a record as people write it."""
    return name.replace("_", " ").replace("miou", "mIoU").replace("crf/", "CRF: ")


def _flatten(row: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The finite numbers of a record, nested mappings joined by "/"."""
    flat: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}/")
        elif isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value):
            flat[prefix + name] = float(value)
    return flat
