"""The generated scenes: reproducible, split without overlap, every class present, usable at any size."""

import hashlib

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from ppap.config import DataConfig
from ppap.data import build_dataset, build_datasets
from ppap.data.scenes import CLASS_NAMES, make_scene

CONFIG = DataConfig(
    kind="scenes", scenes_train=6, scenes_val=3, scenes_size=48, resolution=32, eval_resolution=64
)


def digest(seed, split, index):
    pixels, label = make_scene(seed, split, index, 32)
    return hashlib.sha256(pixels.tobytes() + label.tobytes()).hexdigest()


@pytest.mark.parametrize("size", [16, 33, 128])
def test_a_scene_has_every_pixel_labelled(size):
    pixels, label = make_scene(0, "train", 3, size)
    assert pixels.shape == (size, size, 3) and pixels.dtype == np.uint8
    assert label.shape == (size, size) and label.dtype == np.uint8
    assert label.max() < len(CLASS_NAMES)
    assert pixels.std() > 5


def test_same_arguments_same_scene():
    assert digest(5, "train", 7) == digest(5, "train", 7)


def test_seed_split_and_index_change_the_scene():
    scenes = [digest(s, split, i) for s in (0, 1, 2**32) for split in ("train", "val") for i in range(6)]
    assert len(set(scenes)) == len(scenes)


def test_all_classes_occur_often():
    labels = [make_scene(0, "train", i, 48)[1] for i in range(60)]
    share = np.mean([np.bincount(label.ravel(), minlength=len(CLASS_NAMES)) > 0 for label in labels], axis=0)
    assert (share > 0.25).all(), dict(zip(CLASS_NAMES, share, strict=True))


def test_colour_alone_does_not_tell_the_class():
    """A nearest-mean rule on colour, fitted and scored on the same pixels, stays far from right."""
    scenes = [make_scene(0, "train", i, 32) for i in range(40)]
    pixels = np.concatenate([p.reshape(-1, 3) for p, _ in scenes]).astype(np.float64)
    labels = np.concatenate([label.ravel() for _, label in scenes])
    means = np.stack([pixels[labels == c].mean(0) for c in range(len(CLASS_NAMES))])
    guess = ((pixels[:, None] - means) ** 2).sum(-1).argmin(1)
    recall = [np.mean(guess[labels == c] == c) for c in range(len(CLASS_NAMES))]
    assert np.mean(recall) < 0.5


def test_dataset_keeps_the_contract():
    train, val, description = build_datasets(CONFIG)
    assert (len(train), len(val)) == (6, 3)
    assert train.classes == len(train.class_names) == 8 and train.labelled
    assert "synthetic" in description
    sample = val[2]
    assert sample["image"].shape == (3, 64, 64) and sample["image"].dtype == torch.float32
    assert sample["label"].shape == (64, 64) and sample["label"].dtype == torch.int64
    assert sample["index"] == 2
    assert val.original(2).size == (48, 48) and val.pixels(2).shape == (64, 64, 3)
    assert len({train.name(i) for i in range(6)}) == 6
    assert default_collate([train[0], train[1]])["image"].shape == (2, 3, 32, 32)
    with pytest.raises(IndexError):
        train[6]


def test_one_split_alone_is_the_same():
    assert torch.equal(build_dataset(CONFIG, "val")[1]["image"], build_datasets(CONFIG).val[1]["image"])
