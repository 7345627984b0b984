"""What a run keeps of the steps that it skipped: a line each, and a folder that repeats the last one.

``RUN/nonfinite.jsonl`` has a line per skipped step: its number, what was not finite, and the files of its
batch. Where ``IN_A_ROW`` in a row end the run, ``RUN/nonfinite`` is a checkpoint of the network as the last
of them found it, with the step's batch and random state: ``python -m ppap.training.replay RUN/nonfinite``
takes that step again.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ppap import parallel
from ppap.errors import DataError, NumberError
from ppap.escaping import some
from ppap.methods.engine import Engine
from ppap.methods.finite import IN_A_ROW, Skipped, Skips
from ppap.runs.checkpoint import save_checkpoint
from ppap.runs.disk import write_whole
from ppap.runs.randomness import random_state

FILE, FOLDER = "nonfinite.jsonl", "nonfinite"


class StepFacts(NamedTuple):
    """What a step began with."""

    epoch: int
    index: Tensor
    """(B,) int64, the images of the batch."""
    rng: dict[str, Tensor | None]
    """Of :func:`random_state`."""
    refusal: str | None = None
    """What the kernels said, where they refused the step."""


class SkipLog(Skips):
    """Counts the skipped steps of a run, and writes them down."""

    def __init__(
        self,
        engine: Engine,
        run: Path,
        name_of: Callable[[int], str],
        contents: Callable[[], tuple[dict[str, Any], dict[str, Any]]],
    ) -> None:
        """Nothing is written yet.

        Args:
            engine: whose steps they are.
            run: run directory.
            name_of: file of an image.
            contents: info and state of a checkpoint of the run as it is.
        """
        super().__init__(engine.gate)
        self.engine, self.run, self.name_of, self.contents = engine, run, name_of, contents

    def begin(self, step: int) -> None:
        """Forget the lines of steps past `step`, which are taken again.

        Raises:
            DataError: the disk refuses.
        """
        path = self.run / FILE
        try:
            if path.exists():
                lines = path.read_text(encoding="utf-8").splitlines()
                kept = [line for line in lines if _step_of(line) <= step]
                write_whole(path, "".join(f"{line}\n" for line in kept))
        except OSError as error:
            raise DataError(f"cannot write {path} ({error.strerror or error}); free space") from None

    def facts(self, epoch: int, batch: Mapping[str, Tensor]) -> StepFacts:
        """What the step about to be taken begins with; waits for nothing."""
        return StepFacts(epoch, batch["index"], random_state(self.engine.device))

    def say(self, skipped: Skipped) -> None:
        """Write a line, and say it.

        Raises:
            NumberError: the weights are not finite: no step could be taken any more.
            DataError: the disk refuses.
        """
        facts: StepFacts = skipped.facts
        index = _of_all_ranks(facts.index).tolist()
        names = [self.name_of(i) for i in index]
        row = {"step": skipped.step + 1, "epoch": facts.epoch, "why": _why(skipped)}
        row |= {"index": index, "files": names}
        path = self.run / FILE
        if parallel.world().first:
            _append(path, row)
        tqdm.write(
            f"step {skipped.step + 1} skipped, {_why(skipped)}; its images: {some(names)} (all in {path})"
        )
        bad = [name for name, value in self.engine.weights().items() if not torch.isfinite(value).all()]
        if bad:
            raise NumberError(
                f"step {skipped.step + 1}: weights {bad[0]} are not finite; lower --optim.lr. The last "
                f"checkpoint holds the state before: python -m ppap.train --resume {self.run}"
            )

    def give_up(self, skipped: Skipped) -> None:
        """Write the folder that repeats the step, and end the run.

        Raises:
            NumberError: always.
        """
        facts: StepFacts = skipped.facts
        index = _of_all_ranks(facts.index)
        folder = self.run / FOLDER
        parallel.from_first(lambda: self._write(folder, skipped, index))
        raise NumberError(
            f"step {skipped.step + 1}: {_why(skipped)}, as in the {IN_A_ROW - 1} steps before; all "
            f"{IN_A_ROW} were skipped. Their images are named in {self.run / FILE}; the last of these steps "
            f"is taken again by python -m ppap.training.replay {folder}. Lower --optim.lr or check images "
            f"and weights; the last checkpoint is as it was: python -m ppap.train --resume {self.run}"
        )

    def _write(self, folder: Path, skipped: Skipped, index: Tensor) -> None:
        facts: StepFacts = skipped.facts
        info, state = self.contents()
        state["step"] = info["step"] = skipped.step
        state["engine"]["rng"] = facts.rng
        state["replay"] = {
            "step": skipped.step,
            "seed": self.engine.config.train.seed,
            "epoch": facts.epoch,
            "index": index,
            "files": [self.name_of(i) for i in index.tolist()],
            "why": _why(skipped),
        }
        save_checkpoint(folder, self.engine.weights(), info, state)


def _of_all_ranks(index: Tensor) -> Tensor:
    """Images of the batch of all ranks, which ask together."""
    index = index.cpu()
    return parallel.gather(index, parallel.counts_of(len(index))) if parallel.world().several else index


def _append(path: Path, row: dict[str, Any]) -> None:
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    except OSError as error:
        raise DataError(f"cannot write {path} ({error.strerror or error}); free space") from None


def _why(skipped: Skipped) -> str:
    return skipped.facts.refusal or skipped.why


def _step_of(line: str) -> int:
    """Step of a line; one that a power cut left in part stays."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return 0
