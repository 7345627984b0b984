"""Damaged and hostile files are noticed: labels, metrics, names of images, checkpoints of other people."""

import json

import numpy as np
import pytest
from PIL import Image

from ppap.data.label_files import read_ids
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


def test_a_bad_line_of_metrics_costs_itself_alone(tmp_path):
    run = tiny_run(tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    steps = [row["step"] for row in RunDir(run).rows()]
    for bad in ('{"step": 3, "lo', "\x00\x00", "[1]", '{"loss": 1}'):
        (run / "metrics.jsonl").write_text("\n".join([lines[0], bad, *lines[1:]]) + "\n")
        assert [row["step"] for row in RunDir(run).rows()] == steps
    train([f"--resume={run}", "--train.steps=7"])
    assert [row["step"] for row in RunDir(run).rows()][: len(steps)] == steps, "what came after it is kept"


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
