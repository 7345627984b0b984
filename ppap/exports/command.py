"""What ``ppap export`` does: all is checked first, and a file or folder gets its name when it is whole."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ppap.errors import UsageError
from ppap.evaluation.predictor import Predictor, load
from ppap.exports.check import compare
from ppap.exports.coco import write_instances, write_panoptic
from ppap.exports.files import open_onnx, open_torchscript, write_onnx, write_torchscript
from ppap.exports.labelling import check_names, write_cvat, write_datumaro
from ppap.exports.masks import open_masks
from ppap.exports.network import ExportedNetwork, check_size, described
from ppap.exports.places import beside, require

NETWORK_FORMATS = {"onnx": write_onnx, "torchscript": write_torchscript}
MASK_FORMATS = {
    "coco-panoptic": write_panoptic,
    "coco-instances": write_instances,
    "cvat": write_cvat,
    "datumaro": write_datumaro,
}
_PACKAGES = {
    "onnx": ("onnx", "onnxscript"),
    "coco-instances": ("pycocotools",),
    "cvat": ("datumaro",),
    "datumaro": ("datumaro",),
}
"""Format -> packages that it needs."""


@dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """How a network is exported."""

    probe: Literal["cluster", "linear"] = "cluster"
    """Of networks: cluster = found without labels; linear = trained with labels."""
    names: str | None = None
    """Of networks: names.json of `ppap atlas`: labels have its ids and merges. Masks have theirs already."""
    size: tuple[int, int] | None = None
    """Of networks: height and width [pixels]; None = a square of the run's --data.eval-resolution."""
    dynamic_size: bool = False
    """Of networks: images of any size, which may differ from call to call; not with rotary positions."""

    def __post_init__(self) -> None:
        if self.names is not None and self.probe != "cluster":
            raise UsageError(f"--names are of clusters, --probe is {self.probe!r}; leave one of them out")
        if self.size is not None and min(self.size) < 1:
            raise UsageError(f"--size is {self.size[0]} {self.size[1]}; give at least 1 pixel")


def check_format(kind: str) -> None:
    """Refuse a format whose packages are not installed.

    Raises:
        UsageError: names them and the remedy.
    """
    if kind in _PACKAGES:
        require(_PACKAGES[kind], f"--format {kind}")


def export_network(source: str, kind: str, out: Path, options: NetworkOptions) -> str:
    """Write the network of a run, and compare the file with the predictor.

    Args:
        source: run directory or checkpoint folder.
        kind: one of ``NETWORK_FORMATS``.
        out: new file.
        options: how.

    Returns:
        What was written, for people.

    Raises:
        UsageError: something that cannot be exported, or is there already.
        DataError: no such run, names of another run, or the disk refuses.
        NumberError: the file says something else than the predictor.
    """
    predictor = load(source, "cpu", names=options.names)
    predictor.engine.amp = None  # the graph is fp32, and is compared with fp32
    side = predictor.engine.config.data.eval_resolution
    size, dynamic = options.size or (side, side), options.dynamic_size
    check_size(predictor, size, dynamic)
    network = ExportedNetwork(predictor, options.probe)
    print(f"backbone: {predictor.origin}")
    with beside(out) as path:
        NETWORK_FORMATS[kind](
            network, path, size, dynamic, described(predictor, options.probe, size, dynamic)
        )
        print(_compared(predictor, options, kind, path, size))
    shape = "any height x any width" if dynamic else f"{size[0]} x {size[1]}"
    return f"{out}: images (batch, 3, {shape}), RGB from 0 to 1 -> logits, labels"


def _compared(
    predictor: Predictor, options: NetworkOptions, kind: str, path: Path, size: tuple[int, int]
) -> str:
    if kind == "onnx" and importlib.util.find_spec("onnxruntime") is None:
        return "not compared with torch: onnxruntime is not installed: pip install onnxruntime"
    running = open_onnx(path) if kind == "onnx" else open_torchscript(path)
    patch = predictor.engine.net.backbone.patch_size
    # Another shape, whose sides no patch divides.
    others = [(size[0] + 2 * patch + 1, max(size[1] - patch - 1, patch))] if options.dynamic_size else []
    return compare(predictor, options.probe, running, [size, *others]).line()


def export_masks(source: str, kind: str, out: Path, images: Sequence[str], with_images: bool) -> str:
    """Write a folder of masks in another format.

    Args:
        source: folder of ``ppap predict``.
        kind: one of ``MASK_FORMATS``.
        out: new folder, or file.
        images: the images of the masks; empty = none.
        with_images: copy them too.

    Returns:
        What was written, for people.

    Raises:
        UsageError: the folder is not finished, or `out` is there already.
        DataError: no masks, masks of another run, names that the format cannot hold, or the disk refuses.
    """
    masks = open_masks(source, images)
    if out.resolve().is_relative_to(masks.folder.resolve()):
        raise UsageError(f"--out {out} lies in the folder of the masks; give another")
    if kind == "cvat":
        check_names(masks)
    with beside(out) as path:
        said = MASK_FORMATS[kind](masks, path, with_images)
    return f"{out}: {said}"
