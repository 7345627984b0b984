"""Layouts of folders as people have them: recognised and said, or refused with the option that says it."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from ppap.data import build_datasets
from ppap.data.images import SUFFIXES
from ppap.errors import DataError, UsageError
from ppap.settings.config import DataConfig
from ppap.train import main as train
from tests.test_data_folder import add_image, add_label
from tests.trained import SMALL, VIT


def config(root, **options):
    return DataConfig(root=str(root), resolution=16, eval_resolution=16, **options)


def add_pairs(root, image, label, names=("a", "b", "c")):
    for k, name in enumerate(names):
        add_image(root / image.format(name), seed=k)
        add_label(root / label.format(name))


def labels_of(dataset):
    return [{*np.unique(dataset.load(i)[1])} for i in range(len(dataset))]


LAYOUTS = [
    ("images/{}.jpg", "masks/{}.png"),
    ("imgs/{}.jpg", "masks/{}.png"),
    ("Images/{}.jpg", "Labels/{}.png"),
    ("JPEGImages/{}.jpg", "SegmentationClass/{}.png"),
    ("train/images/{}.jpg", "train/labels/{}.png"),
    ("train/images/{}.jpg", "train/masks/{}.png"),
    ("images/train/{}.jpg", "masks/train/{}.png"),
    ("images/training/{}.jpg", "annotations/training/{}.png"),
    ("images/{}.jpg", "labels/{}.tif"),
    ("images/{}.jpg", "masks/{}_mask.png"),
    ("imagesTr/{}.png", "labelsTr/{}.png"),
    ("{}.jpg", "{}_mask.png"),
    ("{}.jpg", "{}_segmentation.png"),
    ("deep/er/{}.jpg", "deep/er/{}_label.png"),
    ("train/{}.jpg", "train/{}_mask.png"),
    ("images/train/{}.jpg", "images/train/{}_gt.png"),
    ("{}.jpg", "{}.png"),
]


@pytest.mark.parametrize("image, label", LAYOUTS)
def test_usual_layouts_are_recognised(tmp_path, image, label):
    add_pairs(tmp_path, image, label)
    train, _, description = build_datasets(config(tmp_path))
    assert len(train) == 3 and train.labelled and train.classes == 3
    assert labels_of(train) == [{0, 1, 2}] * 3
    assert "found: " in description and "3 training images (labelled)" in description


def test_splits_of_every_name(tmp_path):
    for first, second in (("train", "val"), ("Training", "validation"), ("train", "valid")):
        root = tmp_path / second
        for split in (first, second):
            add_pairs(root, f"{split}/images/{{}}.jpg", f"{split}/masks/{{}}.png")
        train, val, _ = build_datasets(config(root))
        assert train.labelled and val.labelled and len(train) == len(val) == 3
    for split in ("train", "val"):
        add_pairs(tmp_path / "beside", f"{split}/{{}}.jpg", f"{split}/{{}}_mask.png")
    train, val, _ = build_datasets(config(tmp_path / "beside"))
    assert val.labelled and [val.name(i) for i in range(3)] == ["a", "b", "c"] and len(train) == 3


def test_lists_of_names_divide_the_images(tmp_path):
    add_pairs(tmp_path, "JPEGImages/{}.jpg", "SegmentationClass/{}.png")
    lists = tmp_path / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text("c\n")
    (lists / "val.txt").write_text("a\n\n")
    train, val, description = build_datasets(config(tmp_path))
    assert (train.name(0), len(train), val.name(0), len(val)) == ("c", 1, "a", 1)
    assert train.labelled and val.labelled
    assert "splits of ImageSets/Segmentation" in description
    assert "1 images are in none of train.txt, val.txt" in description


@pytest.mark.parametrize(
    "train, val, message",
    [("c\nx\n", "a\n", "no image for 1 of 2 names"), ("", "a\n", "empty list"), ("a\nb\n", "a\n", "a is in")],
)
def test_lists_that_do_not_fit(tmp_path, train, val, message):
    add_pairs(tmp_path, "JPEGImages/{}.jpg", "SegmentationClass/{}.png")
    lists = tmp_path / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    (lists / "train.txt").write_text(train)
    (lists / "val.txt").write_text(val)
    with pytest.raises(DataError, match=message):
        build_datasets(config(tmp_path))


@pytest.mark.parametrize(
    "option", [{"bands": (1, 2, 3)}, {"value_range": (0.0, 1.0)}, {"exif": "ignore"}, {"label_ids": (0, 1)}]
)
def test_what_only_folders_have_is_refused_beside_another_kind(option):
    with pytest.raises(
        ValueError, match=f"--data.{next(iter(option)).replace('_', '-')}.*--data.kind folder"
    ):
        DataConfig(kind="potsdam3", **option)


@pytest.mark.parametrize(
    "images, labels",
    [("photos/*.jpg", "annots/*.png"), ("photos/*", "annots/*"), ("**/*.jpg", "**/*.png")],
)
def test_patterns_for_the_rest(tmp_path, images, labels):
    if "**" in images:
        add_pairs(tmp_path, "some/{}.jpg", "some/{}.png")
    else:
        add_pairs(tmp_path, "photos/{}.jpg", "annots/{}.png")
    train, _, description = build_datasets(config(tmp_path, images=images, labels=labels))
    assert len(train) == 3 and labels_of(train) == [{0, 1, 2}] * 3
    assert f"--data.images {images} with --data.labels {labels}" in description


def test_patterns_with_splits_and_parts_of_names(tmp_path):
    for split in ("train", "val"):
        add_pairs(tmp_path, f"rgb/{split}/{{}}_rgb.jpg", f"ids/{split}/lab_{{}}.png")
    options = {"images": "rgb/{split}/*_rgb.jpg", "labels": "ids/{split}/lab_*.png"}
    train, val, _ = build_datasets(config(tmp_path, **options))
    assert [val.name(i) for i in range(3)] == ["a", "b", "c"] and val.labelled and len(train) == 3
    with pytest.raises(DataError, match="no image matches --data.images"):
        build_datasets(config(tmp_path, images="nowhere/*.jpg"))
    with pytest.raises(DataError, match="no file matches --data.labels"):
        build_datasets(config(tmp_path, images="rgb/{split}/*.jpg", labels="no/{split}/*.png"))
    with pytest.raises(UsageError, match="without --data.images"):
        build_datasets(config(tmp_path, labels="ids/{split}/lab_*.png"))


def test_masks_are_never_taken_for_pictures_in_silence(tmp_path):
    add_pairs(tmp_path, "photos/{}.jpg", "annots/{}.png")
    with pytest.raises(DataError) as caught:
        build_datasets(config(tmp_path))
    assert "--data.images 'photos/*' --data.labels 'annots/*'" in str(caught.value)
    alone = build_datasets(config(tmp_path, images="photos/*"))
    assert len(alone.train) == 3 and not alone.train.labelled


def test_folders_of_photographs_of_the_same_names_are_pictures(tmp_path):
    for place in ("left", "right", "masks"):
        for k in range(3):
            add_image(tmp_path / place / f"{k}.png", seed=k)
    assert len(build_datasets(config(tmp_path)).train) == 9


def test_a_preview_beside_the_labels_is_no_label(tmp_path):
    add_pairs(tmp_path, "images/{}.jpg", "labels/{}.png")
    add_image(tmp_path / "labels/a.jpg")
    add_image(tmp_path / "labels/preview.jpg")
    assert labels_of(build_datasets(config(tmp_path)).train) == [{0, 1, 2}] * 3


def test_few_labels_and_many_pictures(tmp_path):
    for k in range(6):
        add_image(tmp_path / f"images/{k}.jpg", seed=k)
    add_label(tmp_path / "labels/4.png")
    train, _, description = build_datasets(config(tmp_path))
    assert train.labelled and train.classes == 3 and "labels for 1 of 6 training images" in description
    assert [int((train[i]["label"] >= 0).sum()) for i in range(6)] == [0, 0, 0, 0, 256, 0]
    before = train.fingerprint()
    shutil.move(tmp_path / "labels/4.png", tmp_path / "labels/3.png")
    assert build_datasets(config(tmp_path)).train.fingerprint() != before
    (tmp_path / "labels/3.png").rename(tmp_path / "labels/9.png")
    with pytest.raises(DataError, match="6 images have no label(.|\n)*1 labels have no image"):
        build_datasets(config(tmp_path))


def test_validation_labels_that_scores_cannot_see(tmp_path):
    add_pairs(tmp_path, "images/train/{}.jpg", "labels/train/{}.png")
    wide = np.full((20, 60), 255, np.uint8)
    wide[:, :10] = 1
    add_image(tmp_path / "images/val/x.jpg", size=(60, 20))
    (tmp_path / "labels/val").mkdir()
    Image.fromarray(wide).save(tmp_path / "labels/val/x.png")
    assert "outside the centre crop of 16 pixels" in build_datasets(config(tmp_path)).val.unscored
    options = ["folder", f"--data.root={tmp_path}", f"--train.out={tmp_path / 'run'}", *VIT, *SMALL]
    with pytest.raises(DataError, match="outside the centre crop"):
        train(options)
    assert not (tmp_path / "run").exists()
    Image.fromarray(wide * 0 + 255).save(tmp_path / "labels/val/x.png")
    with pytest.raises(DataError, match="hold no class"):
        build_datasets(config(tmp_path))


# What is left out


def test_what_ppap_wrote_is_skipped_and_said(tmp_path):
    for k in range(3):
        add_image(tmp_path / f"photos/{k}.jpg", seed=k)
    run = tmp_path / "runs/demo"
    add_image(run / "pictures/curves.png")
    (run / "config.json").write_text(json.dumps({"config": {}, "hash": "1", "finished": True}))
    masks = tmp_path / "photos/masks"
    for name in ("0", "sub/1"):
        add_label(masks / f"{name}.png")
        add_image(masks / f"{name}_overlay.jpg")
    add_image(masks / "legend.png")
    (masks / "legend.json").write_text(json.dumps({"probe": "cluster", "classes": [], "ignored_id": 255}))
    train, _, description = build_datasets(config(tmp_path))
    assert [train.name(i) for i in range(len(train))] == ["photos/0", "photos/1", "photos/2"]
    assert "skipped what runs of ppap wrote: runs/demo" in description
    assert "skipped 6 masks, overlays and figures that ppap wrote" in description


def test_masks_of_ppap_serve_as_labels(tmp_path):
    add_pairs(tmp_path, "images/{}.jpg", "labels/{}.png")
    for name in ("a", "b", "c"):
        add_image(tmp_path / f"labels/{name}_overlay.jpg")
    add_image(tmp_path / "labels/legend.png")
    legend = {"probe": "cluster", "classes": [], "ignored_id": 255}
    (tmp_path / "labels/legend.json").write_text(json.dumps(legend))
    assert labels_of(build_datasets(config(tmp_path)).train) == [{0, 1, 2}] * 3


def test_the_rest_is_counted_by_suffix(tmp_path):
    add_image(tmp_path / "a.png")
    for name in ("b.heic", "c.HEIC", "notes.txt", "d.psd"):
        (tmp_path / name).write_bytes(b"x")
    description = build_datasets(config(tmp_path)).description
    if ".heic" not in SUFFIXES:
        assert "not read: 2 .heic" in description and "pip install pillow-heif" in description
    assert "1 .txt" in description and "1 .psd" in description


@pytest.mark.parametrize("suffix", ["gif", "ppm", "jp2", "avif", "webp", "bmp", "tif"])
def test_formats_that_pillow_reads_are_read(tmp_path, suffix):
    if f".{suffix}" not in SUFFIXES:
        pytest.skip(f"this Pillow has no decoder of {suffix}")
    add_image(tmp_path / f"a.{suffix}", size=(32, 32))
    train = build_datasets(config(tmp_path)).train
    assert len(train) == 1 and train[0]["image"].shape == (3, 16, 16)
