"""Hidden Positives: mixing, recolouring and pools against loops, and the order of what a step does."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ppap.data.transforms import MEAN, STD
from ppap.errors import UsageError
from ppap.methods.hidden_positives import hidden_positives, pool_radius
from ppap.methods.hp import HP
from ppap.methods.hp_loss import hp_loss
from ppap.methods.local_mixing import attention_logits, has_plain_attention, mix, mixing_weights, neighbours
from ppap.methods.recolour import recolour
from ppap.settings.config import HPConfig
from tests.methods import tiny_engine, tiny_images


def test_neighbourhoods_have_four_six_or_nine_cells():
    index, there = neighbours((3, 4), torch.device("cpu"))
    counts = there.sum(1).view(3, 4)
    assert counts.tolist() == [[4, 6, 6, 4], [6, 9, 9, 6], [4, 6, 6, 4]]
    assert index[5].tolist() == [0, 1, 2, 4, 5, 6, 8, 9, 10]
    assert index[0][there[0]].tolist() == [0, 1, 4, 5] and (index[0][~there[0]] == 0).all()


def test_mixing_against_loops(monkeypatch):
    monkeypatch.setattr("ppap.methods.local_mixing._TILE", 1)
    grid, count = (4, 3), 12
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, count, count, generator=generator, dtype=torch.float64)
    code = torch.randn(2, 5, *grid, generator=generator, dtype=torch.float64)
    got = mix(code, mixing_weights(logits, grid))
    wanted, zeros = np.zeros((2, 5, *grid)), 0
    for n in range(2):
        for i in range(count):
            row = logits[n, i].numpy()
            row = np.clip(row, np.quantile(row, 0.1), np.quantile(row, 0.9))
            weight = np.exp(row) / np.exp(row).sum() * math.sqrt(count)
            weight[weight < weight.mean()] = 0
            y, x = divmod(i, grid[1])
            near = [(y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
            near = [(r, c) for r, c in near if 0 <= r < grid[0] and 0 <= c < grid[1]]
            zeros += sum(weight[r * grid[1] + c] == 0 for r, c in near)
            for r, c in near:
                wanted[n, :, y, x] += weight[r * grid[1] + c] * code[n, :, r, c].numpy() / len(near)
    assert zeros > 5
    np.testing.assert_allclose(got.numpy(), wanted, rtol=0, atol=1e-12)


def test_mixing_passes_the_gradient():
    code = torch.randn(1, 2, 3, 3, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(1, 9, 9, dtype=torch.float64) * neighbours((3, 3), torch.device("cpu"))[1]
    assert torch.autograd.gradcheck(lambda c: mix(c, weights), code)


def test_attention_is_that_of_the_last_block():
    """Rebuilt head by head; with the softmax and the values it is timm's own attention."""
    vit = tiny_engine("hp").net.backbone.vit
    block, tokens = vit.blocks[-1], torch.randn(2, 17, 24)
    got = attention_logits(vit, tokens)
    with torch.no_grad():
        x = block.norm1(tokens)
        q, k, v = block.attn.qkv(x).view(2, 17, 3, 2, 12).permute(2, 0, 3, 1, 4)
        logits = torch.stack([q[:, h] @ k[:, h].transpose(1, 2) / math.sqrt(12) for h in range(2)], dim=1)
        whole = (logits.softmax(-1) @ v).transpose(1, 2).reshape(2, 17, 24)
        torch.testing.assert_close(block.attn.proj(whole), block.attn(x))
        torch.testing.assert_close(got, logits.mean(dim=1)[:, 1:, 1:])


# --- recolouring -------------------------------------------------------------------------------------------


def test_recolouring_depends_on_seed_step_and_place_alone():
    images = tiny_images(3)
    one = recolour(images, 1, 2, normalised=True)
    torch.manual_seed(9)
    assert torch.equal(one, recolour(images, 1, 2, normalised=True))
    assert torch.equal(one[:2], recolour(images[:2], 1, 2, normalised=True))
    assert not torch.equal(one, recolour(images, 1, 3, normalised=True))
    same = recolour(images[:1].repeat(2, 1, 1, 1), 1, 2, normalised=True)
    assert not torch.equal(same[0], same[1])


def test_published_recolouring_clamps_normalised_values():
    """The quirk: all values of a normalised image end in 0..1; the other way all of the image's own do."""
    images = tiny_images(8)
    assert images.min() < -1 and images.max() > 1.5
    published = recolour(images, 0, 0, normalised=True)
    assert published.min() == 0 and published.max() <= 1
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
    pixels = recolour(images, 0, 0, normalised=False) * std + mean
    assert -1e-5 < pixels.min() and pixels.max() < 1 + 1e-5
    original = images * std + mean
    assert 0.5 < F.cosine_similarity(pixels.flatten(1) - 0.5, original.flatten(1) - 0.5, dim=1).mean() < 0.999


def test_share_of_grey_images():
    images = tiny_images(1)[:, :, :4, :4].expand(200, -1, -1, -1)
    changed = recolour(images, 3, 0, normalised=False)
    std, mean = torch.tensor(STD).view(3, 1, 1), torch.tensor(MEAN).view(3, 1, 1)
    pixels = changed * std + mean
    grey = ((pixels - pixels[:, :1]).abs().amax(dim=(1, 2, 3)) < 1e-4).float().mean().item()
    assert abs(grey - 0.2) < 0.09  # standard deviation 0.028


# --- a step ------------------------------------------------------------------------------------------------


def test_the_average_lags_by_one_step():
    """It moves towards the head as the head was before the optimiser's step, after its own code was taken."""
    engine = tiny_engine("hp", hp=HPConfig(dim=8, pool_size=8, ema=0.75))
    loader = iter(engine.start(engine.images))
    first, second = next(loader), next(loader)
    start = copy.deepcopy(engine.net.head.state_dict())
    for name, value in engine.net.average.state_dict().items():
        assert torch.equal(value, start[name]), "the average starts as a copy"
    engine.train_step(first, 0)
    for name, value in engine.net.average.state_dict().items():
        torch.testing.assert_close(value, start[name], msg="before the first step both are the same")
    after = copy.deepcopy(engine.net.head.state_dict())
    assert not torch.equal(after["linear.weight"], start["linear.weight"])
    engine.train_step(second, 1)
    for name, value in engine.net.average.state_dict().items():
        torch.testing.assert_close(value, 0.75 * start[name] + 0.25 * after[name])


def test_a_backbone_without_plain_attention_is_refused(monkeypatch):
    vit = tiny_engine("ppap").net.backbone.vit
    assert has_plain_attention(vit)
    del vit.blocks[-1].attn
    assert not has_plain_attention(vit)
    monkeypatch.setattr("ppap.methods.hp.has_plain_attention", lambda vit: False)
    with pytest.raises(UsageError, match="plain attention, which vit_tiny_patch16_224 has not; give another"):
        tiny_engine("hp")


def test_weight_of_task_specific_positives():
    engine = tiny_engine("hp", hp=HPConfig(dim=8, pool_size=8, warmup=4), steps=12)
    engine.start(engine.images)
    weights = [engine.method.specific_weight(t) for t in range(12)]
    assert weights[:5] == [0] * 5
    assert weights[5:] == pytest.approx([k / 8 for k in range(1, 8)])


def test_pools_are_renewed_within_an_epoch_only(monkeypatch):
    """12 images, batches of 2: epochs of 6 steps. Every 2 steps, but neither at 0 nor at an epoch's start."""
    engine = tiny_engine("hp", hp=HPConfig(dim=8, pool_size=8, renew_every=2), steps=13)
    engine.start(engine.images)
    filled = []
    real = HP._fill
    monkeypatch.setattr(HP, "_fill", lambda self, step: filled.append(step) or real(self, step))
    pools = []
    with torch.no_grad():
        for step in range(13):
            engine.train()
            engine.method.before_step(step)
            pools.append((engine.net.agnostic_pool.clone(), engine.net.specific_pool.clone()))
    assert filled == [0, 2, 4, 8, 10]
    assert all(torch.equal(agnostic, pools[0][0]) for agnostic, _ in pools), "never renewed"
    changes = [k for k in range(1, 13) if not torch.equal(pools[k][1], pools[k - 1][1])]
    assert changes == [2, 4, 8, 10]
    for pool in pools[0]:
        torch.testing.assert_close(pool.norm(dim=1), torch.ones(8))


@pytest.mark.parametrize(
    ("every", "warmup", "told"),
    [(6, 10, "never renewed: --hp.renew-every 6"), (5, 10, None), (6, 11, "no part"), (5, 1000, "no part")],
)
@pytest.mark.parametrize("begin", [0, 3])
def test_what_short_runs_leave_out_is_told(capsys, every, warmup, told, begin):
    """12 images in batches of 2, 12 steps: 2 epochs of 6; also to those who go on with a run."""
    config = HPConfig(dim=8, pool_size=8, renew_every=every, warmup=warmup)
    engine = tiny_engine("hp", hp=config, steps=12)
    engine.start(engine.images)
    for step in (begin, begin + 1):
        engine.method.before_step(step)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("the task")]
    assert len(lines) == (1 if told else 0) and all(told in line for line in lines)
    assert (engine.method.specific_weight(11) == 0) == (told == "no part")


def test_an_epoch_that_the_run_does_not_finish_has_as_many_renewals_as_it_has_steps_for(capsys):
    engine = tiny_engine("hp", hp=HPConfig(dim=8, pool_size=8, renew_every=3, warmup=0), steps=3)
    engine.start(engine.images)
    engine.method.before_step(0)
    assert "an epoch, of which this run has 3" in capsys.readouterr().out


def test_a_pool_larger_than_a_pass_goes_on_with_the_next(capsys):
    """Batches of 2 of 7 images: a pass has 6."""
    engine = tiny_engine("hp", hp=HPConfig(dim=8, pool_size=7))
    engine.start(torch.utils.data.Subset(engine.images, range(7)))
    engine.method.before_step(0)
    assert "7 patches, one an image in 2 passes, of 7 images" in capsys.readouterr().out


def test_a_fill_that_was_stopped_leaves_no_trace():
    """Pools of 8 from batches of 2; renewed at step 2."""
    config, results = HPConfig(dim=8, pool_size=8, renew_every=2), []
    for interrupted in (False, True):
        engine, asked = tiny_engine("hp", hp=config, steps=4), []
        loader = engine.start(engine.images, 0, lambda asked=asked: len(asked) > 0 and asked.pop())
        for step, batch in zip(range(3), loader, strict=False):
            if interrupted and step in (0, 2):
                asked += [True, False]  # at the second batch
                with pytest.raises(InterruptedError):
                    engine.train_step(batch, step)
            values = engine.train_step(batch, step)
        results.append((values["loss"], engine.net.specific_pool, torch.get_rng_state()))
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_a_step_is_the_sum_of_its_parts():
    """Without dropout, and with everything kept: the logged losses from the definitions."""
    config = HPConfig(dim=8, pool_size=8, dropout=0.0, negatives_kept=1.0, warmup=0, consistency=0.5, ema=0.5)
    engine = tiny_engine("hp", hp=config, steps=4)
    loader = iter(engine.start(engine.images))
    engine.train_step(next(loader), 0)
    net, batch = copy.deepcopy(engine.net), next(loader)
    values = engine.train_step(batch, 1)
    with torch.no_grad():
        frozen = net.frozen(batch["image"])
        features, code = frozen.guidance, net.head(frozen.guidance, frozen.guidance)
        rows = lambda maps: maps.permute(0, 2, 3, 1).reshape(-1, maps.shape[1])  # noqa: E731
        embed = lambda maps: F.normalize(net.projection(rows(maps)), dim=1)  # noqa: E731
        mixed = mix(code, mixing_weights(attention_logits(net.backbone.vit, frozen.before), frozen.grid))
        sets = []
        for maps, pool in (
            (features, net.agnostic_pool),
            (net.average(features, features), net.specific_pool),
        ):
            sets.append(hidden_positives(rows(maps), pool_radius(rows(maps), pool), slice(None)))
        z = [embed(maps).double().numpy() for maps in (code, mixed)]
        count = len(z[0])
        everything = np.ones((count, count), bool)
        a, b = (s.numpy() for s in sets)
        tau, wanted = config.temperature, []
        for x in z:
            logits = x @ x.T / tau
            kept = everything & ~np.eye(count, dtype=bool)
            below = np.log((np.exp(logits) * kept).sum(1))
            m = (a + 0.25 * b) * a.any(1)[:, None]
            wanted.append(-tau / 0.07 * (m * (logits - below[:, None])).sum() / m.sum())
        other = recolour(batch["image"], 0, 1, normalised=True)
        z_other = embed(net.code_of(net.frozen(other)))
        distance = (embed(code) - z_other + 1e-6).norm(dim=1).mean()
    assert values["specific_weight"] == 0.25
    assert values["hp_loss"].item() == pytest.approx(np.mean(wanted), rel=1e-4)
    torch.testing.assert_close(values["consistency_loss"], distance)
    torch.testing.assert_close(values["contrast_loss"], values["hp_loss"] + 0.5 * distance)


def test_one_patch_in_a_few_is_an_anchor(monkeypatch):
    """32 patches in chunks of 12: each step draws others, of every chunk its share, also of the last one."""
    seen = []
    monkeypatch.setattr("ppap.methods.hp.CHUNK", 12)
    monkeypatch.setattr("ppap.methods.hp.hp_loss", lambda *args: seen.append(args[1:]) or hp_loss(*args))
    for divisor in (1, 4):
        engine = tiny_engine("hp", hp=HPConfig(dim=8, pool_size=8, anchor_divisor=divisor), steps=4)
        loader = iter(engine.start(engine.images))
        for step in range(2):
            assert engine.train_step(next(loader), step)["hp_loss"].isfinite()
    anchors, _, _, kept, limits = zip(*seen, strict=True)
    assert all(torch.equal(every, torch.arange(32)) for every in anchors[:2])
    assert not torch.equal(anchors[2], anchors[3])
    for few in anchors[2:]:
        assert [int(((few >= i) & (few < i + 12)).sum()) for i in (0, 12, 24)] == [3, 3, 2]
    assert [tuple(rows.shape) for rows in kept] == [(12, 32)] * 2 + [(3, 32)] * 2
    assert [one.chunk for one in limits] == [12, 12, 3, 3]
    assert "every patch an anchor" in tiny_engine("hp").method.describe(64)
    assert "3 anchors per 12 patches" in engine.method.describe(32)
