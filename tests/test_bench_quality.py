"""The quality benchmark on tiny data sets: its files, going on, and what it refuses."""

import json
import math
from dataclasses import replace

import pytest

from bench.quality import __main__ as quality
from bench.quality import report, settings
from bench.quality.__main__ import measure_sets
from bench.quality.known import Known
from ppap.errors import DataError, UsageError
from ppap.reports.sharing import public_config
from ppap.runs.lock import alone
from tests.runs import make_folder


@pytest.fixture
def options(tmp_path, monkeypatch):
    """Two data sets of 40 x 50 pixels with the embedded backbone."""

    def small(*arguments):
        config = settings.base_config(*arguments)
        sides = {"resolution": 32, "eval_resolution": 32, "workers": 0, "ignore_ids": (9, 255)}
        return replace(
            config,
            data=replace(config.data, **sides),
            compare=replace(config.compare, steps=3),
            train=replace(config.train, batch_size=2),
        )

    monkeypatch.setattr(quality, "base_config", small)
    monkeypatch.setattr(quality, "measure_sets", lambda *arguments: None)  # but for one test: it takes long
    monkeypatch.setenv("PPAP_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("one", "two"):
        make_folder(tmp_path / "data" / name)
    return [f"--data={tmp_path / 'data'}", "--weights=embedded", "--steps=2", f"--out={tmp_path / 'out'}"]


def test_a_table_grows_and_goes_on(options, tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr(quality, "measure_sets", measure_sets)
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


def test_the_rows_share_everything_but_the_method(options, tmp_path):
    base = settings.base_config(tmp_path / "data", "one", "embedded", 30)
    runs = settings.cells(base, settings.CORE, (0, 5))
    assert list(runs) == [f"{row}-{s}" for s in (0, 5) for row in settings.CORE]
    assert all(run.config.compare.rows == (name.rpartition("-")[0],) for name, run in runs.items())
    trained = [run.config for run in runs.values() if run.config.method != "frozen"]
    for part in ("data", "model", "loss", "hp", "stego", "optim", "eval"):
        assert len({getattr(config, part) for config in trained}) == 1, part
    assert {config.train.seed for config in trained} == {0, 5}


def scores_of(*values, **more):
    """Seed -> scores, whose cluster mIoU has the given values."""
    keys = ("cluster_accuracy", "linear_accuracy", "linear_miou")
    return {
        seed: {**dict.fromkeys(keys, 1.0), "cluster_miou": value, **more} for seed, value in enumerate(values)
    }


def test_published_data_sets_come_first_and_have_their_names(tmp_path):
    names = ("dubai", "zoo", "msrc21", "art")
    for name in names:
        (tmp_path / name / "images").mkdir(parents=True)
    assert settings.data_sets(tmp_path) == ["msrc21", "dubai", "art", "zoo"]
    scores = {"frozen": scores_of(1.0)}
    text = report.write(tmp_path, {"msrc21": scores, "zoo": scores}, {}, {"lines": []})
    assert "## MSRC-21\n" in text and "## zoo\n" in text


def test_the_overview_says_how_many_seeds_a_mean_is_of(tmp_path):
    results = {
        "msrc21": {
            "frozen": scores_of(10.0, 12.0),
            "ppap": scores_of(30.0, 32.0, **{"kmeans/cluster_miou": 29.0}),
        },
        "zoo": {"ppap": scores_of(20.0)},
    }
    lines = report.overview_lines(results)
    assert lines[:2] == [
        "Means ± standard deviations of 2 seeds, in brackets of how many where they are not; empty: not "
        "measured.",
        "",
    ]
    del lines[:2]
    assert lines[:4] == [
        "| cluster mIoU [%] | MSRC-21 | zoo |",
        "|---|---:|---:|",
        "| frozen features | 11.0 ± 1.4 |  |",
        "| PPAP | 31.0 ± 1.4 | 20.0 (1) |",
    ]
    assert lines[4:] == [
        "",
        "| cluster mIoU by k-means [%] | MSRC-21 | zoo |",
        "|---|---:|---:|",
        "| frozen features |  |  |",
        "| PPAP | 29.0 ± 0.0 |  |",
        "",
    ]
    one = report.overview_lines({"zoo": {"frozen": scores_of(1.0)}})
    assert one[0].startswith("Scores of one seed, in brackets")
    few = {"zoo": {"frozen": scores_of(1.0), "ppap": scores_of(1.0, 2.0)}}
    assert "of 2 seeds" in report.overview_lines(few)[0], "as many of both: the larger number"
    text = report.write(tmp_path, results, {}, {"lines": []})
    assert lines[2] in text and "| linear mIoU | seeds |" in text
    assert "| PPAP | 1.0 | 20.0 | 1.0 | 1.0 | 1 |" in text


def test_bars_of_a_data_set_stand_side_by_side_around_its_name(tmp_path, monkeypatch):
    """Each is where its row is among those of its own data set, and one seed has no whiskers."""
    from matplotlib.axes import Axes

    drawn, real = [], Axes.bar
    monkeypatch.setattr(
        Axes,
        "bar",
        lambda axis, x, height, width, **more: (
            drawn.append((list(x), width, more)) or real(axis, x, height, width, **more)
        ),
    )
    results = {
        "msrc21": {row: scores_of(10.0, 12.0) for row in ("frozen", "fixed", "ppap")},
        "zoo": {"frozen": scores_of(5.0), "ppap": scores_of(6.0)},
    }
    report.draw(tmp_path / "figure.png", results)
    width = drawn[0][1]
    assert [more["label"] for *_, more in drawn] == ["frozen features", "fixed threshold", "PPAP"]
    first = [middles[0] for middles, *_ in drawn]
    assert first == pytest.approx([-width, 0, width])
    second = [drawn[0][0][1], drawn[2][0][1]]
    assert second == pytest.approx([1 - width / 2, 1 + width / 2])
    assert drawn[1][0] == pytest.approx([0]), "not measured on the second"
    assert drawn[0][2]["yerr"][0] > 1 and math.isnan(drawn[0][2]["yerr"][1])


@pytest.mark.parametrize("jobs", [1, 2])
def test_tables_are_written_after_each_run(options, monkeypatch, jobs):
    lengths = []
    monkeypatch.setattr(
        quality, "summarise", lambda out, known, go=quality.summarise: lengths.append(len(go(out, known)))
    )
    rows = ["--rows", "colour", "frozen", "conditioned", "--seeds=0"]
    quality.main([*options, "--sets=one", *rows, f"--jobs={jobs}"])
    assert len(lengths) == 4 and lengths[0] < lengths[2] == lengths[3], "each run, and all of a data set"


def test_a_missing_data_set_is_refused_with_the_others_named(options):
    with pytest.raises(UsageError, match=r"no data set is called 'oen'; did you mean 'one'"):
        quality.main([*options, "--sets", "oen"])


def test_rows_and_seeds_that_are_asked_for_later_join_the_table(options, tmp_path):
    small = [*options, "--sets", "one"]
    quality.main([*small, "--rows", "frozen", "--seeds", "0"])
    quality.main([*small, "--rows", "colour", "frozen", "--seeds", "0", "1"])
    found = json.loads((tmp_path / "out" / "quality.json").read_text())
    assert {row: set(seeds) for row, seeds in found["results"]["one"].items()} == {
        "colour": {"0", "1"},
        "frozen": {"0", "1"},
    }


def test_what_is_known_is_not_measured_again_and_stands_in_the_tables(options, tmp_path, monkeypatch):
    small, elsewhere = [*options[:-1], "--sets", "one", "--seeds", "0"], tmp_path / "elsewhere"
    quality.main([*small, "--rows", "frozen", "ppap", f"--out={elsewhere}"])
    known = elsewhere / "quality.json"
    before = json.loads(known.read_text())
    before["results"]["one"]["ppap"]["0"]["cluster_miou"] = 99.0
    before["sets"] = {"one": {}}
    known.write_text(json.dumps(before))
    monkeypatch.setattr(quality, "measure_sets", lambda *arguments: pytest.fail("known, too"))
    made = []
    monkeypatch.setattr(
        quality,
        "run_cells",
        lambda study, runs, *rest, go=quality.run_cells: made.extend(runs) or go(study, runs, *rest),
    )
    quality.main(
        [*options, "--sets", "one", "--rows", "frozen", "ppap", "--seeds", "0", "1", f"--known={known}"]
    )
    assert [run.name for run in made] == ["frozen-1", "ppap-1"]
    found = json.loads((tmp_path / "out" / "quality.json").read_text())
    rows = found["results"]["one"]
    assert {row: list(seeds) for row, seeds in rows.items()} == {"frozen": ["0", "1"], "ppap": ["0", "1"]}
    assert rows["ppap"]["0"]["cluster_miou"] == 99.0 and set(found["facts"]["configs"]) == {"one"}
    assert "± " in (tmp_path / "out" / "quality.md").read_text()


def test_settings_of_a_method_count_where_runs_of_it_are_known(tmp_path, options):
    base = settings.base_config(tmp_path / "data", "one", "embedded", 30)
    other = replace(base, hp=replace(base.hp, anchor_divisor=1))
    score = {"ppap": {0: {}}}
    Known({"one": score}, {}, {"one": public_config(other)}).check(None, "one", base)
    both = Known({"one": {**score, "hp": {0: {}}}}, {}, {"one": public_config(other)})
    for name in ("one", "two"):
        with pytest.raises(UsageError, match="runs of one had another --hp.anchor-divisor; leave"):
            both.check(None, name, base)


def test_hp_uses_its_second_pool_on_sets_as_small_as_the_published_ones(tmp_path, options):
    """Renewals count within an epoch, of which the smallest set has 8 steps."""
    base = settings.base_config(tmp_path / "data", "one", "embedded")
    assert base.hp.renew_every < 261 // settings.BATCH and base.hp.warmup < settings.STEPS / 2


def test_known_runs_of_other_settings_are_refused(options, tmp_path):
    first = [*options, "--sets", "one", "--rows", "frozen", "--seeds", "0"]
    quality.main(first)
    known = tmp_path / "out" / "quality.json"
    changed = [*first[:2], "--steps=3", f"--out={tmp_path / 'new'}", *first[4:], f"--known={known}"]
    with pytest.raises(UsageError, match="its runs of one had another --train.steps; leave"):
        quality.main(changed)
    assert not (tmp_path / "new").exists()
    of_the_other = [argument if argument != "one" else "two" for argument in changed]
    with pytest.raises(UsageError, match="its runs of one had another --train.steps; leave"):
        quality.main(of_the_other)


def test_a_batch_larger_than_a_data_set_is_refused_before_anything_is_written(options, tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "base_config", settings.base_config)
    with pytest.raises(DataError, match="fewer than one batch of 32; give --train.batch-size"):
        quality.main([*options, "--rows=frozen", "--seeds=0"])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "content", [None, "{", "[]", '{"results": {}}', '{"results": {"a": {"ppap": {"x": {}}}}}']
)
def test_what_holds_no_results_is_refused(options, tmp_path, content):
    known = tmp_path / "known.json"
    if content is not None:
        known.write_text(content)
    with pytest.raises(DataError, match="cannot be read" if content is None else "no quality.json"):
        quality.main([*options, "--rows", "frozen", f"--known={known}"])
    assert not (tmp_path / "out").exists()


def test_other_settings_are_refused_before_any_work_and_spoil_nothing(options, tmp_path):
    first = [*options, "--sets", "one", "--rows", "frozen", "--seeds", "0"]
    quality.main(first)
    before = (tmp_path / "out" / "quality.json").read_bytes()
    with pytest.raises(UsageError, match="would hold runs of --steps 2 and 3; give one folder for each"):
        quality.main([*first, "--steps=3", "--sets", "two"])
    assert not (tmp_path / "out" / "two").exists()
    quality.main(first)
    assert (tmp_path / "out" / "quality.json").read_bytes() == before


@pytest.mark.parametrize(
    "wrong", [["--seeds", "0", "0"], ["--train.steps", "0"], ["--train.batch-size", "0"]]
)
def test_impossible_numbers_are_refused_before_anything_is_written(options, tmp_path, wrong):
    with pytest.raises(UsageError, match=wrong[0]):
        quality.main([*options, *wrong])
    assert not (tmp_path / "out").exists()


def test_a_second_process_is_refused(options, tmp_path):
    (tmp_path / "out").mkdir()
    with alone(tmp_path / "out", "--out out"), pytest.raises(UsageError, match="another process works on"):
        quality.main([*options, "--rows", "frozen"])


def test_figures_of_sets_that_do_not_exist_are_dashes():
    summary = {key: {"mean": 1234.56} for key in ("positives", "true_macro", "negatives")}
    summary |= {"true_micro": None, "false_micro": {"mean": float("nan")}}
    assert report.set_lines({"chance": {"summary": summary}})[2] == (
        "| every patch | 1,235 | - / 1,234.6 | 1,235 | - |"
    )


def test_the_difference_of_two_rows():
    found = report.difference([3.0, 5.0], [1.0, 1.0])
    assert (found.mean, round(found.deviation, 6)) == (3.0, round(2**0.5, 6)) and found.clear
    assert str(report.difference([1.0], [1.04])) == "+0.0"
    assert not report.difference([3.0, 5.0], [1.0, 3.0]).clear
    assert not report.difference([3.0], [1.0]).clear, "one seed says nothing of the spread"


def test_methods_with_settings_of_their_own_have_a_line_where_they_were_measured(options, tmp_path):
    text = lambda: (tmp_path / "out" / "quality.md").read_text()  # noqa: E731
    first = [*options, "--sets=one", "--seeds=0"]
    quality.main([*first, "--rows=frozen"])
    assert "hp with" not in text() and "stego with" not in text()
    quality.main([*first, "--rows", "hp"])
    assert "hp with the loss" in text() and "stego with" not in text()


def test_a_small_folder_takes_a_smaller_batch(options, tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "base_config", settings.base_config)
    taken = []
    monkeypatch.setattr(quality, "check", lambda config, jobs: taken.append(config.train.batch_size))
    monkeypatch.setattr(quality, "run_cells", lambda *arguments: None)
    quality.main([*options, "--sets=one", "--train.batch-size=2"])
    assert taken == [2]
    with pytest.raises(UsageError, match="would hold runs of --batch-size 2 and 3"):
        quality.main([*options, "--sets=two", "--batch-size=3"])


def test_precision_is_that_of_every_run_and_said(options, tmp_path):
    quality.main([*options, "--sets=one", "--rows=ppap", "--seeds=0", "--amp=bf16"])
    out = tmp_path / "out"
    config = json.loads((out / "one/cells/ppap-0/config.json").read_text())["config"]
    assert config["optim"]["amp"] == "bf16" and "--optim.amp bf16" in (out / "quality.md").read_text()
    with pytest.raises(UsageError, match="--amp auto and bf16; give one folder for each"):
        quality.main([*options, "--sets=two", "--rows=ppap", "--seeds=0"])
