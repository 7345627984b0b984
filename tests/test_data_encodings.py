"""Encodings of other people's pictures and labels: read right, the same everywhere, or refused by name."""

import importlib.util
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import ppap
from ppap.data import build_datasets
from ppap.data.deep import Reading
from ppap.data.ids import as_trained, label_facts, reading_of
from ppap.data.images import as_picture, read_image, verify_image
from ppap.errors import DataError, UsageError
from ppap.predict import main as predict
from ppap.settings.config import DataConfig
from tests.files import write_png16, write_tiff
from tests.test_data_folder import add_image, add_label
from tests.trained import tiny_folder_run


def config(root, **options):
    return DataConfig(root=str(root), resolution=16, eval_resolution=16, **options)


def gradient(high, size=32, dtype=np.uint16):
    """(size, size, 3): values 0 to `high` from left to right, and two mixtures."""
    ramp = np.linspace(0, high, size)
    return np.stack(np.broadcast_arrays(ramp, ramp[::-1, None], ramp / 2 + 0 * ramp[:, None]), -1).astype(
        dtype
    )


# One reader for files, the command line and Python


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny_folder_run(tmp_path_factory.mktemp("run"), steps=2)


def masks(run, path, out):
    predict([str(run), str(path), f"--out={out}", "--resolution=32"])
    return np.array(Image.open(out / f"{path.stem}.png"))


def blocks(size=(48, 40), seed=0):
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 255, (5, 6, 3), np.uint8)).resize(size, Image.Resampling.BICUBIC)


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("turn", [1, 2, 3, 4, 5, 6, 7, 8])
def test_api_and_command_agree_for_every_orientation(run, tmp_path, suffix, turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    path = tmp_path / f"a.{suffix}"
    blocks().save(path, exif=exif)
    by_command = masks(run, path, tmp_path / "out")
    predictor = ppap.load(run, device="cpu")
    loaded = Image.open(path)
    loaded.load()
    for image in (path, str(path), Image.open(path), loaded):
        assert np.array_equal(predictor.predict(image, resolution=32).numpy(), by_command)
    assert by_command.shape == ((48, 40) if turn >= 5 else (40, 48))


def deep_files(folder):
    rng = np.random.default_rng(1)
    coarse = rng.integers(0, 65536, (5, 5, 3)).astype(np.uint16).repeat(8, 0).repeat(8, 1)
    Image.fromarray(coarse[..., 0]).save(folder / "grey16.png")
    Image.fromarray(coarse[..., 0]).save(folder / "grey16.tif")
    write_png16(folder / "rgb16.png", coarse)
    write_tiff(folder / "rgb16.tif", coarse)
    blocks().convert("L").save(folder / "grey8.png")
    blocks().convert("P").save(folder / "palette.png")
    blocks().convert("RGBA").save(folder / "alpha.png")
    blocks().convert("CMYK").save(folder / "cmyk.tif")
    return sorted(folder.iterdir())


def test_api_and_command_agree_for_every_depth(run, tmp_path):
    (tmp_path / "in").mkdir()
    predictor = ppap.load(run, device="cpu")
    for path in deep_files(tmp_path / "in"):
        wanted = masks(run, path, tmp_path / f"out-{path.name}")
        for image in (path, Image.open(path)):
            assert np.array_equal(predictor.predict(image, resolution=32).numpy(), wanted), path
        array = np.array(read_image(path))
        for image in (array, torch.from_numpy(array), torch.from_numpy(array).movedim(-1, 0)):
            assert np.array_equal(predictor.predict(image, resolution=32).numpy(), wanted), path


def test_python_refuses_what_the_command_refuses(run, tmp_path):
    predictor = ppap.load(run, device="cpu")
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "float.tif")
    for image in (tmp_path / "float.tif", Image.open(tmp_path / "float.tif")):
        with pytest.raises(DataError, match="32-bit values have no fixed range"):
            predictor.predict(image)
    for image, words in (
        (np.zeros((4, 4, 3), np.float32), r"array of shape \(4, 4, 3\) and dtype float32"),
        (np.zeros((3, 4, 4, 4), np.uint8), r"shape \(3, 4, 4, 4\)"),
        ([1, 2], "builtins.list"),
        (None, "NoneType"),
    ):
        with pytest.raises(UsageError, match=words):
            predictor.predict(image)
    with pytest.raises(DataError, match="no such file"):
        predictor.predict(tmp_path / "none.jpg")


def test_a_picture_is_turned_once(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    blocks().save(tmp_path / "a.jpg", exif=exif)
    upright = read_image(tmp_path / "a.jpg")
    assert np.array_equal(as_picture(upright), upright)


# Depth, range, bands


@pytest.mark.parametrize("write, suffix", [(write_png16, "png"), (write_tiff, "tif")])
def test_sixteen_bits_of_colour_are_read_whole(tmp_path, write, suffix):
    values = gradient(4095)
    path = write(tmp_path / f"a.{suffix}", values)
    assert np.array_equal(read_image(path), values >> 8)
    assert np.array_equal(read_image(path, Reading(value_range=(0, 4095))), values >> 4)
    assert verify_image(path) == (32, 32)


@pytest.mark.parametrize("high", [255, 4095, 10000])
def test_values_that_fill_little_of_16_bits_are_stretched_and_said(tmp_path, high):
    for k in range(3):
        write_png16(tmp_path / f"{k}.png", gradient(high))
    data = build_datasets(config(tmp_path))
    assert len(np.unique(np.array(data.train.original(0))[..., 0])) >= 31, "a ramp of 32 values"
    assert "more than 8 bits: values 0 to" in data.description
    info = {**label_facts(data), "labelled": False, "assignment": None}
    assert reading_of(info) == data.train.readers.images
    again = build_datasets(as_trained(config(tmp_path), info))
    assert again.train.fingerprint() == data.train.fingerprint()


def test_full_16_bits_and_a_range_of_ones_own(tmp_path):
    write_png16(tmp_path / "a.png", gradient(65535))
    plain = build_datasets(config(tmp_path))
    assert plain.train.readers.images == Reading() and "more than 8 bits" not in plain.description
    given = build_datasets(config(tmp_path, value_range=(0, 1000))).train
    assert np.array(given.original(0))[0, -1, 0] == 255 and np.array(given.original(0))[0, 1, 0] == 255
    float_file = np.linspace(0, 1, 32 * 32, dtype=np.float32).reshape(32, 32)
    Image.fromarray(float_file).save(tmp_path / "a.tif")
    (tmp_path / "a.png").unlink()
    with pytest.raises(DataError, match="--data.value-range LOW HIGH"):
        build_datasets(config(tmp_path))
    assert len(np.unique(build_datasets(config(tmp_path, value_range=(0, 1))).train.original(0))) > 200


def test_a_run_predicts_with_the_range_it_was_trained_with(tmp_path):
    for k in range(4):
        write_png16(tmp_path / f"data/{k}.png", gradient(1000 + k))
    run = tiny_folder_run(tmp_path, options=["--data.classes=3"], steps=2)
    info = json.loads((run / "checkpoints/last/config.json").read_text())
    low, high = info["files"]["value_range"]
    predictor = ppap.load(run, device="cpu")
    assert low < 50 and 900 < high < 1100 and predictor.reading.value_range == (low, high)
    path = tmp_path / "data/0.png"
    labels = predictor.predict(path, resolution=32).numpy()
    scaled = read_image(path, predictor.reading)
    assert np.array_equal(labels, predictor.predict(scaled, resolution=32).numpy())
    assert np.array_equal(labels, masks(run, path, tmp_path / "out"))
    assert np.array_equal(labels, predictor.predict(gradient(1000), resolution=32).numpy())


def test_infrared_in_place_of_alpha_divides_nothing(tmp_path):
    rng = np.random.default_rng(0)
    values = rng.integers(1, 255, (16, 16, 4)).astype(np.uint8)
    for extra in ((0,), (1,), (2,)):
        path = write_tiff(tmp_path / f"{extra[0]}.tif", values, extra)
        assert np.array_equal(read_image(path), values[..., :3])


@pytest.mark.parametrize("bands", [2, 5, 8])
def test_multispectral_files_ask_for_their_bands(tmp_path, bands):
    values = np.random.default_rng(0).integers(0, 255, (16, 16, bands)).astype(np.uint8)
    path = write_tiff(tmp_path / "a.tif", values, (0,) * max(bands - 3, 0))
    installed = importlib.util.find_spec("tifffile") is not None
    for call in (lambda: read_image(path), lambda: build_datasets(config(tmp_path))):
        with pytest.raises(DataError, match="--data.bands R G B") as caught:
            call()
        assert installed or "pip install tifffile imagecodecs" in str(caught.value)
        assert f"{bands} " in str(caught.value)


def test_chosen_bands(tmp_path):
    pytest.importorskip("tifffile")
    values = np.random.default_rng(0).integers(0, 255, (16, 16, 5)).astype(np.uint8)
    write_tiff(tmp_path / "a.tif", values, (0, 0))
    train = build_datasets(config(tmp_path, bands=(5, 4, 1))).train
    assert np.array_equal(train.original(0), values[..., [4, 3, 0]])
    assert np.array_equal(
        np.array(build_datasets(config(tmp_path, bands=(2,))).train.original(0))[..., 2], values[..., 1]
    )
    with pytest.raises(DataError, match="no band 6"):
        build_datasets(config(tmp_path, bands=(6, 1, 2)))


def test_bands_of_ordinary_pictures(tmp_path):
    add_image(tmp_path / "a.png", size=(16, 16))
    plain = np.array(read_image(tmp_path / "a.png"))
    swapped = build_datasets(config(tmp_path, bands=(3, 2, 1))).train
    assert np.array_equal(swapped.original(0), plain[..., ::-1])
    with pytest.raises(DataError, match="no band 4"):
        build_datasets(config(tmp_path, bands=(4, 2, 1)))
    for wrong in ({"bands": (0, 1, 2)}, {"bands": (1, 2)}, {"value_range": (3, 3)}):
        with pytest.raises(ValueError, match="--data."):
            config(tmp_path, **wrong)


# Labels by colour


COLOURS = [(0, 0, 0), (200, 30, 40), (20, 180, 60), (90, 90, 250)]
IDS = np.arange(4).repeat(5)[None].repeat(20, 0).astype(np.uint8)


def palette_label(path, order):
    """IDS as a palette file whose colour k stands at index order[k]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(order, np.uint8)[IDS])
    table = np.zeros((256, 3), np.uint8)
    table[list(order)] = COLOURS
    image.putpalette(table.tobytes())
    image.save(path)


def test_palettes_of_another_order_are_read_by_colour(tmp_path):
    for k, order in enumerate([(0, 1, 2, 3), (2, 0, 3, 1), (3, 2, 1, 0)]):
        add_image(tmp_path / f"images/{k}.jpg", size=(20, 20))
        palette_label(tmp_path / f"labels/{k}.png", order)
    data = build_datasets(config(tmp_path))
    assert all(np.array_equal(data.train.load(k)[1], IDS) for k in range(3))
    assert "palettes differ from file to file: labels by colour" in data.description
    info = {**label_facts(data), "classes": 4, "class_names": [], "labelled": True, "assignment": None}
    (tmp_path / "labels/0.png").unlink()
    (tmp_path / "images/0.jpg").unlink()
    again = build_datasets(as_trained(config(tmp_path), json.loads(json.dumps(info)))).train
    assert np.array_equal(again.load(0)[1], IDS), "a part of the files is read by the same colours"


def test_palettes_of_one_order_are_read_by_index(tmp_path):
    for k in range(3):
        add_image(tmp_path / f"images/{k}.jpg", size=(20, 20))
        palette_label(tmp_path / f"labels/{k}.png", (4, 5, 6, 9))
    train, _, description = build_datasets(config(tmp_path))
    assert train.ids == (4, 5, 6, 9) and "by colour" not in description
    grey = np.array([4, 5, 6, 9], np.uint8)[IDS]
    image = Image.fromarray(grey)
    image.putpalette(np.random.default_rng(0).integers(0, 256, 768).astype(np.uint8).tobytes())
    image.save(tmp_path / "labels/1.png")  # other colours, the same indices
    assert build_datasets(config(tmp_path)).train.ids == (4, 5, 6, 9)


LABELMAP = """# label:color_rgb:parts:actions
background:0,0,0::
car:200,30,40::
tree:20,180,60::
sky:90,90,250::
"""
TABLE = "name,r,g,b\nbackground,0,0,0\ncar,200,30,40\ntree,20,180,60\nsky,90,90,250\n"


@pytest.mark.parametrize("name, text", [("labelmap.txt", LABELMAP), ("class_dict.csv", TABLE)])
@pytest.mark.parametrize("place", ["", "labels"])
@pytest.mark.parametrize("form", ["rgb", "palette"])
def test_colour_masks_with_a_legend(tmp_path, name, text, place, form):
    for k in range(2):
        add_image(tmp_path / f"images/{k}.jpg", size=(20, 20))
        if form == "palette":
            palette_label(tmp_path / f"labels/{k}.png", (7, 3, 1, 0))
        else:
            (tmp_path / "labels").mkdir(exist_ok=True)
            Image.fromarray(np.array(COLOURS, np.uint8)[IDS]).save(tmp_path / f"labels/{k}.png")
    (tmp_path / place / name).write_text(text)
    train, _, description = build_datasets(config(tmp_path))
    assert train.class_names == ("background", "car", "tree", "sky")
    assert np.array_equal(train.load(0)[1], IDS) and f"labels by colour, 4 of {name}" in description
    info = {**label_facts(build_datasets(config(tmp_path))), "labelled": True, "assignment": None}
    info |= {"classes": 4, "class_names": list(train.class_names)}
    (tmp_path / place / name).unlink()
    again = build_datasets(as_trained(config(tmp_path), json.loads(json.dumps(info)))).train
    assert again.class_names == train.class_names and np.array_equal(again.load(0)[1], IDS)


def test_colours_given_and_colours_missing(tmp_path):
    add_image(tmp_path / "images/a.jpg", size=(20, 20))
    (tmp_path / "labels").mkdir()
    Image.fromarray(np.array(COLOURS, np.uint8)[IDS]).save(tmp_path / "labels/a.png")
    with pytest.raises(DataError, match="legend file .labelmap.txt"):
        build_datasets(config(tmp_path))
    given = ("#000000", "#c81e28", "#14b43c", "#5a5afa")
    assert np.array_equal(build_datasets(config(tmp_path, label_colours=given)).train.load(0)[1], IDS)
    with pytest.raises(DataError, match=r"colour \(90, 90, 250\) is none of the 3"):
        build_datasets(config(tmp_path, label_colours=given[:3]))
    with pytest.raises(ValueError, match="--data.label-colours"):
        config(tmp_path, label_colours=("red",))


def test_jpeg_labels_are_named_as_such(tmp_path):
    add_image(tmp_path / "images/a.jpg", size=(20, 20))
    (tmp_path / "labels").mkdir()
    Image.fromarray(IDS).save(tmp_path / "labels/a.png", format="JPEG")
    with pytest.raises(DataError, match="a.png: a JPEG file, no PNG label: compression changes ids"):
        build_datasets(config(tmp_path))


@pytest.mark.parametrize("suffix", ["tif", "bmp", "gif"])
def test_other_lossless_labels(tmp_path, suffix):
    add_image(tmp_path / "images/a.jpg", size=(20, 20))
    (tmp_path / "labels").mkdir()
    Image.fromarray(IDS).save(tmp_path / f"labels/a.{suffix}")
    assert np.array_equal(build_datasets(config(tmp_path)).train.load(0)[1], IDS)


# EXIF rotation of labels


def turned(root, turn, drawn_on, size=(40, 40)):
    """A picture of two halves with EXIF orientation `turn`, its label drawn on stored or upright pixels."""
    pixels = np.full((*size[::-1], 3), 30, np.uint8)
    pixels[: size[1] // 3, : size[0] // 2] = 220
    exif = Image.Exif()
    exif[0x0112] = turn
    path = root / "images/a.jpg"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path, exif=exif, quality=95)
    seen = pixels if drawn_on == "stored" else np.array(read_image(path))
    (root / "labels").mkdir(exist_ok=True)
    Image.fromarray((seen[..., 0] > 128).astype(np.uint8)).save(root / "labels/a.png")
    return root


@pytest.mark.parametrize("turn", [2, 3, 4, 5, 6, 7, 8])
def test_labels_drawn_on_stored_pixels_are_noticed(tmp_path, turn):
    upright = build_datasets(config(turned(tmp_path / "upright", turn, "upright"))).train
    root = turned(tmp_path / "stored", turn, "stored")
    with pytest.raises(DataError, match="--data.exif ignore"):
        build_datasets(config(root))
    stored = build_datasets(config(root, exif="ignore")).train
    for train in (upright, stored):
        picture, ids = train.load(0)
        assert (ids == (np.array(picture)[..., 0] > 128)).mean() > 0.98


def test_sizes_that_fit_without_rotation_name_the_option(tmp_path):
    root = turned(tmp_path, 6, "stored", size=(40, 24))
    with pytest.raises(DataError, match="--data.exif ignore takes both as stored"):
        build_datasets(config(root))
    assert build_datasets(config(root, exif="ignore")).train.load(0)[0].size == (40, 24)


@pytest.mark.parametrize("suffix", ["jpg", "png", "tif"])
@pytest.mark.parametrize("turn", [1, 3, 6, 8])
def test_ignored_rotation_gives_the_stored_pixels(tmp_path, suffix, turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    blocks().save(tmp_path / f"a.{suffix}", exif=exif)
    ignore = Reading(exif="ignore")
    assert read_image(tmp_path / f"a.{suffix}", ignore).size == (48, 40)
    assert verify_image(tmp_path / f"a.{suffix}", ignore) == (48, 40)
    if suffix != "jpg":
        assert np.array_equal(read_image(tmp_path / f"a.{suffix}", ignore), blocks())


def test_labels_next_to_a_reading_are_part_of_the_fingerprint(tmp_path):
    add_image(tmp_path / "images/a.jpg", size=(20, 20))
    add_label(tmp_path / "labels/a.png", size=(20, 20))
    plain = config(tmp_path)
    found = {build_datasets(c).train.fingerprint() for c in (plain, replace(plain, exif="ignore"))}
    assert len(found) == 2
