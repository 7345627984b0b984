"""``ppap analyze benchmark``: several methods and seeds on one data set, beside the paper (Tables 1-4)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ppap.analysis import paper
from ppap.analysis.arguments import Out, check_seeds, parse_with_preset, run_config
from ppap.analysis.study import Cell, check, choices_of, open_study, run_cells
from ppap.escaping import markdown
from ppap.evaluation.tables import (
    SCORES,
    Summary,
    has_crf,
    score_lines,
    spread_text,
)
from ppap.methods.table import METHODS, TITLES
from ppap.reports.records import shared_provenance, spread_of
from ppap.runs.rundir import RunDir
from ppap.settings.config import Config, of_seed
from ppap.settings.published import with_method

TEXT = """Train each method with each seed, evaluate it as "ppap eval" does, and set the scores beside the
paper's.

The preset names data and backbone, such as cocostuff27-vits16 with --data.root DIR. Every method has the
settings that it was published with for these data, where there are any; options of this command change all
of them alike. Probes are trained along with each run, the checkpoint is that of --train.selection (the
published presets: chosen by validation labels). The CRF of the paper's Tables 1 to 3 is on; --eval.crf none
leaves it out. ImageNet-S is scored by nearest neighbours (Table 4).

Writes benchmark.md and results.json; each run is a run directory below cells/, which predict and eval take.
The same command continues a stopped benchmark, and adds methods and seeds to a finished one. The demo takes
two minutes a run on two cores; a run of the paper's presets takes hours on a GPU."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkArguments(Config):
    """Options of ``ppap analyze benchmark``; everything else defaults to the preset and the method."""

    out: Out = ""
    """New folder for benchmark.md, results.json and the runs, or one to continue."""
    methods: tuple[Literal["dino", "frozen", "stego", "hp", "fixed", "tps", "ans", "random", "ppap"], ...] = (
        "frozen",
        "stego",
        "hp",
        "ppap",
    )
    """Methods to train, as --method of ppap train; dino is another word for frozen."""
    seeds: tuple[int, ...] = (0,)
    """Every method is trained with each."""
    jobs: int = 1
    """Runs at once, in processes of their own; threads are shared out among them."""

    def __post_init__(self) -> None:
        check_seeds(self.seeds)
        if not self.names or len(set(self.names)) != len(self.methods):
            raise ValueError(f"--methods {' '.join(self.methods)}: name each method once, at least one")

    @property
    def names(self) -> tuple[str, ...]:
        """The methods as settings call them, in the order of the table."""
        asked = {"frozen" if name == "dino" else name for name in self.methods}
        return tuple(name for name in TITLES if name in asked)


def main(argv: Sequence[str]) -> None:
    """Command ``analyze benchmark``."""
    arguments = _parse(argv, "ppap")
    configs = {
        name: of_seed(replace(run_config(_parse(argv, name)), method=name), 0) for name in arguments.names
    }
    base = of_seed(run_config(arguments), 0)
    for name, config in configs.items():
        METHODS[name].check(config)
    check(base, arguments.jobs, splits=("val",))
    path = open_study(arguments.out, "benchmark", base)
    cells = {
        (name, seed): Cell(f"{name}-seed-{seed}", of_seed(config, seed), "checkpoint")
        for name, config in configs.items()
        for seed in arguments.seeds
    }
    records = run_cells(path, list(cells.values()), arguments.jobs)
    results = {
        name: [records[cells[name, seed].name]["result"] for seed in arguments.seeds] for name in configs
    }
    text = write(path, base, arguments.seeds, results)
    print(f"{text}\nwritten: {path}")


def _parse(argv: Sequence[str], method: str) -> BenchmarkArguments:
    """The options, with the defaults of one method."""
    return parse_with_preset(
        argv,
        BenchmarkArguments,
        "benchmark",
        TEXT,
        adjust=lambda config: with_method(config, method),
        compare=lambda start: replace(start.compare, rows=()),
        eval=lambda start: replace(start.eval, crf="native"),
    )


def write(
    path: Path, config: Config, seeds: Sequence[int], results: Mapping[str, Sequence[Mapping[str, Any]]]
) -> str:
    """``results.json`` and ``benchmark.md``; returns the text of the latter.

    Args:
        path: folder of the study.
        config: of the method ppap.
        seeds: of the runs.
        results: method -> what ``ppap eval`` wrote of each run.
    """
    first = next(iter(results.values()))[0]
    lines = [f"# Benchmark: {config.preset}", ""]
    if first["warning"]:
        lines += [f"> **{first['warning']}**", ""]
    lines += [
        f"- backbone: {markdown(first['backbone'])}; seeds {', '.join(map(str, seeds))}"
        + (" (mean ± standard deviation)" if len(seeds) > 1 else ""),
        f"- checkpoint: {config.train.selection}"
        + (" (chosen by validation labels)" if config.train.selection == "best" else ""),
        "",
    ]
    summaries = {name: [result["summary"] for result in runs] for name, runs in results.items()}
    if SCORES[0] in first["summary"]:
        lines += probe_lines(config.preset, {TITLES[name]: runs for name, runs in summaries.items()})
    else:
        lines += neighbour_lines(config.preset, summaries)
    values = {
        "analysis": "benchmark",
        "preset": config.preset,
        "seeds": list(seeds),
        "rows": {name: spread_of(runs) for name, runs in summaries.items()},
        "choices": {
            name: [choices_of(path, f"{name}-seed-{s}").to_dict() for s in seeds] for name in results
        },
        "provenance": {
            name: shared_provenance([run["provenance"] for run in runs]) for name, runs in results.items()
        },
    }
    RunDir(path).write_json("results.json", values)
    text = "\n".join(lines) + "\n"
    (path / "benchmark.md").write_text(text, encoding="utf-8")
    return text


def probe_lines(preset: str, rows: Mapping[str, Sequence[Summary]]) -> list[str]:
    """Our rows, without CRF and with it where it ran, and the paper's rows of the same data and backbone."""
    lines = score_lines(rows)
    if has_crf(rows):
        lines += ["", *score_lines(rows, crf=True)]
    setting = paper.setting_of(preset)
    published = paper.benchmark(setting) if setting else None
    if published is None:
        return lines
    for method, backbone, *cells in published.rows:
        if backbone == setting.backbone:
            found = dict(zip(published.columns, cells, strict=True))
            texts = [paper.text(found.get(score)) for score in SCORES]
            lines.append(f"| paper: {method} | " + " | ".join(texts) + " |")
    return [*lines, "", f"The paper's rows are of its table of {published.title}."]


def neighbour_lines(preset: str, rows: Mapping[str, Sequence[Summary]]) -> list[str]:
    """mIoU by nearest neighbours, ours and the paper's (Table 4)."""
    column, published = paper.neighbour_column(preset), paper.table(4)
    lines = ["| mIoU [%] | ours | paper |", "|---|---:|---:|"]
    for name, seeds in rows.items():
        row = published.find(paper.METHODS.get(name, ""), "ViT-S/16")
        known = paper.text(row[column]) if row and column else "-"
        lines.append(f"| {TITLES[name]} | {spread_text([s['neighbours_miou'] for s in seeds])} | {known} |")
    return lines
