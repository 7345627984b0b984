"""How a source wants its images normalised: mean and deviation per channel of RGB values 0..1.

Images come with ImageNet's statistics everywhere (:func:`ppap.data.transforms.normalise`), which DINO, DINOv2
and DINOv3 were trained with. Where a source states others, they become ``mean`` and ``std`` of the backbone's
spec, and the backbone changes the images itself.
"""

import math
from typing import Any

from ppap.data.transforms import MEAN, STD
from ppap.errors import DataError

SATELLITE = {"mean": [0.43, 0.411, 0.296], "std": [0.213, 0.156, 0.143]}
"""Of DINOv3's weights for satellite images; their files carry ``sat493m`` in the name and no statistics."""
_NEAR = 1e-3  # statistics that are written with fewer digits


def stated(mean: Any, std: Any, where: str) -> dict[str, list[float]]:
    """``mean`` and ``std`` for a spec: empty if they are ImageNet's or not stated (both None).

    Args:
        mean, std: three numbers each, of values 0..1.
        where: who states them, for messages.

    Raises:
        DataError: no three finite numbers, or a deviation that is not positive.
    """
    if mean is None and std is None:
        return {}
    for name, value, least in (("mean", mean, -math.inf), ("std", std, 0.0)):
        ok = isinstance(value, list | tuple) and len(value) == 3
        if not ok or not all(type(v) in (int, float) and least < v < math.inf for v in value):
            wanted = "three positive numbers" if name == "std" else "three numbers"
            raise DataError(f"{where}: the images' {name} is {value!r}; wanted {wanted}")
    near = [abs(a - b) < _NEAR for a, b in zip((*mean, *std), (*MEAN, *STD), strict=True)]
    return {} if all(near) else {"mean": [float(v) for v in mean], "std": [float(v) for v in std]}


def of_preprocessor(config: dict[str, Any], where: str) -> dict[str, list[float]]:
    """:func:`stated` of a ``preprocessor_config.json`` of transformers.

    Args:
        config: its content; ``image_mean``, ``image_std``, ``rescale_factor``, ``do_rescale`` and
            ``do_normalize`` are read.
        where: its name, for messages.

    Raises:
        DataError: as :func:`stated`, or the statistics are missing.
    """
    config = config.get("image_processor", config)
    mean, std = config.get("image_mean"), config.get("image_std")
    if not config.get("do_normalize", True):
        mean, std = [0.0] * 3, [1.0] * 3
    elif mean is None or std is None:
        raise DataError(f"{where}: image_mean is {mean!r} and image_std {std!r}; give three numbers each")
    found = stated(mean, std, where)
    factor = config.get("rescale_factor", 1 / 255) if config.get("do_rescale", True) else 1.0
    if type(factor) not in (int, float) or not 0 < factor < math.inf:
        raise DataError(f"{where}: rescale_factor is {factor!r}; wanted a positive number, usually 1/255")
    # The network is given (factor * pixel - mean) / std of pixels 0..255.
    if abs(255 * factor - 1) > _NEAR:
        found = stated(*([v / (255 * factor) for v in values] for values in (mean, std)), where)
    return found
