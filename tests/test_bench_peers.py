"""Other packages' losses in ``python -m bench.gpu``: the truth for them, and how they are called."""

import sys
import time
from dataclasses import replace
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from bench.gpu import peers
from bench.gpu.peers import PEERS, Peer, Problem, Row

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def problem() -> Problem:
    return Problem.of(70, CPU)


def cross_entropy(queries: torch.Tensor, keys: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(queries.float() @ keys.float().T, right)


def installed(monkeypatch, name: str, **functions: object) -> None:
    module = ModuleType(name)
    vars(module).update(functions)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def packages(monkeypatch):
    """What stands for the packages: their interfaces, with products in plain torch."""

    class MemoryEfficientCLIPLoss:
        def __init__(self, temperature=0.07, normalized_inputs=False, stable=True, tau_plus=0.0):
            assert normalized_inputs and not stable, "gradients would be of other inputs, or scaled"
            self.temperature = temperature

        def __call__(self, x, y):
            right = torch.arange(len(x))
            x = x / self.temperature
            return (cross_entropy(x, y, right) + cross_entropy(y, x, right)) / 2

    def cal_flash_loss(q, k, labels=None, scale=None, head_dim=256):
        assert q.shape[1] % head_dim == 0
        return F.cross_entropy(scale * q @ k.T, labels, reduction="none")

    def linear_cross_entropy(e, c, targets, ignore_index=-100, softcap=None, reduction="mean"):
        assert e.dtype == c.dtype == torch.float16
        return cross_entropy(e, c, targets)

    installed(monkeypatch, "memeff", MemoryEfficientCLIPLoss=MemoryEfficientCLIPLoss)
    installed(monkeypatch, "inf_cl", cal_flash_loss=cal_flash_loss)
    installed(monkeypatch, "cut_cross_entropy", linear_cross_entropy=linear_cross_entropy)


@pytest.mark.parametrize("both", [False, True])
def test_the_truth_is_that_of_autograd(problem, both):
    queries, keys = (t.detach().double().requires_grad_() for t in (problem.queries, problem.keys))
    loss = F.cross_entropy(queries @ keys.T / peers.TAU, problem.right)
    if both:
        loss = (loss + F.cross_entropy(keys @ queries.T / peers.TAU, problem.right)) / 2
    wanted = loss.detach(), *torch.autograd.grad(loss, (queries, keys))
    for value, true in zip(problem.truth[both], wanted, strict=True):
        torch.testing.assert_close(value, true, rtol=1e-12, atol=1e-14)


def test_packages_are_asked_for_the_same_loss(problem, packages):
    rows = {peer.package: peers._measure(peer, problem, 1) for peer in PEERS if peer.package}
    assert set(rows) == {"cut-cross-entropy", "inf-cl", "memeff"}
    for package, row in rows.items():
        assert row.note == "" and row.ms > 0, package
        limit = 1e-3 if package == "cut-cross-entropy" else 1e-5
        assert row.loss < limit and row.gradient < limit, package


def test_what_is_not_there_or_wrong_or_fails_is_said_and_the_rest_is_timed(problem, monkeypatch):
    def fails(problem: Problem) -> torch.Tensor:
        raise RuntimeError("no such GPU")

    torch_form = next(peer for peer in PEERS if "materialised" in peer.title)
    half = replace(torch_form, title="half", loss=lambda p: torch_form.loss(p) / 2)
    nowhere = Peer("nowhere", "no-such-package", torch_form.loss)
    found: list[Row] = []
    monkeypatch.setattr(peers, "PEERS", (torch_form, half, nowhere, replace(half, title="bad", loss=fails)))
    monkeypatch.setattr(peers, "_whole_loss", lambda problem, rounds: Row("whole"))
    monkeypatch.setattr(peers.Problem, "of", lambda rows, device: problem)
    said = peers.compare(70, CPU, found.append, 1, time.monotonic() + 60)
    assert said.startswith("half: WRONG, not timed") and "bad: failed: RuntimeError" in said
    assert [row.note.split(":")[0] for row in found] == [
        "",
        "WRONG, not timed",
        "not measured",
        "failed",
        "not measured",
    ]
    table = peers.report(found, 70)
    assert len(table) == 4 + len(found) and f"{found[0].ms:,.2f} ms" in table[4]
    assert "no such GPU" in table[7]
    assert peers.compare(70, CPU, found.append, 1, time.monotonic() - 1) == "not finished: no time"
