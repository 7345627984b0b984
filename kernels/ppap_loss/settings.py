"""What one call of ``ppap_loss`` takes and gives, and the mean over groups."""

from typing import NamedTuple

import torch

from ..masked_log_softmax import chunks as softmax
from ..precision import accumulator
from ..propagate.config import PropagationConfig


class Settings(NamedTuple):
    """Settings of one call, checked.

    Attributes:
        cfg: of the propagation.
        temperature: divides the logits.
        base_temperature: divides the temperature, which the loss is multiplied by.
        group: consecutive anchors that are averaged first.
        with_gradient: whether a gradient is wanted.
        precision: ``fp64 | fp32 | fp16 | bf16``.
        memory_budget: [bytes].
    """

    cfg: PropagationConfig
    temperature: float
    base_temperature: float
    group: int
    with_gradient: bool
    precision: str
    memory_budget: int

    @property
    def accumulator(self) -> torch.dtype:
        """dtype of losses and uncast gradients."""
        return accumulator(self.precision)

    @property
    def of_softmax(self) -> softmax.Settings:
        """Those of ``masked_log_softmax``."""
        return softmax.Settings(self.temperature, self.precision, self.memory_budget)

    def gradient_scale(self, anchors: int) -> float:
        """What turns the gradient of :mod:`.chunks` into that of the scaled mean."""
        groups = max(-(-anchors // self.group), 1)
        return self.temperature / self.base_temperature / (groups * self.group)


class Result(NamedTuple):
    """Of one call.

    Attributes:
        loss: scalar.
        dz: (N, E) or (0, E), the gradient up to a factor.
        dz_scale: scalar, that factor.
        num_positives: (A,) int64.
        num_negatives: (A,) int64.
    """

    loss: torch.Tensor
    dz: torch.Tensor
    dz_scale: torch.Tensor
    num_positives: torch.Tensor
    num_negatives: torch.Tensor


def group_mean(values_A: torch.Tensor, valid_A: torch.Tensor, group: int) -> torch.Tensor:
    """Mean over groups of consecutive values of the mean of the valid ones; an empty group counts as 0.

    Args:
        values_A: (A,) values, 0 where not valid.
        valid_A: (A,) bool.
        group: values per group, the last one may have fewer.

    Returns:
        Scalar; 0 if there are no values at all.
    """
    count = values_A.shape[0]
    if count == 0:
        return values_A.sum()
    groups = -(-count // group)
    padding = groups * group - count
    sums = torch.nn.functional.pad(values_A, (0, padding)).view(groups, group).sum(dim=1)
    sizes = torch.nn.functional.pad(valid_A, (0, padding)).view(groups, group).sum(dim=1)
    return (sums / sizes.clamp(min=1)).mean()
