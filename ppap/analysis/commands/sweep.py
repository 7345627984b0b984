"""``ppap analyze sweep``: scores over grids of the loss's hyper-parameters (Fig. 4)."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from ppap.analysis import sweep_figure
from ppap.analysis.arguments import Out, check_seeds, parse_with_preset, run_config
from ppap.analysis.study import Cell, check, open_study, run_cells, settle
from ppap.errors import UsageError
from ppap.escaping import markdown
from ppap.evaluation.tables import Summary, has_crf, score_lines
from ppap.reports.records import shared_provenance, spread_of
from ppap.runs.rundir import RunDir
from ppap.settings.config import Config, LossConfig, of_seed

TEXT = """Train with other values of sigma_pos, sigma_amb, phi0 and psi0, and draw the scores over them (the
paper's Fig. 4).

One value is changed at a time, the others stay the preset's; --mode product takes all combinations. What is
auto is chosen once, when the sweep begins, and is the same in all runs (choices.json). Every run is measured
with the same settled probes. The scores use labels: whoever takes the best run has chosen it by labels
("analyze thresholds" suggests phi0 and psi0 without).

Writes sweep.md, results.json, sweep.png and sweep.pdf; each run is below cells/. The same command continues
a stopped sweep, and adds values and seeds to a finished one. The default grid has 17 runs a seed: 25
minutes on two cores for the demo."""


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Values to try; empty = the parameter is not varied."""

    sigma_pos: tuple[float, ...] = (1.0, 2.0, 3.0, 4.0, 5.0)
    """Values of sigma_pos."""
    sigma_amb: tuple[float, ...] = (1.0, 2.0, 3.0, 4.0, 5.0)
    """Values of sigma_amb."""
    phi0: tuple[float, ...] | None = ()
    """Values of phi0 [cosine]; None = about the one that auto finds."""
    psi0: tuple[float, ...] | None = ()
    """Values of psi0 [cosine]; None = likewise."""

    def __post_init__(self) -> None:
        for name, values in asdict(self).items():
            if values is not None and len(set(values)) != len(values):
                raise ValueError(
                    f"--vary.{name.replace('_', '-')} {' '.join(map(str, values))}: name each once"
                )


@dataclass(frozen=True, kw_only=True)
class SweepArguments(Config):
    """Options of ``ppap analyze sweep``; everything else defaults to the preset."""

    out: Out = ""
    """New folder for sweep.md, results.json, the figures and the runs, or one to continue."""
    vary: Grid = field(default_factory=Grid)
    mode: Literal["single", "product"] = "single"
    """single = one parameter at a time; product = all combinations."""
    seeds: tuple[int, ...] = (0,)
    """Every setting is trained with each."""
    jobs: int = 1
    """Runs at once, in processes of their own; threads are shared out among them."""
    keep_checkpoints: bool = False
    """Keep the checkpoints of every run, two of the size of the network each."""

    def __post_init__(self) -> None:
        check_seeds(self.seeds)


def around(loss: LossConfig) -> Grid:
    """The default grid: sigmas 1 to 5, thresholds up to 0.1 on either side of the preset's.

    None for a threshold that is auto: :func:`filled` knows the grid once it is chosen.
    """
    return Grid(phi0=_around(loss.phi0), psi0=_around(loss.psi0))


def _around(value: float | str) -> tuple[float, ...] | None:
    steps = (-0.1, -0.05, 0.0, 0.05, 0.1)
    return None if value == "auto" else tuple(round(value + step, 4) for step in steps)


def filled(grid: Grid, loss: LossConfig) -> Grid:
    """``grid`` with values about those of `loss` where it has None.

    Args:
        grid: of the command line.
        loss: without auto.
    """
    own = {name: _around(getattr(loss, name)) for name, values in asdict(grid).items() if values is None}
    return replace(grid, **own)


def settings(loss: LossConfig, grid: Grid, mode: str) -> list[dict[str, float]]:
    """Every combination to train, each as parameter -> value, without repetition, the preset's own first.

    Args:
        loss: gives the value of what is not varied.
        grid: values to try.
        mode: ``single`` or ``product``.
    """
    base = {f.name: getattr(loss, f.name) for f in fields(Grid)}
    varied = {name: values for name, values in asdict(grid).items() if values}
    if mode == "product":
        combinations = itertools.product(*varied.values())
        return [base | dict(zip(varied, combination, strict=True)) for combination in combinations]
    found = [base] if varied else []
    for name, values in varied.items():
        found += [changed for value in values if (changed := base | {name: value}) not in found]
    return found


def cell_name(setting: Mapping[str, float], seed: int) -> str:
    """Folder of a run, such as ``phi0=0.8,psi0=0.55,sigma_amb=4,sigma_pos=3,seed=0``."""
    parts = [f"{name}={value!r}".removesuffix(".0") for name, value in sorted(setting.items())]
    return ",".join([*parts, f"seed={seed}"])


def main(argv: Sequence[str]) -> None:
    """Command ``analyze sweep``."""
    arguments: SweepArguments = parse_with_preset(
        argv,
        SweepArguments,
        "sweep",
        TEXT,
        vary=lambda start: around(start.loss),
        compare=lambda start: replace(start.compare, rows=("ppap",)),
    )
    config = of_seed(run_config(arguments), 0)
    if config.method != "ppap" or config.compare.rows != ("ppap",):
        raise UsageError("a sweep trains and measures ppap: leave --method and --compare.rows out")
    for name, values in asdict(arguments.vary).items():
        for value in values or ():
            _with(config, {name: value})  # refuse before any work
    if all(values == () for values in asdict(arguments.vary).values()):
        raise UsageError("nothing is varied; give values, such as --vary.phi0 0.5 0.55 0.6")
    check(config, arguments.jobs)
    path = open_study(arguments.out, "sweep", config)
    config = settle(path, config)
    arguments = replace(arguments, vary=filled(arguments.vary, config.loss))
    chosen = settings(config.loss, arguments.vary, arguments.mode)
    cells = {
        (number, seed): Cell(
            cell_name(setting, seed),
            of_seed(_with(config, setting), seed),
            keep_checkpoints=arguments.keep_checkpoints,
        )
        for number, setting in enumerate(chosen)
        for seed in arguments.seeds
    }
    records = run_cells(path, list(cells.values()), arguments.jobs)
    runs = [
        (setting, [records[cells[number, seed].name]["result"] for seed in arguments.seeds])
        for number, setting in enumerate(chosen)
    ]
    text = write(path, config, arguments, runs)
    print(f"{text}\nwritten: {path}")


def _with(config: Config, setting: Mapping[str, float]) -> Config:
    try:
        return replace(config, loss=replace(config.loss, **setting))
    except ValueError as error:
        raise UsageError(str(error).replace("--loss.", "--vary.")) from None


def write(
    path: Path,
    config: Config,
    arguments: SweepArguments,
    runs: Sequence[tuple[dict[str, float], list[dict[str, Any]]]],
) -> str:
    """``results.json``, ``sweep.md`` and ``sweep.{png,pdf}``; returns the text of ``sweep.md``."""
    varied = [name for name, values in asdict(arguments.vary).items() if values]
    base = {name: getattr(config.loss, name) for name in varied}
    rows: dict[str, list[Summary]] = {}
    for setting, results in runs:
        rows[describe(setting, base)] = [result["summary"]["ppap"] for result in results]
    crf, first = has_crf(rows), runs[0][1][0]
    curves = {name: _points(runs, name, base, arguments.mode) for name in varied}
    for suffix in ("png", "pdf"):
        title = f"{config.preset}: {len(arguments.seeds)} seed{'s' if len(arguments.seeds) > 1 else ''} each"
        sweep_figure.draw(curves, base, path / f"sweep.{suffix}", title, crf)
    values = {
        "analysis": "sweep",
        "mode": arguments.mode,
        "backbone": first["backbone"],
        "warning": first["warning"],
        "seeds": list(arguments.seeds),
        "settings": [setting for setting, _ in runs],
        "rows": {name: spread_of(summaries) for name, summaries in rows.items()},
        "provenance": shared_provenance([result["provenance"] for result in runs[0][1]]),
    }
    RunDir(path).write_json("results.json", values)
    lines = [f"# Sweep: {config.preset}", ""]
    if first["warning"]:
        lines += [f"> **{first['warning']}**", ""]
    lines += [
        f"- backbone: {markdown(first['backbone'])}; seeds {', '.join(map(str, arguments.seeds))}",
        "- preset's values: " + ", ".join(f"{name} {value:g}" for name, value in base.items()),
        "- the scores use labels: to take the best row is to choose by labels",
        "",
        *score_lines(rows),
    ]
    lines += ["", *score_lines(rows, crf=True)] if crf else []
    note = "" if arguments.mode == "single" else " Each point is the mean over all values of the others."
    lines += ["", f"Dashed: the preset's value.{note}", "", "![scores over each parameter](sweep.png)"]
    text = "\n".join(lines) + "\n"
    (path / "sweep.md").write_text(text, encoding="utf-8")
    return text


def describe(setting: Mapping[str, float], base: Mapping[str, float]) -> str:
    """What is varied in a run, in words."""
    changed = [f"{name} {setting[name]:g}" for name in base if setting[name] != base[name]]
    return ", ".join(changed) or "preset"


def _points(
    runs: Sequence[tuple[dict[str, float], list[dict[str, Any]]]],
    name: str,
    base: Mapping[str, float],
    mode: str,
) -> dict[float, list[Summary]]:
    """Value -> summaries; in mode single only of runs in which nothing else is changed."""
    points: dict[float, list[Summary]] = {}
    for setting, results in runs:
        others = any(setting[other] != value for other, value in base.items() if other != name)
        if mode == "product" or not others:
            points.setdefault(setting[name], []).extend(r["summary"]["ppap"] for r in results)
    return points
