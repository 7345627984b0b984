"""Arrays kept on disk: made by one process, whole or not there, and never read where they are damaged."""

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from ppap.errors import DataError
from ppap.runs import store as stores
from ppap.runs.store import Kind, Store

ROOT = Path(__file__).parents[1]
KINDS = {"a": Kind((4, 3), np.float16), "b": Kind((4,), np.int16)}
OTHER = """
import sys
from pathlib import Path
from tests.test_store import fill, make
with make(Path(sys.argv[1])).made() as part:
    print("begun" if part is not None else "there", flush=True)
    if part is not None:
        sys.stdin.readline()
        fill(part)
"""


def make(root: Path) -> Store:
    return Store(root, {"of": "x"}, KINDS, what="features", remedy="give another --data.cache-dir")


def fill(part) -> None:
    rows = part.left
    for array in part.arrays.values():
        array[rows] = 1 + rows.reshape(-1, *[1] * (array.ndim - 1))
    part.mark(rows)


@pytest.fixture(autouse=True)
def another_process():
    stores._VERIFIED.clear()


@pytest.fixture
def kept(tmp_path):
    with make(tmp_path).made() as part:
        fill(part)
    stores._VERIFIED.clear()
    return make(tmp_path)


def test_what_is_not_finished_is_nowhere_to_be_read(tmp_path):
    with pytest.raises(KeyboardInterrupt), make(tmp_path).made() as part:
        part.arrays["a"][:2] = 1
        part.mark(np.arange(2))
        raise KeyboardInterrupt
    assert not make(tmp_path).path.exists()
    with make(tmp_path).made() as part:
        assert part.left.tolist() == [2, 3]
        fill(part)
    assert [path.name for path in tmp_path.iterdir()] == [make(tmp_path).path.name]
    assert np.load(make(tmp_path).path / "a.npy")[:, 0].tolist() == [1, 1, 3, 4]


def test_a_second_process_waits_for_the_first(tmp_path, capsys):
    command = [sys.executable, "-c", OTHER, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
    with subprocess.Popen(command, **pipes) as other:
        assert other.stdout.readline() == "begun\n"

        def let_it_finish(seconds):
            other.stdin.write("\n")
            other.stdin.close()
            other.wait(timeout=20)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("ppap.runs.lock.time", SimpleNamespace(sleep=let_it_finish))
            with make(tmp_path).made() as part:
                assert part is None, "made by the other process"
        assert other.returncode == 0
    text = capsys.readouterr().out
    assert f"another process makes {make(tmp_path).path}; waiting for it" in text
    assert np.load(make(tmp_path).path / "b.npy").tolist() == [1, 2, 3, 4]


def test_without_locks_each_makes_its_own_and_the_first_counts(tmp_path, monkeypatch):
    def no_locks(file):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr("ppap.runs.lock._lock", no_locks)
    with pytest.warns(UserWarning, match="no locks"), make(tmp_path).made() as one:
        with make(tmp_path).made() as two:
            assert one.path != two.path
            fill(two)
        fill(one)
    assert [path.name for path in tmp_path.iterdir()] == [make(tmp_path).path.name]


@pytest.mark.parametrize("name", ["a.npy", "b.npy"])
@pytest.mark.parametrize("place", [1, -1], ids=["header", "values"])
def test_a_flipped_bit_is_refused_by_name(kept, name, place):
    content = bytearray((kept.path / name).read_bytes())
    content[place] ^= 4
    (kept.path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name} is damaged .*remove the folder {kept.path}"):
        with kept.made():
            pass


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("a.npy", lambda path: path.write_bytes(path.read_bytes()[:-1])),
        ("a.npy", Path.unlink),
        ("meta.json", lambda path: path.write_bytes(path.read_bytes()[:-9])),
        ("meta.json", lambda path: path.write_text(path.read_text().replace('"x"', '"y"'))),
        ("meta.json", lambda path: path.write_text(json.dumps({"checksums": 1}))),
        ("meta.json", Path.unlink),
    ],
    ids=["cut", "gone", "meta cut", "meta edited", "meta of something else", "meta gone"],
)
def test_other_damage_is_refused_by_name(kept, name, damage):
    damage(kept.path / name)
    with pytest.raises(DataError, match=f"{name} is damaged"), kept.made():
        pass


def test_checksums_are_compared_once_in_a_process(kept, monkeypatch):
    with kept.made() as part:
        assert part is None
    monkeypatch.setattr(stores, "sha256_of", lambda *_: pytest.fail("read again"))
    with kept.made() as part:
        assert part is None
    monkeypatch.undo()
    os.utime(kept.path / "a.npy", (time.time() + 5,) * 2)
    (kept.path / "b.npy").write_bytes(b"")
    with pytest.raises(DataError, match="b.npy is damaged"), kept.made():
        pass


@pytest.mark.parametrize("without", [False, True], ids=["allocated", "written"])
def test_a_full_disk_is_refused_before_the_work(tmp_path, monkeypatch, without):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    if without:
        monkeypatch.delattr(stores.os, "posix_fallocate")
        monkeypatch.setattr(stores, "to_disk", full)
    else:
        monkeypatch.setattr(stores.os, "posix_fallocate", full)
    with pytest.raises(DataError, match="the features need 32 bytes .* give another --data.cache-dir"):
        with make(tmp_path).made():
            pytest.fail("begun")
    assert not list(tmp_path.iterdir()), "nothing is left"


def test_room_is_taken_at_once(tmp_path):
    kinds = {"a": Kind((1024, 1024), np.float16)}
    with pytest.raises(KeyboardInterrupt):
        with Store(tmp_path, {}, kinds, what="features", remedy="r").made() as part:
            taken = (part.path / "a.npy").stat().st_blocks * 512
            raise KeyboardInterrupt
    assert taken >= 2 * 2**20, "a sparse file ends the process where the disk is full"
