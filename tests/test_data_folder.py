"""The folder dataset: layouts, samples, and every problem the check must name."""

import numpy as np
import pytest
import torch
from PIL import Image

from ppap.data import build_dataset, build_datasets
from ppap.data.folder import find_layout
from ppap.errors import DataError, UsageError
from ppap.settings.config import DataConfig


def add_image(path, size=(24, 20), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)).save(path)


def add_label(path, size=(24, 20), ids=(0, 1, 2)):
    path.parent.mkdir(parents=True, exist_ok=True)
    label = np.zeros(size[::-1], np.uint8)
    label.flat[: len(ids)] = ids
    Image.fromarray(label).save(path)


def paired(root, images="images", labels="labels", splits=("train", "val")):
    for split in splits:
        for k in range(3):
            add_image(root / images / split / f"{split}{k}.jpg", seed=k)
            add_label(root / labels / split / f"{split}{k}.png")
    return root


def config(root, **options):
    return DataConfig(root=str(root), resolution=16, eval_resolution=32, **options)


def refused(root, *parts, split=None, **options):
    with pytest.raises(DataError) as caught:
        build_dataset(config(root, **options), split) if split else build_datasets(config(root, **options))
    for part in parts:
        assert part in str(caught.value)
    return str(caught.value)


# Layouts


@pytest.mark.parametrize("names", [("images", "labels"), ("imgs", "labels"), ("img_dir", "ann_dir")])
def test_paired_layouts(tmp_path, names):
    train, val, description = build_datasets(config(paired(tmp_path, *names)))
    assert (len(train), len(val)) == (3, 3)
    assert train.labelled and val.labelled and train.classes == val.classes == 3
    assert train.class_names == ("class 0", "class 1", "class 2")
    assert [val.name(i) for i in range(3)] == ["val0", "val1", "val2"]
    assert f"{names[0]}/{{train,val}} with {names[1]}/{{train,val}}" in description
    assert (
        "3 training images (labelled); 3 validation images (labelled); 3 classes from the labels"
        in description
    )


def test_labels_of_one_class_are_said_to_tell_nothing(tmp_path):
    paired(tmp_path)
    for path in tmp_path.glob("labels/*/*.png"):
        add_label(path, ids=(0,))
    description = build_datasets(config(tmp_path))[2]
    assert "1 class from the labels; a single class: every score will be 100 %" in description


def test_a_sample_keeps_the_contract(tmp_path):
    train, val, _ = build_datasets(config(paired(tmp_path)))
    sample = val[1]
    assert sample["image"].shape == (3, 32, 32) and sample["image"].dtype == torch.float32
    assert sample["label"].shape == (32, 32) and sample["label"].dtype == torch.int64
    assert sample["index"] == 1 and train[0]["image"].shape == (3, 16, 16)
    assert val.original(1).size == (24, 20) and val.original(1).mode == "RGB"
    assert val.pixels(1).shape == (32, 32, 3) and val.pixels(1).dtype == np.uint8
    with pytest.raises(IndexError):
        val[3]


@pytest.mark.parametrize("paths", [("a.jpg", "b.png"), ("x/a.jpg", "y/a.jpg")], ids=["flat", "nested"])
def test_any_folder_of_images(tmp_path, paths):
    for path in paths:
        add_image(tmp_path / path)
    train, val, description = build_datasets(config(tmp_path))
    assert [train.name(i) for i in range(2)] == [p.rsplit(".")[0] for p in paths]
    assert not train.labelled and not val.labelled and train.classes == 27
    assert len(val) == 2 and (train[0]["label"] == -1).all()
    assert (
        "no labels" in description and "no metrics" in description and "27 classes by default" in description
    )


def test_pictures_are_a_fixed_sample_of_the_training_images(tmp_path):
    for k in range(40):
        add_image(tmp_path / f"{k:02d}.png", size=(16, 16))
    names = [
        [val.name(i) for i in range(len(val))] for val in (build_datasets(config(tmp_path)).val for _ in "ab")
    ]
    assert names[0] == names[1] == sorted(names[0]) and len(names[0]) == 16
    assert names[0] == [build_dataset(config(tmp_path), "val").name(i) for i in range(16)]


@pytest.mark.parametrize("labelled", ["train", "val"])
def test_one_split_may_lack_labels(tmp_path, labelled):
    other = {"train": "val", "val": "train"}[labelled]
    paired(tmp_path)
    for label in (tmp_path / "labels" / other).iterdir():
        label.unlink()
    (tmp_path / "labels" / other).rmdir()
    datasets = build_datasets(config(tmp_path))
    assert getattr(datasets, labelled).labelled and not getattr(datasets, other).labelled
    assert datasets.train.classes == datasets.val.classes == 3
    assert build_dataset(config(tmp_path), other).classes == 3  # from the labels of the other split
    assert ("no validation labels" in datasets.description) == (labelled == "train")


def test_labels_without_split_folders_belong_to_training(tmp_path):
    add_image(tmp_path / "images/sub/a.jpg")
    add_label(tmp_path / "labels/sub/a.png")
    train, val, description = build_datasets(config(tmp_path))
    assert train.labelled and not val.labelled and train.name(0) == "sub/a"
    assert "no validation images" in description


def test_validation_alone_suffices_for_evaluation(tmp_path):
    paired(tmp_path, splits=("val",))
    assert build_dataset(config(tmp_path), "val").labelled
    refused(tmp_path, "no train folder")


def test_folders_that_are_not_used_are_named(tmp_path):
    add_image(paired(tmp_path) / "images" / "test" / "a.jpg")
    assert "not used: images/test" in build_datasets(config(tmp_path)).description


# Classes and ids


def test_ignored_ids_become_minus_one(tmp_path):
    add_image(tmp_path / "images/train/a.png", size=(16, 16))
    add_label(tmp_path / "labels/train/a.png", size=(16, 16), ids=(4, 5, 5, 255, 1))
    train = build_dataset(config(tmp_path, ignore_ids=(5, 255)), "train")
    assert train.classes == 3 and train.ids == (0, 1, 4)
    assert train[0]["label"][0, :6].tolist() == [2, -1, -1, -1, 1, 0]
    assert train.label_counts.tolist() == [251, 1, 1]


def test_an_ignored_id_inside_the_classes_is_no_class(tmp_path):
    train = build_datasets(config(paired(tmp_path), classes=4, ignore_ids=(0,))).train
    assert train.ids == (1, 2, 3) and train.label_counts.tolist() == [3, 3, 0]


def test_names_decide_the_number_of_classes(tmp_path):
    train = build_datasets(config(paired(tmp_path), class_names=("a", "b", "c", "d"))).train
    assert train.classes == 4 and train.class_names == ("a", "b", "c", "d")


def test_stray_ids_name_file_id_and_remedy(tmp_path):
    add_label(paired(tmp_path) / "labels/val/val1.png", ids=(0, 1, 7))
    text = refused(tmp_path, "val1.png: id 7 with 3 classes, in 1 files", "--data.classes 8", classes=3)
    assert "--data.ignore-ids 7 255" in text


def test_stray_ids_beside_too_few_names_blame_the_names(tmp_path):
    add_label(paired(tmp_path) / "labels/val/val1.png", ids=(0, 1, 7))
    names = ("a", "b", "c")
    text = refused(tmp_path, "give --data.class-names with 8 names or --data.ignore-ids", class_names=names)
    assert "--data.classes" not in text
    refused(
        tmp_path,
        "give --data.classes 8 and --data.class-names with 8 names or --data",
        classes=3,
        class_names=names,
    )


def test_ids_255_that_nobody_ignores(tmp_path):
    add_label(paired(tmp_path) / "labels/val/val1.png", ids=(255,))
    refused(tmp_path, "--data.ignore-ids 255", ignore_ids=())
    assert "--data.classes" not in refused(tmp_path, "--data.ignore-ids 9 255", classes=3, ignore_ids=(9,))


def test_labels_of_ignored_ids_only(tmp_path):
    add_image(tmp_path / "images/train/a.png")
    add_label(tmp_path / "labels/train/a.png", ids=())
    refused(tmp_path, "only ignored ids (0)", ignore_ids=(0,))


# Problems


def test_no_root_no_folder_no_images(tmp_path):
    with pytest.raises(UsageError, match="--data.root"):
        build_datasets(DataConfig())
    refused(tmp_path / "nowhere", "no such folder", "--data.root")
    (tmp_path / "readme.txt").touch()
    refused(tmp_path, "no images", ".txt", ".jpg")
    refused(tmp_path / "readme.txt", "not a folder")


def test_labels_without_their_images(tmp_path):
    add_label(tmp_path / "labels/train/a.png")
    refused(tmp_path, "labels/ exists but its images do not", "images/ or imgs/")
    add_image(tmp_path / "images/train/a.jpg")
    add_label(tmp_path / "labels/val/b.png")
    refused(tmp_path, "labels/val exists but images/val does not")


def test_labels_without_split_folders_beside_images_with_them(tmp_path):
    add_image(tmp_path / "images/train/a.jpg")
    add_label(tmp_path / "labels/a.png")
    refused(tmp_path, "labels has no split folders", "labels/train")


def test_all_problems_come_in_one_message(tmp_path):
    paired(tmp_path)
    for k in range(7):
        add_image(tmp_path / f"images/train/new{k}.jpg")
    add_label(tmp_path / "labels/val/orphan.png")
    add_label(tmp_path / "labels/train/train0.png", size=(20, 24))
    add_image(tmp_path / "labels/train/train1.png")
    add_image(tmp_path / "images/train/train2.png")
    cut = (tmp_path / "images/val/val0.jpg").read_bytes()
    (tmp_path / "images/val/val0.jpg").write_bytes(cut[: len(cut) * 2 // 3])
    (tmp_path / "labels/val/val1.png").write_bytes(b"")
    text = refused(
        tmp_path,
        "7 images have no label",
        "new0.jpg: no ",
        "... and 2 more",
        "1 labels have no image",
        "orphan.png",
        "20x24 for an image of 24x20 pixels",
        "must be index images",
        "share their name",
        "train2.png and train2.jpg",
        "val0.jpg: cannot be read",
        "val1.png: the file is empty",
    )
    assert "new5.jpg" not in text and "Traceback" not in text


def test_a_split_asked_for_alone_is_checked_alone(tmp_path):
    (paired(tmp_path) / "images/train/train0.jpg").write_bytes(b"")
    assert len(build_dataset(config(tmp_path, classes=3), "val")) == 3
    refused(tmp_path, "train0.jpg", split="train", classes=3)


def test_files_that_change_after_the_check_are_named(tmp_path):
    train = build_datasets(config(paired(tmp_path))).train
    add_label(tmp_path / "labels/train/train0.png", ids=(9,))
    add_label(tmp_path / "labels/train/train1.png", size=(5, 5))
    (tmp_path / "images/train/train2.jpg").unlink()
    for i, message in enumerate(("id 9", "5x5", "no such file")):
        with pytest.raises(DataError, match=message):
            train[i]


def test_labels_are_matched_after_rotation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "images/train").mkdir(parents=True)
    Image.new("RGB", (24, 20)).save(tmp_path / "images/train/a.jpg", exif=exif)
    add_label(tmp_path / "labels/train/a.png", size=(20, 24))
    assert build_dataset(config(tmp_path), "train").original(0).size == (20, 24)
    add_label(tmp_path / "labels/train/a.png", size=(24, 20))
    refused(tmp_path, "EXIF")


def test_the_layout_can_be_asked_for_alone(tmp_path):
    layout = find_layout(paired(tmp_path))
    assert list(layout.splits) == ["train", "val"] and len(layout.splits["train"].images) == 3


@pytest.mark.parametrize("split", ["test", "validation"])
def test_unknown_split(tmp_path, split):
    with pytest.raises(UsageError, match="train or val"):
        build_dataset(config(paired(tmp_path)), split)


def test_unknown_kind_names_the_nearest(tmp_path):
    options = config(tmp_path)
    object.__setattr__(options, "kind", "scene")
    with pytest.raises(UsageError, match="scenes"):
        build_datasets(options)
