"""``ppap analyze backbone``: judgement, figures without and with labels, pictures, the page as a whole."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from ppap.analysis.backbone import LabelFree, Maps, label_free, look, survey_of
from ppap.analysis.backbone_labels import chance, frozen_scores, purity
from ppap.analysis.backbone_pictures import Scene, draw_neighbours
from ppap.analysis.backbone_report import Findings, judge
from ppap.analysis.commands.backbone import training_command
from ppap.analysis.features import prepare
from ppap.analyze import main
from ppap.data import build_datasets
from ppap.errors import DataError, UsageError
from ppap.kernels.ppap_loss import reference
from ppap.methods.thresholds import SetSizes
from ppap.nets.conditioning import Condition, fit
from ppap.nets.model import build_net
from ppap.settings.config import Config
from ppap.training.request import parse_arguments
from tests.runs import TINY, make_folder, settled_demo

LOOK = [option for option in TINY[1:] if option.startswith(("--data", "--model"))]
SMALL = ["--anchors=40", "--queries=2", "--neighbours=3", "--pictures=2"]


def row(name: str, median: float = 0.1, reached: bool = True) -> LabelFree:
    return LabelFree(name, median, 0.8, 0.3, 20.0, 0.4, 0.1, 0.02, (0.22, 0.03), reached)


def findings(raw: LabelFree, own: LabelFree, **changed) -> Findings:
    values = {
        "origin": "weights",
        "is_random": False,
        "facts": [],
        "aim": 0.02,
        "position": (0.1, 0.1),
        "shares": [0.5, 0.5],
        "chosen": own.condition,
        "rate": 3e-4,
        "rows": {"none": raw, own.condition: own},
    }
    return Findings(**{**values, **changed})


@pytest.mark.parametrize(
    ("raw", "own", "changed", "verdict"),
    [
        (row("none"), row("clip:0.01"), {}, "Usable: sets of the wanted size can be formed, of raw"),
        (row("none", median=0.7), row("clip:0.01"), {}, "clip:0.01 is suggested: cosines of raw"),
        (row("none", reached=False), row("clip:0.01"), {}, "sets of raw features jump in size, those of"),
        (row("none"), row("clip:0.01", reached=False), {}, "Doubtful: even with clip:0.01"),
        (row("none"), row("clip:0.01"), {"is_random": True}, "nothing below means anything"),
    ],
)
def test_the_verdict(raw, own, changed, verdict):
    said, reasons = judge(findings(raw, own, **changed))
    assert verdict in said
    assert f"median {raw.median:.2f}" in reasons[0] and not any("place" in reason for reason in reasons)
    jumped = [reason for reason in reasons if "jump from 22 % to 3 %" in reason]
    assert len(jumped) == (not raw.reached) + (not own.reached)


def test_place_is_named_where_it_can_be_read():
    _, reasons = judge(findings(row("none"), row("clip:0.01"), position=(0.9, 0.0)))
    assert "R² of the row 0.90, of the column 0.00" in reasons[-1]


def test_the_command_keeps_data_and_backbone():
    found = findings(row("none"), row("clip:0.01"))
    given = ["folder", "--data.root", "my images", "--data.ignore-ids", "11", "255", "--images", "7"]
    given += [
        "--model.weights=w.pth",
        "--loss.phi0",
        "0.9",
        "--loss.steps=3",
        "--out",
        "x",
        "--seeds",
        "1",
        "2",
    ]
    assert training_command(given, found) == (
        "python -m ppap.train folder --data.root 'my images' --data.ignore-ids 11 255 --model.weights=w.pth "
        "--loss.steps=3 --model.condition clip:0.01 --loss.phi0 0.4 --loss.psi0 0.1 --optim.lr 0.0003"
    )
    assert training_command(["--out=x"], found).startswith("python -m ppap.train demo --model.condition")


def grouped(images: int = 6, side: int = 4, noise: float = 0.3, seed: int = 0) -> Maps:
    """Patches of three classes, 2 pixels a side, about a direction each; an eighth of them has no class."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(3, (images, side, side), generator=generator)
    features = F.one_hot(classes, 8).float() + noise * torch.randn(images, side, side, 8, generator=generator)
    classes[torch.rand(classes.shape, generator=generator) < 0.125] = -1
    labels = classes.repeat_interleave(2, 1).repeat_interleave(2, 2)
    return Maps(list(range(images)), features.permute(0, 3, 1, 2), labels.short(), classes.flatten(1))


def settings() -> Config:
    config = settled_demo()
    model, train = replace(config.model, guidance_dropout=0.0), replace(config.train, batch_size=3)
    return replace(config, model=model, train=train, loss=replace(config.loss, steps=2))


def test_purity_is_that_of_a_plain_count():
    maps, config = grouped(), settings()
    own = replace(row("none"), phi0=0.6, psi0=0.2)
    found = purity(maps, Condition(8), own, config, anchors=1000)
    unit = F.normalize(maps.features.permute(0, 2, 3, 1).reshape(-1, 8), dim=1)
    cosines, classes, images = unit @ unit.T, maps.classes, maps.images
    cosines.fill_diagonal_(-5)
    known = torch.nonzero(classes >= 0)[:, 0].tolist()

    def share(candidates):
        hits = []
        for anchor in known:
            usable = [j for j in candidates(anchor) if classes[j] >= 0]
            best = sorted(usable, key=lambda j: -cosines[anchor, j])[:20]
            hits.append(sum(classes[j] == classes[anchor] for j in best) / len(best))
        return 100 * float(torch.tensor(hits).mean())

    every = range(len(unit))
    assert found.neighbours[20] == pytest.approx(share(lambda a: [j for j in every if j != a]), abs=1e-3)
    assert found.across == pytest.approx(
        share(lambda a: [j for j in every if images[j] != images[a]]), abs=1e-3
    )
    # Sets are formed of the patches of a batch: images 0, 2 and 4.
    part = maps.part([0, 2, 4])
    few, labels = unit.view(6, 16, 8)[[0, 2, 4]].reshape(-1, 8), part.classes
    anchors = torch.nonzero(labels >= 0)[:, 0]
    rel = reference.propagate(few, anchors, replace(config_of(config), phi0=0.6, psi0=0.2))
    positive = rel.positive & (labels >= 0)[None]
    same = positive & (labels[None] == labels[anchors][:, None])
    assert found.propagated[0] == pytest.approx(100 * same.sum().item() / positive.sum().item())
    assert found.size == pytest.approx(rel.positive.sum(dim=1).float().mean().item() / len(few))
    cosines = (few @ few.T)[anchors]
    cosines[torch.arange(len(anchors)), anchors] = -5
    limit = cosines.flatten().sort(descending=True).values[int(0.05 * cosines.numel())]
    positive = (cosines > limit) & (labels >= 0)[None]
    same = positive & (labels[None] == labels[anchors][:, None])
    assert found.plain[0.05][0] == pytest.approx(100 * same.sum().item() / positive.sum().item())


def config_of(config: Config):
    from ppap.methods.loss import PPAPLoss

    return PPAPLoss(config.loss, 0).propagation


def test_chance_is_the_share_of_pairs_of_a_class():
    maps = grouped()
    known = maps.classes[maps.classes >= 0]
    assert chance(maps) == pytest.approx(
        100 * (known[:, None] == known[None]).float().mean().item(), rel=1e-5
    )


def test_features_of_pure_classes_score_in_full():
    train, val = grouped(noise=0.05), grouped(noise=0.05, seed=1)
    flat = val.labels.clone()
    flat[:, :] = flat[:, :1, :1]  # an image of one class: no edge for resizing to blur
    features = val.features[:, :, :1, :1].expand_as(val.features).contiguous()
    found = frozen_scores(
        train, val._replace(labels=flat, features=features), Condition(8), 2, classes=3, seeds=(0, 1)
    )
    assert found.linear_accuracy == 100 and found.cluster_accuracy == [100, 100] == found.cluster_miou


def tiny(*options: str) -> Config:
    return parse_arguments(["demo", *LOOK, "--train.batch-size=4", *options]).config


def test_the_figures_are_those_that_training_chooses_by():
    config = tiny("--model.condition=auto", "--loss.phi0=auto", "--loss.psi0=auto", "--compare.rows")
    data, device = build_datasets(config.data).train, torch.device("cpu")
    net, settled, *_ = prepare(config, data, device)
    maps = look(net, data, 100, config, device)
    seen = survey_of(net, maps, config)
    name = settled.model.condition
    own = label_free(seen, name, fit(name, seen.split), config, data.classes)
    assert (own.phi0, own.psi0) == (settled.loss.phi0, settled.loss.psi0) and own.reached
    torch.testing.assert_close(fit(name, seen.split).map, net.condition.map)
    assert look(net, data, 5, config, device).indices == [0, 2, 4, 7, 9]


def test_sets_that_jump_are_not_reached(monkeypatch):
    config = tiny("--compare.rows")
    data, device = build_datasets(config.data).train, torch.device("cpu")
    net = build_net(config.model)
    seen = survey_of(net, look(net, data, 6, config, device), config)
    monkeypatch.setattr(SetSizes, "share", lambda self, phi0, steps=None: 0.9 if phi0 < 0.5 else 1e-4)
    own = label_free(seen, "none", fit("none", seen.split), config, data.classes)
    assert not own.reached and own.jump == (0.9, 1e-4)


def test_neighbours_are_the_most_similar_patches_of_other_images(tmp_path):
    config = tiny("--compare.rows")
    data = build_datasets(config.data).train
    maps = look(build_net(config.model), data, 5, config, torch.device("cpu"))
    scene = Scene(data, maps, 8, 0)
    record = draw_neighbours(tmp_path / "near.png", scene, {"none": Condition(24)}, 2, 3)
    unit = F.normalize(maps.features.permute(0, 2, 3, 1).reshape(5, -1, 24), dim=2)
    places = {data.name(index): place for place, index in enumerate(maps.indices)}
    for found in record:
        own = places[found["image"]]
        best = (unit @ unit[own, found["patch"]]).max(dim=1)
        expected = sorted((i for i in range(5) if i != own), key=lambda i: -best.values[i])[:3]
        assert [places[near["image"]] for near in found["nearest"]] == expected
        assert [near["patch"] for near in found["nearest"]] == best.indices[expected].tolist()
    with Image.open(tmp_path / "near.png") as picture:
        assert picture.width > 4 * 150


def test_the_page_with_labels(tmp_path, capsys):
    out = tmp_path / "page"
    options = [*LOOK, *SMALL, "--conditions", "centre", "drop:2", "--seeds", "0", "1"]
    main(["backbone", "demo", *options, f"--out={out}", "--model.condition=whiten:0.5"])
    text = capsys.readouterr().out
    assert "These are random weights" in text and text.count("| **clip:0.031** (auto) |") == 3
    record = json.loads((out / "backbone.json").read_text())
    names = ["none", "whiten:0.5", "centre", "drop:2", "clip:0.031"]
    assert list(record["rows"]) == list(record["purity"]) == list(record["frozen"]) == names
    assert "Labels say: " in text and "propagated sets are" in text
    assert len(record["frozen"]["none"]["cluster_miou"]) == 2 and "±" in text
    assert record["provenance"]["config"]["model"]["condition"] == "whiten:0.5"
    for name in ("spectrum", "similarities", "neighbours", "clusters"):
        assert (out / f"{name}.png").exists() and f"({name}.png)" in text
    with pytest.raises(UsageError, match="exists already"):
        main(["backbone", "demo", *options, f"--out={out}"])


def test_the_page_of_a_plain_folder_has_no_scores(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PPAP_CACHE_DIR", str(tmp_path / "cache"))
    root = make_folder(tmp_path / "data", labels=False)
    model = [option for option in LOOK if option.startswith("--model")]
    options = [
        "folder",
        f"--data.root={root}",
        "--data.resolution=32",
        "--data.workers=0",
        "--data.classes=3",
    ]
    main(["backbone", *options, *model, *SMALL, f"--out={tmp_path / 'page'}"])
    text = capsys.readouterr().out
    assert "Labels say" not in text and "by labels" not in text and "Frozen features" not in text
    assert "## Suggested" in text and "features: " in text  # kept in the cache
    record = json.loads((tmp_path / "page" / "backbone.json").read_text())
    assert record["purity"] == record["frozen"] == {} and record["chance"] is None
    main(["backbone", *options, *model, *SMALL, f"--out={tmp_path / 'again'}"])
    assert "images: read from" in capsys.readouterr().out
    again = json.loads((tmp_path / "again" / "backbone.json").read_text())
    assert again["rows"] == record["rows"] and again["neighbours"] == record["neighbours"]


def test_what_cannot_be_measured_is_refused(tmp_path, capsys):
    options = ["backbone", "demo", *LOOK, f"--out={tmp_path / 'out'}"]
    with pytest.raises(UsageError, match="drop:24: the backbone has 24 channels"):
        main([*options, "--conditions", "drop:24"])
    with pytest.raises(DataError, match="give more images"):
        main([*options, "--data.scenes-train=1"])
    for wrong in (["--conditions", "whiten"], ["--images=1"], ["--seeds", "1", "1"]):
        with pytest.raises(SystemExit, match="2"):
            main([*options, *wrong])
    assert "--conditions has 'whiten'; give none, centre" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
