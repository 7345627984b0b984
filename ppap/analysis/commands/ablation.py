"""``ppap analyze ablation``: what each half of the method contributes (Table 5)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ppap.analysis import paper
from ppap.analysis.arguments import Out, check_seeds, parse_with_preset, run_config
from ppap.analysis.study import Cell, check, choices_of, open_study, run_cells
from ppap.errors import UsageError
from ppap.escaping import markdown
from ppap.evaluation.tables import Summary, has_crf, score_lines
from ppap.methods.choices import Choices
from ppap.reports.records import shared_provenance, spread_of
from ppap.runs.rundir import RunDir
from ppap.settings.config import Config, of_seed

ROWS = {"fixed": "none", "tps": "TPS", "ans": "ANS", "ppap": "TPS + ANS"}
"""Row of a comparison -> its name in Table 5."""

TEXT = """Train the four losses of the paper's Table 5 and measure them with the same settled probes.

none: positives above phi0 around the anchor itself, all other patches negatives; TPS: propagated positives
alone; ANS: ambiguous patches left out alone; TPS + ANS: PPAP. All share initial weights, batches,
thresholds and probes; only the switches differ. With --loss.phi0 auto every seed chooses its own, and rows
without propagation have the one that gives sets of the same size, or with --compare.fixed-phi0 same the
one of PPAP, as in the paper.

Writes ablation.md and results.json; each seed is a run directory below cells/. The same command continues a
stopped ablation. A seed costs four trainings: two minutes on two cores for the demo."""


@dataclass(frozen=True, kw_only=True)
class AblationArguments(Config):
    """Options of ``ppap analyze ablation``; everything else defaults to the preset."""

    out: Out = ""
    """New folder for ablation.md, results.json and the runs, or one to continue."""
    seeds: tuple[int, ...] = (0,)
    """One run of all four rows each; the table has mean and standard deviation."""
    jobs: int = 1
    """Seeds at once, in processes of their own."""

    def __post_init__(self) -> None:
        check_seeds(self.seeds)


def main(argv: Sequence[str]) -> None:
    """Command ``analyze ablation``."""
    arguments: AblationArguments = parse_with_preset(
        argv,
        AblationArguments,
        "ablation",
        TEXT,
        compare=lambda start: replace(start.compare, rows=tuple(ROWS), fixed_phi0=None),
    )
    config = of_seed(run_config(arguments), 0)
    if config.method != "ppap":
        raise UsageError(f"--method is {config.method!r}; an ablation is one of ppap: leave it out")
    if set(config.compare.rows) != set(ROWS):
        raise UsageError(
            f"--compare.rows is {' '.join(config.compare.rows)}; leave it out: rows are fixed here"
        )
    check(config, arguments.jobs)
    path = open_study(arguments.out, "ablation", config)
    cells = [Cell(f"seed-{seed}", of_seed(config, seed)) for seed in arguments.seeds]
    results = [record["result"] for record in run_cells(path, cells, arguments.jobs).values()]
    rows = {title: [result["summary"][name] for result in results] for name, title in ROWS.items()}
    text = write(path, config, arguments.seeds, results, rows)
    print(f"{text}\nwritten: {path}")


def thresholds_line(config: Config, chosen: Sequence[Choices]) -> str:
    """The thresholds of every row, in words; those that each seed chose for itself in the order of the seeds.

    Args:
        config: of the ablation.
        chosen: by each seed, where settings are auto.
    """

    def text(given: float | str, values: Sequence[float | None]) -> str:
        if given != "auto":
            return f"{given:g}"
        return "auto" + (f" ({', '.join(f'{v:g}' for v in values)})" if None not in values else "")

    loss, compare = config.loss, config.compare
    phi0 = text(loss.phi0, [choices.phi0 for choices in chosen])
    same = compare.fixed_phi0 == "same"
    still = phi0 if same else text(loss.phi0, [choices.fixed_phi0 for choices in chosen])
    none = still if compare.own_phi0 is None else f"{compare.own_phi0:g}"
    if none != still:
        rows = f"(row none {none})"
    else:
        rows = "in all rows" if still == phi0 else f"(rows none and ANS {still})"
    psi0 = text(loss.psi0, [choices.psi0 for choices in chosen])
    return f"phi0 {phi0} {rows}, psi0 {psi0}, T = {loss.steps}"


def write(
    path: Path, config: Config, seeds: Sequence[int], results: Sequence[dict], rows: dict[str, list[Summary]]
) -> str:
    """``results.json`` and ``ablation.md``; returns the text of the latter."""
    first = results[0]
    chosen = [choices_of(path, f"seed-{seed}") for seed in seeds]
    values = {
        "analysis": "ablation",
        "backbone": first["backbone"],
        "warning": first["warning"],
        "seeds": list(seeds),
        "rows": {name: spread_of(summaries) for name, summaries in rows.items()},
        "choices": [choices.to_dict() for choices in chosen],
        "provenance": shared_provenance([result["provenance"] for result in results]),
    }
    RunDir(path).write_json("results.json", values)
    published = paper.table(5)
    extra = {}
    for column in ("cluster_accuracy", "cluster_miou"):
        head = f"paper: {column.replace('_', ' ').replace('miou', 'mIoU')}"
        extra[head] = {name: paper.text(published.find(name, "ViT-S/16")[column]) for name in ROWS.values()}
    compare = config.compare
    lines = [f"# Ablation: {config.preset}, {len(seeds)} seed{'s' if len(seeds) > 1 else ''}", ""]
    if first["warning"]:
        lines += [f"> **{first['warning']}**", ""]
    lines += [
        f"- backbone: {markdown(first['backbone'])}; seeds {', '.join(map(str, seeds))}"
        + (" (mean ± standard deviation)" if len(seeds) > 1 else ""),
        f"- condition {config.model.condition}; {thresholds_line(config, chosen)}; "
        f"probes: {compare.steps} steps, {compare.starts} starts, the same for every row",
        f"- the paper's numbers are of its {published.title}",
        "",
        *score_lines(rows, extra={} if has_crf(rows) else extra),
    ]
    if has_crf(rows):
        lines += ["", *score_lines(rows, crf=True, extra=extra)]
    text = "\n".join(lines) + "\n"
    (path / "ablation.md").write_text(text, encoding="utf-8")
    return text
