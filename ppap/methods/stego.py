"""STEGO (ICLR 2022): a head whose codes correlate where frozen features do.

Legend: B images, h w patch grid, S x S points per image, D channels of the backbone, E of the code. Read
``stego_loss`` for the loss of a pair of images, ``neighbours`` for the near images.

Settings and loss are the published code's. Different here: images are described without dropout for the table
of near images; an incomplete last batch is dropped; the learning rates of the probes are settings; a step is
a batch on one device.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from ppap.errors import UsageError
from ppap.methods.base import Method, Outcome, TrainingData, net_optimiser
from ppap.methods.head import Head
from ppap.methods.neighbours import neighbour_table, paired_loader
from ppap.methods.stego_loss import correlation_loss, other_images, sample_points
from ppap.nets.backbone import Backbone
from ppap.nets.model import FrozenTokens, Network
from ppap.parallel import from_first, world
from ppap.settings.config import Config, OptimConfig, StegoConfig


class StegoNet(Network):
    """A head on frozen features. Dropout takes whole channels per image, with three masks of their own: in
    both branches of the head, and on the features that are compared."""

    def __init__(self, backbone: Backbone, config: StegoConfig) -> None:
        """Args: frozen network, settings. Initial weights follow torch's global generator."""
        super().__init__(backbone)
        self.head = Head(backbone.width, config.dim)
        self.dropout = config.dropout

    @property
    def code_width(self) -> int:
        """Channels E of the code."""
        return self.head.linear.out_channels

    def code_of(self, frozen: FrozenTokens) -> Tensor:
        """The head's code: (B, E, h, w), fp32; in training mode with dropout on the features."""
        features = frozen.guidance.float()
        return self.head(self.drop(features), self.drop(features)).float()

    def drop(self, features: Tensor) -> Tensor:
        """Dropout of whole channels per image, in training mode."""
        return F.dropout2d(features, self.dropout, training=self.training)


class STEGO(Method):
    """Correlations within an image, with a near image, and with others of the batch."""

    shared = False

    def __init__(self, config: Config, backbone: Backbone) -> None:
        """See :class:`Method`."""
        super().__init__(config, backbone)
        self.stego = config.stego
        self.net: StegoNet = StegoNet(backbone, config.stego)

    def optimisers(self, optim: OptimConfig) -> dict[str, torch.optim.Optimizer]:
        """One, of the head."""
        return {"net": net_optimiser(list(self.net.head.parameters()), optim)}

    def describe(self, patches: int) -> str:
        """What is compared."""
        s = self.stego.samples
        return f"{s * s} points per image, one of {self.stego.neighbours} nearest images for each"

    def start(self, data: TrainingData, start_step: int) -> DataLoader:
        """Batches with a near image for every image, under ``near_image`` (or ``near_before``, ...).

        Raises:
            UsageError: fewer images than neighbours.
        """
        self.data = data
        # Another machine may have it on its disk: one rank looks, and asks no other whether to stop.
        alone = replace(data, should_stop=lambda: False) if world().several else data
        table = from_first(lambda: neighbour_table(self, alone))
        if self.stego.neighbours >= table.shape[1]:
            raise UsageError(
                f"--stego.neighbours is {self.stego.neighbours}; of {len(data.dataset)} images "
                f"{table.shape[1] - 1} others are known, give at most that"
            )
        return paired_loader(data, table, self.stego.neighbours, start_step)

    def step(self, batch: dict[str, Tensor], step: int) -> Outcome:
        """See :class:`Method`; logs the loss of each kind of pair, unweighted."""
        (features, code), (near_features, near_code) = (self._maps(batch, prefix) for prefix in ("", "near_"))
        count, side = len(code), self.stego.samples
        points, others = (
            torch.rand(count, side, side, 2, device=code.device) * 2 - 1 for _ in range(2)
        )  # the second one for near images and for negatives alike
        mine = (sample_points(features, points), sample_points(code, points))
        near = (sample_points(near_features, others), sample_points(near_code, others))
        config = self.stego
        own_loss = self._pair(mine, mine, config.shift_self)
        near_loss = self._pair(mine, near, config.shift_neighbour)
        random_loss = code.new_zeros(())
        for _ in range(config.negative_draws):
            order = other_images(count, code.device)
            far = (sample_points(features[order], others), sample_points(code[order], others))
            random_loss = random_loss + self._pair(mine, far, config.shift_random) / config.negative_draws
        loss = (
            config.weight_self * own_loss
            + config.weight_neighbour * near_loss
            + config.weight_random * random_loss
        )
        log = {"self_loss": own_loss, "neighbour_loss": near_loss, "random_loss": random_loss}
        return Outcome(code, loss, log)

    def _maps(self, batch: dict[str, Tensor], prefix: str) -> tuple[Tensor, Tensor]:
        """Features with dropout, and code, of the images or of their near images."""
        frozen = self.tokens(batch, prefix)
        code = self.net.code_of(frozen)
        return self.net.drop(self.net.compared(frozen.guidance)), code

    def _pair(self, one: tuple[Tensor, Tensor], two: tuple[Tensor, Tensor], shift: float) -> Tensor:
        config = self.stego
        return correlation_loss(
            (one[0], two[0]),
            (one[1], two[1]),
            shift,
            pointwise=config.pointwise,
            zero_clamp=config.zero_clamp,
        )
