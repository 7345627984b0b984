"""Colours, label pictures, comparison strips and curves."""

import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ppap.data.scan import find_images
from ppap.pictures import drawing as pictures
from ppap.pictures import palette
from ppap.pictures.curves import _curve_panels, curves


def labelled(height: int = 20, width: int = 30) -> tuple[np.ndarray, np.ndarray]:
    """A random image, and labels 0..3 with an ignored corner."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, (height, width))
    labels[:5, :5] = -1
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8), labels


def test_palette_is_stable_and_distinct():
    colours = pictures.palette(256)
    assert colours.shape == (256, 3) and colours.dtype == np.uint8
    assert len(np.unique(colours, axis=0)) == 256
    assert np.array_equal(pictures.palette(27), colours[:27])
    assert pictures.palette(0).shape == (0, 3)
    colours[:] = 0  # a copy: the next caller gets the colours again
    assert pictures.palette(1).any()


@pytest.mark.parametrize(("n", "least"), [(12, 0.15), (27, 0.10), (54, 0.07)])
def test_palette_stays_apart_for_colour_blind_eyes(n, least):
    seen = palette._as_seen(pictures.palette(n).astype(float))
    distance = np.array([palette._difference(seen, seen[:, i]) for i in range(n)])
    np.fill_diagonal(distance, np.inf)
    assert distance.min() > least  # OKLab; black to white is 1


def test_palette_avoids_greys():
    assert np.ptp(pictures.palette(256).astype(int), axis=1).min() > 25


@pytest.mark.parametrize("n", [-1, 1002])
def test_palette_refuses_other_sizes(n):
    with pytest.raises(ValueError, match="0 to 1001"):
        pictures.palette(n)


@pytest.mark.parametrize("convert", [np.asarray, torch.as_tensor, np.int32])
def test_index_png_keeps_ids_and_colours(tmp_path, convert):
    _, labels = labelled()
    pictures.save_index_png(convert(labels), tmp_path / "a.png", pictures.palette(4))
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.mode == "P"
        ids, rgb = np.asarray(picture), np.asarray(picture.convert("RGB"))
    assert np.array_equal(ids, np.where(labels < 0, 255, labels))
    assert np.array_equal(rgb[labels >= 0], pictures.palette(4)[labels[labels >= 0]])
    assert np.ptp(rgb[labels < 0]) == 0  # grey


def test_the_legend_of_many_classes_has_those_that_occur():
    labels = np.full((8, 8), 700)
    labels[:4] = 3
    names = [f"class {i}" for i in range(920)]
    sheet = pictures.strip([[labels]], ["truth"], colours=pictures.palette(920), names=names, cell=8)
    few = pictures.legend(["class 3", "class 700"], pictures.palette(920)[[3, 700]], sheet.width)
    assert np.array_equal(np.asarray(sheet)[-few.height :], np.asarray(few))


def test_index_png_of_more_classes_has_16_bits(tmp_path):
    labels = np.arange(-4, 920, dtype=np.int64).reshape(4, -1)
    pictures.save_index_png(labels, tmp_path / "a.png", pictures.palette(920))
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.mode.startswith("I")
        assert np.array_equal(np.asarray(picture), np.where(labels < 0, 65535, labels))
    assert len(np.unique(pictures.palette(1001), axis=0)) == 1001


def test_index_png_of_256_classes(tmp_path):
    labels = np.arange(256).reshape(16, 16)
    pictures.save_index_png(labels, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as picture:
        assert np.array_equal(np.asarray(picture), labels)
        assert np.array_equal(np.asarray(picture.convert("RGB"))[-1, -1], pictures.palette(256)[255])
    labels[0, 0] = -1
    with pytest.raises(ValueError, match="share the value 255"):
        pictures.save_index_png(labels, tmp_path / "a.png")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("classes", [4, 920])
def test_a_kill_leaves_no_half_of_a_mask(tmp_path, monkeypatch, classes):
    labels, colours = labelled()[1], pictures.palette(classes)

    def killed(self, path, **options):
        Path(path).write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        monkeypatch.setattr(Image.Image, "save", killed)
        try:
            pictures.save_index_png(labels, tmp_path / "a.png", colours)
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert not (tmp_path / "a.png").exists() and not find_images(tmp_path)
    pictures.save_index_png(labels, tmp_path / "a.png", colours)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"], "the half is written over"


def test_a_mask_that_cannot_be_written_leaves_the_one_before(tmp_path, monkeypatch):
    labels = labelled()[1]
    pictures.save_index_png(labels, tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()

    def full(self, path, **options):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", full)
        with pytest.raises(OSError, match="No space left"):
            pictures.save_index_png(labels + 1, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_overlay_mixes_and_shows_ignored_pixels_as_they_are():
    image, labels = labelled()
    mixed = np.asarray(pictures.overlay(image, labels, 0.25)).astype(float)
    ignored = labels < 0
    assert np.array_equal(mixed[ignored], image[ignored])
    expected = 0.75 * image[~ignored] + 0.25 * pictures.palette(4)[labels[~ignored]]
    assert np.abs(mixed[~ignored] - expected).max() <= 0.5
    assert np.array_equal(np.asarray(pictures.overlay(torch.from_numpy(image), labels, 0)), image)


def test_colourise_hatches_ignored_pixels():
    _, labels = labelled()
    colours = pictures.colourise(labels)
    assert np.array_equal(colours[labels >= 0], pictures.palette(4)[labels[labels >= 0]])
    hatched = colours[labels < 0]
    assert len(np.unique(hatched, axis=0)) == 2 and (np.ptp(hatched, axis=1) == 0).all()
    assert pictures.colourise(np.full((3, 3), -1), pictures.palette(0)).shape == (3, 3, 3)


def test_legend_shows_every_class():
    names = [f"class {i}" for i in range(27)]
    picture = pictures.legend(names)
    shown = {tuple(map(int, pixel)) for pixel in np.asarray(picture).reshape(-1, 3)}
    assert {tuple(map(int, colour)) for colour in pictures.palette(27)} <= shown
    assert pictures.legend(["a name longer than the picture is wide"], width=50).width > 100


def test_strip_is_one_picture_of_all_cells(tmp_path):
    image, labels = labelled()
    tall, tall_labels = labelled(50, 20)
    rows = [[image, labels, labels], [torch.from_numpy(tall), torch.from_numpy(tall_labels), tall_labels]]
    titles = ["image", "truth", "clusters"]
    plain = pictures.strip(rows, titles, tmp_path / "strip.png", cell=100)
    with Image.open(tmp_path / "strip.png") as written:
        assert written.size == plain.size
    assert plain.width >= 3 * 100 and plain.height >= 67 + 100
    shown = {tuple(map(int, pixel)) for pixel in np.asarray(plain).reshape(-1, 3)}
    assert {tuple(map(int, colour)) for colour in pictures.palette(4)} <= shown
    assert set(pictures._GREYS) <= shown
    with_legend = pictures.strip(rows, titles, names=["a", "b", "c", "d"])
    assert with_legend.height > pictures.strip(rows, titles).height


def test_a_small_cell_is_enlarged_without_new_colours():
    labels = np.array([[0, 1], [2, 3]])
    cell = np.asarray(pictures._cell(labels, None, 100))
    assert cell.shape == (100, 100, 3)
    assert np.array_equal(cell[::50, ::50], pictures.palette(4)[labels])


ROWS = [{"step": s, "loss": 3 / (s + 1), "linear_loss": math.nan, "lr": 1e-3} for s in range(5)] + [
    {"step": 5, "val": {"cluster": {"accuracy": 40.0, "miou": 20.0, "iou": [1.0, None]}}},
    {"note": "no step", "loss": 1.0},
]


def test_curves_draw_losses_and_scores(tmp_path):
    rows = [*ROWS, {"step": 6, "linear_loss": 0.5}]
    assert list(_curve_panels(rows)) == ["loss", "linear loss", "score [%]"]
    curves(rows, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width > 600 and len(picture.convert("RGB").getcolors(2**24)) > 10
        height = picture.height
    curves(ROWS[:5], tmp_path / "losses.png")
    with Image.open(tmp_path / "losses.png") as picture:
        assert picture.height < height, "one row of panels"


@pytest.mark.parametrize("steps", [(1, 2), (1, 2, 3, 4), (1, 10, 150)])
def test_curves_have_whole_steps_on_their_axis(steps, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    ticks = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: ticks.extend(figure.axes[0].get_xticks()))
    curves([{"step": step, "loss": 1 / step} for step in steps], tmp_path / "curves.png")
    assert len(ticks) > 1 and all(tick == round(tick) for tick in ticks)


def test_matplotlib_is_loaded_only_for_curves():
    code = "import sys, ppap.pictures.drawing as p; p.legend(['a']); assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


IMAGE, LABELS = labelled()


@pytest.mark.parametrize(
    ("act", "message"),
    [
        pytest.param(
            lambda: pictures.colourise(LABELS, pictures.palette(3)), "3 colours", id="id without colour"
        ),
        pytest.param(lambda: pictures.colourise(LABELS[0]), r"\(H, W\) integers", id="1-D labels"),
        pytest.param(lambda: pictures.colourise(LABELS / 2), r"\(H, W\) integers", id="float labels"),
        pytest.param(lambda: pictures.colourise(LABELS, np.zeros((4, 3))), "uint8 RGB", id="float colours"),
        pytest.param(lambda: pictures.overlay(IMAGE / 255, LABELS), "uint8 RGB", id="float image"),
        pytest.param(lambda: pictures.overlay(IMAGE[:9], LABELS), "the labels are", id="unequal sizes"),
        pytest.param(lambda: pictures.overlay(IMAGE, LABELS, 2), "alpha", id="alpha"),
        pytest.param(lambda: pictures.legend([]), "0 names", id="no names"),
        pytest.param(lambda: pictures.strip([], ["image"]), "rows of 1 cells", id="no rows"),
        pytest.param(
            lambda: pictures.strip([[IMAGE]], ["image", "truth"]), "rows of 2 cells", id="short row"
        ),
        pytest.param(lambda: curves([{"step": 1, "lr": 0.1}], "never.png"), "no row", id="no curves"),
    ],
)
def test_refuses_wrong_arguments(act, message):
    with pytest.raises(ValueError, match=message):
        act()


def test_what_was_measured_once_is_drawn_as_bars(tmp_path, monkeypatch):

    drawn = []
    monkeypatch.setattr(
        "ppap.pictures.curves._bars", lambda axis, label, lines, colours: drawn.append((label, lines))
    )
    rows = [{"step": 1, "loss": 3.0}, {"step": 9, "loss": 2.0, "cluster_miou": 5.0, "linear_miou": 7.0}]
    curves(rows, tmp_path / "curves.png")
    assert drawn == [("score [%]", {"cluster_miou": [(9, 5.0)], "linear_miou": [(9, 7.0)]})]
    monkeypatch.undo()
    curves(rows, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 5000
