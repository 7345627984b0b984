"""``ppap analyze sets``: counts against loops over pairs, the rows' sets, the paper's tables, the command."""

import json

import numpy as np
import pytest
import torch

from bench.shapes import clustered
from ppap.analysis import paper, set_report
from ppap.analysis.commands.sets import main
from ppap.analysis.set_quality import (
    SetCounts,
    count_sets,
    deciles,
    hidden,
    propagated,
    quality,
)
from ppap.analysis.set_quality import (
    clustered as clustered_sets,
)
from ppap.analysis.set_report import SetResult
from ppap.data.patch_labels import labels_of
from ppap.errors import DataError
from ppap.kernels import PropagationConfig
from ppap.kernels.ppap_loss import reference
from ppap.settings.presets import PRESETS
from tests.runs import TINY, make_folder

OPTIONS = [o for o in TINY[1:] if o.startswith(("--data", "--model", "--loss"))]


def brute_force(positive, negative, anchors, labels, ignored):
    """Every number of Quality and the deciles, pair by pair."""

    def share(mask, chosen):
        pairs, means = [], []
        for a in chosen:
            own = [
                labels[j] == labels[anchors[a]]
                for j in range(len(labels))
                if mask[a][j] and (ignored == "wrong" or labels[j] >= 0)
            ]
            pairs += own
            means += [np.mean(own)] if own else []
        return (100 * np.mean(pairs), 100 * np.mean(means)) if pairs else (None, None)

    every = range(len(anchors))
    known = [a for a in every if labels[anchors[a]] >= 0]
    sizes = [int(positive[a].sum()) for a in every]
    expected = {
        "positives": np.mean(sizes),
        "negatives": np.mean([int(negative[a].sum()) for a in every]),
        "without_positives": 100 * np.mean([size == 0 for size in sizes]),
    }
    expected["true_micro"], expected["true_macro"] = share(positive, known)
    expected["false_micro"], expected["false_macro"] = share(negative, known)
    order = sorted(known, key=lambda a: sizes[a])  # sorted() is stable
    points = []
    for q in range(10, 101, 10):
        first = order[: int(np.ceil(len(order) * q / 100 - 1e-9))]
        points.append((q, np.mean([sizes[a] for a in first]), *share(positive, first)))
    return expected, points


@pytest.fixture
def patches():
    """37 patches of 3 classes, a fifth of them ignored, anchors among both, some without positives."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, 3, (37,), generator=generator)
    labels[torch.rand(37, generator=generator) < 0.2] = -1
    positive = torch.rand(23, 37, generator=generator) < 0.3
    negative = (torch.rand(23, 37, generator=generator) < 0.6) & ~positive
    positive[4] = negative[5] = False
    anchors = torch.randperm(37, generator=generator)[:23]
    return positive, negative, anchors, labels


@pytest.mark.parametrize("ignored", ["exclude", "wrong"])
def test_quality_and_deciles_count_pairs(patches, ignored):
    positive, negative, anchors, labels = patches
    counts = count_sets(
        lambda places: (positive[places], negative[places]), anchors, labels, memory_budget=24 * 37 * 5
    )
    assert counts.labelled.sum() < len(anchors), "some anchors have no class"
    expected, points = brute_force(positive, negative, anchors.tolist(), labels.tolist(), ignored)
    assert vars(quality(counts, ignored)) == pytest.approx(expected)
    found = [tuple(vars(point).values()) for point in deciles(counts, ignored)]
    for a, b in zip(found, points, strict=True):
        assert a == pytest.approx(b)


def test_chunks_do_not_change_counts(patches):
    positive, negative, anchors, labels = patches
    sizes = []

    def sets_of(places):
        sizes.append(len(places))
        return positive[places], negative[places]

    one = count_sets(sets_of, anchors, labels)
    many = count_sets(sets_of, anchors, labels, memory_budget=24 * 37 * 7)
    assert sizes == [23, 7, 7, 7, 2]
    for a, b in zip(one, many, strict=True):
        assert np.array_equal(a, b)


def test_empty_sets_and_no_labels_have_no_share():
    zero, two = np.zeros(3, np.int64), np.full(3, 2)
    counts = SetCounts(np.array([True, False, False]), zero, zero, zero, two, two, two)
    found = quality(counts)
    assert (found.true_micro, found.true_macro, found.without_positives) == (None, None, 100)
    assert (found.false_micro, found.negatives) == (100, 2)
    assert [point.precision_micro for point in deciles(counts)] == [None] * 10
    assert deciles(counts._replace(labelled=np.zeros(3, bool))) == []


def test_propagated_sets_are_those_of_the_definition():
    features, anchors = clustered(60, 16, seed=0, clusters=4), torch.tensor([3, 7, 59])
    cfg = PropagationConfig(0.4, 0.1, steps=2)
    positive, negative = propagated(features, anchors, cfg)(torch.arange(3))
    rel = reference.propagate(features, anchors, cfg)
    assert torch.equal(positive, rel.positive) and torch.equal(negative, rel.kept & ~rel.positive)
    still = PropagationConfig(0.4, 0.1, trustworthy_positives=False, ambiguity_excluded=False)
    positive, negative = propagated(features, anchors, still)(torch.tensor([2, 0]))
    unit = torch.nn.functional.normalize(features, dim=1)
    for row, anchor in enumerate((59, 3)):
        above = unit @ unit[anchor] > 0.4
        above[anchor] = False
        assert torch.equal(positive[row], above)
        assert negative[row].sum() == 59 - above.sum() and not negative[row, anchor]


def test_hidden_and_clustered_sets_pair_by_pair():
    features, pool = clustered(40, 8, seed=1, clusters=3), clustered(6, 8, seed=2, clusters=3)
    anchors = torch.tensor([5, 39, 0])
    unit, entries = (torch.nn.functional.normalize(rows, dim=1).numpy() for rows in (features, pool))
    radius = (unit @ entries.T).max(axis=1)
    clusters = torch.tensor([i % 3 for i in range(40)])
    for sets_of, rule in (
        (hidden(features, anchors, pool), lambda i, j: unit[i] @ unit[j] > min(radius[i], radius[j])),
        (clustered_sets(clusters, anchors), lambda i, j: i % 3 == j % 3),
    ):
        positive, negative = sets_of(torch.tensor([1, 2]))
        for row, i in enumerate((39, 0)):
            for j in range(40):
                assert bool(positive[row, j]) == (i != j and bool(rule(i, j))), (i, j)
                assert bool(negative[row, j]) == (i != j and not rule(i, j)), (i, j)


def test_rules_of_patch_labels():
    label = torch.tensor([[[0, 1, 2, 2], [1, 1, 2, -1], [-1, -1, 3, 4]]])
    assert labels_of(label, 2, "majority").tolist() == [1, 2, -1, 3]
    assert labels_of(label, 2, "centre").tolist() == [1, -1, -1, -1], "below and right of the middle"
    assert labels_of(label, 2, "nearest").tolist() == [0, 2, -1, 3]
    nearest = torch.nn.functional.interpolate(label[:, None, :2].float(), size=(1, 2), mode="nearest")
    assert labels_of(label[:, :2], 2, "nearest").tolist() == nearest.flatten().tolist()


def test_the_command_measures_every_row_and_seed(tmp_path, capsys):
    out = tmp_path / "sets"
    options = ["--images=4", "--anchors=30", "--pool=8", "--seeds", "0", "1", "--loss.phi0=0.3"]
    main(["demo", *OPTIONS, f"--out={out}", *options])
    text = capsys.readouterr().out
    assert "results are meaningless" in text and "| Hidden" not in text
    record = json.loads((out / "sets.json").read_text())
    assert list(record["rows"]) == ["ppap", "hp", "kmeans", "fixed", "chance"] and record["seeds"] == [0, 1]
    assert record["provenance"]["config"]["loss"]["phi0"] == 0.3
    for name, row in record["rows"].items():
        assert len(row["seeds"]) == 2 and len(row["seeds"][0]["deciles"]) == 10, name
        sizes = [seed["quality"]["positives"] + seed["quality"]["negatives"] for seed in row["seeds"]]
        if name in ("hp", "kmeans", "fixed", "chance"):
            assert sizes == [63, 63], "every other patch of 4 images is in one of the two"
    assert record["rows"]["ppap"]["seeds"][0] != record["rows"]["ppap"]["seeds"][1]
    for suffix in ("png", "pdf", "md"):
        assert (out / f"sets.{suffix}").stat().st_size > 1000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", "1", "1"], "give different numbers"),
        (["--pool=0"], "give at least 1"),
        (["--rows"], "at least one"),
        (["--anchors=0"], "give at least 1"),
    ],
)
def test_impossible_options(tmp_path, options, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["demo", f"--out={tmp_path / 'out'}", *options])
    assert message in " ".join(capsys.readouterr().err.split()) and not (tmp_path / "out").exists()


def test_images_without_labels_are_refused_before_any_work(tmp_path):
    root = make_folder(tmp_path / "data", labels=False)
    with pytest.raises(DataError, match="no labels"):
        main(["folder", f"--data.root={root}", f"--out={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()


# Table 6, kept apart from the data file on purpose.
TABLE_6 = """
cityscapes-vits8   HP    78      88.83   50000 21.33
cityscapes-vits8   PPAP  1838    90.18   43000 14.22
cocostuff27-vits8  HP    142     81.98   50000 7.34
cocostuff27-vits8  PPAP  288     87.15   46000 5.92
potsdam-vitb8      HP    unknown unknown 50000 34.08
potsdam-vitb8      PPAP  194     88.62   30000 29.01
"""


@pytest.mark.parametrize("line", TABLE_6.split("\n")[1:-1])
def test_the_papers_set_quality(line):
    preset, method, *cells = line.split()
    assert preset in PRESETS
    found = paper.set_quality(paper.setting_of(preset))[method]
    assert list(found.values()) == [cell if cell == paper.UNKNOWN else float(cell) for cell in cells]


# PPAP and DINO of Tables 1 to 3: cluster accuracy and mIoU, linear accuracy and mIoU; rows 4 and 5 whole.
TABLES_1_TO_3 = """
cocostuff27-vits8   PPAP  59.0 27.2 76.9 46.3
cocostuff27-vits8   DINO  28.7 11.3 68.6 33.9
cocostuff27-vits16  PPAP  62.9 26.5 76.0 43.3
cocostuff27-vits16  HP    54.5 24.3 74.1 39.1
cocostuff27-vits16  STEGO 52.5 23.7 70.6 34.5
cityscapes-vits8    PPAP  82.0 19.6 90.8 31.5
cityscapes-vits8    HP    80.1 18.4 unknown unknown
cityscapes-vitb8    PPAP  83.3 21.2 91.4 36.5
potsdam-vitb8       PPAP  83.2 71.0
potsdam-vitb8       DINO  53.0 None
"""


@pytest.mark.parametrize("line", TABLES_1_TO_3.split("\n")[1:-1])
def test_the_papers_scores(line):
    preset, method, *cells = line.split()
    setting = paper.setting_of(preset)
    found = paper.benchmark(setting).find(method, setting.backbone)
    expected = [{"None": None, "unknown": paper.UNKNOWN}.get(cell) or cell for cell in cells]
    assert [str(value) for value in found.values()] == [str(value) for value in expected]


def test_the_papers_other_tables_and_gains():
    ablation = {row[0]: row[2:] for row in paper.table(5).rows}
    assert ablation == {
        "none": (49.1, 22.9),
        "TPS": (53.7, 25.0),
        "ANS": (55.5, 25.1),
        "TPS + ANS": (62.9, 26.5),
    }
    assert paper.table(4).find("PPAP", "ViT-S/16") == {
        "imagenet_s": 25.7,
        "imagenet_s300": 37.3,
        "imagenet_s50": 59.3,
    }
    assert paper.neighbour_column("imagenet_s300-vits16") == "imagenet_s300"
    assert [paper.setting_of(name) for name in ("demo", "folder", "camvid")] == [None] * 3
    for number in range(1, 7):
        table = paper.table(number)
        assert all(len(row) == 2 + len(table.columns) for row in table.rows)


def test_the_papers_numbers_stand_below_ours():
    counts = SetCounts(np.ones(4, bool), *[np.arange(1, 5)] * 3, *[np.arange(4)] * 3)
    results = {"ppap": [SetResult(quality(counts), deciles(counts))]}
    lines = set_report.table_lines(results, paper.setting_of("cityscapes-vits8"))
    assert any(line.startswith("| paper: PPAP | 1838 | 90.2 |") for line in lines)
    assert len(set_report.table_lines(results, None)) == 3


def test_chance_is_the_share_of_pairs_with_one_class():
    labels, anchors = torch.tensor([0, 0, 1, 2, 2, 2]), torch.arange(6)
    counts = count_sets(clustered_sets(torch.zeros(6, dtype=torch.int64), anchors), anchors, labels)
    assert quality(counts).true_micro == pytest.approx(100 * (2 * 1 + 3 * 2) / (6 * 5))
