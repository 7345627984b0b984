"""Which phi0 and psi0 suit a backbone: similarities of patch pairs, set sizes over a grid, a label-free
rule.

The rule is that of ``ppap.methods.thresholds``, which training follows where a threshold is auto. Here it
picks among the values of a grid, which :func:`around` lays about the ones that training would choose.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ppap.escaping import markdown
from ppap.kernels import PropagationConfig, propagate
from ppap.methods.thresholds import NEGATIVE_SHARE, POSITIVE_CLUSTERS, NegativeSizes, ratio
from ppap.stopping import each

BINS = 100
_STEP, _REACH = 0.05, 0.35  # of a grid [cosine]


@dataclass(frozen=True)
class GridPoint:
    """Mean set sizes after propagation from one pair of thresholds, as shares of all patches."""

    phi0: float
    psi0: float
    positives: float
    negatives: float
    without_positives: float
    """Share of anchors whose positive set is empty."""


@dataclass(frozen=True)
class Thresholds:
    """Result of :func:`analyse`."""

    patches: int
    anchors: int
    bin_edges: list[float]
    """BINS + 1 similarities."""
    same_image: list[float]
    """Share of the pairs within an image in each bin."""
    other_image: list[float]
    """Share of the pairs across images in each bin."""
    grid: list[GridPoint]
    fixed: list[float]
    """Mean share of the patches above each phi0 around the anchor itself, without propagation."""
    aim: float
    """For the mean positive set [share of the patches]."""
    phi0: float
    """Suggested."""
    psi0: float
    """Suggested."""
    fixed_phi0: float
    """Suggested for positives by a fixed threshold, the baseline of Table 5, by the same rule."""


def around(*values: float) -> tuple[float, ...]:
    """A grid of round cosines about some values, and these themselves."""
    first, last = min(values) - _REACH, max(values) + _REACH
    steps = range(int(np.ceil(max(first, -0.95) / _STEP)), int(np.floor(min(last, 0.95) / _STEP)) + 1)
    return tuple(sorted({*values, *(round(_STEP * i, 2) for i in steps)}))


@torch.no_grad()
def analyse(
    features: Tensor,
    images: Tensor,
    cfg: PropagationConfig,
    phi_grid: Sequence[float],
    psi_grid: Sequence[float],
    *,
    clusters: int,
    positives: float = POSITIVE_CLUSTERS,
    anchors: int = 512,
    seed: int = 0,
) -> Thresholds:
    """Measure similarities and set sizes, and suggest thresholds.

    Args:
        features: (N, D) guidance of a batch as the loss sees it, any norm.
        images: (N,) int64, the image of each patch.
        cfg: gives steps and sigmas; its thresholds are not used.
        phi_grid, psi_grid: values to try [cosine].
        clusters: number of clusters of the segmentation; the aim for positives is a share of one.
        positives: aim for a positive set [average clusters].
        anchors: number of patches, drawn at random, whose sets are measured.
        seed: of the draw.
    """
    phi_grid, psi_grid = sorted(set(phi_grid)), sorted(set(psi_grid))
    count = features.shape[0]
    order = np.random.Philox(key=[seed, 0]).random_raw(count).argsort()
    rows = torch.from_numpy(np.sort(order[:anchors])).to(features.device)
    unit = torch.nn.functional.normalize(features.float(), dim=1)
    edges = torch.linspace(-1, 1, BINS + 1)
    same, other = histograms(unit, images, rows)
    grid, fixed = [], []
    for phi0 in each(tqdm(phi_grid, desc="thresholds", disable=None)):
        still = propagate(features, rows, PropagationConfig(phi0, steps=0), precision="fp32")
        fixed.append(still.num_positives.double().mean().item() / count)
        walked = NegativeSizes(features, rows, replace(cfg, phi0=phi0))
        sizes = walked.relations.num_positives
        positive, empty = sizes.double().mean().item() / count, (sizes == 0).double().mean().item()
        grid += [GridPoint(phi0, psi0, positive, walked.share(psi0), empty) for psi0 in psi_grid]
    aim = min(positives / clusters, 0.5)
    fixed_phi0 = min(zip(phi_grid, fixed, strict=True), key=lambda p: (ratio(p[1], aim), p[0]))[0]
    suggested = (*suggest(grid, aim), fixed_phi0)
    return Thresholds(count, len(rows), edges.tolist(), same, other, grid, fixed, aim, *suggested)


def histograms(unit: Tensor, images: Tensor, rows: Tensor) -> tuple[list[float], list[float]]:
    """Shares of pairs in each of BINS bins from -1 to 1: anchors with patches of their own image, of others.

    Args:
        unit: (N, D) unit rows.
        images: (N,) int64, the image of each patch.
        rows: (A,) int64 anchors; an anchor is no pair with itself.
    """
    counts = torch.zeros(2, BINS, dtype=torch.float64)
    for chunk in rows.split(64):
        sim = unit[chunk] @ unit.T
        sim[torch.arange(len(chunk)), chunk] = torch.nan  # the anchor itself is no pair
        same = images[chunk][:, None] == images[None]
        for i, mask in enumerate((same, ~same)):
            values = sim[mask]
            counts[i] += torch.histc(values[values.isfinite()].cpu().float(), BINS, -1, 1).double()
    return tuple((row / row.sum().clamp(min=1)).tolist() for row in counts)


def suggest(grid: Sequence[GridPoint], positives: float) -> tuple[float, float]:
    """The pair of the grid whose sets are nearest to the rule's sizes: phi0 first, then psi0 given phi0.

    Args:
        grid: measured set sizes.
        positives: aim for the mean positive set [share of the patches].
    """

    def mean_positives(phi0: float) -> float:
        return float(np.mean([point.positives for point in grid if point.phi0 == phi0]))

    phi0 = min(
        {point.phi0 for point in grid},
        key=lambda phi: (ratio(mean_positives(phi), positives), phi),
    )
    row = [point for point in grid if point.phi0 == phi0]
    psi0 = min(row, key=lambda p: (abs(p.negatives - NEGATIVE_SHARE * (1 - p.positives)), p.psi0)).psi0
    return phi0, psi0


def write(
    result: Thresholds, folder: Path, title: str, facts: Sequence[str], provenance: dict[str, Any]
) -> None:
    """``thresholds.{json,md,png}`` in an existing folder.

    Args:
        result: what was measured.
        folder: where.
        title: heading, such as the backbone's origin.
        facts: what else a reader must know, a sentence each.
        provenance: for the JSON, see :func:`ppap.reports.provenance.provenance`.
    """
    values = {"provenance": provenance, **asdict(result)}
    (folder / "thresholds.json").write_text(json.dumps(values, indent=1) + "\n")
    phis = sorted({point.phi0 for point in result.grid})
    psis = sorted({point.psi0 for point in result.grid})
    found = {(point.phi0, point.psi0): point for point in result.grid}
    still = dict(zip(phis, result.fixed, strict=True))
    lines = [f"# Thresholds: {markdown(title)}", ""]
    lines += [
        f"{result.patches} patches, {result.anchors} anchors. Suggested without labels: "
        f"phi0 = {result.phi0:g}, psi0 = {result.psi0:g}; "
        f"for positives by a fixed threshold phi0 = {result.fixed_phi0:g}. The rule aims for positive sets "
        f"of {100 * result.aim:.1f} % of the patches and negative sets of {100 * NEGATIVE_SHARE:.0f} % of "
        "the others.",
        "",
        *(line for fact in facts for line in (markdown(fact), "")),
        "Mean positive set [% of the patches] after propagation and by a fixed threshold, and anchors "
        "without positives after propagation [%]:",
        "",
        "| phi0 | positives | fixed | empty |",
        "|---:|---:|---:|---:|",
    ]
    for phi in phis:
        point, fixed = found[phi, psis[0]], still[phi]
        cells = (point.positives, fixed, point.without_positives)
        lines.append(f"| {phi:g} | " + " | ".join(f"{100 * cell:.2f}" for cell in cells) + " |")
    lines += ["", "Mean negative set [% of the patches] after propagation:", ""]
    lines += [
        "| phi0 \\ psi0 | " + " | ".join(f"{psi:g}" for psi in psis) + " |",
        "|---:" * (len(psis) + 1) + "|",
    ]
    for phi in phis:
        lines.append(
            f"| {phi:g} | " + " | ".join(f"{100 * found[phi, psi].negatives:.1f}" for psi in psis) + " |"
        )
    lines += ["", "![similarities and set sizes](thresholds.png)"]
    (folder / "thresholds.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    draw(result, folder / "thresholds.png", title)


def draw(result: Thresholds, path: Path, title: str) -> None:
    """Similarity histograms, and set sizes over the grid."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(14, 4.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    pairs, positive, negative = figure.subplots(1, 3)
    figure.suptitle(title)
    edges = np.array(result.bin_edges)
    middle = (edges[1:] + edges[:-1]) / 2
    for values, name in ((result.same_image, "same image"), (result.other_image, "other images")):
        pairs.plot(middle, 100 * np.array(values), label=name)
    for value, name in ((result.phi0, "phi0"), (result.psi0, "psi0")):
        pairs.axvline(
            value, color="0.3", linestyle="--" if name == "phi0" else ":", label=f"{name} = {value:g}"
        )
    pairs.set(xlabel="cosine similarity of two patches", ylabel="share of the pairs [%]")
    phis, psis = (sorted({getattr(p, name) for p in result.grid}) for name in ("phi0", "psi0"))
    share = [np.mean([p.positives for p in result.grid if p.phi0 == phi]) for phi in phis]
    for values, name in ((share, "after propagation"), (result.fixed, "fixed threshold")):
        positive.semilogy(phis, np.maximum(100 * np.array(values), 1e-4), marker="o", label=name)
    positive.axhline(
        100 * result.aim,
        color="0.3",
        linestyle="--",
        label=f"aim {100 * result.aim:.1f} %",
    )
    positive.set(xlabel="phi0", ylabel="mean positive set [% of patches]")
    row = [p for p in result.grid if p.phi0 == result.phi0]
    negative.plot(
        [p.psi0 for p in row], [100 * p.negatives for p in row], marker="o", label=f"phi0 = {result.phi0:g}"
    )
    aim = 100 * NEGATIVE_SHARE * (1 - row[0].positives)
    negative.axhline(aim, color="0.3", linestyle="--", label=f"aim {aim:.1f} %")
    negative.set(xlabel="psi0", ylabel="mean negative set [% of patches]")
    for axis in (pairs, positive, negative):
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    figure.savefig(path)
