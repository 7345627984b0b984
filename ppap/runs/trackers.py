"""Where people look at runs, beside the run's own files: TensorBoard and Weights & Biases.

Both get the lines of ``metrics.jsonl`` and the pictures of the report. What a run needs to go on never lies
there, and without ``--train.log`` neither package is imported.
"""

import importlib.util
import os
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ppap.errors import UsageError
from ppap.runs.disk import write_whole
from ppap.settings.config import to_dict

# The package that each needs.
_PACKAGES = {"tensorboard": "tensorboard", "wandb": "wandb"}


_ID = "wandb-id.txt"


def _own_id(path: Path) -> str:
    """What a run is called there, drawn once: the same after a stop, whatever its folder is called then."""
    file = path / _ID
    if file.exists() and (found := file.read_text().strip()):
        return found
    write_whole(file, drawn := secrets.token_hex(8))
    return drawn


def check_trackers(names: Sequence[str]) -> None:
    """Refuse a tracker whose package is not installed, before any work.

    Raises:
        UsageError: naming what to install.
    """
    for name in names:
        found = importlib.util.find_spec(_PACKAGES[name])
        if found is None or found.origin is None:  # a folder that is called so
            raise UsageError(
                f"--train.log {name} needs a package: pip install {_PACKAGES[name]}; or give --train.log "
                "without it"
            )


class Tracker:
    """One of the places; this one is nowhere."""

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Numbers of a step, by name."""

    def picture(self, step: int, name: str, path: Path) -> None:
        """A picture of the report."""

    def close(self) -> None:
        """Everything is there, or on its way."""


class TensorBoard(Tracker):
    """Event files in ``RUN/tensorboard``, for ``tensorboard --logdir runs``."""

    def __init__(self, path: Path, step: int) -> None:
        """Args: the run directory, and the step to go on from; events past it are left out of the curves."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(path / "tensorboard"), purge_step=step + 1)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, path: Path) -> None:
        import numpy as np
        from PIL import Image

        with Image.open(path) as picture:
            self._writer.add_image(name, np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class WeightsAndBiases(Tracker):
    """A run of the project ``ppap``, or of ``WANDB_PROJECT``; a resumed run goes on in the same one."""

    def __init__(self, path: Path, config: Any, offline: bool) -> None:
        """Args: the run directory, all settings, and whether no socket may be opened: then the files in
        ``RUN/wandb`` wait for ``wandb sync``.
        """
        import wandb

        self._wandb = wandb
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", "ppap"),
                name=path.name,
                id=_own_id(path),
                resume="allow",
                dir=str(path),
                config=to_dict(config),
                mode="offline" if offline else None,
            )
        except wandb.Error as error:
            raise UsageError(
                f"--train.log wandb: {error} Or set WANDB_MODE=offline. Then go on with: "
                f"python -m ppap.train --resume {path}"
            ) from None

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def picture(self, step: int, name: str, path: Path) -> None:
        self._run.log({name: self._wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        self._run.finish()


class Trackers:
    """All of a run's trackers. One that fails is said, and asked no more: the training goes on."""

    def __init__(self, found: dict[str, Tracker] | None = None) -> None:
        """Args: name -> tracker."""
        self._found = found or {}

    def row(self, row: dict[str, Any]) -> None:
        """A line of metrics: its numbers, but for the step, which they stand at."""
        numbers = {k: v for k, v in row.items() if isinstance(v, int | float) and k != "step"}
        self._each(lambda tracker: tracker.scalars(row["step"], numbers))

    def pictures(self, step: int, folder: Path) -> None:
        """All pictures of a folder, by their stems."""
        for path in sorted(folder.glob("*.png")):
            self._each(lambda tracker, path=path: tracker.picture(step, path.stem, path))

    def close(self) -> None:
        """Everything is there, or on its way."""
        self._each(lambda tracker: tracker.close())
        self._found = {}

    def _each(self, call: Callable[[Tracker], None]) -> None:
        for name in list(self._found):
            try:
                call(self._found[name])
            except Exception as error:  # a network, a disk: whatever another package may raise
                del self._found[name]
                tqdm.write(f"--train.log {name} ends here ({type(error).__name__}: {error}); the run goes on")


def open_trackers(names: Sequence[str], path: Path, config: Any, step: int, offline: bool) -> Trackers:
    """The places that ``--train.log`` names.

    Args:
        names: of them, those of :func:`check_trackers`.
        path: run directory, which is there.
        config: all settings of the run.
        step: where it goes on; 0 = a new run.
        offline: whether nothing may be sent.
    """
    makers: dict[str, Callable[[], Tracker]] = {
        "tensorboard": lambda: TensorBoard(path, step),
        "wandb": lambda: WeightsAndBiases(path, config, offline),
    }
    return Trackers({name: makers[name]() for name in dict.fromkeys(names)})
