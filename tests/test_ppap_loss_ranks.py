"""``ppap_loss`` of several processes against one process that has all patches."""

from pathlib import Path

import numpy as np
import pytest
import torch

from bench.scale import Load, sent_bytes
from ppap.kernels import PropagationConfig, ppap_loss
from tests.gloo_ranks import Pool
from tests.helpers import golden_case, made_case, peak_bytes


def share(group, rank, given, options):
    """Loss, gradient and counts of this rank's part; a module's function, for other processes."""
    device = f"cuda:{rank}" if torch.distributed.get_backend(group) == "nccl" else "cpu"
    features, z, anchors = (torch.from_numpy(values).to(device) for values in given)
    z = z.requires_grad_()
    loss, *counts = ppap_loss(features, z, anchors, return_counts=True, group=group, **options)
    if loss.dim():
        weights = torch.arange(1.0, len(loss) + 1, dtype=loss.dtype) * (rank + 1)
        (loss * weights).sum().backward()
    else:
        (loss * 3).backward()
    return [value.detach().cpu().numpy() for value in (loss, z.grad, *counts)]


def whole(case, options):
    z = case.z.clone().requires_grad_()
    loss, *counts = ppap_loss(case.features, z, case.anchors, return_counts=True, **options)
    (loss * 3).backward()
    return loss.detach(), z.grad, *counts


def cut(case, sizes):
    """Each rank's rows, and those of the anchors that are among them; anchors ascend by rank."""
    begins = np.cumsum([0, *sizes])
    anchors = torch.arange(len(case.z)) if case.anchors is None else case.anchors.sort().values
    case.anchors = anchors
    parts = []  # NumPy, which other processes get whole
    for begin, end in zip(begins, begins[1:], strict=False):
        own = anchors[(anchors >= begin) & (anchors < end)] - begin
        parts.append([t.numpy() for t in (case.features[begin:end], case.z[begin:end], own)])
    return parts


def options_of(case, **more):
    return {"cfg": case.cfg, "temperature": case.temperature, "group_size": case.group_size, **more}


SETTINGS = {
    "paper": PropagationConfig(),
    "tps": PropagationConfig(ambiguity_excluded=False),
    "ans": PropagationConfig(trustworthy_positives=False),
    "no step": PropagationConfig(steps=0),
    "none at all": PropagationConfig(phi0=2.0),
}
# Patches of each rank, anchors per group: groups begin on one rank and end on another, or span several.
CASES = [
    ("paper", (203,), 16),
    ("paper", (120, 83), None),
    ("paper", (150, 0, 53), 5),
    ("paper", (60, 43, 1, 99), 300),
    *((name, (60, 43, 1, 99), 16) for name in SETTINGS),
]


@pytest.mark.parametrize("exchange", ["gather", "ring"])
@pytest.mark.parametrize("impl", ["torch", "cpp"])
def test_ranks_equal_one_process(pool, exchange, impl):
    dtype, near = torch.float32, {"rtol": 1e-5, "atol": 1e-7}
    if impl == "torch":
        dtype, near = torch.float64, {"rtol": 1e-10, "atol": 1e-12}
    for name, sizes, group_size in CASES:
        case = made_case(203, 32, 61, SETTINGS[name], 0.3).to(dtype)
        case.group_size = group_size
        # A budget that takes several chunks of anchors, of one process and of a block.
        options = options_of(case, impl=impl, memory_budget=100_000)
        arguments = [(part, {**options, "exchange": exchange}) for part in cut(case, sizes)]
        found = pool.run(share, len(sizes), arguments)
        assert not [str(f) for f in found if isinstance(f, Exception)]
        loss, dz, *counts = whole(case, options)
        for of_rank in found:
            torch.testing.assert_close(torch.from_numpy(of_rank[0]), loss, **near)
        for k, expected in enumerate((dz, *counts), 1):
            together = torch.cat([torch.from_numpy(of_rank[k]) for of_rank in found])
            torch.testing.assert_close(together, expected, **near)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("impl", ["torch", "cpp"])
def test_anchors_without_positives_and_large_logits_spoil_no_gradient(pool, impl, precision):
    """Weights that count for nothing are of logits of hundreds, whose exponentials are infinite."""
    case = made_case(40, 32, 40, PropagationConfig(), 0.07).to(torch.float32)
    alone = torch.randn(20, case.features.shape[1], generator=torch.Generator().manual_seed(0))
    case.features[20:] = torch.nn.functional.normalize(alone, dim=1)
    case.z = torch.nn.functional.normalize(case.z, dim=1) * 5
    options = options_of(case, impl=impl, precision=precision)
    wanted = whole(case, options)
    assert (wanted[2] == 0).any() and wanted[1].isfinite().all()
    found = pool.run(share, 2, [(part, {**options, "exchange": "ring"}) for part in cut(case, (15, 25))])
    assert not [str(f) for f in found if isinstance(f, Exception)]
    dz = torch.cat([torch.from_numpy(of_rank[1]) for of_rank in found])
    near = (5e-3 if precision == "bf16" else 1e-5) * float(wanted[1].abs().max())
    torch.testing.assert_close(dz, wanted[1], rtol=1e-4, atol=near)


def test_golden_losses_of_two_ranks(pool):
    """The published code's stored loss and gradient, from patches on two ranks."""
    case = golden_case("t2").to(torch.float64)
    sizes = (len(case.z) // 3, len(case.z) - len(case.z) // 3)
    for exchange in ("gather", "ring"):
        arguments = [(part, options_of(case, exchange=exchange)) for part in cut(case, sizes)]
        found = pool.run(share, 2, arguments)
        assert abs(found[0][0] - case.loss) < 1e-10 * abs(case.loss)
        dz = np.concatenate([of_rank[1] for of_rank in found]) / 3
        assert np.abs(dz - case.dz.numpy()).max() < 1e-10 * np.abs(case.dz.numpy()).max()


def test_losses_apart(pool):
    """``none``: each rank's own losses; what ranks do with them reaches the rows of all."""
    case = made_case(90, 16, 40, PropagationConfig(), 0.3)
    parts, options = cut(case, (31, 59)), options_of(case, reduction="none")
    found = pool.run(share, 2, [(part, options) for part in parts])
    z = case.z.clone().requires_grad_()
    loss = ppap_loss(case.features, z, case.anchors, **options)
    begin, weights = 0, torch.ones_like(loss)
    for rank, part in enumerate(parts):
        count = len(part[2])
        weights[begin : begin + count] = torch.arange(1.0, count + 1) * (rank + 1)
        begin += count
    (loss * weights).sum().backward()
    np.testing.assert_allclose(np.concatenate([f[0] for f in found]), loss.detach(), rtol=1e-10)
    np.testing.assert_allclose(np.concatenate([f[1] for f in found]), z.grad, rtol=1e-9, atol=1e-12)


def test_one_rank_that_refuses_ends_the_call_of_all(pool):
    case = made_case(40, 8, None, PropagationConfig(), 0.3)
    parts = cut(case, (20, 20))
    parts[1][1] = parts[1][1].copy()
    parts[1][1][3, 0] = np.nan
    options = options_of(case)
    told = [str(f) for f in pool.run(share, 2, [(part, options) for part in parts])]
    assert "rank 1 of the group has NaN or infinity in z" in told[0] and "z of shape (20, 9)" in told[1]
    other = [(parts[0], {**options, "temperature": 0.4}), (parts[1], options)]
    assert all("other channels, dtypes or settings" in str(f) for f in pool.run(share, 2, other))
    parts = cut(case, (20, 20))
    parts[1][2] = np.full_like(parts[1][2], 99)
    told = [str(f) for f in pool.run(share, 2, [(part, options) for part in parts])]
    assert "rank 1 of the group has bad numbers" in told[0] and "99" in told[1]
    parts = cut(case, (20, 20))
    other = [(parts[0], options), (parts[1], {**options, "temperature": 0.4})]
    assert all("other channels, dtypes or settings" in str(f) for f in pool.run(share, 2, other))
    with pytest.raises(ValueError, match="exchange is 'star'"):
        ppap_loss(case.features, case.z, None, case.cfg, temperature=1, exchange="star")
    with pytest.raises(ValueError, match="ProcessGroup"):
        ppap_loss(case.features, case.z, None, case.cfg, temperature=1, group="world")


def counted(group, rank, exchange, rows, width):
    """What this process wrote in a call [bytes], as the operating system counts it, and its peak memory."""

    def written():
        lines = dict(line.split(": ") for line in open("/proc/self/io").read().splitlines())
        return int(lines["wchar"])

    torch.manual_seed(rank)
    features, z = torch.randn(rows, width), torch.randn(rows, width).requires_grad_()
    anchors, cfg = torch.arange(0, rows, 4), PropagationConfig()

    def call():
        ppap_loss(
            features,
            z,
            anchors,
            cfg,
            temperature=0.3,
            group=group,
            exchange=exchange,
            memory_budget=2**20,
            impl="torch",
        )

    call()
    torch.distributed.barrier(group)
    before = written()
    call()
    sent = written() - before
    return sent, peak_bytes(call)


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="the system counts no bytes of a process")
def test_bytes_are_those_of_the_cost_model_and_memory_of_a_ring_is_constant(pool):
    rows, width, held = 256, 192, {}
    for size in (2, 3, 4):
        load = Load(size * rows, size * rows // 4, width, width, PropagationConfig().steps, size)
        for exchange in ("gather", "ring"):
            found = pool.run(counted, size, [(exchange, rows, width)] * size)
            assert not [str(f) for f in found if isinstance(f, Exception)]
            for sent, _ in found:
                assert sent == pytest.approx(sent_bytes(load, exchange), rel=0.05)
            held[exchange, size] = max(peak for _, peak in found)
    # From three ranks on a rank has its own block, one it works on and one that arrives.
    assert held["ring", 4] == held["ring", 3]
    assert held["gather", 4] > held["gather", 3] + rows * 2 * width * 4  # the rows of one more rank


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("exchange", ["gather", "ring"])
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_two_gpus_equal_one_process(exchange, impl):
    gpus = Pool(2, "nccl")
    try:
        case = made_case(203, 32, 61, PropagationConfig(), 0.3).to(torch.float32)
        options = options_of(case, impl=impl)
        found = gpus.run(
            share, 2, [(part, {**options, "exchange": exchange}) for part in cut(case, (120, 83))]
        )
        assert not [str(f) for f in found if isinstance(f, Exception)]
        loss, dz, *counts = whole(case, {**options, "impl": "torch"})
        assert found[0][0] == pytest.approx(loss.item(), rel=1e-5)
        for k, expected in enumerate((dz, *counts), 1):
            together = torch.cat([torch.from_numpy(of_rank[k]) for of_rank in found])
            torch.testing.assert_close(together, expected, rtol=1e-4, atol=1e-6)
    finally:
        gpus.close()
