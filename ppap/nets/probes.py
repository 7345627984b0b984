"""The two probes that turn the code into classes, and the way from patches back to pixels.

Legend: B images, h w patch grid, H W pixels, D channels, C classes, K clusters. Both probes read the code
detached: their losses never reach the network. All of it runs in fp32, also under autocast.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ppap.nets.pixel_loss import pixel_cross_entropy


class LinearProbe(nn.Module):
    """One linear classifier per patch or pixel, trained with labels; measures what the code holds.

    Initial weights follow torch's global generator (``torch.manual_seed``).
    """

    def __init__(self, dim: int, classes: int) -> None:
        """A probe of codes with ``dim`` = D channels, for ``classes`` = C classes."""
        super().__init__()
        self.classifier = nn.Conv2d(dim, classes, kernel_size=1)

    def logits(self, code: Tensor) -> Tensor:
        """Class scores of a code map (B, D, h, w), at patches or pixels: (B, C, h, w), fp32."""
        with torch.autocast(code.device.type, enabled=False):
            return self.classifier(code.float())

    def loss(self, code: Tensor, label: Tensor, patch_size: int | None = None) -> Tensor:
        """Mean cross-entropy over labelled pixels, of logits resized (bilinear) to the label's size.

        Args:
            code: (B, D, h, w); detached here.
            label: (B, H, W) int64; pixels outside 0..C-1 are left out.
            patch_size: side p of a patch [pixels]; needed where H or W is no multiple of it, so that the
                pixels added to the image are cut off instead of squeezed in. None = the grid covers the label
                exactly.

        Returns:
            fp32 scalar; 0, with a zero gradient, when no pixel is labelled.
        """
        logits = self.logits(code.detach())
        labelled = (label >= 0) & (label < logits.shape[1])
        target = torch.where(labelled, label, -1)
        if patch_size is not None:
            check_grid(logits, patch_size, (label.shape[1], label.shape[2]))
        with torch.autocast(code.device.type, enabled=False):
            total = pixel_cross_entropy(logits, target, patch_size)
        return total / labelled.sum().clamp(min=1)


class ClusterProbe(nn.Module):
    """K cluster centres, trained without labels: each is pulled to the patches it is nearest to.

    Centres start as N(0, 1) from torch's global generator (``torch.manual_seed``).
    """

    def __init__(self, dim: int, clusters: int) -> None:
        """A probe of codes with ``dim`` = D channels, for ``clusters`` = K centres."""
        super().__init__()
        self.clusters = nn.Parameter(torch.randn(clusters, dim))

    def logits(self, code: Tensor) -> Tensor:
        """Cosine of a code map (B, D, h, w), at patches or pixels, with every centre: (B, K, h, w), fp32.

        A zero code has cosine 0 with every centre.
        """
        with torch.autocast(code.device.type, enabled=False):
            code = code.float()
            centres = F.normalize(self.clusters.float(), dim=1)
            # Dividing the K products is cheaper than normalising a copy of the D channels.
            length = torch.linalg.vector_norm(code, dim=1, keepdim=True).clamp(min=1e-12)
            return F.conv2d(code, centres[:, :, None, None]) / length

    def loss(self, code: Tensor) -> Tensor:
        """Minus the mean, over the patches of code (B, D, h, w), of the cosine with the nearest centre.

        Returns:
            fp32 scalar in [-1, 1]; the gradient reaches the nearest centre of each patch, never the code.
        """
        return -self.logits(code.detach()).amax(dim=1).mean()


def upsample(features: Tensor, patch_size: int, size: tuple[int, int]) -> Tensor:
    """A patch map at the size of the image: resized bilinearly, then the pixels added to the image cut off.

    Equals plain resizing (align_corners=False) to ``size`` when H and W are multiples of the patch.

    Args:
        features: code or logits (B, C, h, w), float.
        patch_size: side p of a patch [pixels].
        size: (H, W) of the image [pixels], with h = ceil(H / p) and w = ceil(W / p).

    Returns:
        (B, C, H, W), dtype of ``features``; a view where something was cut off.

    Raises:
        ValueError: the grid does not belong to an image of this size.
    """
    check_grid(features, patch_size, size)
    full = (features.shape[2] * patch_size, features.shape[3] * patch_size)
    features = F.interpolate(features, size=full, mode="bilinear", align_corners=False)
    return features[:, :, : size[0], : size[1]]


def check_grid(features: Tensor, patch_size: int, size: tuple[int, int]) -> None:
    """Refuse a patch map (B, C, h, w) that does not cover an image of ``size`` (H, W) with a ValueError."""
    height, width = features.shape[2:]
    if (height, width) != (-(-size[0] // patch_size), -(-size[1] // patch_size)):
        raise ValueError(
            f"{height} x {width} patches of {patch_size} pixels do not cover an image of {tuple(size)} pixels"
        )
