"""Masks and scores by several ranks: those of one process, written once."""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ppap import eval as evaluation
from ppap import parallel, predict
from ppap.errors import DataError, Stopped, UsageError
from ppap.stopping import Interrupted

COMMANDS = {"eval": evaluation.main, "predict": predict.main}


def command(group, rank, name, argv, size):
    """A command as a rank; what it printed, or its error. A module's function, for other processes."""
    with parallel.rank_of(group, rank, size), contextlib.redirect_stdout(io.StringIO()) as said:
        try:
            COMMANDS[name](argv)
        except (UsageError, DataError) as error:
            return f"{type(error).__name__}: {error}"
    return said.getvalue()


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def stopped(group, rank, size):
    """A rank that is stopped while the first one has done its part."""

    def work():
        if rank:
            raise Interrupted("stopped here")
        return "done"

    with parallel.rank_of(group, rank, size):
        try:
            return parallel.together(work)
        except Stopped as error:
            return str(error)


def test_a_stop_of_one_rank_is_one_of_all(pool):
    found = pool.run(stopped, 2, [(2,)] * 2)
    assert found == ["stopped; give the same command again", "stopped here"]


@pytest.fixture
def photos(tmp_path):
    """Five pictures, and one file that is none."""
    rng = np.random.default_rng(0)
    for i in range(5):
        (tmp_path / "photos").mkdir(exist_ok=True)
        picture = Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8))
        picture.save(tmp_path / "photos" / f"{i}.png")
    (tmp_path / "photos" / "bad.png").write_bytes(b"no picture")
    return tmp_path / "photos"


@pytest.mark.parametrize("more", [[], ["--smooth=3"]], ids=["single", "film"])
def test_masks_are_those_of_one_process(more, pool, finished, photos, tmp_path):
    argv = [str(finished), str(photos), "--device=cpu", "--resolution=32", *more]
    one = command(None, 0, "predict", [*argv, f"--out={tmp_path / 'one'}"], 1)
    several = pool.run(command, 2, [("predict", [*argv, f"--out={tmp_path / 'two'}"], 2)] * 2)
    assert one.startswith("DataError: ") and "bad.png" in one
    assert [text for text in several] == [one, one]
    assert files_of(tmp_path / "one") == files_of(tmp_path / "two")


def test_a_folder_that_is_done_in_part_is_finished(pool, finished, photos, tmp_path):
    (photos / "bad.png").unlink()
    argv = [str(finished), str(photos), "--device=cpu", "--resolution=32", f"--out={tmp_path / 'out'}"]
    command(None, 0, "predict", argv, 1)
    kept = (tmp_path / "out" / "0.png").stat().st_mtime_ns
    for name in ("1.png", "4.png"):
        (tmp_path / "out" / name).unlink()
    several = pool.run(command, 2, [("predict", [*argv, "--skip-existing"], 2)] * 2)
    assert "3 masks are there already, 2 to go" in several[0] and "2 masks in" in several[1]
    assert (tmp_path / "out" / "0.png").stat().st_mtime_ns == kept
    assert len(list((tmp_path / "out").glob("?.png"))) == 5
    refused = pool.run(command, 2, [("predict", argv, 2)] * 2)
    assert all("exist" in text and text.startswith("UsageError") for text in refused)


def test_scores_are_those_of_one_process_and_written_once(pool, finished, tmp_path):
    results = {}
    for size in (1, 2):
        argv = [str(finished), "--device=cpu", f"--out={tmp_path / f'{size}.json'}"]
        said = pool.run(command, size, [("eval", argv, size)] * size)
        assert all("written: " in text for text in said), said
        results[size] = json.loads((tmp_path / f"{size}.json").read_text())
    assert results[1]["summary"] == results[2]["summary"]
    assert results[1]["scores"]["plain"] == results[2]["scores"]["plain"]


def test_what_is_fitted_to_training_images_wants_one_process(pool, finished, tmp_path):
    argv = [str(finished), "--device=cpu", "--frozen", f"--out={tmp_path / 'x.json'}"]
    said = pool.run(command, 2, [("eval", argv, 2)] * 2)
    assert all("start this without torchrun" in text for text in said)
    assert not (tmp_path / "x.json").exists()
