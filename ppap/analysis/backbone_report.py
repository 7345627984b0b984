"""``backbone.{md,json}``: a judgement in words, tables of conditions without and with labels, a command."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ppap.analysis.backbone import LabelFree
from ppap.analysis.backbone_labels import SHARES, Frozen, Purity
from ppap.escaping import markdown, visible
from ppap.evaluation.tables import spread_text

RAW_MEDIAN = 0.3
"""Median cosine of two random patches from which on those of raw features are said to crowd together."""
PLACE_R2 = 0.5
"""Share of the variance of row or column from which on place is said to be a part of every cosine."""


@dataclass(frozen=True)
class Findings:
    """All that ``ppap analyze backbone`` found."""

    origin: str
    """Of the weights."""
    is_random: bool
    facts: Sequence[str]
    """How it was measured, a sentence each."""
    aim: float
    """Size of a positive set [share of the patches]."""
    position: tuple[float, float]
    """R² of a patch's row and column."""
    shares: list[float]
    """Of the variance, of every component."""
    chosen: str
    """Condition that auto takes."""
    rate: float
    """Learning rate that suits the last block."""
    rows: dict[str, LabelFree]
    command: str = ""
    """That trains with what is suggested."""
    purity: dict[str, Purity] = field(default_factory=dict)
    """Empty without labels."""
    frozen: dict[str, Frozen] = field(default_factory=dict)
    """Empty without labelled validation images."""
    chance: float | None = None
    """Purity of patches drawn at random [%]; None without labels."""


def judge(found: Findings) -> tuple[str, list[str]]:
    """A sentence on whether the backbone suits the images, and its reasons; no label enters.

    It is about whether sets can be formed at all. Whether they hold one class each, only eyes or labels can
    tell.
    """
    raw, own = found.rows["none"], found.rows[found.chosen]
    name = found.chosen
    reasons = [
        f"cosines of two random patches have median {raw.median:.2f}, and 95 % of them are below "
        f"{raw.most:.2f}; with {name} {own.median:.2f} and {own.most:.2f}",
        _sizes(raw, found.aim, "raw features"),
        _sizes(own, found.aim, name),
    ]
    row, column = found.position
    if max(row, column) >= PLACE_R2:
        reasons.append(
            f"a patch's place can be read from its features (R² of the row {row:.2f}, of the column "
            f"{column:.2f}): part of every cosine is place, which helps where place means something, as sky "
            "above road does, and misleads elsewhere"
        )
    if found.is_random:
        verdict = "These are random weights: nothing below means anything."
    elif not own.reached:
        verdict = (
            f"Doubtful: even with {name} no threshold gives sets of the wanted size. Try another "
            "--model.condition of the table, another --loss.positives, more images or another backbone."
        )
    elif not raw.reached:
        verdict = (
            f"Usable with --model.condition {name}: sets of raw features jump in size, those of conditioned "
            "ones do not."
        )
    elif raw.median >= RAW_MEDIAN:
        verdict = (
            f"Usable; --model.condition {name} is suggested: cosines of raw features crowd together, those "
            "of conditioned ones leave thresholds more room."
        )
    else:
        verdict = f"Usable: sets of the wanted size can be formed, of raw features as with {name}."
    return verdict, reasons


def _sizes(row: LabelFree, aim: float, of: str) -> str:
    if row.reached:
        return f"{of}: phi0 {row.phi0:g} gives sets of {100 * row.positives:.2g} % (aim {100 * aim:.2g} %)"
    large, small = (f"{100 * size:.2g} %" for size in row.jump)
    return f"{of}: no threshold gives sets of about {100 * aim:.2g} %, they jump from {large} to {small}"


def _said_by_labels(found: Findings) -> str:
    """Raw features beside the suggested condition, in a sentence; it changes no suggestion."""
    raw, own = found.purity["none"], found.purity[found.chosen]
    text = (
        f"Labels say: {raw.across:.0f} % of the 20 nearest patches of other images have the same class, "
        f"{own.across:.0f} % with {found.chosen} (chance {found.chance:.0f} %); propagated sets are "
        f"{_pair(raw.propagated)} % pure and {_pair(own.propagated)} %"
    )
    if found.frozen:
        scores = [
            sum(f.cluster_miou) / len(f.cluster_miou) for f in map(found.frozen.get, ("none", found.chosen))
        ]
        text += f"; frozen clusters have {scores[0]:.1f} and {scores[1]:.1f} % mIoU"
    return text + "."


def _pair(values: tuple[float | None, float | None]) -> str:
    return " / ".join("-" if v is None else f"{v:.0f}" for v in values)


def write(folder: Path, found: Findings, extra: Mapping[str, Any]) -> str:
    """``backbone.md`` and ``backbone.json`` in an existing folder; returns the text of the former.

    Args:
        folder: where; its pictures are there.
        found: what was measured.
        extra: further values for the JSON, such as ``provenance``.
    """
    verdict, reasons = judge(found)
    values = {**asdict(found), "verdict": verdict, "reasons": reasons, **extra}
    (folder / "backbone.json").write_text(json.dumps(values, indent=1) + "\n")
    row, column = found.position
    leading = ", ".join(f"{100 * share:.1f}" for share in found.shares[:5])
    lines = [f"# Backbone: {markdown(found.origin)}", "", f"**{verdict}**", ""]
    lines += [f"- {reason}" for reason in reasons]
    lines += ["", "Whether sets hold one class each, only eyes or labels can tell: look at the neighbours."]
    lines += [_said_by_labels(found)] if found.purity else []
    lines += ["", *(f"- {markdown(fact)}" for fact in found.facts)]
    lines += [
        f"- spectrum: the leading components carry {leading} % of the variance",
        f"- position: R² of a patch's row {row:.2f}, of its column {column:.2f}, held out",
    ]
    lines += ["", "## Suggested", "", "```", visible(found.command, one_line=True), "```"]
    lines += ["", "## Conditions, without labels", "", *_label_free(found), "", _LABEL_FREE_TEXT]
    if found.purity:
        lines += ["", "## Conditions, by labels", "", *_by_labels(found), "", _LABELS_TEXT]
        lines += [f"Patches drawn at random have the same class in {found.chance:.1f} % of the cases."]
    if found.frozen:
        lines += ["", "## Frozen features on the validation images", "", *_frozen(found), "", _FROZEN_TEXT]
    lines += ["", "## Neighbours in other images", "", _NEIGHBOURS_TEXT, "", "![neighbours](neighbours.png)"]
    lines += ["", "## Clusters", "", "![k-means, raw and conditioned](clusters.png)"]
    lines += ["", "## Similarities", "", "![cosines of two patches](similarities.png)"]
    lines += ["", "## Spectrum", "", "![share of the variance by component](spectrum.png)"]
    text = "\n".join(lines) + "\n"
    (folder / "backbone.md").write_text(text, encoding="utf-8")
    return text


def _table(heads: Sequence[str], rows: Mapping[str, Sequence[str]], chosen: str) -> list[str]:
    lines = [f"| condition | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
    for name, cells in rows.items():
        title = f"**{name}** (auto)" if name == chosen else name
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return lines


def _label_free(found: Findings) -> list[str]:
    def cells(row: LabelFree) -> list[str]:
        large, small = (f"{100 * size:.2g}" for size in row.jump)
        size = f"{100 * row.positives:.2g}" if row.reached else f"jump: {large} to {small}"
        numbers = (row.median, row.most, row.separation)
        return [*(f"{v:.2f}" for v in numbers), f"{row.rank:.0f}", f"{row.phi0:.2f}", f"{row.psi0:.2f}", size]

    heads = ("median cosine", "95 %", "separation", "rank", "phi0", "psi0", "sets [%]")
    return _table(heads, {name: cells(row) for name, row in found.rows.items()}, found.chosen)


def _by_labels(found: Findings) -> list[str]:
    heads = ["20 nearest", "100 nearest", "20 of other images"]
    heads += [f"sets of {100 * share:g} %" for share in SHARES] + ["propagated sets", "their size [%]"]
    rows = {
        name: [
            *(f"{value:.1f}" for value in own.neighbours.values()),
            f"{own.across:.1f}",
            *(_pair(own.plain[share]) for share in SHARES),
            _pair(own.propagated),
            f"{100 * own.size:.2g}",
        ]
        for name, own in found.purity.items()
    }
    return _table(heads, rows, found.chosen)


def _frozen(found: Findings) -> list[str]:
    heads = ("cluster accuracy", "cluster mIoU", "linear accuracy", "linear mIoU")
    rows = {
        name: [
            spread_text(own.cluster_accuracy),
            spread_text(own.cluster_miou),
            f"{own.linear_accuracy:.1f}",
            f"{own.linear_miou:.1f}",
        ]
        for name, own in found.frozen.items()
    }
    return _table(heads, rows, found.chosen)


_LABEL_FREE_TEXT = (
    "Cosines are of random pairs of patches. Separation: how much farther the next centre of k-means is than "
    "a patch's own. Rank: effective number of directions. phi0 and psi0: what `--loss.phi0 auto "
    "--loss.psi0 auto` would choose; sets: mean positive set after propagation [% of the patches]."
)
_LABELS_TEXT = (
    "Patches of the anchor's class [%]: among its nearest patches; in sets above one threshold for all (over "
    "all pairs / mean over anchors); in the sets of propagation at phi0 and psi0 of the table above, with "
    "channel dropout as in training. Labels choose nothing."
)
_FROZEN_TEXT = (
    "Per pixel [%]: k-means (cosine, best of 3 starts) with one cluster per class, matched to classes once, "
    "and a linear classifier, both fitted to at most 16,384 patches of the training images above."
)
_NEIGHBOURS_TEXT = (
    "Random patches (magenta) and the most similar patch of each of the images nearest to it, with their "
    "cosine; green = the query's class, red = another, yellow = not known."
)
