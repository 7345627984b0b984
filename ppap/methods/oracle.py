"""What the loss makes of perfect sets: a yardstick for every way of finding them, not a way of one's own."""

from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor

from ppap import parallel
from ppap.data.patch_labels import labels_of
from ppap.methods.base import Outcome
from ppap.methods.ppap import PPAP
from ppap.nets.backbone import Backbone
from ppap.settings.config import Config


class Oracle(PPAP):
    """PPAP's network and loss with the sets of the training labels.

    Positives are the patches of the anchor's class, negatives all others; a patch has the class of its middle
    pixel. Patches whose middle is ignored, or lies in the rows and columns that the network adds, take no
    part.
    """

    needs_labels = True

    def __init__(self, config: Config, backbone: Backbone) -> None:
        """See :class:`Method`."""
        # One-hot rows of the classes have cosines 0 and 1: the threshold lies between, whatever --loss.phi0.
        super().__init__(replace(config, loss=replace(config.loss, phi0=0.5)), backbone)
        self.config = config
        self.propagation = None  # nothing is propagated, so there is nothing to draw

    def step(self, batch: dict[str, Tensor], step: int) -> Outcome:
        """See :class:`Method`; logs the mean sizes of the sets per anchor."""
        out = self.net.forward_tokens(self.tokens(batch))
        label = labels_of(batch["label"], self.net.backbone.patch_size, "centre").to(out.z.device)
        known = label >= 0
        classes = max(int(label.max()) + 1, 1)
        if parallel.in_step():
            classes = max(parallel.counts_of(classes))
        if not parallel.any_rank(bool(known.any())):
            none = out.z.new_zeros(())
            return Outcome(out.code, (out.z * 0).sum(), {"positives": none, "negatives": none})
        contrast = self.contrast(F.one_hot(label[known], classes).to(out.z.dtype), out.z[known], step)
        log = {"positives": contrast.positives, "negatives": contrast.negatives}
        return Outcome(out.code, contrast.loss, log)
