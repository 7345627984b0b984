"""ppap prepare: crops as published, blocks of raw Potsdam tiles, checks; nothing of the user's is lost."""

import io
import json
import os
import signal
import struct
import subprocess
import sys
import time

import numpy as np
import pytest
import scipy.io
import torch
from PIL import Image
from torchvision.transforms.functional import five_crop

from ppap import cli
from ppap.data import build_dataset, build_datasets
from ppap.data.cityscapes import FRAMES
from ppap.errors import DataError, UsageError
from ppap.preparation import potsdam
from ppap.preparation.crops import five_boxes
from ppap.prepare import main
from ppap.settings.config import DataConfig
from tests.trees import (
    POTSDAM_COLOURS,
    cityscapes_tree,
    coco_tree,
    imagenet_s_tree,
    label,
    picture,
    potsdam_mat_tree,
    potsdam_raw_tree,
    save,
)

CROPS = "cropped/cocostuff27_five_crop_0.5"


def prepare(name, root, *options):
    main([name, "--root", str(root), "--workers", "0", *map(str, options)])


def contents(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


# Crops


@pytest.mark.parametrize(("width", "height", "ratio"), [(640, 427, 0.5), (33, 25, 0.5), (50, 41, 0.3)])
def test_crops_are_where_torchvision_cuts_them(width, height, ratio):
    places = torch.arange(width * height).view(1, height, width)
    expected = five_crop(places, [int(height * ratio), int(width * ratio)])
    boxes = five_boxes(width, height, ratio)
    assert all(
        torch.equal(e[0], places[0, t:b, x:r]) for e, (x, t, r, b) in zip(expected, boxes, strict=True)
    )
    if width == 640:
        assert boxes[4] == (160, 107, 480, 320) and boxes[3] == (320, 214, 640, 427)


def test_crops_have_the_published_order_sizes_names_and_encoding(tmp_path):
    root = coco_tree(tmp_path, 3, 1, size=(65, 49))
    before = contents(root)
    prepare("cocostuff27", root)
    train = build_dataset(DataConfig(kind="cocostuff27", root=str(root), crop="none"), "train")
    folder = root / CROPS
    assert sorted(int(p.stem) for p in (folder / "img/train").iterdir()) == list(range(15))
    for i in range(3):
        photo, ids = train.load(i)
        for k, box in enumerate(five_boxes(65, 49, 0.5)):
            jpeg = io.BytesIO()
            photo.crop(box).save(jpeg, "JPEG")  # Pillow's default quality
            assert (folder / f"img/train/{5 * i + k}.jpg").read_bytes() == jpeg.getvalue()
            stored = np.array(Image.open(folder / f"label/train/{5 * i + k}.png"))
            assert stored.dtype == np.uint8 and stored.shape == (24, 32)
            assert np.array_equal(stored, ids[box[1] : box[3], box[0] : box[2]] + 1)
    assert {name: data for name, data in contents(root).items() if name in before} == before
    cropped = build_datasets(DataConfig(kind="cocostuff27", root=str(root)))
    assert len(cropped.train) == 15 and "crops of list full" in cropped.description


def test_lossless_crops_keep_every_pixel(tmp_path):
    root = coco_tree(tmp_path / "data", 1, 1)
    prepare("cocostuff27", root, "--lossless", "--out", tmp_path / "made", "--ratio", 0.25)
    config = DataConfig(
        kind="cocostuff27", root=str(root), crop_root=str(tmp_path / "made"), crop_ratio=0.25, crop="five"
    )
    photo = Image.open(root / "images/train2017/000000000009.jpg")
    crop = build_dataset(config, "train").original(4)
    assert np.array_equal(np.array(crop), np.array(photo.crop((24, 18, 40, 30))))


def test_images_too_small_for_crops_are_found_before_any_is_made(tmp_path):
    root = coco_tree(tmp_path, 3, 1, size=(40, 5))
    small = root / "images/train2017/000000000025.jpg"
    save(small, picture((40, 4), 0))
    save(root / "annotations/train2017/000000000025.png", label((40, 4), (0,), 0).astype(np.uint8))
    with pytest.raises(
        DataError, match="1 images are too small for crops of --ratio 0.2; give sides of 5"
    ) as e:
        prepare("cocostuff27", root, "--ratio", 0.2)
    assert f"{small}: 40x4 pixels" in str(e.value)
    assert not (root / "cropped").exists()


def test_an_interrupted_preparation_goes_on(tmp_path):
    root = coco_tree(tmp_path, 3, 1)
    prepare("cocostuff27", root)
    complete = contents(root / CROPS)
    kept = root / CROPS / "img/train/0.jpg"
    age = kept.stat().st_mtime_ns
    for name in ("img/train/7.jpg", "label/train/14.png"):
        (root / CROPS / name).unlink()
    (root / CROPS / "img/train/7.jpg.part").write_bytes(b"half")
    config = DataConfig(kind="cocostuff27", root=str(root))
    with pytest.raises(DataError, match="14 images and 14 labels of 15.*it goes on"):
        build_dataset(config, "train")
    prepare("cocostuff27", root)
    assert contents(root / CROPS) == complete and kept.stat().st_mtime_ns == age
    assert len(build_dataset(config, "train")) == 15


@pytest.mark.skipif(os.name != "posix", reason="sends a POSIX signal")
def test_ctrl_c_leaves_whole_files_and_the_same_command_finishes(tmp_path):
    root = coco_tree(tmp_path, 400, 1, size=(96, 72))
    command = [sys.executable, "-m", "ppap.prepare", "cocostuff27", "--root", str(root)]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    images = root / CROPS / "img/train"
    while running.poll() is None and not (images.is_dir() and any(images.glob("*.jpg"))):
        time.sleep(0.01)
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 75 and "Traceback" not in errors, errors
    assert 0 < len(list(images.glob("*.jpg"))) < 2000 and not list(root.rglob("*.part"))
    prepare("cocostuff27", root)
    assert len(build_dataset(DataConfig(kind="cocostuff27", root=str(root)), "train")) == 2000


def test_folders_that_are_there_already_are_left_alone(tmp_path):
    root = coco_tree(tmp_path, 1)
    prepare("cocostuff27", root)
    with pytest.raises(UsageError, match="begun with other settings .quality 75, now 90"):
        prepare("cocostuff27", root, "--quality", 90)
    (root / CROPS / "crops.json").write_text("{")
    with pytest.raises(DataError, match="crops.json: cannot be read"):
        prepare("cocostuff27", root)
    (root / CROPS / "crops.json").unlink()
    before = contents(root)
    with pytest.raises(UsageError, match="was not made by ppap prepare"):
        prepare("cocostuff27", root)
    assert contents(root) == before


def test_images_that_cannot_be_cropped_are_named_and_the_rest_is_made(tmp_path):
    root = coco_tree(tmp_path, 60, 1, size=(16, 16), ids=(3,))
    bad = root / "annotations/train2017/000000000073.png"  # the fifth one, which is no sample of the check
    save(bad, np.full((16, 16), 250, np.uint8))
    with pytest.raises(DataError, match="(?s)1 pairs cannot be used.*73.png: id 250"):
        prepare("cocostuff27", root)
    assert len(list((root / CROPS / "img/train").iterdir())) == 59 * 5
    save(bad, np.full((16, 16), 3, np.uint8))
    prepare("cocostuff27", root)
    assert len(list((root / CROPS / "img/train").iterdir())) == 300


def test_cityscapes_crops_follow_the_sorted_names(tmp_path, monkeypatch):
    cityscapes_tree(tmp_path, 2)
    with pytest.raises(DataError, match="aachen: 2 of 174 frames"):
        prepare("cityscapes27", tmp_path)
    monkeypatch.setitem(FRAMES, "train", {"aachen": 2, "zurich": 2})
    monkeypatch.setitem(FRAMES, "val", {"frankfurt": 2, "munster": 2})
    prepare("cityscapes27", tmp_path)
    train = build_dataset(DataConfig(kind="cityscapes27", root=str(tmp_path)), "train")
    assert len(train) == 20
    whole = build_dataset(DataConfig(kind="cityscapes27", root=str(tmp_path), crop="none"), "train")
    assert np.array_equal(train.load(5)[1], whole.load(1)[1][:16, :32])  # upper left of the second frame
    assert "_000001_" in whole.name(1)


def test_crops_of_the_smaller_sets_hold_all_classes(tmp_path):
    prepare("cocostuff15", coco_tree(tmp_path, 2, 1))
    stored = np.array(Image.open(tmp_path / CROPS / "label/train/0.png"))
    assert set(range(1, 13)) & set(stored.ravel().tolist())  # things
    assert json.loads((tmp_path / CROPS / "crops.json").read_text())["source"] == "list 7"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (("--ratio", 1), "0 and 1"),
        (("--quality", 0), "--quality is 0"),
        (("--workers", -1), "--workers is -1"),
    ],
)
def test_impossible_options(tmp_path, options, match, capsys):
    root = coco_tree(tmp_path, 1)
    try:
        main(["cocostuff27", "--root", str(root), *map(str, options)])
    except (UsageError, ValueError) as error:
        text = str(error)
    assert match in text and not (root / "cropped").exists()


# Check


def test_check_decodes_everything_and_counts(tmp_path, capsys):
    root = coco_tree(tmp_path, 60, 2, size=(16, 16), ids=(156, 156, 156, 93))
    prepare("cocostuff27", root)
    prepare("cocostuff27", root, "--check")
    text = capsys.readouterr().out
    (row,) = [line for line in text.splitlines() if line.startswith("sky")]
    assert row.split() == ["sky", "75.00", "%", "75.00", "%", "75.00", "%"] and "every file decodes" in text
    path = root / "annotations/train2017/000000000073.png"
    save(path, np.full((16, 16), 200, np.uint8))
    build_dataset(DataConfig(kind="cocostuff27", root=str(root), crop="none"), "train")  # no sample
    with pytest.raises(DataError, match="(?s)1 pairs cannot be used.*73.png: id 200"):
        prepare("cocostuff27", root, "--check")


@pytest.mark.parametrize("kind", ["potsdam3", "imagenet_s"])
def test_what_needs_nothing_made_is_checked(tmp_path, kind, capsys):
    potsdam_mat_tree(tmp_path)
    imagenet_s_tree(tmp_path)
    prepare(kind, tmp_path, "--partial")
    assert "nothing has to be made" in capsys.readouterr().out
    prepare(kind, tmp_path, "--partial", "--check")
    assert "every file decodes" in capsys.readouterr().out
    assert cli.main(["prepare", kind, "--root", str(tmp_path)]) == 3
    assert "accept it with --partial" in capsys.readouterr().err


# Potsdam


def test_halving_is_the_rounded_mean_of_four():
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 4), np.uint8)
    pixels[:2, :2, 0] = [[0, 1], [0, 1]]  # 0.5 becomes 1
    blocks = pixels.reshape(3, 2, 4, 2, 4).astype(int).sum(axis=(1, 3))
    assert np.array_equal(potsdam.halve(pixels), np.floor(blocks / 4 + 0.5))
    assert potsdam.halve(pixels)[0, 0, 0] == 1


def test_raw_tiles_become_blocks(tmp_path, capsys):
    raw, out = potsdam_raw_tree(tmp_path / "raw"), tmp_path / "out"
    before = contents(raw)
    prepare("potsdam3", raw, "--out", out, "--partial")
    assert "drawn with seed 0 (the published draw is not known)" in capsys.readouterr().out
    tile = np.array(Image.open(raw / "4_Ortho_RGBIR/top_potsdam_7_12_RGBIR.tif"))
    halves = potsdam.halve(tile)
    # Tiles in the order of their names: 2_10, 2_13, 7_12; four blocks each.
    for n, (y, x) in enumerate([(0, 0), (0, 200), (200, 0), (200, 200)], 8):
        block = scipy.io.loadmat(out / f"imgs/{n}.mat")["img"]
        assert block.dtype == np.uint8 and np.array_equal(block, halves[y : y + 200, x : x + 200])
    stored = label((800, 800), range(6), 1)[::2, ::2]
    ids = scipy.io.loadmat(out / "gt/9.mat")["gt"]
    assert ids.dtype == np.int32 and np.array_equal(ids, stored[:200, 200:])
    lists = {name: (out / name).read_text().split() for name in (*LISTS, "unlabelled_train.txt")}
    assert lists["unlabelled_train.txt"] == ["4", "5", "6", "7"]
    assert sorted(map(int, lists[LISTS[0]] + lists[LISTS[1]])) == [0, 1, 2, 3, 8, 9, 10, 11]
    assert len(lists[LISTS[1]]) == 1 and contents(raw) == before
    train, val, _ = build_datasets(DataConfig(kind="potsdam3", root=str(out), partial=True))
    assert (len(train), len(val)) == (7, 1)


LISTS = ("labelled_train.txt", "labelled_test.txt")


def test_blocks_go_on_and_other_settings_are_refused(tmp_path):
    raw, out = potsdam_raw_tree(tmp_path / "raw", side=400), tmp_path / "out"
    prepare("potsdam3", raw, "--out", out, "--partial")
    complete = contents(out)
    (out / "imgs/1.mat").unlink()
    prepare("potsdam3", raw, "--out", out, "--partial")
    assert contents(out) == complete
    with pytest.raises(
        UsageError, match="begun with other settings .split 'drawn with seed 0', now 'drawn with seed 1'"
    ):
        prepare("potsdam3", raw, "--out", out, "--partial", "--seed", 1)
    with pytest.raises(UsageError, match="is there already"):
        prepare("potsdam3", raw, "--out", raw, "--partial")
    with pytest.raises(UsageError, match="--out is not given"):
        prepare("potsdam3", raw, "--partial")


def test_given_lists_decide_the_split(tmp_path):
    raw = potsdam_raw_tree(tmp_path / "raw", side=400)
    for name, numbers in zip(LISTS, ("0", "2"), strict=True):
        save(tmp_path / "lists/x.png", picture((8, 8), 0))
        (tmp_path / "lists" / name).write_text(numbers)
    prepare("potsdam3", raw, "--out", tmp_path / "out", "--partial", "--lists", tmp_path / "lists")
    assert (tmp_path / "out" / LISTS[1]).read_text() == "2\n"
    (tmp_path / "lists" / LISTS[1]).write_text("1")  # of a tile without labels
    with pytest.raises(DataError, match="1 is no labelled block"):
        prepare("potsdam3", raw, "--out", tmp_path / "new", "--partial", "--lists", tmp_path / "lists")
    assert not (tmp_path / "new").exists()


def test_all_38_tiles_and_their_split(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(potsdam, "TILE", 400)
    tiles = (*potsdam.LABELLED, *potsdam.HELD_OUT)
    assert len(tiles) == len(set(tiles)) == 38
    raw = potsdam_raw_tree(tmp_path / "raw", side=400, tiles=tiles)
    for tile in tiles:  # 5_Labels_all has the held-out ones too, which stay unused
        path = raw / f"5_Labels_for_participants/top_potsdam_{tile}_label.tif"
        save(path, np.full((400, 400, 3), POTSDAM_COLOURS[0], np.uint8))
    prepare("potsdam3", raw, "--check")
    assert "38 image tiles, 24 label tiles: ready" in capsys.readouterr().out
    prepare("potsdam3", raw, "--out", tmp_path / "out")
    counts = {name: len((tmp_path / "out" / name).read_text().split()) for name in LISTS}
    assert counts == {"labelled_train.txt": 20, "labelled_test.txt": 4}
    assert len(list((tmp_path / "out/imgs").iterdir())) == 38


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (
            lambda r: (r / "4_Ortho_RGBIR/top_potsdam_2_13_RGBIR.tif").unlink(),
            "(?s)36 image tiles are missing.*top_potsdam_2_11_RGBIR.tif",
        ),
        (
            lambda r: (r / "5_Labels_for_participants/top_potsdam_2_10_label.tif").unlink(),
            "(?s)23 label tiles are missing.*top_potsdam_2_10_label.tif",
        ),
        (
            lambda r: save(r / "copy/top_potsdam_2_13_RGBIR.tif", np.zeros((400, 400, 4), np.uint8)),
            "1 tiles are there twice",
        ),
        (lambda r: None, "3 tiles have another size; tiles are 6000x6000|5 tiles have another size"),
    ],
)
def test_incomplete_tiles_are_refused_by_name(tmp_path, spoil, match):
    spoil(potsdam_raw_tree(tmp_path / "raw", side=400))
    with pytest.raises(DataError, match=match):
        prepare("potsdam3", tmp_path / "raw", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_labels_of_other_colours_are_ignored_but_not_all_of_them(tmp_path, capsys):
    raw = potsdam_raw_tree(tmp_path / "raw", side=400)
    path = raw / "5_Labels_for_participants/top_potsdam_2_10_label.tif"
    pixels = np.array(Image.open(path))
    pixels[:20] = (1, 2, 3)
    save(path, pixels)
    prepare("potsdam3", raw, "--out", tmp_path / "out", "--partial")
    assert f"{10 * 200:,} label pixels of other colours are ignored" in capsys.readouterr().out
    assert (scipy.io.loadmat(tmp_path / "out/gt/0.mat")["gt"][:10] == 255).all()
    save(path, np.full((400, 400, 3), 9, np.uint8))
    with pytest.raises(DataError, match="none of the six label colours"):
        prepare("potsdam3", raw, "--out", tmp_path / "new", "--partial")


def four_channels(path, extra, **options):
    """A TIFF file whose fourth channel is declared as `extra`: 0 unspecified, 1 or 2 transparency."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 4), np.uint8)
    data = save(path, pixels, **options).read_bytes()
    tag = struct.pack("<HHIHH", 338, 3, 1, 2, 0)  # as Pillow writes it
    assert data.count(tag) == 1
    path.write_bytes(data.replace(tag, struct.pack("<HHIHH", 338, 3, 1, extra, 0)))
    return pixels


@pytest.mark.parametrize("compression", [None, "tiff_adobe_deflate", "tiff_lzw"])
@pytest.mark.parametrize("extra", [0, 1, 2])
def test_tiles_of_four_channels(tmp_path, compression, extra):
    pixels = four_channels(tmp_path / "a.tif", extra, compression=compression)
    assert np.array_equal(potsdam._read(tmp_path / "a.tif", 4), pixels)
