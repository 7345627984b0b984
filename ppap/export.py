"""Write a run's network as ONNX or TorchScript, or a folder of its masks as COCO, for CVAT or Datumaro.

`ppap export RUN --format onnx` writes one file: pixels in, logits and labels out, as ppap predict finds them
without CRF. `ppap export MASKS --format coco-panoptic` takes a folder of ppap predict, names and colours
from its legend. Nothing is written over.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ppap.cli import parse, run
from ppap.errors import UsageError
from ppap.exports.command import (
    MASK_FORMATS,
    NETWORK_FORMATS,
    NetworkOptions,
    check_format,
    export_masks,
    export_network,
)
from ppap.exports.places import check_new


@dataclass(frozen=True, kw_only=True)
class ExportArguments(NetworkOptions):
    """Options of ``ppap export``."""

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN_OR_MASKS")]
    """Run directory or checkpoint folder, for onnx and torchscript; else a folder of `ppap predict`."""
    format: Literal["onnx", "torchscript", "coco-panoptic", "coco-instances", "cvat", "datumaro"]
    """Of networks: onnx, torchscript. Of masks: coco-panoptic, coco-instances, cvat (Segmentation mask 1.1),
    datumaro."""
    out: str
    """New file (onnx, torchscript, cvat: a zip) or folder (the others)."""
    images: tuple[str, ...] = ()
    """Of masks: the image files or folders that `ppap predict` was given, whose names and suffixes the export
    then has; none = NAME.jpg."""
    with_images: bool = False
    """Of masks: copy the images too."""


def main(argv: Sequence[str]) -> None:
    """Command ``export``."""
    arguments = parse(ExportArguments, argv, command="export", description=__doc__)
    out, network = Path(arguments.out), arguments.format in NETWORK_FORMATS
    _refuse_foreign_options(arguments, network)
    check_format(arguments.format)
    check_new(out)
    if network:
        print(export_network(arguments.source, arguments.format, out, arguments))
    else:
        print(export_masks(arguments.source, arguments.format, out, arguments.images, arguments.with_images))


def _refuse_foreign_options(arguments: ExportArguments, network: bool) -> None:
    """Refuse options that the other kind of export has."""
    default = NetworkOptions()
    given = [name for name in vars(default) if getattr(arguments, name) != getattr(default, name)]
    if network:
        given = [name for name in ("images", "with_images") if getattr(arguments, name)]
    if given:
        others = MASK_FORMATS if network else NETWORK_FORMATS
        raise UsageError(
            f"--{given[0].replace('_', '-')} is for --format {', '.join(others)}; leave it out with "
            f"--format {arguments.format}"
        )
    if arguments.with_images and not arguments.images:
        raise UsageError("--with-images copies those of --images; give them")


if __name__ == "__main__":
    sys.exit(run(main))
