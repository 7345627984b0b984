"""Data, oracles and measures that several test files share."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench.shapes import clustered
from ppap.kernels import PropagationConfig, native

GOLDEN = Path(__file__).parent / "golden"


@dataclass
class LossCase:
    """Inputs of the whole loss and, for the stored cases, the published code's results in float64."""

    features: torch.Tensor
    z: torch.Tensor
    anchors: torch.Tensor | None
    cfg: PropagationConfig
    temperature: float
    group_size: int | None = None
    loss: float | None = None
    dz: torch.Tensor | None = None
    mean_positives: float | None = None
    mean_below_psi: float | None = None

    def to(self, dtype: torch.dtype) -> "LossCase":
        values = {**vars(self), "features": self.features.to(dtype), "z": self.z.to(dtype)}
        return LossCase(**values)


def golden_case(name: str) -> LossCase:
    """One stored result of the published code."""
    data = np.load(GOLDEN / f"loss_{name}.npz")
    cfg = PropagationConfig(
        *(float(data[key]) for key in ("phi0", "psi0")),
        steps=int(data["steps"]),
        sigma_pos=float(data["sigma_pos"]),
        sigma_amb=float(data["sigma_amb"]),
    )
    return LossCase(
        torch.from_numpy(data["features"]),
        torch.from_numpy(data["z"]),
        torch.from_numpy(data["anchors"]),
        cfg,
        float(data["temperature"]),
        int(data["anchors_per_chunk"]),
        float(data["loss"]),
        torch.from_numpy(data["grad_z"]),
        float(data["mean_positives"]),
        float(data["mean_below_psi"]),
    )


GOLDEN_NAMES = ("t2", "t3_sparse", "overlap")


def made_case(
    rows: int, width: int, anchors: int | None, cfg: PropagationConfig, temperature: float
) -> LossCase:
    """A seeded case on clustered features, in float64."""
    g = torch.Generator().manual_seed(rows + width)
    chosen = None if anchors is None else torch.randperm(rows, generator=g)[:anchors]
    features = clustered(rows, width, seed=rows, clusters=5).double()
    z = torch.nn.functional.normalize(torch.randn(rows, width + 1, generator=g, dtype=torch.float64), dim=1)
    return LossCase(features, z, chosen, cfg, temperature)


PLAIN = PropagationConfig()
CASES = [
    pytest.param(lambda: made_case(203, 32, 37, PLAIN, 0.3), id="ragged"),
    pytest.param(lambda: made_case(64, 16, None, PLAIN, 0.8), id="every patch an anchor"),
    pytest.param(lambda: made_case(203, 32, 37, PropagationConfig(steps=0), 0.3), id="no step"),
    pytest.param(
        lambda: made_case(203, 32, 37, PropagationConfig(phi0=5.0, psi0=0.1), 0.3), id="no positives"
    ),
    pytest.param(
        lambda: made_case(90, 16, 11, PropagationConfig(phi0=-2.0, psi0=-1.5), 0.3), id="all positives"
    ),
    pytest.param(lambda: made_case(120, 16, 30, PropagationConfig(0.3, 0.6, 3), 0.1), id="psi above phi"),
    pytest.param(lambda: made_case(1, 16, 1, PLAIN, 0.3), id="one patch"),
    pytest.param(lambda: made_case(30, 16, 0, PLAIN, 0.3), id="no anchors"),
    pytest.param(
        lambda: made_case(203, 32, 37, PropagationConfig(trustworthy_positives=False), 0.3),
        id="anchors' positives",
    ),
    pytest.param(
        lambda: made_case(203, 32, 37, PropagationConfig(ambiguity_excluded=False), 0.3),
        id="ambiguous are negatives",
    ),
    pytest.param(
        lambda: made_case(
            203, 32, 37, PropagationConfig(trustworthy_positives=False, ambiguity_excluded=False), 0.3
        ),
        id="fixed threshold",
    ),
]


class _Allocations(TorchDispatchMode):
    """Bytes of storages made while active and still alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.alive, self.live, self.peak = {}, 0, 0

    def _forget(self, key: int) -> None:
        self.live -= self.alive.pop(key, 0)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {
            t.untyped_storage()._cdata
            for t in torch.utils._pytree.tree_leaves((args, kwargs))
            if torch.is_tensor(t)
        }
        for tensor in torch.utils._pytree.tree_leaves(result):
            if not torch.is_tensor(tensor):
                continue
            storage = tensor.untyped_storage()
            if storage._cdata in given or storage._cdata in self.alive:
                continue
            self.alive[storage._cdata] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, storage._cdata)
        return result


def peak_bytes(run: Callable[[], object]) -> int:
    """Largest sum of live tensor bytes that `run` allocates; `run` must not go through a registered op."""
    with _Allocations() as allocations:
        run()
    return allocations.peak


def isas_to_build() -> list[str]:
    """For ``csrc/build.py --isas``: what runs here beside the portable form; others take long to compile."""
    best = next(iter(native.available_isas()))
    return [best] if best != "portable" else []
