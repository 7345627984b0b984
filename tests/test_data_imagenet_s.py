"""ImageNet-S: variants, masks of two bytes, and trees that are not complete."""

import numpy as np
import pytest

from ppap.data import build_dataset, build_datasets
from ppap.errors import DataError, UsageError
from ppap.settings.config import DataConfig
from tests.trees import imagenet_s_mask, imagenet_s_tree, label, save


def config(root, **options):
    options = {"resolution": 16, "eval_resolution": 16, "partial": True, **options}
    return DataConfig(kind="imagenet_s", root=str(root), **options)


FIRST_MASK = "validation-segmentation/n01440764/ILSVRC2012_val_00000000.png"


@pytest.mark.parametrize("categories", [919, 300, 50])
def test_every_id(tmp_path, categories):
    base = imagenet_s_tree(tmp_path, 1, categories, categories=1, size=(160, 128))
    stored = label((160, 128), (*range(categories + 1), 1000), 0)
    save(base / FIRST_MASK, imagenet_s_mask(stored))
    val = build_dataset(config(tmp_path), "val")
    ids = val.load(0)[1]
    assert set(stored.ravel().tolist()) == {*range(categories + 1), 1000}
    assert np.array_equal(ids, np.where(stored == 1000, -1, stored))
    assert val.classes == categories + 1 and val.class_names[0] == "other"
    assert val[0]["label"].max() > 255 or categories == 50


@pytest.mark.parametrize("place", ["", "ImageNetS50", "up"])
@pytest.mark.parametrize("classes", [None, 50, 51])
def test_layouts(tmp_path, place, classes):
    imagenet_s_tree(tmp_path / "imagenet-s" if place == "up" else tmp_path, 2)
    root = tmp_path / "ImageNetS50" if place == "ImageNetS50" else tmp_path
    train, val, text = build_datasets(config(root, classes=classes))
    assert (len(train), len(val)) == (6, 6) and train.classes == val.classes == 51
    assert not train.labelled and val.labelled and "a part of 64,431" in text
    assert train.name(0) == "n01440764/n01440764_0" and (train[0]["label"] == -1).all()


def test_a_folder_of_another_name_needs_the_variant(tmp_path):
    imagenet_s_tree(tmp_path).rename(tmp_path / "mine")
    assert build_dataset(config(tmp_path / "mine", classes=50), "val").classes == 51
    with pytest.raises(UsageError, match="3 categories; say which with --data.classes"):
        build_dataset(config(tmp_path / "mine"), "val")


def test_several_variants_need_a_choice(tmp_path):
    imagenet_s_tree(tmp_path, classes=50, categories=1)
    imagenet_s_tree(tmp_path, classes=300, categories=1)
    with pytest.raises(UsageError, match="several variants; choose one with --data.classes 300 or 50"):
        build_dataset(config(tmp_path), "val")
    assert build_dataset(config(tmp_path, classes=300), "val").classes == 301
    with pytest.raises(UsageError, match="--data.classes is 27"):
        build_dataset(config(tmp_path, classes=27), "val")
    with pytest.raises(DataError, match="no folder ImageNetS919"):
        build_dataset(config(tmp_path, classes=919), "val")


def test_labelled_training_images(tmp_path):
    imagenet_s_tree(tmp_path)
    train = build_dataset(config(tmp_path, imagenet_s_train="train-semi"), "train")
    assert train.labelled and len(train) == 6
    assert set(np.unique(train.load(5)[1]).tolist()) == {-1, 0, 3, 50}


def test_names_come_from_a_complete_tree_or_the_list(tmp_path):
    base = imagenet_s_tree(tmp_path)
    assert build_dataset(config(tmp_path), "val").class_names[:2] == ("other", "category 1")
    wnids = [f"n{k:08d}" for k in range(50)]
    (base / "ImageNetS_categories_im50.txt").write_text("\n".join(wnids))
    assert build_dataset(config(tmp_path), "val").class_names == ("other", *wnids)


def test_counts_are_checked(tmp_path):
    imagenet_s_tree(tmp_path)
    with pytest.raises(DataError) as caught:
        build_datasets(config(tmp_path, partial=False))
    assert "6 training images of 64,431" in str(caught.value)
    assert "6 validation images of 752" in str(caught.value)


@pytest.mark.parametrize(
    ("ids", "match"), [(51, "id 51 with 50 categories"), (999, "id 999 with 50 categories")]
)
def test_masks_of_another_variant(tmp_path, ids, match):
    base = imagenet_s_tree(tmp_path)
    save(base / FIRST_MASK, imagenet_s_mask(np.full((40, 48), ids)))
    with pytest.raises(DataError, match=match):
        build_dataset(config(tmp_path), "val")


def test_wrong_masks_are_named(tmp_path):
    base = imagenet_s_tree(tmp_path)
    save(base / FIRST_MASK, np.zeros((40, 48), np.uint8))
    with pytest.raises(DataError, match="a mask of mode L; ImageNet-S masks are RGB"):
        build_dataset(config(tmp_path), "val")
    (base / FIRST_MASK).unlink()
    with pytest.raises(DataError, match="1 images have no label"):
        build_dataset(config(tmp_path), "val")
    (base / "validation-segmentation").rename(base / "masks")
    with pytest.raises(DataError, match="validation-segmentation: no such folder"):
        build_dataset(config(tmp_path), "val")
