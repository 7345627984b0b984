"""STEGO: sampling, centring and loss against loops in float64; the rule for partners; near images."""

import math

import numpy as np
import pytest
import torch

from ppap.data import build_datasets
from ppap.errors import UsageError
from ppap.methods import neighbours
from ppap.methods.neighbours import NeighbourSampler, nearest_images, neighbour_table
from ppap.methods.stego_loss import correlation_loss, other_images, sample_points
from ppap.nets.feature_cache import cache_features
from ppap.settings.config import DataConfig, StegoConfig
from tests.methods import DATA, tiny_engine


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PPAP_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_sampling_by_hand():
    """-1 and 1 are the centres of the border patches; between patches bilinear; the border beyond."""
    maps = torch.tensor([[[0.0, 1, 2], [3, 4, 5]], [[1.0] * 3] * 2], dtype=torch.float64)[
        None
    ]  # (1, 2, 2, 3)
    places = [(-1, -1, 0.0), (1, -1, 2), (0, 0, 2.5), (0.5, 1, 4.5), (-0.5, 0, 2), (0, -0.5, 1.75)]
    places += [(0.25, 0.5, 3.5), (1, 1, 5), (0, 1, 4)]
    points = torch.tensor([[x, y] for x, y, _ in places]).view(1, 3, 3, 2)
    got = sample_points(maps, points)[0]
    torch.testing.assert_close(got.norm(dim=1), torch.ones(9, dtype=torch.float64))
    wanted = torch.tensor([value for *_, value in places], dtype=torch.float64)
    torch.testing.assert_close(got[:, 0] / got[:, 1], wanted)


def unit(*shape, seed):
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.nn.functional.normalize(x + 0.5, dim=-1)


@pytest.mark.parametrize("pointwise", [True, False])
@pytest.mark.parametrize("zero_clamp", [True, False])
def test_loss_against_loops(pointwise, zero_clamp):
    f, g = unit(3, 4, 6, seed=0).numpy(), unit(3, 4, 6, seed=1).numpy()
    c, d = unit(3, 4, 2, seed=2), unit(3, 4, 2, seed=3) - 0.4
    similar = np.array([[[f[n, a] @ g[n, b] for b in range(4)] for a in range(4)] for n in range(3)])
    if pointwise:
        centred = np.array([[row - row.mean() for row in image] for image in similar])
        similar = centred - centred.mean() + similar.mean()
    total, clamped = 0.0, 0
    for n in range(3):
        for a in range(4):
            for b in range(4):
                code = float(c[n, a] @ d[n, b])
                clamped += code < 0
                total -= (max(code, 0) if zero_clamp else code) * (similar[n, a, b] - 0.2)
    assert clamped > 3
    pair = (torch.from_numpy(f), torch.from_numpy(g))
    got = correlation_loss(pair, (c, d), 0.2, pointwise=pointwise, zero_clamp=zero_clamp)
    assert got.item() == pytest.approx(total / 48, rel=1e-12)


def test_centring_is_one_sided():
    f = unit(2, 3, 4, seed=0)
    code = torch.eye(3, dtype=torch.float64)[None].repeat(2, 1, 1)
    one = correlation_loss((f, f), (code[:, [0]].repeat(1, 3, 1), code), 0.0)  # pairs (any a, b = 0)
    two = correlation_loss((f, f), (code, code[:, [0]].repeat(1, 3, 1)), 0.0)  # pairs (a = 0, any b)
    assert not torch.isclose(one, two), "centred over the second point only"


def test_gradient_reaches_codes_and_not_features():
    maps = torch.randn(2, 3, 3, 3, dtype=torch.float64, requires_grad=True)
    features = torch.randn(2, 5, 3, 3, dtype=torch.float64, requires_grad=True)
    points = torch.rand(2, 2, 2, 2, dtype=torch.float64) * 2 - 1

    def loss(codes):
        f, c = sample_points(features, points), sample_points(codes, points)
        return correlation_loss((f, f.flip(0)), (c, c.flip(0)), 0.1)

    assert torch.autograd.gradcheck(loss, (maps,))
    loss(maps).backward()
    assert features.grad is None and maps.grad.any()


def test_no_image_is_its_own_partner():
    torch.manual_seed(0)
    seen_twice = 0
    for count in (2, 3, 7):
        for _ in range(60):
            order = other_images(count, torch.device("cpu"))
            assert order.shape == (count,) and not (order == torch.arange(count)).any()
            assert 0 <= order.min() and order.max() < count
            seen_twice += len(order.unique()) < count
    assert seen_twice > 0, "not always a permutation"
    assert other_images(1, torch.device("cpu")).tolist() == [0]


def test_fixed_points_move_on(monkeypatch):
    monkeypatch.setattr(torch, "randperm", lambda n, device: torch.tensor([0, 2, 1, 3]))
    assert other_images(4, torch.device("cpu")).tolist() == [1, 2, 1, 0]


# --- near images -------------------------------------------------------------------------------------------


def test_nearest_images_by_angle(monkeypatch):
    monkeypatch.setattr(neighbours, "_TILE", 6)  # two rows at a time
    monkeypatch.setattr(neighbours, "KEPT", 3)
    angles = torch.tensor([0.0, 10, 15, 40, 90, 90])
    rows = torch.stack([(angles * math.pi / 180).cos(), (angles * math.pi / 180).sin()], dim=1)
    table = nearest_images(rows)
    assert table[:4].tolist() == [[0, 1, 2], [1, 2, 0], [2, 1, 0], [3, 2, 1]]
    assert table[4:].tolist() == [[4, 5, 3], [5, 4, 3]], "of equal images each comes first for itself"


def test_table_is_of_mean_features_and_kept_on_disk(cache, capsys, tmp_path):
    engine = tiny_engine("stego")
    engine.train()
    engine.start(engine.images)
    files = list((cache / "neighbours").iterdir())
    assert len(files) == 1
    with torch.no_grad():
        means = torch.stack(
            [engine.net.features(engine.images[i]["image"][None])[0].mean((1, 2)) for i in range(12)]
        )
    cosine = torch.nn.functional.cosine_similarity(means[:, None], means[None], dim=2)
    table = np.load(files[0])
    assert np.array_equal(table, cosine.argsort(dim=1, descending=True).numpy())
    capsys.readouterr()
    again = tiny_engine("stego")
    again.start(again.images)
    assert "nearest images: read from" in capsys.readouterr().out
    # Other images, other weights, or features of another type: another table.
    data = DataConfig(**{**vars(DATA), "scenes_seed": 1})
    again.start(build_datasets(data, ("train",)).train)
    with torch.no_grad():
        engine.net.backbone.norm.weight[0] += 1
    engine.start(engine.images)
    cached = cache_features(
        again.net, again.images, root=tmp_path / "features", device=torch.device("cpu"), dtype="bf16"
    )
    again.start(cached)
    assert len(list((cache / "neighbours").iterdir())) == 4


def test_a_damaged_table_is_told(cache):
    from ppap.errors import DataError

    engine = tiny_engine("stego")
    engine.start(engine.images)
    (file,) = (cache / "neighbours").iterdir()
    file.write_bytes(b"no array")
    with pytest.raises(DataError, match="cannot be read.*delete it"):
        engine.start(engine.images)


def test_ranks_are_uniform_and_depend_on_seed_epoch_and_image_alone():
    table = np.array([[i, *range(100, 107)] for i in range(400)], dtype=np.int32)

    def pairs(seed=0, epoch=0, start=0, batch=8):
        sampler = NeighbourSampler(table, 7, 400, batch, seed, epoch, start)
        return [pair for batch in sampler for pair in batch]

    whole = pairs()
    assert whole == pairs() and whole[24:] == pairs(start=3)
    assert dict(pairs(batch=5)) == dict(whole), "the batch size does not matter"
    assert dict(pairs(epoch=1)) != dict(whole) != dict(pairs(seed=1))
    ranks = np.bincount([near - 100 for _, near in whole], minlength=7)
    assert len(ranks) == 7 and ranks.min() > 30 and ranks.max() < 90  # 57, standard deviation 7


def test_batches_bring_a_near_image(cache):
    engine = tiny_engine("stego", stego=StegoConfig(neighbours=2))
    batches = list(engine.start(engine.images))
    table = neighbour_table(engine.method, engine.method.data)
    for batch in batches:
        for k, (i, near) in enumerate(zip(batch["index"], batch["near_index"], strict=True)):
            assert near in table[i, 1:3]
            assert torch.equal(batch["image"][k], engine.images[int(i)]["image"])
            assert torch.equal(batch["near_image"][k], engine.images[int(near)]["image"])


def test_more_neighbours_than_images_are_refused():
    engine = tiny_engine("stego", stego=StegoConfig(neighbours=12))
    with pytest.raises(UsageError, match="--stego.neighbours is 12; of 12 images 11 others are known"):
        engine.start(engine.images)


def test_a_step_weighs_its_three_terms():
    config = StegoConfig(dim=8, samples=3)
    engine = tiny_engine("stego", stego=config)
    values = engine.train_step(next(iter(engine.start(engine.images))), 0)
    terms = [values[f"{name}_loss"].item() for name in ("self", "neighbour", "random")]
    weights = (config.weight_self, config.weight_neighbour, config.weight_random)
    wanted = sum(weight * term for weight, term in zip(weights, terms, strict=True))
    assert len(set(terms)) == 3 and values["contrast_loss"].item() == pytest.approx(wanted)
