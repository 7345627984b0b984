"""What the terminal shows of an evaluation, and what to do about empty sets."""

from collections.abc import Mapping, Sequence
from typing import Any

from ppap.evaluation.evaluate import Evaluation
from ppap.evaluation.metrics import Scores

KEPT = 0.5
"""Share of the frozen features' neighbours below which the code is said to forget (docs/conditioning.md)."""


def drift_hint(row: Mapping[str, Any]) -> str | None:
    """What to do about a code that has lost the neighbours that patches have in the frozen features."""
    kept = row.get("neighbours_kept", 1.0)
    if kept >= KEPT:
        return None
    return (
        f"the code keeps {100 * kept:.0f} % of the frozen features' nearest neighbours: it forgets what the "
        "backbone knows; lower --optim.lr"
    )


def sets_words(row: Mapping[str, Any]) -> str:
    """Sizes of an anchor's sets, where the method has such sets."""
    if "positives" not in row:
        return ""
    return f"per anchor {row['positives']:.0f} positives {row['negatives']:.0f} negatives, "


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


def score_table(evaluation: Evaluation, names: Sequence[str]) -> str:
    """Plain-text table of all scores, per class too, for the terminal."""
    columns: list[tuple[str, Scores]] = [(probe, s) for probe, s in evaluation.plain.items()]
    columns += [(f"{probe}+CRF", s) for probe, s in evaluation.crf.items()]
    width = max(map(len, ("pixel accuracy", *names)))
    lines = [f"{'[%]':<{width}}  " + "  ".join(f"{title:>11}" for title, _ in columns)]

    def line(title: str, values: list[Any]) -> str:
        cells = ["-" if value is None else f"{value:.2f}" for value in values]
        return f"{title:<{width}}  " + "  ".join(f"{cell:>11}" for cell in cells)

    lines.append(line("pixel accuracy", [s.accuracy for _, s in columns]))
    lines.append(line("mIoU", [s.miou for _, s in columns]))
    lines += [line(name, [s.iou[i] for _, s in columns]) for i, name in enumerate(names)]
    return "\n".join(lines)
