"""The quality benchmark on tiny data sets: its files, going on, and what it refuses."""

import json
from dataclasses import replace

import pytest

from bench.quality import __main__ as quality
from bench.quality import report, settings
from ppap.errors import UsageError
from tests.runs import make_folder


@pytest.fixture
def options(tmp_path, monkeypatch):
    """Two data sets of 40 x 50 pixels with the embedded backbone."""

    def small(data, name, weights, steps):
        config = settings.base_config(data, name, weights, steps)
        sides = {"resolution": 32, "eval_resolution": 32, "workers": 0, "ignore_ids": (9, 255)}
        return replace(
            config,
            data=replace(config.data, **sides),
            compare=replace(config.compare, steps=3),
            train=replace(config.train, batch_size=2),
        )

    monkeypatch.setattr(quality, "base_config", small)
    monkeypatch.setenv("PPAP_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("one", "two"):
        make_folder(tmp_path / "data" / name)
    return [f"--data={tmp_path / 'data'}", "--weights=embedded", "--steps=2", f"--out={tmp_path / 'out'}"]


def test_a_table_grows_and_goes_on(options, tmp_path, capsys):
    out = tmp_path / "out"
    quality.main([*options, "--sets", "one", "--rows", "frozen", "conditioned", "ppap", "--seeds", "0"])
    assert not (out / "one" / "cells" / "ppap-0" / "checkpoints").exists(), "no weights are kept"
    record = out / "one" / "cells" / "ppap-0.json"
    before = record.stat().st_mtime_ns
    quality.main([*options, "--sets", "one", "two", "--rows", "frozen", "ppap", "--seeds", "0"])
    assert record.stat().st_mtime_ns == before, "what is finished stays"
    found = json.loads((out / "quality.json").read_text())
    assert set(found["results"]) == {"one", "two"} == set(found["sets"])
    assert {name: set(rows) for name, rows in found["results"].items()} == {
        "one": {"frozen", "conditioned", "ppap"},
        "two": {"frozen", "ppap"},
    }
    scores = found["results"]["two"]["ppap"]["0"]
    assert {"cluster_miou", "crf/cluster_miou", "linear_accuracy"} <= set(scores)
    text = (out / "quality.md").read_text()
    assert text.count("## ") == 2 and "| PPAP minus [points] |" in text and "| with CRF [%] |" in text
    assert (out / "quality.png").stat().st_size > 10_000
    with pytest.raises(UsageError, match=r"started with another .*--train\.steps"):
        quality.main([*options, "--steps=3", "--sets", "one"])


def test_the_rows_share_everything_but_the_method(options, tmp_path):
    base = settings.base_config(tmp_path / "data", "one", "embedded", 30)
    runs = settings.cells(base, settings.CORE, (0, 5))
    assert list(runs) == [
        f"{row}-{s}" for s in (0, 5) for row in ("untrained", "fixed", "hp", "stego", "ppap")
    ]
    trained = [run.config for name, run in runs.items() if not name.startswith("untrained")]
    for part in ("data", "model", "loss", "hp", "stego", "optim", "eval"):
        assert len({getattr(config, part) for config in trained}) == 1, part
    assert {config.train.seed for config in trained} == {0, 5}


def test_a_missing_data_set_is_refused_with_the_others_named(options):
    with pytest.raises(UsageError, match=r"no data set is called 'oen'; did you mean 'one'"):
        quality.main([*options, "--sets", "oen"])


def test_the_difference_of_two_rows():
    found = report.difference([3.0, 5.0], [1.0, 1.0])
    assert (found.mean, round(found.deviation, 6)) == (3.0, round(2**0.5, 6)) and found.clear
    assert not report.difference([3.0, 5.0], [1.0, 3.0]).clear
    assert not report.difference([3.0], [1.0]).clear, "one seed says nothing of the spread"
