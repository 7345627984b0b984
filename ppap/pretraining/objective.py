"""What is learned from crops of an image: a student ViT, and a teacher that is its moving average.

Three losses are cross-entropies between the teacher's assignments to the prototypes of a small head, thrown
away at the end, and the student's; the fourth needs the student alone:

- image: the class token of one crop from that of another crop (DINO, arXiv 2104.14294);
- mask: patches that the student does not see, from the same crop (iBOT, arXiv 2111.07832);
- dense: patches from the patch of another crop that shows the same place. Crops differ in scale and colour,
  so the features of a patch come to tell what is there, not how it is coloured or where it lies;
- vicreg: embeddings of that same patch in both crops agree, while every channel keeps its spread over the
  batch and no two channels tell the same (VICReg, arXiv 2105.04906, for patches). With few channels only
  what survives other colours, scales and surroundings fits in. It has a gradient from the first step, where
  assignments start uniform, so it learns most per second where computing is scarce.

The teacher's class tokens are centred by a moving average and sharpened; its patches, of which a batch has
thousands, are spread evenly over the prototypes by Sinkhorn's iteration. Either keeps the network from
giving every input the same answer.

Legend: B images, V crops, M = V B, h w patch grid, N = h w, D channels, K prototypes, E embedding channels.
"""

import copy
import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ppap.nets.backbone import Backbone
from ppap.pretraining.base import Objective
from ppap.pretraining.views import Crops, draw_masks, hide_patches, make_crops, match_patches
from ppap.settings.pretraining import ObjectiveConfig, PretrainConfig

_CENTRE_MOMENTUM = 0.9
_SINKHORN_STEPS = 3
_VARIANCE_FLOOR = 1e-4  # under the root of a channel's deviation (VICReg, Eq. 1)


class Head(nn.Module):
    """Cosines of a token, after a small network, with K prototypes.

    The network's outputs are standardised over all tokens of a call. Without that, tokens start almost equal
    (their biases outweigh their differences), every assignment is uniform, and training stays there.
    """

    def __init__(self, width: int, config: ObjectiveConfig) -> None:
        super().__init__()
        self.layers = _small_network(width, config.hidden, config.bottleneck)
        self.prototypes = nn.Parameter(torch.randn(config.prototypes, config.bottleneck))

    def forward(self, tokens: Tensor) -> Tensor:
        """(..., D) tokens -> (..., K) fp32 cosines."""
        with torch.autocast(tokens.device.type, enabled=False):
            return _standardised(self.layers(tokens.float())) @ F.normalize(self.prototypes, dim=-1).T


def _standardised(outputs: Tensor) -> Tensor:
    """Unit vectors of mean 0 and deviation 1 per channel over all rows, before they are made unit vectors."""
    flat = outputs.flatten(0, -2)
    spread = flat.var(dim=0, correction=0).add(1e-6).sqrt()
    return F.normalize((outputs - flat.mean(dim=0)) / spread, dim=-1)


def _small_network(width: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(width, hidden),
        nn.GELU(),
        nn.Linear(hidden, hidden),
        nn.GELU(),
        nn.Linear(hidden, outputs),
    )


class Network(nn.Module):
    """A backbone with its heads: for images, for patches, and the patches' embedding."""

    def __init__(self, backbone: Backbone, config: ObjectiveConfig) -> None:
        super().__init__()
        self.backbone = backbone
        self.image_head = Head(backbone.width, config)
        self.patch_head = Head(backbone.width, config)
        self.embedding = _small_network(backbone.width, config.hidden, config.embedding)

    def tokens(self, images: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """Normalised tokens of (M, 3, s, s) images: image (M, D), patches (M, N, D), and the grid."""
        _, last, grid = self.backbone.tokens(images)
        last = self.backbone.norm(last)
        prefix = self.backbone.num_prefix
        patches = last[:, prefix:]
        return (last[:, 0] if prefix else patches.mean(dim=1)), patches, grid


class Distillation(Objective):
    """Student, teacher and centre: all that pretraining learns."""

    def __init__(self, backbone: Backbone, config: PretrainConfig) -> None:
        """`backbone` becomes the teacher's, the student starts equal. Heads follow torch's generator."""
        super().__init__()
        self.config = config
        self.teacher = Network(backbone, config.objective).requires_grad_(False)
        self.student = copy.deepcopy(self.teacher).requires_grad_(True)
        self.register_buffer("centre", torch.zeros(config.objective.prototypes))

    @property
    def product(self) -> Backbone:
        return self.teacher.backbone

    def describe(self) -> list[str]:
        views = self.config.views
        return [
            f"step: {self.config.train.batch_size} images, 2 crops of {views.global_size} and "
            f"{views.locals} of {views.local_size} pixels each"
        ]

    def after_step(self, step: int) -> None:
        self.move_teacher(step)

    def moving(self) -> Iterable[Tensor]:
        return (self.centre, *self.teacher.parameters())

    def losses(self, pixels: Tensor, generator: torch.Generator, first: int = 0) -> dict[str, Tensor]:
        """Losses of one batch.

        Args:
            pixels: (B, 3, S, S) float32, 0..1.
            generator: of crops, colours and masks, on the device of `pixels`.
            first: unused.

        Returns:
            Scalars: loss (with a gradient), and detached: the losses that have a weight, unweighted, as
            image_loss, mask_loss, dense_loss, vicreg_loss; found, the share of patches with a counterpart
            in the other crop; used_prototypes, where there is a teacher's assignment, the effective number
            of prototypes of its patches (exp of the entropy of their mean): 1 = collapsed.
        """
        views, aim = self.config.views, self.config.objective
        whole = make_crops(pixels, 2, views.global_size, views.global_scale, views, generator)
        side = -(-views.global_size // self.student.backbone.patch_size)
        masks = draw_masks(len(whole.images), side * side, views, generator)
        hidden = hide_patches(whole.images, masks, self.student.backbone.patch_size)
        image_tokens, patch_tokens, grid = self.student.tokens(hidden)
        parts = {}
        if aim.vicreg_weight:
            parts["vicreg_loss"] = self._vicreg(patch_tokens, whole.boxes, grid)
        if aim.image_weight or aim.mask_weight or aim.dense_weight:
            seen = [(image_tokens, patch_tokens, grid, whole.boxes)]
            if views.locals:
                size, scale = views.local_size, views.local_scale
                crops = make_crops(pixels, views.locals, size, scale, views, generator)
                seen.append((*self.student.tokens(crops.images), crops.boxes))
            parts |= self._distil(whole, seen, masks)
        used = {k: parts.pop(k) for k in ("used_prototypes",) if k in parts}
        weights = {name: getattr(aim, name.replace("_loss", "_weight")) for name in parts}
        loss = sum(weights[name] * value for name, value in parts.items())
        parts = {name: value.detach() for name, value in parts.items() if weights[name]}
        found = match_patches(whole.boxes[0], grid, whole.boxes[1], grid)[1].float().mean()
        return {"loss": loss, **parts, "found": found, **used}

    def _vicreg(self, patch_tokens: Tensor, boxes: Tensor, grid: tuple[int, int]) -> Tensor:
        """VICReg between the patches of the two global crops that show the same place."""
        with torch.autocast(patch_tokens.device.type, enabled=False):
            own, other = self.student.embedding(patch_tokens.float()).unflatten(0, (2, -1))
            index, found = match_patches(boxes[0], grid, boxes[1], grid)
            other = other.gather(1, index[..., None].expand_as(own))
            return vicreg_loss(own[found], other[found], self.config.objective.vicreg_agreement)

    def _distil(self, whole: Crops, seen: list[tuple], masks: Tensor) -> dict[str, Tensor]:
        """The losses against the teacher's assignments: image, mask, dense, and used_prototypes."""
        sharp = self.config.objective.student_temperature
        image_target, patch_target, grid, used = self._targets(whole.images)
        batch = whole.boxes.shape[1]
        image, dense, mask = [], [], None
        for group, (image_tokens, patch_tokens, own_grid, boxes) in enumerate(seen):
            image_logp = (self.student.image_head(image_tokens) / sharp).log_softmax(dim=-1)
            patch_logp = (self.student.patch_head(patch_tokens) / sharp).log_softmax(dim=-1)
            if group == 0:
                mask = masked_loss(patch_logp, patch_target.flatten(0, 1), masks)
            image_logp, patch_logp = (x.unflatten(0, (-1, batch)) for x in (image_logp, patch_logp))
            for v in range(len(boxes)):
                for t in range(2):
                    if group == 0 and v == t:
                        continue
                    image.append(-(image_target[t] * image_logp[v]).sum(dim=-1).mean())
                    index, found = match_patches(boxes[v], own_grid, whole.boxes[t], grid)
                    dense.append(dense_loss(patch_logp[v], patch_target[t], index, found))
        means = {"image_loss": torch.stack(image).mean(), "dense_loss": torch.stack(dense).mean()}
        return {**means, "mask_loss": mask, "used_prototypes": used}

    @torch.no_grad()
    def _targets(self, images: Tensor) -> tuple[Tensor, Tensor, tuple[int, int], Tensor]:
        """The teacher's assignments: image (2, B, K), patches (2, B, N, K), grid, used prototypes."""
        sharp = self.config.objective.teacher_temperature
        image_tokens, patch_tokens, grid = self.teacher.tokens(images)
        logits = self.teacher.image_head(image_tokens)
        image = ((logits - self.centre) / sharp).softmax(dim=-1)
        self.centre.lerp_(logits.mean(dim=0), 1 - _CENTRE_MOMENTUM)
        scores = self.teacher.patch_head(patch_tokens)
        mean = (scores / sharp).softmax(dim=-1).mean(dim=(0, 1))
        used = torch.special.entr(mean).sum().exp()
        patches = spread_evenly(scores.flatten(0, 1) / sharp).view_as(scores)
        return image.unflatten(0, (2, -1)), patches.unflatten(0, (2, -1)), grid, used

    @torch.no_grad()
    def move_teacher(self, step: int) -> None:
        """Let the teacher follow the student, as far as the schedule says at `step`."""
        first, last = self.config.objective.momentum
        progress = step / max(self.config.train.steps - 1, 1)
        keep = last - (last - first) * (1 + math.cos(math.pi * progress)) / 2
        for mine, its in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            mine.lerp_(its, 1 - keep)


def masked_loss(logp: Tensor, target: Tensor, masks: Tensor) -> Tensor:
    """Mean cross-entropy over masked patches, every crop that has any counting the same; 0 if none has.

    Args:
        logp, target: (M, N, K) the student's log-probabilities and the teacher's probabilities.
        masks: (M, N) bool.
    """
    cost = -(target * logp).sum(dim=-1)
    per_crop = (cost * masks).sum(dim=1) / masks.sum(dim=1).clamp(min=1)
    return per_crop.sum() / masks.any(dim=1).sum().clamp(min=1)


def dense_loss(logp: Tensor, target: Tensor, index: Tensor, found: Tensor) -> Tensor:
    """Mean cross-entropy over patches with a counterpart; 0 if none has one.

    Args:
        logp: (B, N, K) the student's log-probabilities.
        target: (B, N', K) the teacher's probabilities in the other crop.
        index, found: (B, N) of ``ppap.pretraining.views.match_patches``.
    """
    rows = target.gather(1, index[..., None].expand(-1, -1, target.shape[-1]))
    cost = -(rows * logp).sum(dim=-1)
    return (cost * found).sum() / found.sum().clamp(min=1)


def vicreg_loss(own: Tensor, other: Tensor, agreement: float) -> Tensor:
    """Agreement of two embeddings, spread of each channel, and independence of the channels.

    mu (mean squared difference + hinge(1 - deviation), mean over channels and both crops)
    + sum of squared covariances of different channels / E, for either crop (VICReg, section 4, with the means
    of its published code, where mu is 25).

    Args:
        own, other: (R, E) embeddings of R patches in two crops.
        agreement: mu, weight of the first two terms; the covariances have weight 1.

    Returns:
        Scalar; 0, with a zero gradient, for fewer than two patches.
    """
    if len(own) < 2:
        return (own.sum() + other.sum()) * 0
    spread, covariance = 0.0, 0.0
    for rows in (own, other):
        rows = rows - rows.mean(dim=0)
        spread = spread + F.relu(1 - (rows.var(dim=0) + _VARIANCE_FLOOR).sqrt()).mean() / 2
        products = rows.T @ rows / (len(rows) - 1)
        covariance = covariance + (products.square().sum() - products.diagonal().square().sum())
    return agreement * (F.mse_loss(own, other) + spread) + covariance / own.shape[1]


def spread_evenly(scores: Tensor) -> Tensor:
    """Sinkhorn's iteration: assignments near softmax(scores) that use all columns equally.

    Args:
        scores: (R, K) logits, R rows.

    Returns:
        (R, K), rows sum to 1.
    """
    logs = scores.float().log_softmax(dim=1)
    for _ in range(_SINKHORN_STEPS):
        logs = logs - logs.logsumexp(dim=0, keepdim=True)
        logs = logs - logs.logsumexp(dim=1, keepdim=True)
    return logs.exp()
