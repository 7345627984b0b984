"""COCO-Stuff: layouts, every label id, lists, and the files that must be named when they are wrong."""

import hashlib
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ppap.data import build_dataset, build_datasets
from ppap.data.coco_lists import as_text, packaged
from ppap.data.cocostuff import NAMES
from ppap.errors import DataError, UsageError
from ppap.settings.config import DataConfig
from tests.trees import COCO_7, COCO_FULL, coco_tree, five_crop_tree, picture, save

# Fine ids of each of the 27 classes (COCO-Stuff id - 1), as the classes are published.
FINE = (
    ("71-76", "77-82", "51-60", "61-70", "83-90", "43-50", "25-32", "15-24", "9-14", "0", "33-42", "1-8")
    + ("101-102", "100 113-117", "120-121 152 169", "97 106-107 109 111 122 129 132 155 160 164")
    + ("99 131 138 142", "91-92 103-104 108 130 136 140 151 166-167", "170-176", "179-180")
    + ("94-95 127 150 157 165", "110 124-125 135 139 143-144 146 148 153 158")
    + ("93 96 118 123 128 133 141 162 168", "105 156", "126 134 149 159 161 181", "98 112 137 145 163")
    + ("119 147 154 177-178",)
)


def fine_ids(text):
    for part in text.split():
        first, _, last = part.partition("-")
        yield from range(int(first), int(last or first) + 1)


COARSE = {fine: coarse for coarse, text in enumerate(FINE) for fine in fine_ids(text)}
THREE = {23: 0, 22: 1, 21: 2}
EXPECTED = {
    "cocostuff27": lambda fine: COARSE.get(fine, -1),
    "cocostuff15": lambda fine: max(COARSE.get(fine, -1) - 12, -1),
    "cocostuff3": lambda fine: THREE.get(COARSE.get(fine), -1),
}


def config(root, kind="cocostuff27", **options):
    options = {"crop": "none", "resolution": 16, "eval_resolution": 32, **options}
    return DataConfig(kind=kind, root=str(root), **options)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Read only."""
    return coco_tree(tmp_path_factory.mktemp("coco"), 2)


@pytest.mark.parametrize("kind", EXPECTED)
def test_every_label_id(tree, kind):
    assert sorted(COARSE) == list(range(182))  # the table above has all of them, once
    val = build_dataset(config(tree, kind), "val")
    stored = np.array(Image.open(tree / "annotations/val2017/000000000009.png"))
    assert set(stored.ravel().tolist()) == {*range(182), 255}
    expected = np.vectorize(EXPECTED[kind])(stored)
    assert np.array_equal(val.load(0)[1], expected)
    assert val.classes == len(val.class_names) == len(set(val.class_names)) == int(kind[9:])


def test_the_documentation_has_the_same_table():
    text = (Path(__file__).parent.parent / "docs/datasets.md").read_text()
    rows = re.findall(r"\| (\d+) \| ([a-z ()]+) \| ([\d, -]+?) (?=\|)", text)
    assert {int(c): (name, ids.replace(",", "")) for c, name, ids in rows} == {
        c: (NAMES[c], FINE[c]) for c in range(27)
    }


def test_names_of_the_smaller_sets_follow_the_classes(tree):
    assert build_dataset(config(tree, "cocostuff15"), "val").class_names == NAMES[12:]
    assert build_dataset(config(tree, "cocostuff3"), "val").class_names == ("sky", "plant", "ground")


@pytest.mark.parametrize(
    ("base", "images", "labels"),
    [
        ("", "images/{}", "annotations/{}"),
        ("cocostuff", "images/{}", "annotations/{}"),
        ("coco", "{}", "stuffthingmaps/{}"),
        ("", "images/{}", "stuffthingmaps_trainval2017/{}"),
        ("", "{}", "{}"),
    ],
)
def test_layouts(tmp_path, base, images, labels):
    coco_tree(tmp_path / base, 2, 1, images=images, labels=labels)
    train, val, text = build_datasets(config(tmp_path))
    assert (len(train), len(val)) == (2, 1) and train.labelled and val.labelled
    assert [train.name(i) for i in range(2)] == ["000000000009", "000000000025"]
    assert train[1]["image"].shape == (3, 16, 16) and val[0]["label"].shape == (32, 32)
    assert train.original(1).size == (64, 48)
    assert images.format("train2017") in text and "none is missing" in text


def test_the_packaged_lists_are_the_distributed_files():
    digests = {
        ("train2017", "full"): (97702, "277a78bf32835ab0"),
        ("train2017", "7"): (49629, "3b837594a81880a7"),
        ("val2017", "full"): (4172, "5d8ff03b25dfa5c3"),
        ("val2017", "7"): (2175, "7c629734c88f1a74"),
    }
    for (folder, which), (count, digest) in digests.items():
        ids = packaged(folder, which)
        assert len(ids) == count
        assert hashlib.sha256(as_text(ids).encode()).hexdigest().startswith(digest)


def test_lists_in_the_tree_win_and_are_named(tmp_path):
    coco_tree(tmp_path, 3)
    (tmp_path / "curated/train2017" / COCO_7).write_text("000000000025\n")
    assert len(build_dataset(config(tmp_path), "train")) == 3
    datasets = build_datasets(config(tmp_path, coco_list="7"))
    assert len(datasets.train) == 1 and f"curated/train2017/{COCO_7}" in datasets.description
    assert len(build_dataset(config(tmp_path, "cocostuff15"), "train")) == 1


def test_without_lists_the_packaged_ones_say_what_is_missing(tmp_path):
    coco_tree(tmp_path, 1, 2, ids=(96,))
    (tmp_path / "curated").rename(tmp_path / "lists")
    for folder in ("images", "annotations"):  # the first two of list 7
        for old, new in ((9, 139), (25, 724)):
            (path,) = (tmp_path / folder / "val2017").glob(f"{old:012d}.*")
            path.rename(path.with_name(f"{new:012d}{path.suffix}"))
    with pytest.raises(DataError, match="2,173 images are missing.*--data.partial") as caught:
        build_dataset(config(tmp_path), "val")
    assert f"images/val2017/{packaged('val2017', '7')[2]:012d}.jpg" in str(caught.value)
    _, val, text = build_datasets(config(tmp_path, partial=True), ("val",))
    assert len(val) == 2 and "a part of 2,175" in text and "the package" in text
    with pytest.raises(DataError, match="Few_Stuff_6.*--data.coco-list 7"):
        build_dataset(config(tmp_path, "cocostuff3"), "val")
    assert len(build_dataset(config(tmp_path, "cocostuff3", coco_list="7", partial=True), "val")) == 2


@pytest.mark.parametrize(
    ("line", "match"),
    [("9x", "line 1: '9x' is no id"), ("", "the list is empty"), ("9\n9", "1 ids stand there twice")],
)
def test_lists_that_are_wrong(tmp_path, line, match):
    (coco_tree(tmp_path, 1) / "curated/train2017" / COCO_FULL).write_text(line)
    with pytest.raises(DataError, match=match):
        build_dataset(config(tmp_path), "train")


# Crops


@pytest.mark.parametrize("base", ["", "cocostuff", ".."])
def test_crops_in_either_placement(tmp_path, base):
    root = tmp_path / "cocostuff" if base == ".." else tmp_path
    coco_tree(root, 4)
    five_crop_tree(root / base, 20)
    train, val, text = build_datasets(config(root, crop="five"))
    assert len(train) == 20 and len(val) == 4 and "crops of list full" in text
    assert train.name(11) == "11" and train.original(11).size == (32, 24)
    stored = np.array(Image.open(train.files.label_path(11)))
    assert np.array_equal(train.load(11)[1], stored.astype(int) - 1)


@pytest.mark.parametrize(
    ("kind", "of"),
    [("cocostuff15", lambda c: c - 12 if c >= 12 else -1)] + [("cocostuff3", lambda c: THREE.get(c, -1))],
)
def test_crops_serve_the_smaller_sets(tmp_path, kind, of):
    train = build_dataset(config(five_crop_tree(coco_tree(tmp_path, 4)), kind, crop="five"), "train")
    stored = np.array(Image.open(train.files.label_path(3))).astype(int) - 1
    assert np.array_equal(train.load(3)[1], np.vectorize(of)(stored))


def remove(folder, number):
    (folder / f"img/train/{number}.jpg").unlink()
    (folder / f"label/train/{number}.png").unlink()


TOO_HIGH = np.full((24, 32), 28, np.uint8)


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda f: remove(f, 7), "numbers 7 are missing"),
        (lambda f: (f / "label/train/19.png").unlink(), "20 images but 19 labels"),
        (lambda f: save(f / "img/train/x.jpg", picture((8, 8), 0)), "x.jpg: not a crop"),
        (lambda f: (f / "img/train/4.jpg").write_bytes(b""), "4.jpg: the file is empty"),
        (lambda f: save(f / "label/train/0.png", TOO_HIGH), "id 28 is none of the ids of crops"),
        (lambda f: remove(f, 19), "no multiple of five"),
        (lambda f: os.rename(f / "label", f / "labels"), "label/train: no such folder"),
        (lambda f: os.rename(f, f.with_name("other")), "ppap prepare cocostuff27 --root .*crop none"),
    ],
)
def test_crops_that_are_wrong(tmp_path, spoil, match):
    spoil(five_crop_tree(coco_tree(tmp_path, 4)) / "cropped/cocostuff27_five_crop_0.5")
    with pytest.raises(DataError, match=match):
        build_dataset(config(tmp_path, crop="five"), "train")


def test_crops_of_too_few_images_are_refused(tmp_path):
    five_crop_tree(coco_tree(tmp_path, 5))
    with pytest.raises(DataError, match="20 training images of 25"):
        build_dataset(config(tmp_path, crop="five"), "train")
    assert len(build_dataset(config(tmp_path, crop="five", partial=True), "train")) == 20


def test_an_explicit_list_decides_how_many_crops_there_are(tmp_path):
    five_crop_tree(coco_tree(tmp_path, 5))
    (tmp_path / "curated/train2017" / COCO_7).write_text("9\n25\n41\n57\n")
    assert "crops of list 7" in build_datasets(config(tmp_path, crop="five")).description
    with pytest.raises(DataError, match="20 training images of 25"):
        build_datasets(config(tmp_path, crop="five", coco_list="full"))


# Wrong data


def drop(root):
    for number in (9, 25, 41):
        (root / f"images/train2017/{number:012d}.jpg").unlink()


def cut(path):
    path.write_bytes(path.read_bytes()[:-200])


def relabel(root, value, name="000000000009"):
    save(root / f"annotations/train2017/{name}.png", np.full((48, 64), value, np.uint8))


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (drop, r"(?s)3 images are missing; add them.*000000000009.jpg.*000000000041.jpg"),
        (lambda r: (r / "annotations/train2017/000000000025.png").unlink(), "1 images have no label"),
        (lambda r: cut(r / "images/train2017/000000000025.jpg"), "(?s)1 files are damaged.*25.jpg"),
        (lambda r: cut(r / "annotations/train2017/000000000025.png"), "(?s)1 files are damaged.*25.png"),
        (lambda r: relabel(r, 183), "id 183 is none of the COCO-Stuff ids"),
        (
            lambda r: save(r / "annotations/train2017/000000000009.png", np.zeros((47, 64), np.uint8)),
            "64x47 for an image of 64x48 pixels",
        ),
        (
            lambda r: save(r / "annotations/train2017/000000000009.png", picture((64, 48), 0)),
            "9.png: this label has RGB channels",
        ),
        (lambda r: os.rename(r / "annotations", r / "a"), "unzip stuffthingmaps_trainval2017.zip"),
        (lambda r: os.rename(r / "images", r / "i"), "no images/train2017 .*unzip train2017.zip"),
    ],
)
def test_wrong_files_are_named_before_a_run(tmp_path, spoil, match):
    spoil(coco_tree(tmp_path, 5))
    with pytest.raises(DataError, match=match):
        build_datasets(config(tmp_path))


def test_converted_labels_are_recognised(tmp_path):
    for path in (coco_tree(tmp_path, 2) / "annotations/train2017").iterdir():
        path.rename(path.with_name(f"{path.stem}_labelTrainIds.png"))
    with pytest.raises(DataError, match="a conversion with other ids"):
        build_dataset(config(tmp_path), "train")


def test_a_file_that_turns_bad_later_is_named(tmp_path):
    train = build_dataset(config(coco_tree(tmp_path, 2)), "train")
    relabel(tmp_path, 200, "000000000025")
    with pytest.raises(DataError, match="000000000025.png: id 200"):
        train[1]
    cut(tmp_path / "images/train2017/000000000009.jpg")
    with pytest.raises(DataError, match="000000000009.jpg"):
        train[0]


def test_settings_that_do_not_fit(tree, tmp_path):
    with pytest.raises(UsageError, match="has its own 27 classes"):
        build_datasets(config(tree, classes=26))
    with pytest.raises(UsageError, match="leave out --data.ignore-ids"):
        build_datasets(config(tree, ignore_ids=(255, 3)))
    with pytest.raises(UsageError, match="--data.root is not given"):
        build_datasets(DataConfig(kind="cocostuff27"))
    with pytest.raises(DataError, match="no such folder"):
        build_datasets(config(tmp_path / "x"))
    assert build_dataset(config(tree, classes=27, class_names=NAMES), "val").classes == 27


def test_the_fingerprint_follows_the_files(tmp_path):
    first = build_dataset(config(coco_tree(tmp_path, 2)), "train").fingerprint()
    assert first == build_dataset(config(tmp_path), "train").fingerprint()
    relabel(tmp_path, 3)
    assert first != build_dataset(config(tmp_path), "train").fingerprint()
