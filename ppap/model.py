"""The two streams: frozen guidance features, and a trained copy of the last block with a projection.

Legend: B images, h w patch grid, P prefix tokens, N = B h w patches, D channels. Tokens before the last block
of the frozen ViT feed both streams; both end in the same frozen norm. Read ``ppap.backbone`` first;
``ppap.probes`` reads the code.
"""

import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ppap.backbone import Backbone, build_backbone
from ppap.config import ModelConfig


class FrozenTokens(NamedTuple):
    """All that the trainable stream needs of a batch; depends on the images alone, so it may be cached."""

    before: Tensor
    """Tokens before the last block, prefix included: (B, P + h w, D)."""
    guidance: Tensor
    """n(t_L), without dropout: (B, D, h, w), fp32."""
    grid: tuple[int, int]
    """Patch rows h and columns w."""


class Streams(NamedTuple):
    """Output of :class:`PPAPNet`."""

    guidance: Tensor | None
    """Frozen features for the propagation, (B, D, h, w), fp32, no gradient; in training with dropout.
    None where only the code was asked for."""
    code: Tensor
    """Trained features, (B, D, h, w), fp32: what the probes read."""
    z: Tensor | None
    """L2-normalised projection of the code, (B h w, D), fp32, rows in (image, row, column) order.
    None where only the code was asked for."""
    grid: tuple[int, int]
    """Patch rows h and columns w."""


class PPAPNet(nn.Module):
    """A frozen backbone, a trained copy of its last block, and a linear projection for the contrastive loss.

    The copy is made on construction: load the backbone's weights before. The projection's initial weights
    follow torch's global generator (``torch.manual_seed``); channel dropout follows the generator of the
    images' device.
    """

    def __init__(self, backbone: Backbone, guidance_dropout: float = 0.1) -> None:
        """Copy the last block of ``backbone``.

        Args:
            backbone: frozen network with its weights.
            guidance_dropout: share p of guidance channels dropped per image in training mode; 0 = off.
        """
        super().__init__()
        self.backbone = backbone
        self.block = copy.deepcopy(backbone.vit.blocks[-1]).requires_grad_(True)
        self.projection = nn.Linear(backbone.width, backbone.width)
        self.guidance_dropout = guidance_dropout

    def forward(self, x: Tensor, code_only: bool = False) -> Streams:
        """Both streams of a batch of images.

        Args:
            x: normalised images, float (B, 3, H, W), any size; see :class:`~ppap.backbone.Backbone` for the
                padding.
            code_only: compute the code alone, as evaluation needs it: no guidance, no z, one block less.
        """
        if code_only:
            with torch.no_grad():
                before, grid = self.backbone.tokens_before(x)
            return Streams(None, self._code(before, grid), None, grid)
        return self.forward_tokens(self.frozen(x))

    @torch.no_grad()
    def frozen(self, x: Tensor) -> FrozenTokens:
        """The frozen half of :meth:`forward`, without gradient, for images (B, 3, H, W)."""
        before, last, grid = self.backbone.tokens(x)
        return FrozenTokens(before, self.backbone.patch_map(last, grid), grid)

    def forward_tokens(self, frozen: FrozenTokens) -> Streams:
        """The trainable half of :meth:`forward`.

        Args:
            frozen: what :meth:`frozen` returned; its tensors may have been stored in half precision since.
        """
        guidance = frozen.guidance.float()
        if self.guidance_dropout > 0:
            # Whole channels per image: similarities within an image keep their value, those across images
            # shrink.
            guidance = F.dropout2d(guidance, self.guidance_dropout, training=self.training)
        code = self._code(frozen.before, frozen.grid)
        z = F.normalize(self.projection(patch_rows(code)).float(), dim=1)
        return Streams(guidance, code, z, frozen.grid)

    @torch.no_grad()
    def features(self, x: Tensor) -> Tensor:
        """The frozen features n(t_L), (B, D, h, w), fp32, no dropout: the code of an untrained network."""
        return self.backbone(x)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Parameters of the block and the projection, in a fixed order."""
        return [*self.block.parameters(), *self.projection.parameters()]

    def _code(self, before: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.backbone.patch_map(self.block(before.float()), grid)


def patch_rows(features: Tensor) -> Tensor:
    """A map (B, D, h, w) as one row per patch, (B h w, D), in (image, row, column) order.

    No copy for the maps of :class:`Streams`.
    """
    return features.permute(0, 2, 3, 1).reshape(-1, features.shape[1])


def build_net(config: ModelConfig) -> PPAPNet:
    """The network that ``config`` names, with its backbone's weights; on the CPU, in training mode.

    Raises:
        UsageError, DataError, NumberError: see :func:`ppap.backbone.build_backbone`.
    """
    return PPAPNet(build_backbone(config), config.guidance_dropout)
