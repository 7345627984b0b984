"""How many kernels a step launches: on a GPU each costs the host as much time as thousands of products."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import GridExecutor

from ppap.kernels import PropagationConfig
from ppap.kernels.ppap_loss import triton_impl
from ppap.kernels.ppap_loss.settings import Settings
from ppap.kernels.tiles import planes
from tests.helpers import LossCase, made_case
from tests.interpreted.test_loss import BLOCK, budget_of_chunks

# Ops that launch nothing on a GPU.
FREE = (
    "empty",
    "permute",
    "view",
    "slice",
    "select",
    "expand",
    "as_strided",
    "transpose",
    "detach",
    "alias",
    "t.default",
)


class Launches(TorchDispatchMode):
    """Counts Triton kernels and torch ops."""

    def __init__(self, monkeypatch) -> None:
        super().__init__()
        self.kernels, self.ops = [], []
        launch = GridExecutor.__call__

        def counted(executor, *args, **options):
            self.kernels.append(executor.fn.__name__)
            with torch.utils._python_dispatch._disable_current_modes():
                return launch(executor, *args, **options)

        monkeypatch.setattr(GridExecutor, "__call__", counted)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).removeprefix("aten.")
        if not name.startswith(FREE):
            self.ops.append(name)
        return func(*args, **(kwargs or {}))

    def __len__(self) -> int:
        return len(self.kernels) + len(self.ops)


@pytest.fixture
def launches(monkeypatch):
    """launches(case, budget): those of one step; products count as one op each, as on a GPU."""

    def product(a, b, out=None):
        if out is None:
            out = torch.empty(a.shape[0], b.shape[1])
        return out.fill_(1.0)

    monkeypatch.setattr(planes, "product", product)
    monkeypatch.setattr(planes, "add_product", lambda target, a, b: target.fill_(1.0))

    def run(case: LossCase, budget: int, precision: str) -> int:
        settings = Settings(case.cfg, 0.3, 0.07, 8, True, precision, budget)
        with Launches(monkeypatch) as counted:
            triton_impl.guarded_loss(case.features, case.z, case.anchors, settings)
        return len(counted)

    return run


@pytest.mark.parametrize(("precision", "most"), [("fp16", 21), ("fp32", 23)])
def test_launches_of_a_chunk_and_of_a_call(launches, precision, most):
    case = made_case(200, 63, 3 * BLOCK, PropagationConfig(), 0.3).to(torch.float32)
    one, two, three = (
        launches(case, budget_of_chunks(case, rows, precision), precision)
        for rows in (3 * BLOCK, 2 * BLOCK, BLOCK)
    )
    assert three - two <= most, "of another chunk"
    assert one <= most + 22, "of a call of one chunk"
