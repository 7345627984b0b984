"""Files of networks for other programs: ONNX by torch's exporter, and TorchScript."""

import json
import logging
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ppap.errors import UsageError
from ppap.exports.network import ExportedNetwork, fit_for_graph

OPSET = 18
"""Of ONNX; onnxruntime 1.14 and later run it."""
INPUT, OUTPUTS = "image", ("logits", "labels")
Running = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Images (B, 3, H, W), 0 to 1 -> logits (B, K, H, W), labels (B, H, W)."""


def write_onnx(
    network: ExportedNetwork, path: Path, size: tuple[int, int], dynamic: bool, metadata: Mapping[str, str]
) -> None:
    """Write an ONNX file, weights inside; those of more than 2 GB stand in FILE.data beside it.

    Args:
        network: what to write.
        path: new file.
        size: (H, W) of images [pixels].
        dynamic: other sizes too; the batch is always free.
        metadata: properties of the model.

    Raises:
        UsageError: torch cannot export this network so.
    """
    import onnx

    free = torch.export.Dim.DYNAMIC
    axes = {0: free, 2: free, 3: free} if dynamic else {0: free}
    with _exporting(network, size, dynamic, "onnx") as image:
        program = torch.onnx.export(
            network,
            (image,),
            input_names=[INPUT],
            output_names=list(OUTPUTS),
            opset_version=OPSET,
            dynamo=True,
            dynamic_shapes=(axes,),
            verbose=False,
        )
        _name_axes(program)
        _forget_sources(program)
        program.model.metadata_props.update(metadata)
        program.save(str(path), external_data=False)
        onnx.checker.check_model(str(path))


def write_torchscript(
    network: ExportedNetwork, path: Path, size: tuple[int, int], dynamic: bool, metadata: Mapping[str, str]
) -> None:
    """Write a TorchScript file, traced; arguments as those of :func:`write_onnx`.

    The metadata is its extra file ``ppap.json``, an object of the values.

    Raises:
        UsageError: torch cannot export this network so.
    """
    values = {key: json.loads(value) for key, value in metadata.items()}
    with _exporting(network, size, dynamic, "torchscript") as image:
        traced = torch.jit.trace(network, (image,), check_trace=False)
        torch.jit.save(traced, str(path), _extra_files={"ppap.json": json.dumps(values, ensure_ascii=False)})
        _forget_lines(path)


def open_onnx(path: Path) -> Running:
    """What onnxruntime makes of a file, on the CPU."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(image: Tensor) -> tuple[Tensor, Tensor]:
        logits, labels = session.run(list(OUTPUTS), {INPUT: np.ascontiguousarray(image.numpy())})
        return torch.from_numpy(logits), torch.from_numpy(labels)

    return run


def open_torchscript(path: Path) -> Running:
    """What torch makes of a TorchScript file, on the CPU."""
    with _quiet():
        loaded = torch.jit.load(str(path), map_location="cpu")

    def run(image: Tensor) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return loaded(image)

    return run


def _name_axes(program: "torch.onnx.ONNXProgram") -> None:
    """Free axes are called what they are, not s0, s1."""
    for value in (*program.model.graph.inputs, *program.model.graph.outputs):
        names = {0: "batch", len(value.shape) - 2: "height", len(value.shape) - 1: "width"}
        for axis, name in names.items():
            if not isinstance(value.shape[axis], int):
                value.shape[axis] = name


def _forget_sources(program: "torch.onnx.ONNXProgram") -> None:
    """Nodes do not say which lines, of which file of this machine, they were made of."""
    for graph in (program.model.graph, *program.model.functions.values()):
        for node in graph:
            node.metadata_props.clear()
            for value in node.outputs:
                value.metadata_props.clear()


def _forget_lines(path: Path) -> None:
    """The same of TorchScript, whose archive has a file of lines for every file of code."""
    kept = path.with_name(f"{path.name}.kept")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(kept, "w", zipfile.ZIP_STORED) as new:
        for part in old.infolist():
            if not part.filename.endswith(".debug_pkl"):
                new.writestr(zipfile.ZipInfo(part.filename), old.read(part))
    kept.replace(path)


@contextmanager
def _exporting(network: ExportedNetwork, size: tuple[int, int], dynamic: bool, kind: str) -> Iterator[Tensor]:
    """An image to export with, and torch's many errors as one."""
    # Two images: an axis of one would be taken for fixed.
    image = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad(), _quiet(), fit_for_graph(network.net.backbone, size, dynamic):
            network(image)  # fills what a network keeps per size
            yield image
    except OSError:
        raise
    except Exception as error:  # the exporters raise what they like
        reason = str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        remedy = "leave out --dynamic-size" if dynamic else "try another --format"
        raise UsageError(
            f"--format {kind}: torch {torch.__version__} cannot export this network ({reason}); {remedy}"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' remarks, which are about torch, not about the network."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
