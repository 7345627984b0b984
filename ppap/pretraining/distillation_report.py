"""What a distillation has to show: the table of student and teacher, for people and as JSON."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass

import torch

from ppap.escaping import markdown
from ppap.nets.backbone import Backbone
from ppap.pretraining.agreement import Scores
from ppap.pretraining.measured import Measured
from ppap.reports.provenance import device_name, versions, weights_sha256
from ppap.runs.rundir import RunDir
from ppap.settings.config import config_hash, to_dict
from ppap.settings.pretraining import PretrainConfig

REFERENCE = "teacher, conditioned"
BEHIND_HEAD = "student, behind its head"


@dataclass(frozen=True)
class Results:
    """Everything that the table is made of."""

    scores: Mapping[str, Scores]
    """Row -> scores; rows begin with the name of their network."""
    speeds: Mapping[str, float]
    """Network -> images/s."""
    networks: Mapping[str, Backbone]
    """student and teacher."""
    measured: Measured
    clusters: int
    device: torch.device


def write_report(run: RunDir, config: PretrainConfig, results: Results) -> None:
    """Print the table, and write ``report.md`` and ``distillation.json``."""
    lines = table(results, config.distill.neighbours)
    print("\n".join(lines), flush=True)
    student, teacher = (results.networks[name] for name in ("student", "teacher"))
    notes = [
        f"# Distillation {markdown(run.path.name)}",
        "",
        f"- settings `{config_hash(config)}`, preset `{config.preset}`, seed {config.train.seed}, "
        f"{config.train.steps} steps of {config.train.batch_size} images",
        f"- student: {markdown(str(student.spec))}",
        f"- teacher: {markdown(teacher.origin)}",
        f"- measured on {markdown(results.measured.description)}; {results.clusters} clusters",
        f"- device: {device_name(results.device)}; "
        + ", ".join(f"{name} {version}" for name, version in versions().items()),
        "",
        *lines,
        "",
        *explained(config.distill.neighbours, results.measured.labels is not None),
    ]
    run.write_text("report.md", "\n".join(notes) + "\n")
    run.write_json("distillation.json", record(config, results))
    print(f"report: {run.path / 'report.md'}, {run.path / 'distillation.json'}")


def table(results: Results, neighbours: int) -> list[str]:
    """Markdown: a row per kind of features."""
    heads = [f"{neighbours} neighbours kept [%]", "clusters alike [0..1]"]
    labelled = any(scores.miou is not None for scores in results.scores.values())
    heads += [f"purity of {neighbours} [%]", "k-means mIoU [%]"] if labelled else []
    heads += ["images/s", "weights [million]", "MB"]
    lines = ["| features | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
    for name, scores in results.scores.items():
        network = name.split(",")[0]
        size = _size(results.networks[network])
        cells = ["" if name == REFERENCE else f"{100 * scores.kept:.1f}", f"{scores.alike:.2f}"]
        if labelled:
            purity = "" if scores.purity is None else f"{100 * scores.purity:.1f}"
            cells += [purity, f"{100 * scores.miou:.1f} ± {100 * scores.miou_deviation:.1f}"]
        cells += [f"{results.speeds[network]:.1f}", f"{size / 1e6:.2f}", f"{4 * size / 1e6:.1f}"]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def explained(neighbours: int, labelled: bool) -> list[str]:
    """What the columns say."""
    lines = [
        f"Kept: share of the {neighbours} nearest patches in other images by the conditioned teacher that "
        "are among the nearest of the row. Alike: adjusted Rand index of k-means' clusters with those of the "
        "conditioned teacher (0 = chance); its own row compares its clusters under different seeds, the most "
        "that can be reached. All on the student's grid, to which the teacher's map is resampled. Images/s: "
        "forward passes, each network at its own resolution, the best of three turns. MB as fp32; "
        "`python -m ppap.pretraining.export RUN/backbone DIR` stores half of it."
    ]
    if labelled:
        lines += [
            "",
            "Purity: share of these neighbours that have the patch's class. mIoU: of k-means' clusters on "
            "these patches, each matched to a class, mean and deviation over three seeds. Labels served to "
            "measure alone.",
        ]
    return lines


def record(config: PretrainConfig, results: Results) -> dict:
    """The table as plain containers, with where its numbers come from."""
    measured = results.measured
    networks = {
        name: {
            **network.spec,
            "origin": network.origin,
            "parameters": _size(network),
            "images_per_s": results.speeds[name],
            "sha256": weights_sha256(network.vit.state_dict()),
        }
        for name, network in results.networks.items()
    }
    return {
        "rows": {name: asdict(scores) for name, scores in results.scores.items()},
        "reference": REFERENCE,
        "networks": networks,
        "measured": {
            "what": measured.description,
            "images": len(measured.pixels),
            "labels": measured.labels is not None,
            "clusters": results.clusters,
        },
        "provenance": {
            "preset": config.preset,
            "seed": config.train.seed,
            "settings": config_hash(config),
            "config": to_dict(config),
            "versions": versions(),
            "device": device_name(results.device),
        },
    }


def _size(network: Backbone) -> int:
    return sum(p.numel() for p in network.parameters())
