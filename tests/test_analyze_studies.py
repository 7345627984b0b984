"""Analyses that train (ablation, sweep, benchmark): results, continuation, and pictures of their runs."""

import json
from dataclasses import replace

import pytest
from PIL import Image

from ppap.analysis import study
from ppap.analysis.arguments import run_config
from ppap.analysis.commands import ablation, benchmark, compare, sweep
from ppap.analysis.commands.sweep import Grid, around, cell_name, describe, settings
from ppap.analysis.study import Cell, open_study, run_cells
from ppap.errors import DataError, PpapError, Stopped, UsageError
from ppap.evaluation.comparison import variant
from ppap.evaluation.tables import mean_and_deviation, score_lines
from ppap.pictures.drawing import legend
from ppap.settings.config import LossConfig, from_dict, of_seed
from ppap.settings.presets import demo, preset
from ppap.settings.published import with_method
from ppap.training.request import parse_arguments
from tests.runs import TINY, make_folder

# Two steps of a tiny network; the probes barely move.
FAST = [
    *(option for option in TINY if option != "--compare.rows"),
    "--train.steps=2",
    "--train.val-every=0",
    "--eval.pictures=0",
    "--compare.steps=2",
    "--compare.batch-size=4",
    "--compare.starts=2",
    "--eval.crf=none",
    "--loss.phi0=0.3",
]


def result(path, name):
    return json.loads((path / "cells" / f"{name}.json").read_text())


def test_an_ablation_grows_by_seeds_and_refuses_other_settings(tmp_path, capsys):
    out = tmp_path / "ablation"
    ablation.main([*FAST, f"--out={out}"])
    first = (out / "cells" / "seed-0.json").stat().st_mtime_ns
    ablation.main([*FAST, f"--out={out}", "--seeds", "0", "1"])
    assert (out / "cells" / "seed-0.json").stat().st_mtime_ns == first, "seed 0 was kept"
    text = capsys.readouterr().out
    assert "1 of 2 runs were finished before" in text
    record = json.loads((out / "results.json").read_text())
    assert list(record["rows"]) == ["none", "TPS", "ANS", "TPS + ANS"] and record["seeds"] == [0, 1]
    for seed in (0, 1):
        own = result(out, f"seed-{seed}")["result"]
        for name, title in ablation.ROWS.items():
            value = own["summary"][name]["cluster_miou"]
            assert record["rows"][title]["cluster_miou"]["values"][seed] == value
        assert own["provenance"]["config"]["compare"]["fixed_phi0"] is None, "one phi0 for all rows"
    table = (out / "ablation.md").read_text()
    assert table.count("±") >= 16 and "| 62.9 | 26.5 |" in table
    for changed in (["--loss.psi0=0.2"], ["--train.steps=3"], ["--data.scenes-seed=7"]):
        with pytest.raises(UsageError, match=f"another {changed[0].split('=')[0]}"):
            ablation.main([*FAST, f"--out={out}", *changed])
    with pytest.raises(UsageError, match="holds the analysis ablation, not sweep"):
        sweep.main([*FAST, f"--out={out}"])


def test_the_four_rows_differ_by_the_switches_alone():
    config = replace(demo(), compare=replace(demo().compare, fixed_phi0=None))
    assert {name: variant(config, name) for name in ablation.ROWS} == {
        name: replace(config, method=name) for name in ablation.ROWS
    }


def test_a_sweep_runs_in_parallel_and_goes_on(tmp_path, capsys):
    out = tmp_path / "sweep"
    vary = ["--vary.sigma-pos", "--vary.sigma-amb", "--vary.psi0", "--vary.phi0", "0.3", "0.2"]
    options = [*FAST, *vary, f"--out={out}", "--keep-checkpoints"]
    sweep.main([*options, "--jobs=2"])
    names = [f"phi0={phi},psi0=0.15,sigma_amb=4,sigma_pos=3,seed=0" for phi in ("0.3", "0.2")]
    assert sorted(path.stem for path in (out / "cells").glob("*.json")) == sorted(names)
    before = {name: result(out, name)["result"]["summary"] for name in names}
    # The second one's end is lost: it is measured again from its last checkpoint, and nothing else is done.
    (out / "cells" / f"{names[1]}.json").unlink()
    capsys.readouterr()
    sweep.main(options)
    text = capsys.readouterr().out
    assert "1 of 2 runs were finished before" in text and "continued at step 2" in text
    assert {name: result(out, name)["result"]["summary"] for name in names} == before
    record = json.loads((out / "results.json").read_text())
    assert list(record["rows"]) == ["preset", "phi0 0.2"]
    trained = [result(out, name)["result"]["provenance"]["config"]["loss"]["phi0"] for name in names]
    assert trained == [0.3, 0.2]
    assert "to choose by labels" in (out / "sweep.md").read_text()
    assert (out / "sweep.png").exists() and (out / "sweep.pdf").exists()


def test_settings_of_a_sweep():
    loss, grid = LossConfig(phi0=0.8, psi0=0.5), Grid(sigma_pos=(1.0, 3.0), sigma_amb=(), phi0=(0.7, 0.9))
    base = {"sigma_pos": 3.0, "sigma_amb": 4.0, "phi0": 0.8, "psi0": 0.5}
    single = settings(loss, grid, "single")
    assert single == [base, base | {"sigma_pos": 1.0}, base | {"phi0": 0.7}, base | {"phi0": 0.9}]
    product = settings(loss, grid, "product")
    assert [(s["sigma_pos"], s["phi0"]) for s in product] == [(1, 0.7), (1, 0.9), (3, 0.7), (3, 0.9)]
    assert settings(loss, Grid(sigma_pos=(), sigma_amb=()), "single") == []
    assert describe(single[1], {"sigma_pos": 3.0, "phi0": 0.8}) == "sigma_pos 1"
    assert len({cell_name(s, seed) for s in [*single, *product] for seed in (0, 1)}) == 2 * 6
    found = around(loss)
    assert found.phi0 == (0.7, 0.75, 0.8, 0.85, 0.9) and found.psi0 == (0.4, 0.45, 0.5, 0.55, 0.6)
    assert len(settings(loss, found, "single")) == 17


@pytest.mark.parametrize(
    ("run", "options", "error", "message"),
    [
        (sweep.main, [], UsageError, "--out is not given"),
        (sweep.main, ["--out=OUT", "--jobs=0"], UsageError, "--jobs is 0"),
        (sweep.main, ["--out=OUT", "--vary.sigma-pos", "-1"], UsageError, "give a finite positive number"),
        (sweep.main, ["--out=OUT", "--compare.rows", "frozen"], UsageError, "leave --method"),
        (ablation.main, ["--out=OUT", "--method=hp"], UsageError, "leave it out"),
        (ablation.main, ["--out=OUT", "--model.weights=nowhere.pth"], DataError, "nowhere.pth"),
        (benchmark.main, ["--out=OUT", "--methods", "hp", "--data.cache-features"], UsageError, "recoloured"),
    ],
)
def test_wrong_options_before_any_work(tmp_path, run, options, error, message):
    out = tmp_path / "out"
    arguments = [option.replace("OUT", str(out)) for option in options]
    with pytest.raises(error, match=message):
        run([*FAST, *arguments])
    assert not out.exists()


@pytest.mark.parametrize(
    ("run", "options"),
    [
        (sweep.main, ["--vary.phi0", "0.5", "0.5"]),
        (ablation.main, ["--seeds", "-1"]),
        (benchmark.main, ["--methods", "dino", "frozen"]),
        (benchmark.main, ["--methods", "dinosaur"]),
        (compare.main, ["--out=x"]),
    ],
)
def test_impossible_options(run, options):
    with pytest.raises(SystemExit, match="2"):
        run(options)


def test_unlabelled_images_cannot_be_scored(tmp_path):
    root = make_folder(tmp_path / "data", labels=False)
    with pytest.raises(DataError, match="no labels to score with"):
        ablation.main(
            ["folder", f"--data.root={root}", *[o for o in FAST[1:] if "scenes" not in o], "--out=x"]
        )


def test_what_a_study_folder_may_hold(tmp_path):
    config = of_seed(demo(), 0)
    path = open_study(str(tmp_path / "new"), "sweep", config)
    moved = replace(config, data=replace(config.data, root="elsewhere", workers=0))
    assert open_study(str(path), "sweep", moved) == path, "where things are may change"
    assert from_dict(json.loads((path / "study.json").read_text())["config"]) == config
    (path / "study.json").write_text("{")
    with pytest.raises(DataError, match="damaged"):
        open_study(str(path), "sweep", config)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("kept")
    with pytest.raises(UsageError, match="is no sweep"):
        open_study(str(tmp_path / "other"), "sweep", config)


def test_a_failing_cell_is_named(tmp_path):
    (tmp_path / "big.log").write_text("step 1\nerror: 12 images, fewer than one batch\n\n")
    with pytest.raises(DataError, match=r"run big: 12 images, fewer than one batch \(all it .*big\.log\)"):
        study._check_exit(tmp_path, "big", DataError.exit_code)
    with pytest.raises(Stopped, match="run big: "):
        study._check_exit(tmp_path, "big", Stopped.exit_code)
    with pytest.raises(PpapError, match="fewer"):
        study._check_exit(tmp_path, "big", -9)
    study._check_exit(tmp_path, "big", 0)


def test_a_stop_says_how_to_go_on(tmp_path, monkeypatch):
    def stop(self):
        raise Stopped("stopped at step 1 of 2; continue with: something else")

    monkeypatch.setattr(study.Trainer, "run", stop)
    config = of_seed(parse_arguments([*FAST, "--train.out=x"]).config, 0)
    with pytest.raises(Stopped, match="stopped at step 1 of 2 of run a; the same command continues"):
        run_cells(tmp_path, [Cell("a", config)])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A benchmark of two methods: its folder."""
    out = tmp_path_factory.mktemp("benchmark") / "out"
    benchmark.main([*FAST, f"--out={out}", "--methods", "ppap", "dino"])
    return out


def test_a_benchmark_evaluates_every_method(runs):
    record = json.loads((runs / "results.json").read_text())
    assert list(record["rows"]) == ["frozen", "ppap"]
    for name in ("frozen", "ppap"):
        own = result(runs, f"{name}-seed-0")["result"]
        assert own["provenance"]["config"]["method"] == name
        assert record["rows"][name]["cluster_miou"]["mean"] == own["summary"]["cluster_miou"]
        assert (runs / "cells" / f"{name}-seed-0" / "evaluation.json").exists()
    text = (runs / "benchmark.md").read_text()
    assert "| frozen features |" in text and "paper" not in text, "the demo is none of the paper's"


def test_the_papers_rows_stand_below_ours():
    row = {"cluster_accuracy": 50.0, "cluster_miou": 20.0, "linear_accuracy": 70.0, "linear_miou": 40.0}
    lines = benchmark.probe_lines("cocostuff27-vits16", {"PPAP": [row, row]})
    assert lines[2] == "| PPAP | 50.0 ± 0.0 | 20.0 ± 0.0 | 70.0 ± 0.0 | 40.0 ± 0.0 |"
    assert "| paper: HP | 54.5 | 24.3 | 74.1 | 39.1 |" in lines
    assert not any("TransFGU" in line for line in lines), "another backbone"
    lines = benchmark.probe_lines(
        "cityscapes-vits8", {"PPAP": [row | {f"crf/{k}": v for k, v in row.items()}]}
    )
    assert sum("with CRF [%]" in line for line in lines) == 1
    assert "| paper: HP | 80.1 | 18.4 | unknown | unknown |" in lines
    near = benchmark.neighbour_lines("imagenet_s50-vits16", {"ppap": [{"neighbours_miou": 12.0}]})
    assert near[-1] == "| PPAP | 12.0 | 59.3 |"


def test_defaults_follow_method_and_protocol():
    def config(method, *options):
        return run_config(benchmark._parse(["cocostuff27-vits16", *options], method))

    assert config("stego").train == with_method(preset("cocostuff27-vits16"), "stego").train
    assert (
        config("stego", "--train.steps=7").train.steps == config("ppap", "--train.steps=7").train.steps == 7
    )
    published, paper_says = config("ppap"), config("ppap", "--protocol=paper")
    assert (published.model.guidance_dropout, paper_says.model.guidance_dropout) == (0.1, 0.0)
    assert config("ppap", "--protocol", "paper", "--model.guidance-dropout=0.2").model.guidance_dropout == 0.2


def test_means_and_missing_values():
    assert mean_and_deviation([1.0, None, 3.0]) == (2.0, pytest.approx(2**0.5))
    assert mean_and_deviation([4.0]) == (4.0, None) and mean_and_deviation([None]) is None
    assert score_lines({"a": [{}]})[-1] == "| a | - | - | - | - |"
    both = score_lines({"a": [{"cluster_miou": 3.0, "kmeans/cluster_miou": 2.0}], "b": [{}]})
    assert "| cluster mIoU | cluster mIoU by k-means | linear accuracy |" in both[0]
    assert both[2:] == ["| a | - | 3.0 | 2.0 | - | - |", "| b | - | - | - | - | - |"]
    assert "k-means" not in score_lines({"a": [{"kmeans/cluster_miou": 2.0}]}, crf=True)[0]


def test_runs_side_by_side(runs, tmp_path):
    out, cells = tmp_path / "compare", runs / "cells"
    both = [str(cells / "frozen-seed-0"), str(cells / "ppap-seed-0")]
    compare.main([*both, f"--out={out}", "--images", "3", "0", "--cell=64"])
    record = json.loads((out / "compare.json").read_text())
    assert [run["title"] for run in record["runs"]] == ["frozen features", "PPAP"]
    assert len(record["images"]) == 2 and len(record["runs"][0]["assignment"]) == 8
    with Image.open(out / "compare.png") as picture:
        names = result(runs, "ppap-seed-0")["result"]["classes"]
        below = legend(names, width=picture.width).height
        assert picture.height == 15 + 2 * 8 + 2 * (64 + 8) + below
        assert 4 * 64 < picture.width < 4 * 200
    compare.main([both[1], both[1], f"--out={tmp_path / 'linear'}", "--probe=linear", "--count=1"])
    titles = [run["title"] for run in json.loads((tmp_path / "linear" / "compare.json").read_text())["runs"]]
    assert titles == ["PPAP 1", "PPAP 2"]
    for options, message in (
        (["--images", "nobody"], "no validation image"),
        (["--images", "4"], "no validation image"),
        (["--out="], "--out is not given"),
    ):
        with pytest.raises(UsageError, match=message):
            compare.main([both[0], f"--out={tmp_path / 'never'}", *options])
    with pytest.raises(DataError, match="no checkpoint"):
        compare.main([str(tmp_path / "nowhere"), f"--out={tmp_path / 'never'}"])
    assert not (tmp_path / "never").exists()
