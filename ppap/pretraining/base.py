"""The contract of an objective of pretraining: what ``ppap.pretraining.pretrainer`` asks of it."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from ppap.nets.backbone import Backbone
from ppap.pretraining.export import centred
from ppap.runs.rundir import RunDir


class Objective(nn.Module):
    """Everything that is learned or kept with a checkpoint: ``state_dict`` has all of it."""

    student: nn.Module
    """What is trained."""
    verb: str = "pretrained"
    """What was done to the product, for the line that says where its weights came from."""

    @property
    def product(self) -> Backbone:
        """The backbone that the run is for."""
        raise NotImplementedError

    def describe(self) -> list[str]:
        """Lines for the beginning of a run."""
        raise NotImplementedError

    def check_restored(self, tensors: Mapping[str, Tensor]) -> None:
        """Look at a checkpoint's weights before they are loaded.

        Raises:
            DataError: it cannot be continued with what there is.
        """

    def prepare(self, should_stop: Callable[[], bool]) -> None:
        """Long work ahead of a run's first step and of a resumed one's.

        Raises:
            InterruptedError: `should_stop` said so.
        """

    def losses(self, pixels: Tensor, generator: torch.Generator, first: int = 0) -> dict[str, Tensor]:
        """Losses of one batch.

        Args:
            pixels: (B, 3, S, S) float32, 0..1.
            generator: of all that is drawn, on the device of `pixels`.
            first: number of the batch's first draw; the others follow.

        Returns:
            Scalars: loss, with a gradient, and detached ones to log.
        """
        raise NotImplementedError

    def after_step(self, step: int) -> None:
        """Whatever follows the optimiser's step."""

    def moving(self) -> Iterable[Tensor]:
        """What a step changes beside the student's weights; put back where the step is skipped."""
        return ()

    def exported(self, images: Tensor) -> Backbone:
        """The product as it is handed out.

        Args:
            images: (B, 3, S, S) normalised images, on the device.
        """
        return centred(self.product, images)

    def finish(self, exported: Backbone, run: RunDir, should_stop: Callable[[], bool]) -> None:
        """Long work behind the last step, with what was handed out.

        Raises:
            InterruptedError: `should_stop` said so.
        """
