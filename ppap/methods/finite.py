"""Steps whose numbers are not finite: nothing of them is kept, and they are counted.

A GPU is not waited for. Whether a step is good is a flag on its device; there the optimisers are torch's
fused ones, whose kernel reads the flag and leaves weights and moments as they are (``found_inf``, which loss
scaling uses too), and what else a step changes is put back by a selection. The host reads the flags of
several steps at once, when it logs, saves or validates anyway. On other devices the flag is looked at before
the optimisers' step.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ppap import parallel
from ppap.errors import DataError, NumberError

IN_A_ROW = 5
"""Skipped steps, one after another, that end a run."""
_UNREAD = 16  # steps at most whose flags lie on a GPU


class Gate:
    """Lets a step change something only if its numbers are finite."""

    def __init__(self, device: torch.device, *, fused: bool | None = None) -> None:
        """Args: where it computes; whether optimisers are told by a flag (default: on CUDA)."""
        self.fused = device.type == "cuda" if fused is None else fused
        self.in_a_row = torch.zeros((), dtype=torch.int64, device=device)
        """Skipped steps up to now without a good one between; from IN_A_ROW on all are skipped, so that the
        network stays as the last one found it, until someone has looked."""

    def prepare(self, optimiser: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """The optimiser, in the form that reads the flag where there is one."""
        if self.fused and isinstance(optimiser, torch.optim.Adam):
            for group in optimiser.param_groups:
                group["fused"], group["foreach"] = True, None
        return optimiser

    def load(self, optimiser: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
        """Load an optimiser's state, of whatever device, and keep its form."""
        form = {key: optimiser.param_groups[0].get(key) for key in ("fused", "foreach")}
        groups = state["param_groups"]
        groups = [{**group, **{key: form[key] for key in form if key in group}} for group in groups]
        optimiser.load_state_dict({**state, "param_groups": groups})

    def judge(self, values: Iterable[Tensor], norms: Iterable[Tensor], scale: Tensor | None) -> Tensor:
        """Whether a step is to be skipped: a bool scalar on the device.

        Args:
            values: scalars of the step.
            norms: norms of its gradients.
            scale: factor of the loss where it is scaled; above 1 an overflow of gradients is its doing: the
                scaler skips what it concerns and lowers it, and that is no failure.
        """
        bad = ~_finite(values, self.in_a_row.device)
        gradients = ~_finite(norms, self.in_a_row.device)
        bad = bad | (gradients if scale is None else gradients & (scale <= 1))
        if parallel.world().several:  # logged values are a rank's own
            on_ranks = bad.float()
            parallel.add_(on_ranks)
            bad = on_ranks > 0
        stuck = self.in_a_row >= IN_A_ROW
        self.in_a_row = torch.where(bad | stuck, self.in_a_row + 1, 0)
        return bad | stuck

    def step(
        self,
        values: Mapping[str, Tensor],
        optimisers: Mapping[str, Any],
        norms: Mapping[str, Tensor],
        scaler: Any,
    ) -> Tensor:
        """The optimisers' step, or nothing, and the scaler's.

        Args:
            values: scalars of the step.
            optimisers: by name, their gradients unscaled.
            norms: norm of the gradient of each.
            scaler: of the loss.

        Returns:
            Whether it was skipped, of :meth:`judge`.
        """
        one = torch.ones((), device=self.in_a_row.device)
        scale = scaler.scale(one) if scaler.is_enabled() else None
        skip = self.judge(values.values(), norms.values(), scale)
        for name, optimiser in optimisers.items():
            if all(group.get("fused") for group in optimiser.param_groups):
                optimiser.found_inf = (skip | ~torch.isfinite(norms[name])).float()
                try:
                    optimiser.step()
                finally:
                    del optimiser.found_inf
            elif not skip:
                scaler.step(optimiser)
        scaler.update()
        return skip


def _finite(numbers: Iterable[Tensor], device: torch.device) -> Tensor:
    """Whether all scalars are finite, on the device."""
    return torch.isfinite(torch.stack([n.detach().to(device).float().reshape(()) for n in numbers])).all()


def gradient_norm(optimiser: torch.optim.Optimizer, like: Tensor) -> Tensor:
    """L2 norm of the gradient that an optimiser is about to follow; 0, of the type of `like`, for none."""
    gradients = [p.grad for group in optimiser.param_groups for p in group["params"] if p.grad is not None]
    return nn.utils.get_total_norm(gradients) if gradients else torch.zeros_like(like)


class Held:
    """Tensors as they were before a step, for one that is skipped."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        """Args: what the step may change beside what its optimisers do."""
        self.pairs = [(tensor, tensor.detach().clone()) for tensor in tensors]

    @torch.no_grad()
    def restore(self, skip: Tensor) -> None:
        """Put them back if `skip`, without asking the device for it."""
        for tensor, before in self.pairs:
            tensor.copy_(torch.where(skip, before, tensor))


@dataclass(frozen=True)
class Skipped:
    """A step that was skipped."""

    step: int
    """Its number, from 0."""
    why: str
    """What was not finite."""
    facts: Any
    """What :meth:`Skips.add` was given."""


class Skips:
    """The skipped steps of a training, counted on the host."""

    def __init__(self, gate: Gate) -> None:
        """Args: of the engine."""
        self.gate, self.total, self.in_a_row = gate, 0, 0
        gate.in_a_row.fill_(0)
        self.unread: list[tuple[int, Tensor, dict[str, Tensor], Any]] = []

    def restore(self, state: Any, where: str) -> None:
        """Take over the counters of a checkpoint; None = of a version that kept none.

        Args:
            state: what :meth:`state` said.
            where: checkpoint, for messages.

        Raises:
            DataError: they are none.
        """
        numbers = [0, 0] if state is None else list(state.values()) if isinstance(state, dict) else []
        if not numbers or not all(type(number) is int and 0 <= number < 2**53 for number in numbers):
            raise DataError(f"{where}/state.pt counts skipped steps as {state!r:.100}; use an earlier one")
        state = state or {}
        self.total, self.in_a_row = state.get("total", 0), state.get("in_a_row", 0)
        if self.in_a_row >= IN_A_ROW:  # a run ends before it saves so many
            raise DataError(
                f"{where}/state.pt counts {self.in_a_row} skipped steps in a row; use an earlier one"
            )
        self.gate.in_a_row.fill_(self.in_a_row)

    def state(self) -> dict[str, int]:
        """Counters, for a checkpoint; :meth:`read` first."""
        return {"total": self.total, "in_a_row": self.in_a_row}

    def add(self, step: int, skip: Tensor, values: dict[str, Tensor], facts: Any = None) -> None:
        """Note a step: its number from 0, whether it was skipped, and its values.

        Raises:
            NumberError: see :meth:`read`.
        """
        self.unread.append((step, skip, values, facts))
        if skip.device.type == "cpu" or len(self.unread) >= _UNREAD:
            self.read()

    def read(self) -> None:
        """Look at the steps noted since; this waits for the device.

        Raises:
            NumberError: ``IN_A_ROW`` steps in a row were skipped.
        """
        unread, self.unread = self.unread, []
        if not unread:
            return
        flags = torch.stack([skip for _, skip, _, _ in unread]).tolist()
        for flag, (step, _, values, facts) in zip(flags, unread, strict=True):
            self.in_a_row = self.in_a_row + 1 if flag else 0
            if not flag:
                continue
            self.total += 1
            skipped = Skipped(step, _why(values), facts)
            self.say(skipped)
            if self.in_a_row >= IN_A_ROW:  # all after it were skipped unseen
                self.give_up(skipped)

    def say(self, skipped: Skipped) -> None:
        """Called once for every skipped step."""

    def give_up(self, skipped: Skipped) -> None:
        """Called for the last of ``IN_A_ROW`` skipped steps.

        Raises:
            NumberError: always.
        """
        raise NumberError(
            f"step {skipped.step + 1}: {skipped.why}, as in the {IN_A_ROW - 1} steps before; all were "
            "skipped. Lower --optim.lr or check images and weights"
        )


def _why(values: Mapping[str, Tensor]) -> str:
    bad = [f"{name} = {value.item()}" for name, value in values.items() if not torch.isfinite(value)]
    return f"not finite: {', '.join(bad)}" if bad else "a gradient that is not logged is not finite"


def check_finite(values: dict[str, Tensor], step: int) -> None:
    """Raise NumberError if a value of a training step is not finite."""
    bad = [f"{name} = {value.item()}" for name, value in values.items() if not torch.isfinite(value)]
    if bad:
        raise NumberError(
            f"step {step}: {', '.join(bad)}; lower --optim.lr or check images and weights. "
            "The last checkpoint holds the state before."
        )
