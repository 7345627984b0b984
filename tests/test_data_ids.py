"""Ids of label files and classes: ignored ids leave them, gaps are closed, files keep their own ids."""

import json

import numpy as np
import pytest
from PIL import Image

import ppap
from ppap.data import build_datasets, class_colours
from ppap.data.ids import NO_ID, as_trained, choose_classes
from ppap.errors import DataError
from ppap.eval import main as evaluate
from ppap.predict import main as predict
from ppap.settings.config import DataConfig, config_hash, from_dict
from ppap.train import main as train
from tests.runs import edit_info
from tests.trained import tiny_folder_run


def classes_of(present, **options):
    return choose_classes(present, DataConfig(**options))


@pytest.mark.parametrize(
    "present, options, ids",
    [
        pytest.param((0, 1, 2, 255), {}, (0, 1, 2), id="as before"),
        pytest.param((0, 1, 2, 3, 255), {"ignore_ids": (0, 255)}, (1, 2, 3), id="the first is ignored"),
        pytest.param((0, 1, 2, 3), {"ignore_ids": (2,)}, (0, 1, 3), id="one in the middle is ignored"),
        pytest.param((0, 255), {}, (0, 255), id="binary"),
        pytest.param((0, 255), {"ignore_ids": ()}, (0, 255), id="binary, nothing ignored"),
        pytest.param((0, 255), {"classes": 1}, (0,), id="binary, one class asked for"),
        pytest.param((0, 80, 160), {}, (0, 80, 160), id="gaps"),
        pytest.param((0, 80, 160), {"classes": 3}, (0, 80, 160), id="gaps and their number"),
        pytest.param((0, 80, 160), {"classes": 5}, (0, 80, 160, -1, -1), id="gaps and more clusters"),
        pytest.param((0, 1, 2), {"classes": 5}, (0, 1, 2, 3, 4), id="ids that do not occur"),
        pytest.param((0, 1, 2), {"classes": 4, "ignore_ids": (0,)}, (1, 2, 3), id="4 ids, one ignored"),
        pytest.param((0, 1, 2, 3), {"classes": 3, "ignore_ids": (0,)}, (1, 2, 3), id="3 classes, 0 ignored"),
        pytest.param((0, 2), {"label_ids": (2, 0)}, (2, 0), id="given"),
        pytest.param((0, 128, 255), {"label_ids": (0, 128, 255)}, (0, 128, 255), id="255 named"),
    ],
)
def test_classes_of_the_ids_that_labels_hold(present, options, ids):
    found = classes_of(present, **options)
    assert found.ids == ids and not found.stray and len(found.names) == len(ids)


def test_names_go_with_ids():
    names = ("ground", "road", "roof")
    assert classes_of((0, 1, 2), class_names=names, ignore_ids=(0,)).names == ("road", "roof")
    assert classes_of((0, 1, 2, 3), class_names=names, ignore_ids=(0,)).names == names
    assert classes_of((0, 80, 160), class_names=names).names == names
    assert classes_of((0, 80, 160)).names == ("class 0", "class 80", "class 160")


def test_what_is_packed_is_said():
    assert "classes are the ids 0, 80, 160" in classes_of((0, 80, 160)).notes
    assert any("0 and 255: two classes" in note for note in classes_of((0, 255)).notes)
    assert not classes_of((0, 1, 2, 255)).notes


@pytest.mark.parametrize(
    "present, options, words",
    [
        ((0, 127, 255), {}, "--data.label-ids 0 127 255"),
        ((0, 85, 170, 255), {}, "--data.label-ids 0 85 170 if not"),
        ((0, 1, 255), {"ignore_ids": ()}, "--data.ignore-ids 255"),
        ((4, 255), {"ignore_ids": (4, 255)}, "only ignored ids"),
    ],
)
def test_doubtful_ids_are_refused(present, options, words):
    with pytest.raises(DataError, match=words):
        classes_of(present, **options)


def test_more_ids_than_classes_are_stray():
    assert classes_of((0, 1, 2, 7), classes=3).stray == (7,)
    assert classes_of((0, 7), class_names=("a", "b", "c")).stray == (7,)
    assert classes_of((0, 3), label_ids=(0, 80)).stray == (3,)


def test_colours_belong_to_ids():
    colours = class_colours("folder", 3, (0, 80, 160))
    assert np.array_equal(colours[1], class_colours("folder", 200)[80])
    assert len(np.unique(class_colours("folder", 4, (7, -1, 2, -1)), axis=0)) == 4


def test_an_older_checkpoint_reads_its_labels_as_it_did():
    info = {"classes": 4, "class_names": ["class 0"] * 4, "labelled": True, "assignment": [0, 1, 2, 3]}
    known = as_trained(DataConfig(ignore_ids=(0, 255)), info)
    assert known.label_ids == (NO_ID, 1, 2, 3) and known.classes == 4
    assert known.value_range == (0, 65535) and known.label_colours == (), "16 bits whole, labels by index"
    assert choose_classes((0, 1, 2), known).ids == (NO_ID, 1, 2, 3)


@pytest.fixture(scope="module")
def by_place(tmp_path_factory):
    """The same pictures with the ignored id in four places: (run, ids of the classes) of each."""
    runs = {}
    for name, ids, ignored in (
        ("last", (0, 1, 2), 3),
        ("first", (1, 2, 3), 0),
        ("middle", (0, 2, 3), 1),
        ("far", (10, 90, 200), 0),
    ):
        folder = tmp_path_factory.mktemp(name)
        run = tiny_folder_run(folder, ids=(*ids, ignored), options=["--data.ignore-ids", str(ignored), "255"])
        runs[name] = run, ids
    return runs


def test_scores_do_not_hang_on_the_place_of_the_ignored_id(by_place):
    scores = [
        json.loads((run / "evaluation-final.json").read_text())["summary"] for run, _ in by_place.values()
    ]
    assert all(score == scores[0] for score in scores)


@pytest.mark.parametrize("name", ["first", "middle", "far"])
def test_masks_results_and_legend_have_the_ids_of_the_files(by_place, name, tmp_path):
    run, ids = by_place[name]
    image = next((run.parent / "data/images/val").iterdir())
    predict([str(run), str(image), f"--out={tmp_path / 'masks'}", "--resolution=32"])
    mask = Image.open(tmp_path / "masks" / f"{image.stem}.png")
    assert {*np.unique(np.array(mask))} <= {*ids}
    legend = json.loads((tmp_path / "masks/legend.json").read_text())
    assert [entry["id"] for entry in legend["classes"]] == list(ids)
    for entry in legend["classes"]:
        assert mask.getpalette()[3 * entry["id"] :][:3] == entry["rgb"]
    labels = ppap.load(run).predict(Image.open(image), resolution=32)
    assert np.array_equal(labels.numpy(), np.array(mask))
    evaluate([str(run), f"--out={tmp_path / 'scores.json'}", "--eval.crf=none"])
    record = json.loads((tmp_path / "scores.json").read_text())
    final = json.loads((run / "evaluation-final.json").read_text())
    assert record["label_ids"] == list(ids) and record["summary"] == final["summary"]
    assert record["classes"] == [f"class {i}" for i in ids]


def test_an_earlier_checkpoint_goes_on_and_is_measured(tmp_path, capsys):
    """Without the ids in its config.json, and with a class for the ignored id, as it was written then."""
    run = tiny_folder_run(
        tmp_path,
        ids=(1, 2, 3, 0),
        options=["--data.label-ids", "-1", "1", "2", "3", "--data.ignore-ids", "0", "255"],
    )

    def older(info):
        info["config"]["data"].pop("label_ids")
        info["config"]["data"]["ignore_ids"] = [0, 255]
        for name in ("label_ids", "ignored_ids"):
            info.pop(name)

    for name in ("last", "best"):
        edit_info(run / "checkpoints" / name, older)
    stored = json.loads((run / "config.json").read_text())
    stored["config"]["data"].pop("label_ids")
    stored["config"]["data"]["ignore_ids"] = [0, 255]
    stored["hash"] = config_hash(from_dict(stored["config"]))
    (run / "config.json").write_text(json.dumps(stored))
    evaluate([str(run), "--eval.crf=none"])
    train(["--resume", str(run), "--train.steps=5"])
    assert json.loads((run / "checkpoints/last/config.json").read_text())["classes"] == 4


def test_binary_masks_are_two_classes(tmp_path):
    for split in ("train", "val"):
        for k in range(3):
            ids = np.zeros((24, 24), np.uint8)
            ids[:, 8 * k :] = 255
            for kind, pixels in (("images", np.stack([ids] * 3, -1)), ("labels", ids)):
                (tmp_path / kind / split).mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(tmp_path / kind / split / f"{k}.png")
    data = build_datasets(DataConfig(root=str(tmp_path), resolution=16, eval_resolution=16))
    assert data.train.classes == 2 and data.train.ids == (0, 255)
    assert {*data.val[1]["label"].unique().tolist()} == {0, 1}
    assert "two classes" in data.description
