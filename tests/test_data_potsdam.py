"""Potsdam: prepared blocks, mmsegmentation's tiles, and damaged MATLAB files."""

import numpy as np
import pytest
import scipy.io

from ppap.data import build_dataset, build_datasets
from ppap.errors import DataError
from ppap.settings.config import DataConfig
from tests.trees import label, potsdam_mat_tree, potsdam_mmseg_tree, potsdam_raw_tree, save

COARSE = {0: 0, 4: 0, 1: 1, 5: 1, 2: 2, 3: 2}
"""Roads and cars, buildings and clutter, low vegetation and trees."""


def config(root, **options):
    options = {"resolution": 16, "eval_resolution": 16, "partial": True, **options}
    return DataConfig(kind="potsdam3", root=str(root), **options)


def write(root, name, **variables):
    scipy.io.savemat(root / name, variables)


@pytest.mark.parametrize("dtype", [np.int32, np.uint8, np.float64])
def test_every_id_of_a_block(tmp_path, dtype):
    potsdam_mat_tree(tmp_path)
    stored = label((40, 40), (*range(6), 255), 0)
    write(tmp_path, "gt/5.mat", gt=stored.astype(dtype))
    if dtype is np.float64:
        with pytest.raises(DataError, match="gt is float64"):
            build_dataset(config(tmp_path), "val")
        return
    val = build_dataset(config(tmp_path), "val")
    expected = np.vectorize(lambda i: COARSE.get(i, -1))(stored)
    assert np.array_equal(val.load(0)[1], expected)
    assert val.class_names == ("roads and cars", "buildings and clutter", "vegetation and trees")


def test_minus_one_is_ignored_too(tmp_path):
    write(potsdam_mat_tree(tmp_path), "gt/5.mat", gt=np.full((40, 40), -1, np.int32))
    assert (build_dataset(config(tmp_path), "val").load(0)[1] == -1).all()


@pytest.mark.parametrize("base", ["", "potsdam"])
def test_prepared_blocks(tmp_path, base):
    potsdam_mat_tree(tmp_path / base)
    train, val, text = build_datasets(config(tmp_path))
    assert (len(train), len(val)) == (5, 2) and "labelled_train.txt" in text and "a part of 4,545" in text
    stored = scipy.io.loadmat(tmp_path / base / "imgs/6.mat")["img"]
    assert np.array_equal(np.array(val.original(1)), stored[:, :, :3])  # infrared is dropped
    with pytest.raises(DataError, match="5 training images of 4,545"):
        build_dataset(config(tmp_path, partial=False), "train")


def test_every_id_of_mmsegmentation(tmp_path):
    potsdam_mmseg_tree(tmp_path)
    stored = label((64, 64), range(7), 0)
    train, val, text = build_datasets(config(tmp_path, partial=False))
    assert (len(train), len(val)) == (4, 2) and "mmsegmentation" in text
    expected = np.vectorize(lambda i: COARSE.get(i - 1, -1))(stored)
    assert np.array_equal(val.load(0)[1], expected)
    save(tmp_path / "ann_dir/val/2_13_0_0_64_64.png", np.full((64, 64), 7, np.uint8))
    with pytest.raises(DataError, match="id 7 is none of mmsegmentation's Potsdam ids"):
        build_dataset(config(tmp_path), "val")


def cut(root, name, count=100):
    path = root / name
    path.write_bytes(path.read_bytes()[:-count])


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda r: cut(r, "imgs/6.mat"), r"6.mat: the file is cut off"),
        (lambda r: cut(r, "gt/5.mat", 6000), r"5.mat: the file is cut off"),
        (lambda r: (r / "gt/5.mat").write_bytes(b""), r"5.mat: the file is empty"),
        (lambda r: (r / "gt/5.mat").write_bytes(b"MATLAB 7.3 MAT-file" + b" " * 200), "version 7.3"),
        (lambda r: (r / "gt/5.mat").unlink(), "1 images have no label"),
        (
            lambda r: write(r, "gt/5.mat", gt=np.full((40, 40), 6, np.int32)),
            "id 6 is none of the Potsdam ids",
        ),
        (lambda r: write(r, "gt/5.mat", labels=np.zeros((4, 4))), "no variable 'gt' .it holds labels"),
        (lambda r: write(r, "gt/5.mat", gt=np.zeros((40, 41), np.int32)), "41x40 for an image of 40x40"),
        (lambda r: write(r, "imgs/5.mat", img=np.zeros((40, 40), np.uint8)), "img is uint8 .40, 40"),
        (lambda r: (r / "labelled_test.txt").unlink(), "labelled_test.txt: no such list"),
        (lambda r: (r / "labelled_test.txt").write_text("5\nsix\n"), "line 2: 'six' is no block number"),
        (lambda r: (r / "labelled_test.txt").write_text("5\n5\n"), "twice"),
    ],
)
def test_wrong_files_are_named(tmp_path, spoil, match):
    spoil(potsdam_mat_tree(tmp_path))
    with pytest.raises(DataError, match=match):
        build_dataset(config(tmp_path), "val")


def test_compressed_blocks_that_are_cut_off(tmp_path):
    potsdam_mat_tree(tmp_path)
    scipy.io.savemat(tmp_path / "gt/5.mat", {"gt": np.zeros((40, 40), np.int32)}, do_compression=True)
    build_dataset(config(tmp_path), "val")
    cut(tmp_path, "gt/5.mat", 3)
    with pytest.raises(DataError, match="5.mat: the file is cut off"):
        build_dataset(config(tmp_path), "val")


def test_a_missing_block_is_named(tmp_path):
    (potsdam_mat_tree(tmp_path) / "imgs/6.mat").unlink()
    with pytest.raises(DataError, match="(?s)1 images are missing.*imgs/6.mat"):
        build_dataset(config(tmp_path, partial=False), "val")
    assert len(build_dataset(config(tmp_path), "val")) == 1


def test_raw_tiles_lead_to_prepare(tmp_path):
    with pytest.raises(DataError, match="cut them with ppap prepare potsdam3"):
        build_datasets(config(potsdam_raw_tree(tmp_path, side=400, tiles=("2_10",))))
    with pytest.raises(DataError, match="neither imgs/ and gt/"):
        build_datasets(config(tmp_path / "5_Labels_for_participants"))
