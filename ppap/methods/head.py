"""The head that STEGO and HP train on frozen features: a linear and a two-layer branch, added."""

import torch.nn.functional as F
from torch import Tensor, nn


class Head(nn.Module):
    """code = A x + C relu(B y), three 1x1 convolutions with bias and torch's default initial weights.

    x and y are the same features (B, D, h, w) under channel masks of their own: dropout lies outside, so that
    a caller decides what is masked. No norm.
    """

    def __init__(self, width: int, dim: int) -> None:
        """Args: channels D of the features, E of the code."""
        super().__init__()
        self.linear = nn.Conv2d(width, dim, kernel_size=1)
        self.inner = nn.Conv2d(width, width, kernel_size=1)
        self.outer = nn.Conv2d(width, dim, kernel_size=1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Code (B, E, h, w) of the two copies of the features."""
        return self.linear(x) + self.outer(F.relu(self.inner(y)))
