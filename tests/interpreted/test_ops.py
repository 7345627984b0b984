"""The ops on the Triton backend against their definitions in float64, and the kernels' building blocks."""

import math
from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl

from bench.shapes import clustered
from ppap.kernels import masked_log_softmax, pack_masks, proxy_average, relation_masks, unpack_masks
from ppap.kernels.masked_log_softmax import reference as log_softmax
from ppap.kernels.proxy_average import reference as averages
from ppap.kernels.relation_masks import reference as relations
from ppap.kernels.tiles import bits, device, launch
from ppap.kernels.tiles.planes import planes
from tests.test_masked_log_softmax import inputs, loss_and_gradients, packed

BLOCK = launch.row_block(torch.device("cpu"))
SIZES = [(37, 203, 32), (1, 1, 16), (0, 30, 16), (5, 0, 16), (65, 257, 7), (130, 300, 96)]


@pytest.mark.parametrize(("anchors", "rows", "width"), SIZES)
def test_proxy_average(anchors, rows, width):
    keys, queries = clustered(rows, width, seed=1, clusters=5), clustered(anchors, width, seed=2, clusters=5)
    threshold = torch.linspace(-0.5, 0.9, anchors)
    wanted = averages.proxy_average(*(t.double() for t in (queries, keys, threshold)))
    proxy, count = proxy_average(queries, keys, threshold, precision="fp32", impl="triton")
    assert proxy.dtype == torch.float32 and torch.equal(count, wanted[1])
    torch.testing.assert_close(proxy.double(), wanted[0], atol=2e-6, rtol=0)


@pytest.mark.parametrize(("anchors", "rows"), [(37, 203), (1, 1), (0, 30), (130, 300)])
@pytest.mark.parametrize("negative", [False, True])
def test_relation_masks(anchors, rows, negative):
    keys = clustered(rows, 32, seed=1, clusters=5)
    index = torch.randperm(rows, generator=torch.Generator().manual_seed(3))[:anchors]
    neg_queries = clustered(anchors, 32, seed=4, clusters=5) if negative else None
    phi, psi = torch.linspace(0, 0.9, anchors), torch.linspace(-0.2, 0.5, anchors)
    exact = [None if t is None else t.double() for t in (keys[index], phi, keys, psi)]
    wanted = relations.relation_masks(*exact, index, None if neg_queries is None else neg_queries.double())
    got, num_positives, num_kept = relation_masks(
        keys[index], phi, keys, psi, index, neg_queries, precision="fp32", impl="triton", memory_budget=2**20
    )
    for words, counts, mask in zip(got[:2], (num_positives, num_kept), wanted, strict=True):
        assert torch.equal(unpack_masks(words, rows), mask)
        assert torch.equal(counts, mask.sum(1))


def test_infinite_thresholds():
    keys = clustered(40, 16, seed=1)
    infinite, index = torch.full((40,), math.inf), torch.arange(40)
    got, num_positives, num_kept = relation_masks(keys, -infinite, keys, infinite, index, impl="triton")
    assert num_positives.tolist() == num_kept.tolist() == [39] * 40
    _, none, kept = relation_masks(keys, infinite, keys, -infinite, index, impl="triton")
    assert none.tolist() == kept.tolist() == [0] * 40


@pytest.mark.parametrize(("precision", "eps"), [("fp32", 2**-24), ("fp16", 2**-11), ("bf16", 2**-8)])
def test_flips_lie_close_to_a_threshold(precision, eps):
    keys, index = clustered(300, 64, seed=1), torch.arange(300)
    phi, psi = torch.full((300,), 0.55), torch.full((300,), 0.15)
    wanted = relations.relation_masks(keys.double(), phi.double(), keys.double(), psi.double(), index)
    got, _, _ = relation_masks(keys, phi, keys, psi, index, precision=precision, impl="triton")
    sim = keys.double() @ keys.double().T
    near = ((sim - 0.55).abs() < 4 * 64**0.5 * eps) | ((sim - 0.15).abs() < 4 * 64**0.5 * eps)
    for words, mask in zip(got[:2], wanted, strict=True):
        flipped = unpack_masks(words, 300) != mask
        assert not (flipped & ~near).any()
        assert flipped.float().mean() <= {"fp32": 0, "fp16": 5e-4, "bf16": 5e-3}[precision]


@pytest.mark.parametrize(
    ("anchors", "rows", "width"), [(37, 203, 33), (1, 1, 16), (0, 30, 16), (130, 300, 64)]
)
def test_masked_log_softmax(anchors, rows, width):
    arguments = inputs(anchors, rows, width)
    weights = torch.linspace(0.5, 2, anchors).double()
    wanted = loss_and_gradients(log_softmax.masked_log_softmax, *arguments, weights)
    z_anchors, z, positive, kept = arguments
    got = loss_and_gradients(
        packed,
        z_anchors.float(),
        z.float(),
        positive,
        kept,
        weights.float(),
        impl="triton",
        memory_budget=2**20,
    )
    for value, true, tolerance in zip(got, wanted, (1e-5, 2e-5, 2e-5), strict=True):
        scale = max(true.abs().max().item(), 1.0) if true.numel() else 1.0
        torch.testing.assert_close(value.double(), true, atol=tolerance * scale, rtol=0)


@pytest.mark.parametrize("scale", [1e-6, 1e3, 1e6])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_any_finite_norm(scale, precision):
    z_anchors, z, positive, kept = inputs(20, 100, 32, scale=scale)
    weights = torch.ones(20).double()
    wanted = loss_and_gradients(log_softmax.masked_log_softmax, z_anchors, z, positive, kept, weights)
    got = loss_and_gradients(
        packed,
        z_anchors.float(),
        z.float(),
        positive,
        kept,
        weights.float(),
        precision=precision,
        impl="triton",
    )
    unit = max(1.0, float((z_anchors @ z.T).abs().max()) / 0.3)
    assert ((got[0] - wanted[0]).abs() <= {"fp32": 2e-6, "fp16": 2e-3}[precision] * unit).all()
    assert all(torch.isfinite(value).all() for value in got)


def test_tiles_of_one_group_of_columns(monkeypatch):
    """The widths that GPUs use: a partial result per 128 columns."""
    table = {name: launch.Launch(block_m=BLOCK) for name in launch.TABLE["interpret"]}
    monkeypatch.setitem(launch.TABLE, "interpret", table)
    test_masked_log_softmax(130, 300, 64)
    test_relation_masks(130, 300, False)
    test_proxy_average(65, 257, 7)


def test_programs_that_go_through_several_tiles(monkeypatch):
    """More tiles than programs; the unit of scaled operands is applied once, not by tile."""
    table = {name: replace(one, persistent=True) for name, one in launch.TABLE["interpret"].items()}
    grids, of_tiles = [], launch.tiles

    def tiles(rows, columns, config, device):
        apart = replace(config, persistent=False)
        found = of_tiles(rows, columns, config, device)
        grids.append((*found, *of_tiles(rows, columns, apart, device)))
        return found

    monkeypatch.setitem(launch.TABLE, "interpret", table)
    monkeypatch.setattr(launch, "tiles", tiles)
    test_masked_log_softmax(130, 1100, 64)
    test_relation_masks(130, 1100, False)
    test_relation_masks(130, 1100, True)
    test_proxy_average(130, 1100, 7)
    assert grids and all(programs == 4 < tiles for programs, tiles in grids)


def test_a_search_launches_every_kernel_in_other_configurations(monkeypatch):
    """What is timed on a GPU is the launch itself, which only overwrites: results stay."""
    tried = {}

    def fastest(key, device, shipped, others, go):
        for config in (replace(shipped, warps=8), replace(shipped, persistent=True), shipped):
            go(config)
            tried.setdefault(key[0], []).append(config)
        return shipped

    embeddings = [t.float() if t.is_floating_point() else t for t in inputs(20, 130, 32)] + [torch.ones(20)]
    queries, keys = clustered(20, 96, 1), clustered(130, 96, 2)
    threshold, half = torch.full((20,), 0.2), torch.full((130,), 0.5)

    def run():
        count = proxy_average(queries, keys, threshold, precision="fp32", impl="triton")
        _, *sizes = relation_masks(keys, half, keys, half - 0.4, torch.arange(130), impl="triton")
        return [*count, *sizes, *loss_and_gradients(packed, *embeddings, impl="triton")]

    wanted = run()
    monkeypatch.setattr(launch, "interpreted", lambda: False)
    monkeypatch.setattr(launch, "autotune_wanted", lambda: True)
    monkeypatch.setattr(launch.autotune, "fastest", fastest)
    assert all(torch.equal(value, true) for value, true in zip(run(), wanted, strict=True))
    assert set(tried) == set(launch.KERNELS)
    assert all(len(configs) >= 2 for configs in tried.values())


def test_descriptors_load_what_pointers_load(monkeypatch):
    """Tensor descriptors as on sm_90, where loads past a plane give 0."""
    wanted = proxy_average(clustered(70, 96, 1), clustered(300, 96, 2), torch.full((70,), 0.2), impl="triton")
    tma = {name: launch.Launch(block_m=BLOCK, tma=True) for name in launch.TABLE["interpret"]}
    monkeypatch.setitem(launch.TABLE, "interpret", tma)
    got = proxy_average(clustered(70, 96, 1), clustered(300, 96, 2), torch.full((70,), 0.2), impl="triton")
    assert torch.equal(wanted[1], got[1])
    torch.testing.assert_close(wanted[0], got[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("columns", [1, 31, 128, 129, 300, 513])
@pytest.mark.parametrize("rows", [1, BLOCK, BLOCK + 1])
def test_layout_of_masks(rows, columns):
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(0)) < 0.3
    words = pack_masks(mask)
    found = bits.from_public(words, columns, BLOCK)
    back = torch.empty_like(words)
    bits.to_public(found, back)
    assert torch.equal(back, words)
    assert torch.equal(found.totals(), mask.sum(1))
    assert found.words[rows:].abs().sum() == 0 and found.counts.shape[1] % 2 == 0
    row, column = rows - 1, columns - 1
    word = found.words[row, column // 128, column % 8].item()
    assert bool(word >> (column % 128 // 8) & 1) == bool(mask[row, column]), "the documented order"


def test_bits_past_the_last_column_count_for_nothing():
    """As with the other backends: ~words is a natural way to say "not in the set"."""
    z_anchors, z, positive, kept = (t.float() if t.is_floating_point() else t for t in inputs(5, 40, 16))
    wanted = packed(z_anchors, z, positive, kept, 0.3, impl="torch")
    words = (~pack_masks(~positive), ~pack_masks(~kept))
    assert not torch.equal(words[1], pack_masks(kept))
    got = masked_log_softmax(z_anchors, z, words, 0.3, impl="triton")
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scale", [100.0, 300.0, 1e6])
def test_rows_that_are_not_of_unit_norm(scale):
    keys, queries = scale * clustered(80, 32, seed=1), clustered(20, 32, seed=2)
    threshold = torch.linspace(-0.5, 0.9, 20) * scale
    wanted = proxy_average(queries, keys, threshold, precision="fp32", impl="torch")
    proxy, count = proxy_average(queries, keys, threshold, precision="fp32", impl="triton")
    assert torch.equal(count, wanted[1])
    torch.testing.assert_close(proxy, wanted[0], atol=2e-6, rtol=0)


def test_several_bands_of_tiles(monkeypatch):
    monkeypatch.setattr(launch, "BAND", 2)
    test_relation_masks(290, 300, False)
    test_masked_log_softmax(330, 300, 64)


@triton.jit
def _offsets_kernel(p_words, p_entries, i_row, i_column, groups, WIDTH: tl.constexpr):
    o_words = device.word_offsets(i_row, i_column, groups, 4, 1)
    tl.store(p_words + tl.arange(0, 4), tl.max(tl.max(o_words, 2), 1))
    o_entries = device.entry_offsets(i_row, i_column, WIDTH, 4, 8)
    tl.store(p_entries + tl.arange(0, 4), tl.max(o_entries, 1))


def test_offsets_past_two_to_the_31():
    words, entries = torch.empty(4, dtype=torch.int64), torch.empty(4, dtype=torch.int64)
    _offsets_kernel[(1,)](words, entries, 400_000, 100, 3125, WIDTH=400_000)
    assert words.tolist() == [((400_000 + i) * 3125 + 100) * 8 + 7 for i in range(4)]
    assert entries.tolist() == [(400_000 + i) * 400_000 + 107 for i in range(4)]


def test_two_planes_hold_single_precision():
    values = clustered(50, 70, seed=0) * torch.logspace(-3, 0, 50)[:, None]
    two = planes(values, "fp32", 64, scaled=True)
    assert two.high.shape == (64, 128) and two.low is not None
    back = (two.high.double() + two.low.double())[:50, :70] * float(two.unit)
    assert (back - values.double()).abs().max() <= 2**-22 * values.abs().max()
    assert two.high[50:].abs().sum() == 0 and two.high[:, 70:].abs().sum() == 0
