"""What looks at whole rows and whole calls: norms and planes, occupied tiles, sizes, bad numbers."""

import math

import pytest
import torch

from ppap.kernels import guards, ppap_loss, propagate
from ppap.kernels.proxy_average.triton_kernels import parts
from ppap.kernels.tiles import bits, launch, occupancy
from ppap.kernels.tiles.planes import fill
from tests.helpers import PLAIN, made_case
from tests.loss_forms import fused, loss_and_gradient

BLOCK = launch.row_block(torch.device("cpu"))


def rows_of_all_kinds() -> torch.Tensor:
    """(40, 70): plain, zero, huge, tiny, with an infinity, with a NaN."""
    rows = torch.randn(40, 70, generator=torch.Generator().manual_seed(0))
    rows[1], rows[2:4], rows[6] = 0, rows[2:4] * torch.tensor([[1e30], [1e-30]]), rows[6] * 1e37
    rows[4, 3], rows[5, 2] = math.inf, math.nan
    return rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gathered", [False, True])
def test_norms_and_unit_rows(gathered, dtype):
    rows = rows_of_all_kinds().to(dtype)
    index = torch.randperm(40, generator=torch.Generator().manual_seed(1))[:23] if gathered else None
    wanted = rows if index is None else rows[index]
    count = len(wanted)
    norm, largest, unit = torch.empty(count), torch.empty(count), torch.empty(count, 70)
    planes = fill(rows, "fp32", 64, index=index, normalise=True, norm=norm, largest=largest, out=unit)
    bad = ~wanted.isfinite().all(dim=1)
    assert torch.equal(norm.isnan(), bad) and bad.any()
    exact = wanted[~bad].double()
    torch.testing.assert_close(norm[~bad].double(), exact.norm(dim=1), rtol=1e-6, atol=0)
    assert torch.equal(largest[~bad], wanted[~bad].float().abs().amax(dim=1))
    true = torch.nn.functional.normalize(exact, dim=1, eps=0).nan_to_num()
    torch.testing.assert_close(unit[~bad].double(), true, atol=2e-7, rtol=0)
    back = (planes.high.double() + planes.low.double()) * planes.unit
    assert (back[:count, :70][~bad] - true).abs().max() <= 2**-21
    assert back[count:].abs().sum() == 0 and back[:count, 70:][~bad].abs().sum() == 0


def test_a_finite_row_whose_norm_overflows_is_not_bad():
    norm = torch.empty(1)
    fill(torch.full((1, 70), 3e38), "fp16", 64, normalise=True, norm=norm)
    assert norm.isfinite().all() and norm > 3e38


def test_factors_units_and_scales():
    rows = torch.randn(9, 33, generator=torch.Generator().manual_seed(0))
    factor, unit = torch.linspace(0.1, 2, 9), torch.tensor(8.0)
    planes = fill(rows, "fp32", 64, unit=unit, factor=factor, scale=0.25)
    back = (planes.high.double() + planes.low.double())[:9, :33] * planes.unit
    wanted = rows.double() * factor.double()[:, None] * 0.25
    torch.testing.assert_close(back, wanted, atol=2**-20, rtol=0)


@pytest.mark.parametrize("share", [0.0, 2e-4, 0.3])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (BLOCK + 1, 700), (3 * BLOCK, 70_000)])
def test_occupied_tiles_and_sizes(rows, columns, share):
    g = torch.Generator().manual_seed(rows)
    groups = 2 * -(-columns // 256)
    counts = torch.zeros(-(-rows // BLOCK) * BLOCK, groups, dtype=torch.int16)
    counts[:rows] = (torch.rand(rows, groups, generator=g) < share) * torch.randint(
        1, 129, (rows, groups), generator=g
    )
    mask = bits.Bits(torch.zeros(*counts.shape, 8, dtype=torch.int16), counts, rows, columns)
    found = occupancy.occupancy(mask, BLOCK)
    occupied = counts.view(-1, BLOCK, groups).amax(dim=1) > 0
    assert torch.equal(occupancy.flags(mask, BLOCK).bool(), occupied)
    assert torch.equal(found.num_tiles.long(), occupied.sum(dim=1))
    for tile, flags in enumerate(occupied):
        assert found.tiles[tile, : found.num_tiles[tile]].tolist() == flags.nonzero().flatten().tolist()
    kept = bits.Bits(mask.words, counts + (counts > 0), rows, columns)
    positive, negative = bits.sizes(mask, kept)
    assert torch.equal(positive, counts[:rows].sum(dim=1, dtype=torch.int64))
    assert torch.equal(negative, (counts[:rows] > 0).sum(dim=1))


@pytest.mark.parametrize("slots", [4, 132, 264])
def test_parts_fill_the_device(slots):
    for row_tiles in (1, 7, 25, 37, 392):
        for programs in (1, 2, 3, 6):
            count = parts(row_tiles, programs, slots)
            waves = row_tiles * programs * count / slots
            assert 1 <= count <= 16
            assert row_tiles * programs * 16 < slots or waves / math.ceil(waves) > 0.75


def bad_case(bad: str):
    case = made_case(130, 16, 70, PLAIN, 0.5).to(torch.float32)
    if bad in ("features", "z"):
        getattr(case, bad)[3, 2] = math.nan
    elif bad == "infinite":
        case.z[3, 2] = -math.inf
    else:
        case.anchors[3] = {"out of range": 130, "negative": -1, "twice": int(case.anchors[50])}[bad]
    return case


@pytest.mark.parametrize("bad", ["features", "z", "infinite", "out of range", "negative", "twice"])
def test_bad_numbers(bad, monkeypatch):
    case, options = bad_case(bad), {"temperature": 0.5, "impl": "triton", "return_counts": True}
    with pytest.raises(ValueError):
        ppap_loss(case.features, case.z, case.anchors, case.cfg, **options)
    # On a GPU the host does not look at them: the kernels do.
    monkeypatch.setattr(guards, "_host_waits_for", lambda device: False)
    z = case.z.requires_grad_()
    loss, positives, negatives = ppap_loss(case.features, z, case.anchors, case.cfg, **options)
    assert loss.isnan() and (positives == -1).all() and (negatives == -1).all()
    assert torch.autograd.grad(loss, z)[0].isnan().any()
    if bad not in ("z", "infinite"):
        rel = propagate(case.features, case.anchors, case.cfg, impl="triton")
        assert rel.phi.isnan().all() and rel.proxies.isnan().all() and (rel.num_positives == -1).all()


@pytest.mark.parametrize("impl", ["triton", "torch", "cpp"])
def test_sizes_of_nothing(impl):
    two = torch.tensor([0, 1])
    for call in (
        lambda: ppap_loss(torch.zeros(0, 8), torch.zeros(0, 4), two, PLAIN, temperature=0.1, impl=impl),
        lambda: propagate(torch.zeros(0, 8), two, PLAIN, impl=impl),
    ):
        with pytest.raises(ValueError, match="2 anchors of no patches"):
            call()


def test_embeddings_without_channels():
    case = made_case(30, 16, 8, PLAIN, 0.5).to(torch.float32)
    z = torch.zeros(30, 0, requires_grad=True)
    loss, wanted = (
        ppap_loss(case.features, z, case.anchors, PLAIN, temperature=0.5, impl=impl)
        for impl in ("triton", "torch")
    )
    torch.testing.assert_close(loss, wanted)
    assert torch.autograd.grad(loss, z)[0].shape == (30, 0)


@pytest.mark.parametrize("group_size", [71, 2**40])
def test_groups_larger_than_the_anchors(group_size):
    """One group, as without a size: no operand is scaled for a size that does not occur."""
    case = made_case(130, 16, 70, PLAIN, 0.5)
    wanted = loss_and_gradient(fused, case)
    case.group_size = group_size
    for impl in ("triton", "torch"):
        loss, dz = loss_and_gradient(fused, case.to(torch.float32), impl=impl, precision="fp32")
        assert (loss - wanted[0]).abs() <= 2e-6 * wanted[0].abs()
        assert (dz - wanted[1]).abs().max() <= 2e-5 * wanted[1].abs().max()
