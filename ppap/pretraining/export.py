"""What a pretraining run hands out: a folder that ``--model.weights`` takes, and pictures of the features.

``python -m ppap.pretraining.export FROM TO`` stores such a folder again in half precision.
"""

import argparse
import copy
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ppap.cli import run
from ppap.data.transforms import denormalise, to_uint8
from ppap.errors import DataError, NumberError
from ppap.nets.backbone import Backbone, build_backbone
from ppap.nets.files import write_checksums, write_tensors
from ppap.pictures.drawing import strip
from ppap.runs.checkpoint import replace_folder
from ppap.settings.config import ModelConfig


def export_backbone(backbone: Backbone, folder: Path, origin: str, *, half: bool = False) -> None:
    """Write weights, ``config.json`` and their checksums, replacing an older folder only when complete.

    Args:
        backbone: network to write.
        folder: where.
        origin: one honest line on where the weights come from; it is shown wherever they are used.
        half: store fp16, which loading turns back into fp32.

    Raises:
        NumberError: a weight is not finite.
        DataError: the disk refuses.
    """
    tensors = {}
    for name, value in backbone.vit.state_dict().items():
        tensors[name] = (value.half() if half else value).detach().cpu().contiguous()
        if not torch.isfinite(tensors[name]).all():
            raise NumberError(f"weights {name} are not finite; {folder} was not written")
    spec = {key: value for key, value in backbone.spec.items() if key != "pos_interp"}
    aside = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        write_tensors(aside / "model.safetensors", tensors)
        text = json.dumps({"backbone": spec, "origin": origin}, indent=2) + "\n"
        (aside / "config.json").write_text(text, encoding="utf-8")
        write_checksums(aside)
        replace_folder(aside, folder)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise DataError(
            f"cannot write {folder}: {error.strerror or error}; free space or change --train.out"
        ) from None


@torch.no_grad()
def centred(backbone: Backbone, images: Tensor) -> Backbone:
    """A copy whose patch features have mean zero on `images`; only the final norm's bias differs.

    No loss of pretraining sees a constant that all features share, and so it can outweigh what tells them
    apart: every cosine would be near 1.

    Args:
        backbone: its final norm must have a bias.
        images: (B, 3, H, W) normalised, on the backbone's device.
    """
    copied = copy.deepcopy(backbone)
    copied.norm.bias -= backbone(images).mean(dim=(0, 2, 3))
    return copied


def principal_colours(features: Tensor) -> np.ndarray:
    """The three strongest directions of patch features as red, green and blue.

    Args:
        features: (B, D, h, w) float, D >= 3.

    Returns:
        (B, h, w, 3) uint8, one projection for all images: equal colours mean similar features. Each
        direction's sign is fixed (its largest weight is positive), so that runs repeat their pictures.
    """
    rows = F.normalize(features.float(), dim=1).movedim(1, -1)
    flat = rows.reshape(-1, rows.shape[-1]).double()
    flat = flat - flat.mean(dim=0)
    directions = torch.linalg.eigh(flat.T @ flat).eigenvectors[:, -3:].flip(1)
    largest = directions.gather(0, directions.abs().argmax(dim=0, keepdim=True))
    values = flat @ (directions * largest.sign())
    low, high = (torch.quantile(values, q, dim=0) for q in (0.02, 0.98))
    share = ((values - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
    return (share * 255).round().to(torch.uint8).view(*rows.shape[:-1], 3).numpy()


@torch.no_grad()
def draw_features(backbone: Backbone, images: Tensor, path: Path, title: str) -> None:
    """Write a picture of images and their patch features beside each other.

    Args:
        backbone: network whose final patch features are drawn.
        images: (B, 3, H, W) normalised, on the backbone's device.
        path: PNG to write.
        title: above the features, such as the step.
    """
    colours = principal_colours(backbone(images).cpu())
    pixels = to_uint8(denormalise(images.cpu())).numpy()
    half = (len(pixels) + 1) // 2
    cells = [[image, colour] for image, colour in zip(pixels, colours, strict=True)]
    blank = [np.full_like(pixels[0], 255), np.full_like(colours[0], 255)]
    cells += [blank] * (2 * half - len(cells))
    rows = [left + right for left, right in zip(cells[:half], cells[half:], strict=True)]
    path.parent.mkdir(parents=True, exist_ok=True)
    strip(rows, ["image", title] * 2, path)


def main(argv: Sequence[str]) -> None:
    """Store an exported backbone in half precision."""
    parser = argparse.ArgumentParser(prog="python -m ppap.pretraining.export", description=main.__doc__)
    parser.add_argument("source", type=Path, help="folder that pretraining wrote, such as RUN/backbone")
    parser.add_argument("target", type=Path, help="folder to write")
    options = parser.parse_args(argv)
    backbone = build_backbone(ModelConfig(weights=str(options.source)))
    try:
        origin = json.loads((options.source / "config.json").read_text(encoding="utf-8"))["origin"]
    except (OSError, ValueError, KeyError):
        raise DataError(f"{options.source} is no folder that pretraining wrote; give RUN/backbone") from None
    export_backbone(backbone, options.target, origin, half=True)


if __name__ == "__main__":
    sys.exit(run(main))
