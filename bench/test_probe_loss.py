"""The linear probe's loss with its gradient: 32 crops of 224 pixels, patch 14, 21 classes, by form."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.machine import DEVICE
from ppap.kernels import native, use_backend
from ppap.nets.pixel_loss import pixel_cross_entropy

CLASSES, GRID, PATCH = 21, 16, 14


def resized_by_torch(logits: Tensor, target: Tensor) -> Tensor:
    """What the published codes do."""
    scores = F.interpolate(logits, size=target.shape[1:], mode="bilinear", align_corners=False)
    return F.cross_entropy(scores, target, ignore_index=-1, reduction="sum")


def of_backend(name: str):
    def loss(logits: Tensor, target: Tensor) -> Tensor:
        with use_backend(name):
            return pixel_cross_entropy(logits, target, PATCH)

    return loss


FORMS = {"torch's resizing": resized_by_torch, "products": of_backend("torch")}
if DEVICE.type == "cpu" and native.reason() is None:
    FORMS["native"] = of_backend("cpp")


@pytest.mark.parametrize("form", FORMS)
def test_probe_loss(form, measure, request):
    images = 2 if request.config.getoption("--quick") else 32
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(images, CLASSES, GRID, GRID, generator=generator).to(DEVICE).requires_grad_()
    target = torch.randint(-1, CLASSES, (images, GRID * PATCH, GRID * PATCH), generator=generator).to(DEVICE)
    measure(lambda: torch.autograd.grad(FORMS[form](logits, target), logits), f"{images} images")
