"""Hidden Positives (HP, CVPR 2023): network, pools and a training step.

Legend: B images, h w patch grid, N = B h w patches, D channels of the backbone, E of the code. Read
``hidden_positives`` for the sets, ``hp_loss`` for the contrast, ``local_mixing`` for the mixed code.

Settings and order of operations are the published code's. Different here: products and sums are in fp32, not
fp16; a chunk without anchors gives 0, not NaN; the grid may have any size, not 28 x 28 alone; a pool larger
than the set of images goes through it again; checkpoints hold projection and pools, so that a run resumes.
"""

import copy
import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from ppap.errors import UsageError
from ppap.methods.base import Method, Outcome, net_optimiser
from ppap.methods.head import Head
from ppap.methods.hidden_positives import draw_patches, hidden_positives, pool_radius, unit_rows
from ppap.methods.hp_loss import HPSettings, Positives, hp_loss
from ppap.methods.local_mixing import attention_logits, has_plain_attention, mix, mixing_weights
from ppap.methods.loss import anchors_text, draw_anchors
from ppap.methods.recolour import recolour
from ppap.nets.backbone import Backbone
from ppap.nets.model import FrozenTokens, Network, patch_rows
from ppap.runs.randomness import random_state, set_random_state
from ppap.settings.config import Config, HPConfig, OptimConfig

CHUNK = 784
"""Patches whose anchors are a chunk of the loss: those of one image at 224 pixels and patch 8."""


class HPNet(Network):
    """A head on frozen features, its moving average, a projection, and the two reference pools.

    All of it is in ``state_dict``, and so in checkpoints. Dropout takes whole channels per image, with masks
    of their own in every place: in both branches of both heads, on the average's code, on the mixed code and
    on the features that are compared; never on the code itself.
    """

    has_embedding = True

    def __init__(self, backbone: Backbone, config: HPConfig) -> None:
        """Args: frozen network, settings. Initial weights follow torch's global generator."""
        super().__init__(backbone)
        self.head = Head(backbone.width, config.dim)
        self.average = copy.deepcopy(self.head).requires_grad_(False)
        self.projection = nn.Linear(config.dim, config.dim)
        self.register_buffer("agnostic_pool", torch.zeros(config.pool_size, backbone.width))
        self.register_buffer("specific_pool", torch.zeros(config.pool_size, config.dim))
        self.dropout, self.decay = config.dropout, config.ema

    @property
    def code_width(self) -> int:
        """Channels E of the code."""
        return self.projection.in_features

    def code_of(self, frozen: FrozenTokens) -> Tensor:
        """The head's code s: (B, E, h, w), fp32; in training mode with dropout on the features."""
        features = frozen.guidance.float()
        return self.head(self.drop(features), self.drop(features)).float()

    def embedding(self, frozen: FrozenTokens) -> Tensor:
        """z: the projected code."""
        return self.embed(self.code_of(frozen))

    @torch.no_grad()
    def averaged(self, features: Tensor) -> Tensor:
        """The averaged head's code s', with dropout: (B, E, h, w), fp32."""
        return self.drop(self.average(self.drop(features), self.drop(features)).float())

    @torch.no_grad()
    def follow(self) -> None:
        """Move the averaged head towards the head: theta' = m theta' + (1 - m) theta."""
        for slow, fast in zip(self.average.parameters(), self.head.parameters(), strict=True):
            slow.lerp_(fast, 1 - self.decay)

    def embed(self, code: Tensor) -> Tensor:
        """L2-normalised projection of a code map, (N, E), fp32, rows in (image, row, column) order."""
        return F.normalize(self.projection(patch_rows(code)).float(), dim=1)

    def drop(self, features: Tensor) -> Tensor:
        """Dropout of whole channels per image, in training mode."""
        return F.dropout2d(features, self.dropout, training=self.training)


class HP(Method):
    """Contrast over hidden positives, in the frozen features and, more and more, in the averaged code."""

    shared = False

    def __init__(self, config: Config, backbone: Backbone) -> None:
        """See :class:`Method`."""
        super().__init__(config, backbone)
        if not has_plain_attention(backbone.vit):
            raise UsageError(
                f"method hp needs a last block with plain attention, which {backbone.name} has not; "
                "give another --model.weights, such as vit_small_patch16_224.dino"
            )
        self.hp = config.hp
        self.told = False
        self.net: HPNet = HPNet(backbone, config.hp)

    @classmethod
    def check(cls, config: Config) -> None:
        """Cached features know only one view of an image."""
        if config.data.cache_features and config.hp.consistency > 0:
            raise UsageError(
                "method hp compares every image with a recoloured one, which --data.cache-features has not; "
                "give --data.no-cache-features, or --hp.consistency 0"
            )

    def optimisers(self, optim: OptimConfig) -> dict[str, torch.optim.Optimizer]:
        """``net`` of the head alone; the projection has Adam with the same rate, undecayed and unclipped."""
        return {
            "net": net_optimiser(list(self.net.head.parameters()), optim),
            "projection": torch.optim.Adam(self.net.projection.parameters(), lr=optim.lr),
        }

    def describe(self, patches: int) -> str:
        """Anchors of a step, and the pools."""
        anchors = anchors_text(patches, CHUNK, self.hp.anchor_divisor)
        return f"{anchors}, reference pools of {self.hp.pool_size} patches"

    def before_step(self, step: int) -> None:
        """Fill both pools before the first step, and renew the task-specific one within each epoch."""
        if self.data is None:
            raise RuntimeError("call start() with the training images before the first step")
        if not self.told:
            self.told = True
            self._tell_of_what_is_left_out()
        if step == 0 or self._renews(step):
            self._fill(step)

    def _renews(self, step: int) -> bool:
        """Whether the task-specific pool is renewed ahead of a step past the first one."""
        within = step % self.data.steps_per_epoch
        return within > 0 and within % self.hp.renew_every == 0

    def _tell_of_what_is_left_out(self) -> None:
        """Say what a short run, or short epochs, leave out of the task-specific pool."""
        steps, warmup = self.data.total_steps, self.hp.warmup
        epoch, every = min(self.data.steps_per_epoch, steps), self.hp.renew_every
        if warmup >= steps - 1:  # no step has a specific_weight
            tqdm.write(
                f"the task-specific pool has no part in this run: --hp.warmup {warmup} leaves none of its "
                f"{steps} steps; give fewer, or more --train.steps"
            )
        elif every >= epoch:
            tqdm.write(
                f"the task-specific pool is never renewed: --hp.renew-every {every} counts the steps within "
                f"an epoch, of which this run has {epoch}; give fewer, or a smaller --train.batch-size"
            )

    def _tell_of_pools(self) -> None:
        """Say where the patches come from."""
        size, images = self.hp.pool_size, len(self.data.dataset)
        per_pass = self.data.steps_per_epoch * self.config.train.batch_size  # incomplete batches are dropped
        passes = f" in {math.ceil(size / per_pass)} passes" if size > per_pass else ""
        tqdm.write(f"reference pools: {size} patches, one an image{passes}, of {images} images")

    def held(self, step: int) -> Iterable[Tensor]:
        """The averaged head, and the pool that the step renews; the pools' first content stays."""
        pool = [self.net.specific_pool] if step > 0 and self._renews(step) else []
        return [*self.net.average.parameters(), *pool]

    def _fill(self, step: int) -> None:
        """Pools from images in an order of their own, with dropout; the two draw their patches apart."""
        seed, size, count = self.config.train.seed, self.hp.pool_size, 0
        if step == 0:
            self._tell_of_pools()
        drawn: dict[str, list[Tensor]] = {"agnostic": [], "specific": []}
        before = random_state(self.device)
        with tqdm(total=size, desc="reference pools", unit="image", leave=False, disable=None) as bar:
            for batch in self.data.shuffled(step):
                if self.data.should_stop():
                    set_random_state(before, self.device)
                    raise InterruptedError
                features = self.tokens(batch).guidance.float()[: size - count]
                if step == 0:
                    compared = self.net.drop(self.net.compared(features))
                    drawn["agnostic"].append(draw_patches(compared, seed, 0, count))
                drawn["specific"].append(draw_patches(self.net.averaged(features), seed, step + 1, count))
                count += len(features)
                bar.update(len(features))
                if count == size:
                    break
        if step == 0:
            self.net.agnostic_pool.copy_(unit_rows(torch.cat(drawn["agnostic"])))
        self.net.specific_pool.copy_(unit_rows(torch.cat(drawn["specific"])))

    def step(self, batch: dict[str, Tensor], step: int) -> Outcome:
        """See :class:`Method`; logs sizes of the sets, the weight of task-specific positives, and losses."""
        net, frozen = self.net, self.tokens(batch)
        features = frozen.guidance.float()
        code = net.code_of(frozen)
        averaged = net.averaged(features)
        net.follow()  # before the optimisers' step: the average lags by one
        weights = mixing_weights(attention_logits(net.backbone.vit, frozen.before), frozen.grid)
        z, z_mix = net.embed(code), net.embed(net.drop(mix(code, weights)))
        weight = self.specific_weight(step)
        compared = net.drop(net.compared(features))
        positives = self._positives(compared, averaged if weight > 0 else None)
        anchors, chunk = draw_anchors(len(z), CHUNK, self.hp.anchor_divisor, self.config.train.seed, step)
        kept = torch.empty(chunk, len(z), dtype=torch.bool, device=z.device)
        contrast = hp_loss(
            (z, z_mix),
            anchors.to(z.device),
            positives,
            weight,
            kept.bernoulli_(self.hp.negatives_kept),
            HPSettings(
                self.hp.temperature,
                self.hp.base_temperature,
                chunk,
                self.hp.reweighting,
                self.config.loss.memory_budget_mib * 2**20,
            ),
        )
        consistency = self._consistency(batch, z, step)
        log = {
            "hp_loss": contrast.loss,
            "consistency_loss": consistency,
            "positives": contrast.positives,
            "specific_positives": contrast.specific,
            "negatives": contrast.negatives,
            "specific_weight": z.new_tensor(weight),
        }
        return Outcome(code, contrast.loss + self.hp.consistency * consistency, log)

    def specific_weight(self, step: int) -> float:
        """lambda of a step: 0 up to the warm-up W, then linear, 1 at the end T of the run."""
        total, warmup = self.data.total_steps, self.hp.warmup
        return (step - warmup) / (total - warmup) if step > warmup else 0.0

    def _positives(self, features: Tensor, averaged: Tensor | None) -> Callable[[Tensor], Positives]:
        """Sets of some anchors: in the features and, where it is given, in the averaged code."""
        spaces = []
        for values, pool in ((features, self.net.agnostic_pool), (averaged, self.net.specific_pool)):
            if values is not None:
                rows = unit_rows(patch_rows(values))
                spaces.append((rows, pool_radius(rows, pool)))

        def sets(rows: Tensor) -> Positives:
            found = [hidden_positives(unit, radius, rows, normalised=True) for unit, radius in spaces]
            return Positives(found[0], found[1] if len(found) > 1 else None)

        return sets

    def _consistency(self, batch: dict[str, Tensor], z: Tensor, step: int) -> Tensor:
        """Mean distance of the embeddings to those of the recoloured images; both receive the gradient."""
        if self.hp.consistency == 0:
            return z.new_zeros(())
        images = batch["image"].to(self.device, non_blocking=True)
        normalised = self.hp.augment == "published"
        other = recolour(images, self.config.train.seed, step, normalised=normalised)
        z_other = self.net.embed(self.net.code_of(self.tokens({"image": other})))
        return F.pairwise_distance(z, z_other, eps=1e-6).mean()
