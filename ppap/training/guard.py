"""Around the training loop: its backend, the data it began with, and what it says when memory ends."""

from typing import Any

import torch

from ppap.data import Datasets
from ppap.errors import UsageError, out_of_memory
from ppap.kernels import dispatch
from ppap.methods.engine import Engine
from ppap.reports.provenance import device_name


def backend_of(device: torch.device) -> str:
    """Kernel backend of the loss on a device; refuses wrong PPAP_ variables before any work."""
    try:
        dispatch.check_environment()
        return dispatch.choose(None, torch.empty(0, device=device))
    except (ValueError, RuntimeError) as error:
        raise UsageError(str(error)) from None


def step_text(engine: Engine, backend: str) -> str:
    """What a step of a run consists of, and what it is computed by, for people."""
    config, device = engine.config, engine.device
    side = -(-config.data.resolution // engine.net.backbone.patch_size)
    images, patches = config.train.batch_size, side * side * config.train.batch_size
    return (
        f"step: {images} images, {patches} patches, method {config.method}, "
        f"{engine.method.describe(patches)}; "
        f"{device_name(device)}, {backend} backend, autocast {engine.amp or 'off'}"
    )


def data_facts(data: Datasets) -> dict[str, Any]:
    """What stands for the training images in a checkpoint."""
    return {"train": data.train.fingerprint(), "images": len(data.train)}


def changed_data(info: dict[str, Any], now: dict[str, Any]) -> str | None:
    """What to say where a run goes on with other images or labels than it was begun with.

    Args:
        info: of the checkpoint; those of earlier versions hold no facts, and nothing is said.
        now: :func:`data_facts` of the data at hand.
    """
    before = info.get("data")
    if before is None or before["train"] == now["train"]:
        return None
    numbers = f" ({before['images']} images then, {now['images']} now)"
    changed = numbers if before["images"] != now["images"] else ""
    return (
        f"warning: the training images or labels are not those that the run was begun with{changed}: from "
        "here on it is not, bit for bit, the run that it would have been (a benchmark that was moved or "
        "copied counts as changed)"
    )


def memory_error(error: BaseException, path: Any) -> UsageError | None:
    """The one line for memory that is exhausted; None for other errors."""
    if not out_of_memory(error):
        return None
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return UsageError(
        f"memory is exhausted ({reason}). The run is saved: where there is more memory, or with "
        f"--eval.batch-size or --data.workers smaller, python -m ppap.train --resume {path} goes on; a new "
        "run needs less with a smaller --train.batch-size, --data.resolution, --loss.memory-budget-mib or "
        "--compare.images, or with --data.no-cache-features"
    )
