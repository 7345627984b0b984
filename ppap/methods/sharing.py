"""A step that several ranks share: the probes' losses and all gradients are those of the whole batch."""

from collections.abc import Mapping

import torch
from torch import Tensor

from ppap import parallel


def parts_of_means(
    linear: Tensor, cluster: Tensor, label: Tensor, classes: int, batch_size: int
) -> tuple[Tensor, Tensor]:
    """This rank's parts of the probes' mean losses over the labelled pixels and patches of all ranks.

    Args:
        linear, cluster: losses of the probes on this rank's images.
        label: (B, H, W) classes; what is not of 0 to `classes` - 1 is unlabelled.
        classes: number of classes.
        batch_size: images of all ranks.
    """
    labelled = ((label >= 0) & (label < classes)).sum().to(linear.dtype)
    of_all = labelled.clone()
    parallel.add_(of_all)
    return linear * (labelled / of_all.clamp(min=1)), cluster * (len(label) / batch_size)


def add_up(
    optimisers: Mapping[str, torch.optim.Optimizer], linear: Tensor, cluster: Tensor, own: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum gradients and the probes' losses over ranks; the method's own loss is that of all already.

    Returns:
        Both probes' losses, and the sum with the method's own, detached.
    """
    groups = (group for optimiser in optimisers.values() for group in optimiser.param_groups)
    parallel.add_gradients([p for group in groups for p in group["params"]])
    probes = torch.stack([linear.detach(), cluster.detach()])
    parallel.add_(probes)
    return probes[0], probes[1], own.detach() + probes.sum()
