"""Cityscapes: layouts, every label id, and what is missing."""

import numpy as np
import pytest
from PIL import Image

from ppap.data import build_dataset, build_datasets, class_colours
from ppap.data.cityscapes import FRAMES
from ppap.errors import DataError
from ppap.pictures.palette import palette
from ppap.settings.config import DataConfig
from tests.trees import cityscapes_tree, five_crop_tree, label, save

# Label id -> class of the 27, by name.
CLASSES = {
    **{7: "road", 8: "sidewalk", 9: "parking", 10: "rail track", 11: "building", 12: "wall", 13: "fence"},
    **{14: "guard rail", 15: "bridge", 16: "tunnel", 17: "pole", 18: "polegroup", 19: "traffic light"},
    **{20: "traffic sign", 21: "vegetation", 22: "terrain", 23: "sky", 24: "person", 25: "rider", 26: "car"},
    **{27: "truck", 28: "bus", 29: "caravan", 30: "trailer", 31: "train", 32: "motorcycle", 33: "bicycle"},
}


def config(root, **options):
    options = {"crop": "none", "resolution": 16, "eval_resolution": 16, "partial": True, **options}
    return DataConfig(kind="cityscapes27", root=str(root), **options)


def relabel(root, values):
    ids = label((64, 32), values, 0).astype(np.uint8)
    save(root / "gtFine/val/frankfurt/frankfurt_000000_000019_gtFine_labelIds.png", ids)
    return ids


def test_every_label_id(tmp_path):
    stored = relabel(cityscapes_tree(tmp_path, 1), (*range(34), 255))
    val = build_dataset(config(tmp_path), "val")
    ids = val.load(0)[1]
    for value in (*range(34), 255):
        found = set(ids[stored == value].tolist())
        assert len(found) == 1
        name = val.class_names[found.pop()] if found != {-1} else None
        assert name == CLASSES.get(value)
    assert val.classes == 27 and len(val.class_names) == 27


@pytest.mark.parametrize(
    ("values", "stray"), [((7, 34), 34), ((*range(34), 100), 100)], ids=["just above", "another set"]
)
def test_ids_of_another_set_are_refused(tmp_path, values, stray):
    relabel(cityscapes_tree(tmp_path, 1), values)
    with pytest.raises(DataError, match=f"id {stray} is none of the Cityscapes label ids"):
        build_dataset(config(tmp_path), "val")


@pytest.mark.parametrize(("base", "flat"), [("", False), ("cityscapes", False), ("", True)])
def test_layouts(tmp_path, base, flat):
    cityscapes_tree(tmp_path / base, 2, 1, flat=flat)
    train, val, text = build_datasets(config(tmp_path))
    assert (len(train), len(val)) == (4, 2) and "a part of 2,975" in text
    names = [val.name(i).rsplit("/")[-1] for i in range(2)]
    assert names == ["frankfurt_000000_000019", "munster_000000_000019"]
    assert ("no folders of cities" in text) == flat
    assert train[0]["image"].shape == (3, 16, 16)


def test_split_folders_without_cities(tmp_path):
    for split, city in (("train", "ulm"), ("val", "lindau")):
        stem = f"{city}_000000_000019"
        save(tmp_path / f"leftImg8bit/{split}/{stem}_leftImg8bit.png", np.zeros((16, 32, 3), np.uint8))
        save(tmp_path / f"gtFine/{split}/{stem}_gtFine_labelIds.png", np.full((16, 32), 7, np.uint8))
    assert build_dataset(config(tmp_path), "train").name(0) == "ulm_000000_000019"


def test_the_number_of_frames_is_checked_by_city(tmp_path):
    assert sum(FRAMES["train"].values()) == 2975 and sum(FRAMES["val"].values()) == 500
    cityscapes_tree(tmp_path, 2)
    with pytest.raises(DataError) as caught:
        build_dataset(config(tmp_path, partial=False), "val")
    assert "frankfurt: 2 of 267 frames" in str(caught.value) and "lindau: 0 of 59" in str(caught.value)


def test_missing_frames_and_labels_are_named(tmp_path, monkeypatch):
    monkeypatch.setitem(FRAMES, "train", {"aachen": 3, "zurich": 3})  # what cityscapes_tree makes
    cityscapes_tree(tmp_path, 3)
    assert len(build_dataset(config(tmp_path, partial=False), "train")) == 6
    lost = tmp_path / "leftImg8bit/train/zurich/zurich_000001_000019_leftImg8bit.png"
    lost.unlink()
    with pytest.raises(DataError, match=f"(?s)1 images are missing.*{lost}"):
        build_dataset(config(tmp_path, partial=False), "train")
    (tmp_path / "gtFine/train/aachen/aachen_000000_000019_gtFine_labelIds.png").unlink()
    with pytest.raises(DataError, match="1 images have no label"):
        build_dataset(config(tmp_path), "train")


@pytest.mark.parametrize(
    ("old", "new", "match"),
    [
        ("leftImg8bit", "images", "no leftImg8bit folder; unzip"),
        ("gtFine", "labels", "no gtFine beside it"),
        ("leftImg8bit/val", "leftImg8bit/other", "do not both have a folder val"),
    ],
)
def test_missing_folders(tmp_path, old, new, match):
    cityscapes_tree(tmp_path, 1)
    (tmp_path / old).rename(tmp_path / new)
    with pytest.raises(DataError, match=match):
        build_dataset(config(tmp_path), "val")


def test_labels_of_19_classes_are_recognised(tmp_path):
    for path in cityscapes_tree(tmp_path, 1).rglob("*_labelIds.png"):
        path.rename(path.with_name(path.name.replace("labelIds", "labelTrainIds")))
    with pytest.raises(DataError, match="19 classes.*need .*_gtFine_labelIds.png"):
        build_dataset(config(tmp_path), "val")


def test_crops(tmp_path):
    five_crop_tree(cityscapes_tree(tmp_path, 1), 10, "cityscapes")
    train = build_dataset(config(tmp_path, crop="five"), "train")
    assert len(train) == 10
    stored = np.array(Image.open(train.files.label_path(2))).astype(int) - 1
    assert np.array_equal(train.load(2)[1], stored)
    with pytest.raises(DataError, match="10 training images of 14,875"):
        build_dataset(config(tmp_path, crop="five", partial=False), "train")


def test_crops_elsewhere(tmp_path):
    cityscapes_tree(tmp_path / "data", 1)
    five_crop_tree(tmp_path / "made", 10, "cityscapes")
    options = {"crop": "five", "crop_root": str(tmp_path / "made")}
    assert len(build_dataset(config(tmp_path / "data", **options), "train")) == 10


def test_customary_colours():
    colours = class_colours("cityscapes27", 27)
    assert colours[0].tolist() == [128, 64, 128] and colours[26].tolist() == [119, 11, 32]
    assert np.array_equal(class_colours("cocostuff27", 27), palette(27))
    assert np.array_equal(class_colours("cityscapes27", 30), palette(30))  # extra clusters


def test_names_of_any_letters(tmp_path):
    cityscapes_tree(tmp_path, 1)
    for part in ("leftImg8bit", "gtFine"):
        (tmp_path / part / "train/aachen").rename(tmp_path / part / "train/köln")
    assert "köln/aachen_000000_000019" in {build_dataset(config(tmp_path), "train").name(i) for i in range(2)}


def test_crops_beside_a_folder_given_as_the_current_one(tmp_path, monkeypatch):
    cityscapes_tree(tmp_path / "cityscapes", 1)
    five_crop_tree(tmp_path, 10, "cityscapes")
    monkeypatch.chdir(tmp_path / "cityscapes")
    assert len(build_dataset(config("."), "train")) == 2
    assert len(build_dataset(config(".", crop="five"), "train")) == 10


@pytest.mark.parametrize("place", ["", "val/frankfurt/"])
def test_the_frame_that_another_toolbox_tests_with(tmp_path, place):
    ids = [1, 2, 3, 4, 7, 8, 11, 13, 17, 20, 21, 23, 24, 26]
    stem = f"{place}frankfurt_000000_000294"
    save(tmp_path / f"leftImg8bit/{stem}_leftImg8bit.png", np.zeros((128, 256, 3), np.uint8))
    save(tmp_path / f"gtFine/{stem}_gtFine_labelIds.png", label((256, 128), ids, 0).astype(np.uint8))
    val = build_dataset(config(tmp_path), "val")
    assert set(np.unique(val.load(0)[1]).tolist()) == {-1, 0, 1, 4, 6, 10, 13, 14, 16, 17, 19}
