"""What the loss reaches with perfect sets: a bound for every way of finding them, not a way of one's own."""

import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from ppap.backbone import Backbone
from ppap.config import Config
from ppap.errors import UsageError
from ppap.methods.base import Outcome, TrainingData
from ppap.methods.ppap import PPAP


class Oracle(PPAP):
    """PPAP's network and loss with the sets of the training labels.

    Positives are the patches of the anchor's class, negatives all others; a patch has the class of its middle
    pixel, and patches without one take no part.
    """

    def __init__(self, config: Config, backbone: Backbone) -> None:
        """See :class:`Method`."""
        super().__init__(config, backbone)
        self.propagation = None  # nothing is propagated, so there is nothing to draw

    @classmethod
    def check(cls, config: Config) -> None:
        """See :class:`Method`."""
        super().check(config)
        # One-hot rows of the classes have cosines 0 and 1, which any threshold between tells apart.
        if not 0 <= config.loss.phi0 < 1:
            raise UsageError(f"--loss.phi0 is {config.loss.phi0}; give 0 <= phi0 < 1 with --method oracle")

    def start(self, data: TrainingData, start_step: int) -> DataLoader:
        """See :class:`Method`.

        Raises:
            UsageError: the training images have no labels.
        """
        if not data.dataset.labelled:
            raise UsageError("oracle takes its sets from labels of the training images; give labels/train")
        return super().start(data, start_step)

    def step(self, batch: dict[str, Tensor], step: int) -> Outcome:
        """See :class:`Method`; logs the mean sizes of the sets per anchor."""
        out = self.net.forward_tokens(self.tokens(batch))
        label = batch["label"].to(out.z.device)[:, None].float()
        label = F.interpolate(label, size=out.code.shape[-2:], mode="nearest-exact").long().flatten()
        known = label >= 0
        if not known.any():
            nothing = out.z.sum() * 0
            return Outcome(out.code, nothing, {"positives": nothing.detach(), "negatives": nothing.detach()})
        contrast = self.contrast(F.one_hot(label[known]).to(out.z.dtype), out.z[known], step)
        log = {"positives": contrast.positives, "negatives": contrast.negatives}
        return Outcome(out.code, contrast.loss, log)
