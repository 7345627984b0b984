"""Search for the fastest launch configuration on the device at hand (PPAP_AUTOTUNE=1), kept on disk."""

import functools
import json
import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import torch
import triton
from triton.errors import TritonError

from ..cache import cache_folder

logger = logging.getLogger("ppap.kernels")

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_Config = TypeVar("_Config", bound="DataclassInstance")


def cache_file(device: torch.device) -> Path:
    """Where the findings for `device` are kept."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    safe = "".join(letter if letter.isalnum() else "-" for letter in name)
    return cache_folder() / "autotune" / f"{safe}-triton-{triton.__version__}.json"


@functools.cache
def _known(path: Path) -> dict[str, dict[str, object]]:
    try:
        found = json.loads(path.read_text())
        if isinstance(found, dict):
            return found
        raise ValueError("not a table of findings")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        logger.warning("autotune: %s is not readable (%s); it is searched anew", path, error)
        return {}


def fastest(
    key: Sequence[object],
    device: torch.device,
    shipped: _Config,
    others: Sequence[_Config],
    go: Callable[[_Config], object],
    timer: Callable[[Callable[[], object]], float] = triton.testing.do_bench,
) -> _Config:
    """The configuration that runs quickest, from the cache file or by timing all of them.

    Configurations that do not compile or exceed the device's resources are passed over; the shipped one must
    run.

    Args:
        key: what is launched: kernel, types, sizes.
        device: where.
        shipped: the configuration used without a search.
        others: what to try besides.
        go: launches the kernel in a configuration.
        timer: milliseconds of a call.
    """
    path, name = cache_file(device), " ".join(map(str, key))
    known = _known(path)
    for config in (shipped, *others):
        if known.get(name) == asdict(config):
            return config
    # Not searched yet, or what was found is no choice of this version.
    timings = [(timer(partial(go, shipped)), shipped)]
    for config in others:
        try:
            timings.append((timer(partial(go, config)), config))
        except TritonError as error:
            logger.debug("autotune: %s does not run: %s", config, error)
    best_ms, best = min(timings, key=lambda timing: timing[0])
    logger.info("autotune: %s: %s, %.3f ms (shipped %.3f ms)", name, best, best_ms, timings[0][0])
    known[name] = asdict(best)
    _save(path, known)
    return best


def _save(path: Path, known: dict[str, dict[str, object]]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "w") as file:
            json.dump(known, file, indent=1)
        os.replace(temporary, path)
    except OSError as error:
        logger.warning("autotune: findings are not kept, %s cannot be written (%s)", path, error)
