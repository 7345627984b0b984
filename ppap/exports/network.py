"""A run's network with everything around it in one module: pixels in, logits and labels out.

Legend: B images, H W pixels, K channels of the probe. ``files.py`` writes it, ``check.py`` compares what was
written with the predictor.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ppap import __version__
from ppap.data.transforms import MEAN, STD
from ppap.errors import UsageError
from ppap.evaluation.predictor import MAX_TOKENS, Predictor
from ppap.exports.positions import FixedPosition, position_by_products
from ppap.nets.backbone import Backbone
from ppap.nets.probes import upsample
from ppap.reports.sharing import public_origin


class ExportedNetwork(nn.Module):
    """What ``ppap predict`` computes without CRF, of images at the size that the network sees.

    Normalisation, positions, the probe, and the ids of a run or of a user's names are part of it. It computes
    in fp32 on the CPU, whatever precision the run was trained with.
    """

    def __init__(self, predictor: Predictor, probe: str) -> None:
        """Args: a run, and its probe: cluster or linear."""
        super().__init__()
        engine = predictor.engine
        self.net, self.patch = engine.net, engine.net.backbone.patch_size
        if probe == "linear":
            weight, bias = engine.linear.classifier.weight, engine.linear.classifier.bias
        else:
            weight = F.normalize(engine.cluster.clusters.float(), dim=1)[:, :, None, None]
            bias = torch.zeros(len(weight))
        self.register_buffer("weight", weight.detach().float().clone())
        self.register_buffer("bias", bias.detach().float().clone())
        self.register_buffer("ids", predictor.table(predictor.lookout(probe)))
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(STD).view(3, 1, 1))
        self.eval().requires_grad_(False)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and labels of every pixel.

        Args:
            image: (B, 3, H, W) float32 RGB, 0 to 1.

        Returns:
            (B, K, H, W) float32 scores, for clusters products of the code with unit centres, and
            (B, H, W) int64 ids of the largest; -1 = no class.
        """
        code = self.net.code((image - self.mean) / self.std).float()
        scores = F.conv2d(code, self.weight, self.bias)
        logits = upsample(scores, self.patch, (image.shape[2], image.shape[3]))
        return logits, self.ids[logits.argmax(dim=1)]


@contextmanager
def fit_for_graph(backbone: Backbone, size: tuple[int, int], dynamic: bool) -> Iterator[None]:
    """While it is written, a backbone has positions that a graph can hold.

    Args:
        backbone: in place.
        size: (H, W) of images [pixels].
        dynamic: whether other sizes are to follow.
    """
    before = backbone.resize
    embedding = backbone.vit.pos_embed
    if dynamic:
        backbone.resize = position_by_products
    elif embedding is not None:
        grid = (-(-size[0] // backbone.patch_size), -(-size[1] // backbone.patch_size))
        backbone.resize = FixedPosition(backbone.position(grid))
    try:
        yield
    finally:
        del backbone.resize  # of a module: it would stay among the submodules
        backbone.resize = before


def check_size(predictor: Predictor, size: tuple[int, int], dynamic: bool) -> None:
    """Refuse sizes that cannot be exported, before anything is written.

    Raises:
        UsageError: a side below a patch, more patches than ``ppap predict`` takes, or a network whose
            positions hold for one size only.
    """
    backbone = predictor.engine.net.backbone
    if min(size) < backbone.patch_size:
        raise UsageError(
            f"--size {size[0]} {size[1]} is smaller than a patch; give at least {backbone.patch_size} pixels"
        )
    tokens = -(-size[0] // backbone.patch_size) * -(-size[1] // backbone.patch_size)
    if tokens > MAX_TOKENS:
        raise UsageError(
            f"--size {size[0]} {size[1]} gives {tokens} patches of {backbone.patch_size} pixels, the limit "
            f"is {MAX_TOKENS}; give a smaller one"
        )
    if dynamic and getattr(backbone.vit, "rope", None) is not None:
        raise UsageError(
            f"--dynamic-size: the rotary positions of {backbone.name} are formed for one size of images; "
            "leave it out and give --size"
        )


def described(predictor: Predictor, probe: str, size: tuple[int, int], dynamic: bool) -> dict[str, str]:
    """What the file says of itself: names, ids and colours, mean, deviation and size, each value a JSON."""
    names, ids, colours = predictor.names(probe), predictor.ids(probe), predictor.colours(probe)
    named = predictor.named if probe == "cluster" else None
    values = {
        "ppap": __version__,
        "input": "image: batch x 3 x height x width, float32 RGB, 0 to 1; mean and std are applied inside",
        "outputs": "logits: batch x channel x height x width; labels: batch x height x width, -1 = no class",
        "mean": MEAN,
        "std": STD,
        "size": "dynamic" if dynamic else list(size),
        "resolution": predictor.engine.config.data.eval_resolution,
        "patch": predictor.engine.net.backbone.patch_size,
        "probe": probe,
        "method": predictor.engine.config.method,
        "backbone": public_origin(predictor.origin),
        "names": names,
        "ids": ids,
        "colours": colours.tolist(),
        "channel_ids": predictor.table(predictor.lookout(probe)).tolist(),
        "named_by": {**named.record(), "file": Path(named.path).name} if named else None,
    }
    return {key: json.dumps(value, ensure_ascii=False) for key, value in values.items()}
