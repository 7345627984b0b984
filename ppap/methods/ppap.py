"""PPAP and what Table 5 makes of it by leaving parts out."""

import torch
from torch import Tensor

from ppap.methods.base import Method, Outcome, net_optimiser
from ppap.methods.loss import PPAPLoss, Switches, anchors_text
from ppap.nets.backbone import Backbone
from ppap.nets.model import PPAPNet, patch_rows
from ppap.settings.config import Config, OptimConfig

SWITCHES = {
    "ppap": Switches(),
    "fixed": Switches(trustworthy_positives=False, ambiguity_excluded=False),
    "tps": Switches(ambiguity_excluded=False),
    "ans": Switches(trustworthy_positives=False),
    "random": Switches(shuffled=True),
    "oracle": Switches(trustworthy_positives=False, ambiguity_excluded=False),
}
"""Method -> parts of the loss (Table 5, the control, and the yardstick)."""


class PPAP(Method):
    """A trained copy of the last block, by the contrastive loss over propagated sets (Eq. 1-8)."""

    def __init__(self, config: Config, backbone: Backbone) -> None:
        """See :class:`Method`."""
        super().__init__(config, backbone)
        self.net = PPAPNet(backbone, config.model.guidance_dropout)
        self.contrast = PPAPLoss(
            config.loss, config.train.seed, SWITCHES[config.method], config.train.exchange
        )
        self.propagation = self.contrast.propagation

    def optimisers(self, optim: OptimConfig) -> dict[str, torch.optim.Optimizer]:
        """One, of the block and the projection."""
        return {"net": net_optimiser(self.net.trainable_parameters(), optim, self.net.projection)}

    def step(self, batch: dict[str, Tensor], step: int) -> Outcome:
        """See :class:`Method`; logs the mean sizes of the sets per anchor."""
        out = self.net.forward_tokens(self.tokens(batch))
        contrast = self.contrast(patch_rows(out.guidance), out.z, step)
        log = {"positives": contrast.positives, "negatives": contrast.negatives}
        return Outcome(out.code, contrast.loss, log)

    def describe(self, patches: int) -> str:
        """Anchors of a step."""
        loss = self.config.loss
        return anchors_text(patches, loss.chunk, loss.anchor_divisor)
