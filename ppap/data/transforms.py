"""From a picture and its ids to tensors: resize the shorter side, crop the centre, normalise.

There is no augmentation. The defaults are the published pipeline's; equality with torchvision is tested.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image

from ppap.errors import DataError

MEAN = (0.485, 0.456, 0.406)  # ImageNet, RGB, of values 0..1
STD = (0.229, 0.224, 0.225)

# (3, 256) float32: every possible result of normalise()
_NORMALISED = np.arange(256, dtype=np.float32)[None] / np.float32(255)
_NORMALISED = (_NORMALISED - np.float32(MEAN)[:, None]) / np.float32(STD)[:, None]
_RESAMPLE = {"nearest": Image.Resampling.NEAREST, "bilinear": Image.Resampling.BILINEAR}


@dataclass(frozen=True)
class Geometry:
    """Where the square input lies in a picture, the same for image and label.

    The shorter side becomes ``resolution``, the longer one ``int(resolution * long / short)`` (truncated).
    The crop's upper left corner is ``round((side - resolution) / 2)`` with Python's rounding of halves to
    even (a rest of 1 pixel is cut at the end, of 3 pixels 2 at the start), as torchvision's CenterCrop.
    """

    resolution: int
    """Side of the result [pixels]."""
    interpolation: Literal["nearest", "bilinear"] = "nearest"
    """Resizing of images; labels always take the nearest id."""

    def image(self, image: Image.Image) -> np.ndarray:
        """Resize and crop a picture.

        Args:
            image: PIL image of mode RGB, any size.

        Returns:
            (resolution, resolution, 3) uint8.

        Raises:
            DataError: so long and narrow that the resized picture would exceed Pillow's limit on pixels.
        """
        return np.array(self._fit(image, _RESAMPLE[self.interpolation]))

    def whole(self, image: Image.Image) -> np.ndarray:
        """Resize a picture without cropping it: (H, W, 3) uint8 with a shorter side of ``resolution``.

        Raises:
            DataError: as :meth:`image`.
        """
        return self.scaled(image, resized_size(*image.size, self.resolution))

    def scaled(self, image: Image.Image, size: tuple[int, int]) -> np.ndarray:
        """Resize a picture to `size`, (width, height) [pixels]: (H, W, 3) uint8."""
        return np.array(image.resize(size, _RESAMPLE[self.interpolation]))

    def label(self, label: np.ndarray) -> np.ndarray:
        """Resize and crop class ids, nearest.

        Args:
            label: (H, W) integer ids, -1 = ignored.

        Returns:
            (resolution, resolution) int64.

        Raises:
            DataError: as :meth:`image`.
        """
        # Mode I keeps -1 and ids above 255, and resizes to the same pixels as the published 8-bit label.
        image = Image.fromarray(np.ascontiguousarray(label, dtype=np.int32))
        return np.array(self._fit(image, Image.Resampling.NEAREST)).astype(np.int64)

    def _fit(self, image: Image.Image, resample: Image.Resampling) -> Image.Image:
        size = resized_size(*image.size, self.resolution)
        if image.size != size:
            image = image.resize(size, resample)
        left, top = (round((side - self.resolution) / 2) for side in size)
        return image.crop((left, top, left + self.resolution, top + self.resolution))


def resized_size(width: int, height: int, resolution: int) -> tuple[int, int]:
    """Size after the shorter side became ``resolution``: ``(width, height)`` in pixels.

    Raises:
        DataError: the result would exceed Pillow's limit on pixels.
    """
    short, long = sorted((width, height))
    stretched = int(resolution * long / short)
    if stretched * resolution > (Image.MAX_IMAGE_PIXELS or float("inf")):
        raise DataError(f"an image of {width}x{height} pixels is too narrow to resize; crop or remove it")
    return (resolution, stretched) if width <= height else (stretched, resolution)


def normalise(pixels: np.ndarray) -> torch.Tensor:
    """ImageNet normalisation.

    Args:
        pixels: (H, W, 3) uint8 RGB.

    Returns:
        (3, H, W) float32, ``(pixels / 255 - MEAN) / STD``, contiguous.
    """
    # A table of the 256 values per channel: exact, and without torch's threads, which would only contend.
    return torch.from_numpy(np.stack([_NORMALISED[c][pixels[:, :, c]] for c in range(3)]))


def denormalise(image: torch.Tensor) -> torch.Tensor:
    """Undo :func:`normalise` up to float rounding.

    Args:
        image: (..., 3, H, W) floating point, normalised.

    Returns:
        (..., 3, H, W), same dtype and device, values 0..1 up to rounding errors on either side.
    """
    return image * _channels(STD, image) + _channels(MEAN, image)


def to_uint8(image: torch.Tensor, *, truncate: bool = False) -> torch.Tensor:
    """Float values 0..1 to 8 bits.

    Args:
        image: (..., 3, H, W) floating point, 0..1 (:func:`denormalise`).
        truncate: cut off the fraction instead of rounding, as the published CRF input is made: after a
            normalised round trip 14 to 24 % of its values are 1 too low. Wanted only to reproduce published
            numbers.

    Returns:
        (..., H, W, 3) uint8.
    """
    values = image.movedim(-3, -1) * 255
    return (values if truncate else values.round()).clamp(0, 255).to(torch.uint8)


def _channels(values: tuple[float, ...], like: torch.Tensor) -> torch.Tensor:
    return torch.tensor(values, dtype=like.dtype, device=like.device).view(3, 1, 1)
