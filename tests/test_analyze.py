"""``ppap analyze``: similarities, set sizes and the label-free rule for the thresholds."""

import json
import math
from dataclasses import replace

import pytest
import torch
from PIL import Image

from bench.shapes import clustered
from ppap.analysis.thresholds import NEGATIVE_SHARE, POSITIVE_CLUSTERS, GridPoint, analyse, suggest
from ppap.analyze import main
from ppap.errors import UsageError
from ppap.kernels import PropagationConfig
from ppap.kernels.ppap_loss import reference
from ppap.reports.positives import Example, examples
from tests.runs import TINY


def test_the_rule_takes_the_nearest_grid_values():
    grid = [
        GridPoint(phi, psi, positives, negatives, 0.0)
        for phi, positives in ((0.4, 0.2), (0.5, 0.012), (0.6, 0.001))
        for psi, negatives in ((0.1, 0.5), (0.2, 0.9), (0.3, 0.98))
    ]
    assert suggest(grid, 0.015) == (0.5, 0.2)


def test_sizes_are_those_of_the_definition():
    features, images = clustered(120, 16, seed=0, clusters=6), torch.arange(4).repeat_interleave(30)
    result = analyse(features, images, PropagationConfig(), (0.4, 0.6), (0.1, 0.3), clusters=8, anchors=120)
    for point in result.grid:
        rel = reference.propagate(features, None, PropagationConfig(point.phi0, point.psi0))
        assert point.positives == pytest.approx(rel.positive.sum(1).float().mean().item() / 120, abs=1e-6)
        negatives = (rel.kept & ~rel.positive).sum(1).float().mean().item() / 120
        assert point.negatives == pytest.approx(negatives, abs=1e-6)
        empty = (~rel.positive.any(1)).float().mean().item()
        assert point.without_positives == pytest.approx(empty, abs=1e-6)
    unit = torch.nn.functional.normalize(features, dim=1)
    for phi0, share in zip((0.4, 0.6), result.fixed, strict=True):
        assert share == pytest.approx(((unit @ unit.T > phi0).sum().item() - 120) / 120**2, abs=1e-6)
    assert result.fixed_phi0 == min(
        (0.4, 0.6), key=lambda phi: abs(math.log(_share(result, phi) / (POSITIVE_CLUSTERS / 8)))
    )


def test_histograms_tell_images_apart_and_leave_out_the_anchor():
    axes = torch.eye(8)
    features = torch.cat([axes[:1].repeat(5, 1), axes[1:2].repeat(5, 1)])
    images = torch.arange(2).repeat_interleave(5)
    result = analyse(features, images, PropagationConfig(), (0.5,), (0.1,), clusters=2, anchors=10)
    assert result.same_image[-1] == pytest.approx(1)
    assert sum(result.other_image[49:51]) == pytest.approx(1), "cosine 0 across images"


def test_the_command_draws_and_writes(tmp_path, capsys):
    options = [o for o in TINY[1:] if o.startswith(("--data", "--model", "--loss"))]
    out = tmp_path / "thresholds"
    main(["thresholds", "demo", *options, f"--out={out}", "--images=6", "--anchors=40"])
    text = capsys.readouterr().out
    assert "Suggested without labels" in text and "results are meaningless" in text
    result = json.loads((out / "thresholds.json").read_text())
    assert result["patches"] == 6 * 16
    grid = {(point["phi0"], point["psi0"]) for point in result["grid"]}
    assert (result["phi0"], result["psi0"]) in grid and len(grid) == len(result["grid"]) > 100
    assert (out / "thresholds.png").exists()
    with pytest.raises(UsageError, match="exists already"):
        main(["thresholds", "demo", *options, f"--out={out}"])


def test_positives_by_step(tmp_path, capsys):
    options = [o for o in TINY[1:] if o.startswith(("--data", "--model", "--loss"))]
    out = tmp_path / "positives"
    main(
        [
            "positives",
            "demo",
            *options,
            "--loss.phi0=0.2",
            f"--out={out}",
            "--images=3",
            "--anchors=2",
            "--pool=8",
        ]
    )
    record = json.loads((out / "positives.json").read_text())
    table = capsys.readouterr().out.partition("positive patches, and how many percent")[2].splitlines()
    assert table[1].split("  ")[-1].strip() == "HP"
    for row, line in zip(record["anchors"], table[2:], strict=False):
        assert line.split()[:3] == ["patch", str(row["patch"]), f"{row['positives'][0]},"]
    assert len(record["anchors"]) == 2
    for row in record["anchors"]:
        assert len(row["positives"]) == len(row["precision"]) == 3 and row["positives"][-1] > 0
    with Image.open(out / "positives.png") as picture:
        assert picture.width > 4 * 32
    main(["positives", "demo", *options, "--loss.phi0=1.5", f"--out={tmp_path / 'none'}", "--no-hidden"])
    assert "no patch has positives" in capsys.readouterr().out
    assert not (tmp_path / "none" / "positives.png").exists()


def test_a_set_in_words():
    sets = torch.tensor([[True, False, False, False], [True, True, True, True]])
    example = Example(0, sets)
    assert [example.describe(s) for s in sets] == ["1 patch", "4 patches"]
    example = example._replace(same_class=torch.tensor([True, True, True, False]))
    assert [example.describe(s) for s in sets] == [
        "1 patch, 100 % of its class",
        "4 patches, 75 % of its class",
    ]


def test_examples_are_the_sets_of_the_definition():
    features, cfg = clustered(60, 16, seed=0, clusters=4), PropagationConfig(0.4, 0.1, steps=2)
    found = examples(features, cfg, 3)
    assert len(found) == 3
    for example in found:
        for t in range(3):
            rel = reference.propagate(features, torch.tensor([example.anchor]), replace(cfg, steps=t))
            assert torch.equal(example.positives[t], rel.positive[0])
        assert example.counts() == example.positives.sum(1).tolist()
        known = example._replace(same_class=example.positives[-1])
        assert known.precision()[-1] == 1 and example.precision() == [None] * 3
    assert examples(features, replace(cfg, phi0=1.5), 3) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["treshold"], "did you mean 'thresholds'"),
        ([], "name an analysis"),
        (["thresholds"], "--out is not given"),
        (["thresholds", "dmeo", "--out=x"], "did you mean 'demo'"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(UsageError, match=message):
        main(arguments)


@pytest.mark.parametrize("options", [["positives", "--seed=-1"], ["thresholds", "--anchors=0"]])
def test_impossible_numbers(tmp_path, options, capsys):
    with pytest.raises(SystemExit, match="2"):
        main([*options, f"--out={tmp_path / 'out'}"])
    assert "; give " in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_aims_lie_within_the_published_ranges():
    """Table 6: positives 288 and 1838, negatives 46K and 43K, of 50,176 patches, 27 clusters."""
    assert 288 / 50_176 < POSITIVE_CLUSTERS / 27 < 1838 / 50_176
    assert 43_000 / 50_176 < NEGATIVE_SHARE < 46_000 / 50_176


def _share(result, phi0):
    return result.fixed[[0.4, 0.6].index(phi0)]
