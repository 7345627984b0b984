"""A first patch kernel that sees textures: estimated from the images instead of drawn."""

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from ppap.nets.backbone import Backbone
from ppap.pretraining.views import make_crops
from ppap.settings.pretraining import PretrainConfig

_IMAGES = 48
_NOISE_FLOOR = 0.02  # variance [normalised pixels squared] below which a direction counts as sensor noise


@torch.no_grad()
def whiten_patches(backbone: Backbone, draws: Dataset, config: PretrainConfig) -> None:
    """Replace the patch kernel by the strongest principal directions of patches, randomly rotated.

    Each direction is divided by its variance to the power of ``config.train.whiten``. The rotation follows
    torch's global generator.

    Args:
        backbone: with a plain patch embedding; changed in place. Where it has more channels than a patch has
            values, the others stay as drawn.
        draws: images; the first ones are read.
        config: of the run.
    """
    kernel = backbone.vit.patch_embed.proj
    views, generator = config.views, torch.Generator().manual_seed(config.train.seed)
    pixels = torch.stack([draws[n] for n in range(_IMAGES)]).float() / 255
    crops = make_crops(pixels, 2, views.global_size, views.global_scale, views, generator).images
    patches = F.unfold(crops, backbone.patch_size, stride=backbone.patch_size).transpose(1, 2).flatten(0, 1)
    mean = patches.mean(dim=0)
    values, directions = torch.linalg.eigh((patches - mean).T @ (patches - mean) / len(patches))
    count = min(len(values), kernel.out_channels)
    values, directions = values.flip(0)[:count].clamp(min=0), directions.flip(1)[:, :count]
    rotation = torch.linalg.qr(torch.randn(count, count))[0]
    weight = rotation @ (directions / (values + _NOISE_FLOOR) ** config.train.whiten).T
    kernel.weight[:count] = weight.view(count, *kernel.weight.shape[1:])
    if kernel.bias is not None:
        kernel.bias[:count] = -weight @ mean
