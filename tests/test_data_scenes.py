"""The generated scenes: reproducible, split without overlap, every class present, usable at any size."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from ppap.data import build_dataset, build_datasets
from ppap.data.patch_labels import patch_labels
from ppap.data.scenes import CLASS_NAMES, STREAMS, make_scene
from ppap.evaluation.patches import cluster_scores, colour_features
from ppap.settings.config import DataConfig

CONFIG = DataConfig(
    kind="scenes", scenes_train=6, scenes_val=3, scenes_size=48, resolution=32, eval_resolution=64
)

# Mean of the pixels and pixels per class of the first four validation scenes, 64 pixels wide.
FROZEN = {
    "easy": [
        (120.25, [525, 0, 0, 292, 1833, 944, 269, 233]),
        (81.84, [1095, 463, 0, 442, 466, 232, 332, 1066]),
        (119.61, [979, 0, 0, 102, 1621, 1311, 83, 0]),
        (116.51, [1341, 0, 594, 177, 1071, 869, 44, 0]),
    ],
    "hard": [
        (79.96, [904, 220, 1365, 131, 849, 623, 0, 4]),
        (81.49, [919, 0, 2114, 496, 414, 0, 153, 0]),
        (69.60, [710, 0, 0, 1868, 970, 420, 128, 0]),
        (125.06, [470, 263, 417, 245, 2231, 421, 49, 0]),
    ],
}


def digest(seed, stream, index, difficulty="easy"):
    pixels, label = make_scene(seed, stream, index, 32, difficulty)
    return hashlib.sha256(pixels.tobytes() + label.tobytes()).hexdigest()


@pytest.mark.parametrize("difficulty", ["easy", "hard"])
@pytest.mark.parametrize("size", [16, 33, 128])
def test_a_scene_has_every_pixel_labelled(size, difficulty):
    pixels, label = make_scene(0, "train", 3, size, difficulty)
    assert pixels.shape == (size, size, 3) and pixels.dtype == np.uint8
    assert label.shape == (size, size) and label.dtype == np.uint8
    assert label.max() < len(CLASS_NAMES)
    assert pixels.std() > 5


def test_same_arguments_same_scene():
    assert digest(5, "train", 7) == digest(5, "train", 7)


def test_seed_stream_difficulty_and_index_change_the_scene():
    scenes = [
        digest(seed, stream, i, difficulty)
        for seed in (0, 1, 2**32)
        for stream in STREAMS
        for difficulty in ("easy", "hard")
        for i in range(6)
    ]
    assert len(set(scenes)) == len(scenes)


def test_an_unknown_stream_or_difficulty_is_refused():
    with pytest.raises(ValueError):
        make_scene(0, "test", 0, 16)
    with pytest.raises(ValueError):
        make_scene(0, "val", 0, 16, "impossible")


@pytest.mark.parametrize("difficulty", ["easy", "hard"])
def test_all_classes_occur_often(difficulty):
    labels = [make_scene(0, "train", i, 48, difficulty)[1] for i in range(60)]
    share = np.mean([np.bincount(label.ravel(), minlength=len(CLASS_NAMES)) > 0 for label in labels], axis=0)
    assert (share > 0.25).all(), dict(zip(CLASS_NAMES, share, strict=True))


@pytest.mark.parametrize("difficulty", ["easy", "hard"])
@pytest.mark.parametrize("bins", [0, 4], ids=["mean and deviation", "histogram"])
def test_colour_alone_does_not_tell_the_class(difficulty, bins):
    """k-means on patch colours: measured 14 to 16 % mIoU on easy scenes, 11 to 13 % on hard ones."""
    scenes = [make_scene(0, "val", i, 64, difficulty) for i in range(40)]
    pixels, labels = (torch.from_numpy(np.stack(part)) for part in zip(*scenes, strict=True))
    rows = colour_features(pixels, 8, bins=bins)
    scores = cluster_scores(rows, patch_labels(labels.long(), 8), len(CLASS_NAMES))
    assert scores.miou < 20, scores


def test_dataset_keeps_the_contract():
    train, val, description = build_datasets(CONFIG)
    assert (len(train), len(val)) == (6, 3)
    assert train.classes == len(train.class_names) == 8 and train.labelled
    assert "synthetic" in description and "easy" in description
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


def test_the_setting_reaches_the_scenes():
    hard = build_dataset(replace(CONFIG, scenes_difficulty="hard"), "val")
    assert np.array_equal(hard.original(1), make_scene(0, "val", 1, 48, "hard")[0])


def test_the_scenes_are_frozen():
    """Published numbers belong to these scenes, up to a platform's rounding."""
    for difficulty, means in FROZEN.items():
        for index, (mean, shares) in enumerate(means):
            pixels, label = make_scene(0, "val", index, 64, difficulty)
            assert pixels.mean() == pytest.approx(mean, abs=0.05)
            got = np.bincount(label.ravel(), minlength=len(CLASS_NAMES))
            assert np.abs(got - shares).sum() <= 4, got
