"""Files that would hang, fill the memory or crash the process are refused by name before they are decoded."""

import os
import struct
import zlib

import numpy as np
import pytest
import scipy.io
from PIL import Image

import ppap
from ppap.cli import run as command
from ppap.data import build_datasets, limits
from ppap.data.checks import check_complete, read_list
from ppap.data.images import looks_like_mask, read_image, verify_image
from ppap.data.label_files import read_colours, read_ids
from ppap.data.limits import at_most
from ppap.data.matlab import read_matrix
from ppap.errors import DataError
from ppap.predict import main as predict
from ppap.settings.config import DataConfig
from ppap.train import main as train
from tests.runs import TINY, make_folder, tiny_run


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return tiny_run(tmp_path_factory.mktemp("limits") / "run", "--train.steps=1")


def config(root, **options):
    return DataConfig(root=str(root), ignore_ids=(9,), resolution=32, eval_resolution=32, **options)


# What is no file


def read_block(path):
    return read_matrix(path, "img")


@pytest.mark.parametrize(
    "read", [read_image, verify_image, read_ids, read_colours, check_complete, read_list, read_block]
)
def test_a_pipe_is_refused_and_not_waited_for(tmp_path, read):
    path = tmp_path / "a.png"
    os.mkfifo(path)
    with pytest.raises(DataError, match="a.png: it is a named pipe, no file; remove it"):
        read(path)
    assert not looks_like_mask(path)


@pytest.mark.parametrize("part", ["images/train/x.png", "labels/train/train0.png"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_a_data_set_with_one_is_refused(tmp_path, part, kind):
    path = make_folder(tmp_path) / part
    path.unlink(missing_ok=True)
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    if part.startswith("images"):
        Image.new("L", (50, 40)).save(tmp_path / "labels/train/x.png")
    word = "named pipe" if kind == "pipe" else "device"
    with pytest.raises(DataError, match=f"{path.name}: it is a {word}, no file"):
        build_datasets(config(tmp_path))


def test_predict_goes_past_one(finished, tmp_path, capsys):
    os.mkfifo(tmp_path / "a.png")
    Image.new("RGB", (40, 40)).save(tmp_path / "b.png")
    argv = [str(finished), *map(str, tmp_path.glob("?.png")), f"--out={tmp_path / 'out'}", "--resolution=32"]
    assert command(predict, argv) == 3
    assert "a.png: it is a named pipe" in capsys.readouterr().err
    assert (tmp_path / "out/b.png").exists()


# Pixels


def bomb(path, side=60_000):
    """A small PNG whose header says 3.6 thousand million pixels."""

    def chunk(kind, body):
        data = kind + body
        return struct.pack(">I", len(body)) + data + struct.pack(">I", zlib.crc32(data))

    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "BMP", "GIF", "WEBP"])
@pytest.mark.parametrize("read", [read_image, verify_image, read_ids, looks_like_mask])
def test_the_header_decides(tmp_path, monkeypatch, kind, read):
    path = tmp_path / "a"
    Image.new("L" if kind != "WEBP" else "RGB", (50, 40)).save(path, kind)
    if read is read_ids and kind in ("JPEG", "WEBP"):
        return
    Image.init()  # whose plugins decode pictures of their own
    for name in ("load", "verify"):
        monkeypatch.setattr(Image.Image, name, lambda self: pytest.fail("decoded"))
    with at_most(1999):
        if read is looks_like_mask:
            assert not read(path)
            return
        with pytest.raises(DataError, match="50 x 40 are 2000 pixels, the limit is 1999.*--data.max-pixels"):
            read(path)
    monkeypatch.undo()
    with at_most(2000):
        read(path)


def test_a_bomb_is_refused(tmp_path):
    for read in (read_image, verify_image, read_ids):
        with pytest.raises(DataError, match="bomb.png: more than|bomb.png: 60000 x 60000"):
            read(bomb(tmp_path / "bomb.png"))


def test_the_default_is_above_pillows_own(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 89_478_485)
    assert DataConfig().max_pixels == limits.max_pixels() == 200_000_000
    with at_most(200_000_000):
        assert Image.MAX_IMAGE_PIXELS == 200_000_000
    assert Image.MAX_IMAGE_PIXELS == 89_478_485


@pytest.mark.parametrize("workers", [0, 1])
def test_the_option_of_training(tmp_path, capsys, workers):
    root = make_folder(tmp_path / "data")
    argv = ["folder", *TINY[4:], f"--data.root={root}", "--data.ignore-ids", "9", "--train.steps=1"]
    argv += [f"--train.out={tmp_path / 'run'}", f"--data.workers={workers}"]
    with at_most(limits.max_pixels()):
        assert command(train, [*argv, "--data.max-pixels=1999"]) == 3
        errors = capsys.readouterr().err
        assert "the limit is 1999" in errors and "train0.jpg" in errors and "train0.png" in errors
        assert command(train, [*argv, "--data.max-pixels=2000"]) == 0
    with pytest.raises(SystemExit, match="2"):
        command(train, [*argv, "--data.max-pixels=0"])


def test_the_option_of_predict_and_python(finished, tmp_path, capsys):
    Image.new("RGB", (50, 40)).save(tmp_path / "a.png")
    argv = [str(finished), str(tmp_path / "a.png"), f"--out={tmp_path / 'out'}", "--resolution=32"]
    with at_most(limits.max_pixels()):
        assert command(predict, [*argv, "--max-pixels=1999"]) == 3
        assert "the limit is 1999" in capsys.readouterr().err
        assert command(predict, [*argv, "--max-pixels=2000"]) == 0
    network = ppap.load(finished, max_pixels=1999)
    for image in (tmp_path / "a.png", Image.open(tmp_path / "a.png")):
        with pytest.raises(DataError, match="the limit is 1999"):
            network.predict(image, resolution=32)
    assert ppap.load(finished).predict(tmp_path / "a.png", resolution=32).shape == (40, 50)


# MATLAB


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", ["u1", "i1", "i4", "u2", "f8", "f4", "i8"])
def test_matrices_are_those_of_scipy(tmp_path, packed, dtype):
    values = {"a": np.arange(6, dtype=dtype).reshape(2, 3), "long_name_of_it": np.arange(120, dtype=dtype)}
    values["img"] = np.random.default_rng(0).integers(0, 99, (7, 5, 4)).astype(dtype)
    scipy.io.savemat(tmp_path / "a.mat", values, do_compression=packed)
    read = scipy.io.loadmat(tmp_path / "a.mat")
    for name in values:
        found = read_matrix(tmp_path / "a.mat", name)
        assert found.dtype == read[name].dtype and np.array_equal(found, read[name])
    with pytest.raises(DataError, match=r"no variable 'gt' \(it holds a, long_name_of_it, img\)"):
        read_matrix(tmp_path / "a.mat", "gt")


@pytest.mark.parametrize("packed", [False, True])
def test_no_damage_of_a_matrix_raises_anything_else(tmp_path, packed):
    path, rng = tmp_path / "a.mat", np.random.default_rng(1)
    scipy.io.savemat(path, {"img": np.zeros((9, 8, 4), np.uint8)}, do_compression=packed)
    whole = path.read_bytes()
    for _ in range(400):
        bad = bytearray(whole[: rng.integers(1, len(whole) + 1)])
        for place in rng.integers(0, len(bad), 3):
            bad[place] = rng.integers(0, 256)
        path.write_bytes(bad)
        try:
            read_matrix(path, "img")
        except DataError as error:
            assert "a.mat" in str(error)


def test_a_matrix_larger_than_the_limit_is_not_unpacked(tmp_path, monkeypatch):
    path = tmp_path / "a.mat"
    scipy.io.savemat(path, {"gt": np.zeros((4000, 4000), np.uint8)}, do_compression=True)
    monkeypatch.setattr("ppap.data.matlab._Matrix.values", lambda *_: pytest.fail("unpacked"))
    with at_most(10**6), pytest.raises(DataError, match="4000 x 4000 are 16000000 pixels"):
        read_matrix(path, "gt")


@pytest.mark.parametrize(
    ("values", "match"),
    [({"img": "text"}, "no array of real numbers"), ({"img": np.zeros((2, 2)) + 1j}, "no array of real")],
)
def test_other_variables_are_refused(tmp_path, values, match):
    scipy.io.savemat(tmp_path / "a.mat", values)
    with pytest.raises(DataError, match=match):
        read_matrix(tmp_path / "a.mat", "img")
