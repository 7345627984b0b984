"""What is written to JSON of a run: its scores, with where they come from, and those of several runs."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ppap.evaluation.comparison import Row
from ppap.evaluation.crf import crf_implementation
from ppap.evaluation.evaluate import Evaluation
from ppap.methods.engine import Engine
from ppap.reports.provenance import provenance
from ppap.runs.checkpoint import Checkpoint
from ppap.settings.config import Config

RANDOM_WARNING = "backbone: random weights; results are meaningless"
FINAL_SCORES = "evaluation-final.json"
"""A run's own scores, of the selected checkpoint, without CRF."""


def evaluation_record(
    config: Config, engine: Engine, checkpoint: Checkpoint, evaluation: Evaluation
) -> dict[str, Any]:
    """All of an evaluation of both probes, as plain containers for JSON."""
    crf = crf_implementation(config.eval.crf if evaluation.crf else "none", engine.device)
    return {
        **backbone_facts(engine),
        "provenance": provenance(config, engine.device, checkpoint, crf=crf),
        "summary": evaluation.summary(),
        "scores": evaluation.to_dict(),
    }


def backbone_facts(engine: Engine) -> dict[str, Any]:
    """Where the backbone came from, and the warning that random weights deserve."""
    backbone = engine.net.backbone
    return {"backbone": backbone.origin, "warning": RANDOM_WARNING if backbone.is_random else None}


def comparison_record(config: Config, engine: Engine, rows: Mapping[str, Row], step: int) -> dict[str, Any]:
    """All of a comparison, as plain containers for JSON; `step` is that of the run's network."""
    ran = any(row.scores.crf for row in rows.values())
    crf = crf_implementation(config.eval.crf if ran else "none", engine.device)
    why = "the last step, for every row alike"
    return {
        **backbone_facts(engine),
        "provenance": provenance(config, engine.device, engine.weights(), step=step, selection=why, crf=crf),
        "summary": summaries(rows),
        "scores": {name: row.scores.to_dict() for name, row in rows.items()},
    }


def summaries(rows: Mapping[str, Row]) -> dict[str, dict[str, float]]:
    """Row name -> its four scores [%]."""
    return {name: row.scores.summary() for name, row in rows.items()}


def spread_of(summaries: Sequence[Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    """Score name -> mean, standard deviation (None for one run), min, max and all values of several runs."""
    result = {}
    for key in summaries[0]:
        values = [summary[key] for summary in summaries]
        std = float(np.std(values, ddof=1)) if len(values) > 1 else None
        result[key] = {
            "mean": float(np.mean(values)),
            "std": std,
            "min": min(values),
            "max": max(values),
            "values": values,
        }
    return result


def shared_provenance(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One record of several runs that differ in their seed: lists where each has its own."""
    own = {key: [record[key] for record in records] for key in ("seed", "settings", "weights")}
    config = {**records[0]["config"], "train": {**records[0]["config"]["train"], "seed": own["seed"]}}
    return {**records[0], **own, "config": config}
