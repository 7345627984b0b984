"""Networks on a frozen backbone: the base of all, and PPAP's two streams.

PPAP has frozen guidance features, and a trained copy of the last block with a projection. Legend: B images,
h w patch grid, P prefix tokens, N = B h w patches, D channels of the backbone, E of the code. Tokens before
the last block of the frozen ViT feed both streams; both end in the same frozen norm. Read
``ppap.nets.backbone`` first; ``ppap.nets.probes`` reads the code, ``ppap.methods`` has the networks of other
methods.
"""

import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ppap.nets.backbone import Backbone, build_backbone
from ppap.nets.conditioning import Condition
from ppap.parallel import dropout2d
from ppap.settings.config import ModelConfig


class FrozenTokens(NamedTuple):
    """All that the trainable stream needs of a batch; depends on the images alone, so it may be cached."""

    before: Tensor
    """Tokens before the last block, prefix included: (B, P + h w, D)."""
    guidance: Tensor
    """n(t_L), without dropout: (B, D, h, w), fp32."""
    grid: tuple[int, int]
    """Patch rows h and columns w."""


class Network(nn.Module):
    """A frozen backbone and whatever a method trains on top; by itself the code is the frozen features."""

    has_embedding = False
    """Whether there is an :meth:`embedding`."""

    def __init__(self, backbone: Backbone) -> None:
        """Args: the frozen network with its weights."""
        super().__init__()
        self.backbone = backbone
        self.condition: Condition | None = None

    @property
    def code_width(self) -> int:
        """Channels E of the code."""
        return self.backbone.width

    @torch.no_grad()
    def frozen(self, x: Tensor) -> FrozenTokens:
        """All that is computed without gradient, for normalised images (B, 3, H, W) of any size."""
        before, last, grid = self.backbone.tokens(x)
        return FrozenTokens(before, self.backbone.patch_map(last, grid), grid)

    def compared(self, features: Tensor) -> Tensor:
        """What stands for frozen features (B, D, h, w) of any float type where they are compared, fp32.

        That is ``self.condition`` of them (``--model.condition``), or where it is None they themselves.
        """
        return features.float() if self.condition is None else self.condition(features)

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """The frozen features n(t_L), (B, D, h, w), fp32, no dropout: the code of an untrained network."""
        return self.backbone(x)

    def code(self, x: Tensor) -> Tensor:
        """What the probes read, of images (B, 3, H, W): (B, E, h, w), fp32."""
        return self.code_of(self.frozen(x))

    def code_of(self, frozen: FrozenTokens) -> Tensor:
        """:meth:`code` of what :meth:`frozen` returned; a method with weights of its own overrides it.

        Args:
            frozen: its tensors may have been stored in half precision since.
        """
        return frozen.guidance.float()

    def embedding(self, frozen: FrozenTokens) -> Tensor:
        """What the method's loss compares: unit rows (B h w, E), fp32, in (image, row, column) order."""
        raise NotImplementedError(f"{type(self).__name__} compares no embedding of the code")


class Streams(NamedTuple):
    """Output of :class:`PPAPNet`."""

    guidance: Tensor
    """Frozen features for the propagation, conditioned, (B, D, h, w), fp32, no gradient; in training with
    dropout."""
    code: Tensor
    """Trained features, (B, D, h, w), fp32: what the probes read."""
    z: Tensor
    """L2-normalised projection of the code, (B h w, D), fp32, rows in (image, row, column) order."""
    grid: tuple[int, int]
    """Patch rows h and columns w."""


class PPAPNet(Network):
    """A frozen backbone, a trained copy of its last block, and a linear projection for the contrastive loss.

    The copy is made on construction: load the backbone's weights before. The projection's initial weights
    follow torch's global generator (``torch.manual_seed``); channel dropout follows the generator of the
    images' device.
    """

    has_embedding = True

    def __init__(self, backbone: Backbone, guidance_dropout: float = 0.1) -> None:
        """Copy the last block of ``backbone``.

        Args:
            backbone: frozen network with its weights.
            guidance_dropout: share p of guidance channels dropped per image in training mode; 0 = off.
        """
        super().__init__(backbone)
        self.block = copy.deepcopy(backbone.vit.blocks[-1]).requires_grad_(True)
        self.projection = nn.Linear(backbone.width, backbone.width)
        self.guidance_dropout = guidance_dropout

    def forward(self, x: Tensor) -> Streams:
        """Both streams of a batch of normalised images, float (B, 3, H, W), any size."""
        return self.forward_tokens(self.frozen(x))

    def forward_tokens(self, frozen: FrozenTokens) -> Streams:
        """The trainable half of :meth:`forward`.

        Args:
            frozen: what :meth:`frozen` returned; its tensors may have been stored in half precision since.
        """
        guidance, code = self.guidance_of(frozen), self.code_of(frozen)
        z = F.normalize(self.projection(patch_rows(code)).float(), dim=1)
        return Streams(guidance, code, z, frozen.grid)

    def guidance_of(self, frozen: FrozenTokens) -> Tensor:
        """What patches are compared by (B, D, h, w): conditioned, and in training without some channels."""
        guidance = self.compared(frozen.guidance)
        if self.guidance_dropout > 0:
            # Whole channels per image: similarities within an image keep their value, those across images
            # shrink.
            guidance = dropout2d(guidance, self.guidance_dropout, training=self.training)
        return guidance

    def code(self, x: Tensor) -> Tensor:
        """The code of images (B, 3, H, W), as :meth:`forward` gives it; no guidance, hence one block less."""
        with torch.no_grad():
            before, grid = self.backbone.tokens_before(x)
        return self._code(before, grid)

    def code_of(self, frozen: FrozenTokens) -> Tensor:
        """See :meth:`Network.code_of`."""
        return self._code(frozen.before, frozen.grid)

    def embedding(self, frozen: FrozenTokens) -> Tensor:
        """z, see :class:`Streams`."""
        return self.forward_tokens(frozen).z

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Parameters of the block and the projection, in a fixed order."""
        return [*self.block.parameters(), *self.projection.parameters()]

    def _code(self, before: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.backbone.patch_map(self.backbone.through(self.block, before.float(), grid), grid)


def patch_rows(features: Tensor) -> Tensor:
    """A map (B, D, h, w) as one row per patch, (B h w, D), in (image, row, column) order.

    No copy for the maps of :class:`Streams`.
    """
    return features.permute(0, 2, 3, 1).reshape(-1, features.shape[1])


def build_net(config: ModelConfig) -> PPAPNet:
    """The network that ``config`` names, with its backbone's weights; on the CPU, in training mode.

    Raises:
        UsageError, DataError, NumberError: see :func:`ppap.nets.backbone.build_backbone`.
    """
    return PPAPNet(build_backbone(config), config.guidance_dropout)
