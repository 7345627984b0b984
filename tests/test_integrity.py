"""Damaged and hostile files are noticed: labels, metrics, names of images, checkpoints of other people."""

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ppap.data.label_files import choose_colours, read_ids, used_palette
from ppap.errors import DataError
from ppap.predict import main as predict
from ppap.reports.masks import find_images
from ppap.reports.measure import settings_of
from ppap.runs.checkpoint import load_checkpoint
from ppap.runs.rundir import RunDir
from ppap.train import main as train
from tests.runs import edit_info, tiny_run


@pytest.mark.parametrize("mode", ["L", "P"])
def test_no_flipped_bit_of_a_label_gives_other_ids(tmp_path, mode):
    rng = np.random.default_rng(0)
    ids = rng.integers(0, 5, (40, 40), dtype=np.uint8)
    image = Image.fromarray(ids)
    if mode == "P":
        image.putpalette(rng.integers(0, 256, 768, dtype=np.uint8).tobytes())
    path = tmp_path / "label.png"
    image.save(path)
    whole, found = path.read_bytes(), 0
    for place in rng.choice(8 * len(whole), 200, replace=False):
        bad = bytearray(whole)
        bad[place // 8] ^= 1 << place % 8
        path.write_bytes(bad)
        try:
            assert np.array_equal(read_ids(path), ids), f"bit {place} changes ids in silence"
        except DataError:
            found += 1
    assert found > 150


def chunks(data: bytes) -> dict[bytes, int]:
    """Kind of each chunk of a PNG -> where it begins; of several of one kind the first."""
    found, place = {}, 8
    while place < len(data):
        found.setdefault(bytes(data[place + 4 : place + 8]), place)
        place += 12 + int.from_bytes(data[place : place + 4], "big")
    return found


def noted_label(path: Path, after_pixels: bool) -> np.ndarray:
    """A palette PNG with a text before its pixels, or behind them; its ids."""
    ids = np.arange(64, dtype=np.uint8).reshape(8, 8) % 5
    image = Image.fromarray(ids)
    image.putpalette(bytes(range(48)))
    image.save(path)
    data, body = path.read_bytes(), b"tEXtComment\0drawn by hand"
    place = chunks(data)[b"IEND" if after_pixels else b"PLTE"]
    text = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    path.write_bytes(data[:place] + text + data[place:])
    return ids


@pytest.mark.parametrize("after_pixels", [False, True], ids=["before the pixels", "behind them"])
def test_a_damaged_text_of_a_label_costs_no_ids(tmp_path, after_pixels):
    path = tmp_path / "label.png"
    ids = noted_label(path, after_pixels)
    data = bytearray(path.read_bytes())
    data[chunks(data)[b"tEXt"] + 10] ^= 1
    path.write_bytes(data)
    assert np.array_equal(read_ids(path), ids)
    assert used_palette(path)[4] == (12, 13, 14)
    assert choose_colours(tmp_path, [path]) == ((), (), None)


@pytest.mark.parametrize("kind", [b"IHDR", b"PLTE", b"IDAT", b"IEND"])
@pytest.mark.parametrize("place", ["checksum", "bit that says it is needed"])
def test_a_damaged_chunk_that_a_label_needs_is_named(tmp_path, kind, place):
    path = tmp_path / "label.png"
    noted_label(path, False)
    data = bytearray(path.read_bytes())
    start = chunks(data)[kind]
    end = start + 12 + int.from_bytes(data[start : start + 4], "big")
    data[end - 1 if place == "checksum" else start + 4] ^= 1 if place == "checksum" else 32
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"label.png: cannot be read as a label \(the checksum of its chunk"):
        read_ids(path)


def test_a_label_without_checksums_is_not_said_to_be_a_png(tmp_path):
    path = tmp_path / "label.tif"
    Image.fromarray(np.zeros((40, 40), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError) as caught:
        read_ids(path)
    said = str(caught.value).removeprefix(str(path))
    assert "cannot be read as a label" in said and "PNG" not in said and "checksum" not in said
    path.write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"not a label in a supported format \(PNG, TIFF, BMP, GIF\)"):
        read_ids(path)


def test_a_bad_line_of_metrics_costs_itself_alone(tmp_path):
    run = tiny_run(tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    steps = [row["step"] for row in RunDir(run).rows()]
    for bad in ('{"step": 3, "lo', "\x00\x00", "[1]", '{"loss": 1}'):
        (run / "metrics.jsonl").write_text("\n".join([lines[0], bad, *lines[1:]]) + "\n")
        assert [row["step"] for row in RunDir(run).rows()] == steps
    train([f"--resume={run}", "--train.steps=7"])
    assert [row["step"] for row in RunDir(run).rows()][: len(steps)] == steps, "what came after it is kept"


def test_a_changed_number_of_metrics_is_left_out_and_said(tmp_path, capsys):
    run = RunDir(tmp_path)
    for step in (1, 2, 3):
        run.append({"step": step, "loss": step / 8, "none": float("nan")})
    whole = run.metrics.read_text()
    assert [row["loss"] for row in run.rows()] == [0.125, 0.25, 0.375] and not capsys.readouterr().out
    for damage in (whole.replace("0.25", "0.35"), whole.replace('"crc32"', '"crc33"', 1)):
        run.metrics.write_text(damage)
        assert len(run.rows()) == 2
        assert f"{run.metrics}: 1 of 3 lines are damaged and left out" in capsys.readouterr().out
    run.metrics.write_text('{"step": 1, "loss": 0.5}\n')  # of an earlier version
    run._forget_after(1)
    assert run.rows() == [{"step": 1, "loss": 0.5}] and '"crc32"' in run.metrics.read_text()


@pytest.mark.parametrize("name", ["..jpg", "...png", ". .jpg"])
def test_no_mask_leaves_its_folder_by_the_name_of_its_image(tmp_path, name):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg")
    (tmp_path / "a.jpg").rename(tmp_path / name)
    with pytest.raises(DataError, match="no name before its suffix"):
        find_images([str(tmp_path / name)])
    run = tiny_run(tmp_path / "run", "--train.steps=1")
    with pytest.raises(DataError, match="no name before its suffix"):
        predict([str(run), str(tmp_path / name), f"--out={tmp_path / 'out'}"])
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_does_not_choose_where_files_are_written(tmp_path):
    run = tiny_run(tmp_path / "run", "--train.steps=1")

    def hostile(info: dict) -> None:
        info["config"]["eval"]["neighbours"]["masks"] = str(tmp_path / "theirs")
        info["config"]["data"]["cache_dir"] = str(tmp_path / "theirs")

    edit_info(run / "checkpoints" / "last", hostile)
    stored = json.loads((run / "checkpoints" / "last" / "config.json").read_text())
    assert stored["config"]["data"]["cache_dir"]
    settings = settings_of(load_checkpoint(run, "last"))
    assert settings.eval.neighbours.masks is None and settings.data.cache_dir is None
