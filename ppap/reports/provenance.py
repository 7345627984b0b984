"""Where a number comes from: the record that every file of results carries under the key ``provenance``.

Whoever has the file alone knows which settings, weights, software and hardware it came from.
"""

import hashlib
import platform
from collections.abc import Mapping
from typing import Any

import timm
import torch
from safetensors.torch import save
from torch import Tensor

from ppap import __version__
from ppap.kernels import dispatch
from ppap.methods.engine import amp_type
from ppap.runs.checkpoint import Checkpoint
from ppap.settings.config import Config, config_hash, to_dict


def provenance(
    config: Config,
    device: torch.device,
    weights: Checkpoint | Mapping[str, Tensor],
    *,
    step: int | None = None,
    selection: str | None = None,
    crf: str = "none",
) -> dict[str, Any]:
    """Everything a number follows from, as plain containers for JSON.

    Args:
        config: the settings that were in force, command line included.
        device: what it was computed on.
        weights: the checkpoint that was measured, or the tensors by name of a network that lies in none, such
            as an untouched backbone.
        step: training step of tensors that lie in no checkpoint; None = they were not trained.
        selection: why these weights; None = what the checkpoint says.
        crf: the implementation that ran, as :func:`ppap.evaluation.crf.crf_implementation` names it, or
            ``none``.

    Returns:
        ``preset``, ``method``, ``protocol``, ``seed``, ``settings`` (hash) and ``config`` (all of it),
        ``versions``,
        ``device``, ``backend`` (of the loss' kernels on this device), ``precision`` (of the forward pass, of
        the loss), ``crf``, and ``weights``: sha256 of their safetensors file and, for a checkpoint, path,
        step and selection.
    """
    forward = str(amp_type(config.optim.amp, device) or torch.float32).removeprefix("torch.")
    loss = forward if config.loss.precision == "auto" else config.loss.precision
    return {
        "preset": config.preset,
        "method": config.method,
        "protocol": config.protocol,
        "seed": config.train.seed,
        "settings": config_hash(config),
        "config": to_dict(config),
        "versions": versions(),
        "device": device_name(device),
        "backend": dispatch.choose(None, torch.empty(0, device=device)),
        "precision": {"forward": forward, "loss": loss},
        "crf": crf,
        "weights": _weights(weights, step, selection),
    }


def versions() -> dict[str, str]:
    """Versions of what computes: ppap, torch, timm and Python."""
    return {
        "ppap": __version__,
        "torch": torch.__version__,
        "timm": timm.__version__,
        "python": platform.python_version(),
    }


def device_name(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"


def weights_sha256(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of the safetensors file that these tensors would make.

    For the weights of a checkpoint it is that of its ``model.safetensors``.
    """
    contiguous = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    return hashlib.sha256(save(contiguous)).hexdigest()


def _weights(
    weights: Checkpoint | Mapping[str, Tensor], step: int | None, selection: str | None
) -> dict[str, Any]:
    if not isinstance(weights, Checkpoint):
        return {"checkpoint": None, "step": step, "selection": selection, "sha256": weights_sha256(weights)}
    return {
        "checkpoint": str(weights.path),
        "step": weights.info["step"],
        "selection": selection or weights.selection,
        "sha256": weights.sha256,
    }
