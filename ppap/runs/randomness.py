"""torch's global generators: their state, set and kept apart; and orders that do not touch them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor


def random_state(device: torch.device) -> dict[str, Tensor | None]:
    """State of the CPU's generator and of `device`'s own (None where it is the CPU)."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_random_state(state: Mapping[str, Tensor | None], device: torch.device) -> None:
    """Inverse of :func:`random_state`; the generator of another kind of device is left as it is."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)


@contextmanager
def own_randomness() -> Iterator[None]:
    """Leave torch's global generators as they were before."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        yield


def drawn_order(count: int, seed: int, stream: int) -> np.ndarray:
    """A permutation of 0..count-1, a pure function of its arguments: (count,) int64.

    Args:
        count: numbers to order.
        seed: 0 to 2^64 - 1.
        stream: draws of one seed that must not be alike have numbers of their own.
    """
    # Raw counter-based bits, which NumPy promises to keep.
    bits = np.random.Philox(counter=[0, 0, 0, stream], key=[seed, 0]).random_raw(count)
    return bits.argsort(kind="stable")
