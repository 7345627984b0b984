"""Moments, the maps of --model.condition against plain restatements, and what is refused."""

import pytest
import torch

from ppap.nets.conditioning import (
    Condition,
    Moments,
    Split,
    fit,
    position_directions,
    position_r2,
    spectrum,
)
from ppap.settings.checks import parse_condition
from ppap.settings.config import ModelConfig


def maps(images=40, width=12, side=6, seed=0):
    """Features with a mean, a steep spectrum, and their rows."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.tensor([2.0 ** -(i / 2) for i in range(width)])
    values = torch.randn(images, width, side, side, generator=generator) * scale[:, None, None] + 0.7
    return values, values.permute(0, 2, 3, 1).reshape(-1, width).double()


def split_of(values):
    return Split(Moments.of(values[::2]), Moments.of(values[1::2]))


def test_moments_of_parts_add_up_to_those_of_all():
    values, rows = maps()
    whole = Moments.of(values)
    parts = Moments.of(values[:3]) + (Moments.of(values[3:4]) + Moments.of(values[4:]))
    assert parts.count == whole.count == len(rows)
    torch.testing.assert_close(parts.mean, whole.mean)
    torch.testing.assert_close(parts.covariance, whole.covariance)
    torch.testing.assert_close(whole.mean[:-2], rows.mean(dim=0))
    torch.testing.assert_close(whole.covariance[:-2, :-2], torch.cov(rows.T, correction=0))
    # Row and column run from -1 to 1, whatever the number of images.
    torch.testing.assert_close(whole.mean[-2:], torch.zeros(2, dtype=torch.float64))
    assert whole.covariance[-2, -1].abs() < 1e-12


def test_moments_of_a_single_row_and_column():
    assert Moments.of(torch.randn(2, 3, 1, 4)).covariance[-2, -2] == 0
    assert Moments.of(torch.randn(2, 3, 1, 1)).covariance[-2:, -2:].abs().max() == 0


def covariance(values, condition):
    out = fit(condition, split_of(values))(values).permute(0, 2, 3, 1).reshape(-1, values.shape[1]).double()
    return out.mean(dim=0), torch.cov(out.T, correction=0)


@pytest.mark.parametrize("condition", ["centre", "whiten:1", "whiten:0.5", "clip:0.1", "drop:3"])
def test_maps_do_what_their_names_say(condition):
    values, rows = maps()
    before = torch.linalg.eigvalsh(torch.cov(rows.T, correction=0)).flip(0)
    mean, after = covariance(values, condition)
    after = torch.linalg.eigvalsh(after).flip(0)
    half = 0.5 * before.sum().sqrt() if condition.startswith("clip") else 0.0
    assert abs(mean.norm() - half) < 1e-4
    assert after.sum().item() == pytest.approx(before.sum().item(), rel=1e-4)  # sizes keep their meaning
    shrink = len(before) / len(rows)
    known = before * (1 - shrink) + before.mean() * shrink  # what few patches can know of the small ones
    wanted = {
        "centre": before,
        "whiten:1": before / known,
        "whiten:0.5": before / known.sqrt(),
        "clip:0.1": before * (0.1 * known.sum() / known).clamp(max=1),
        "drop:3": torch.cat([before[3:], torch.zeros(3, dtype=before.dtype)]),
    }[condition]
    wanted = wanted * before.sum() / wanted.sum()
    torch.testing.assert_close(after, wanted.sort(descending=True).values, rtol=1e-3, atol=1e-6)


def test_none_is_the_identity_and_few_patches_stay_finite():
    values, _ = maps(images=2, width=64, side=2)
    assert torch.equal(fit("none", split_of(values))(values), values)
    for condition in ("centre", "whiten:1", "clip:0.01", "drop:63", "position"):
        out = fit(condition, split_of(values))(values)
        assert torch.isfinite(out).all() and out.shape == values.shape


def test_dropping_all_that_varies_leaves_nothing_infinite():
    """Exactly 0 is left to keep the size of; by rounding it is more or less on some processors."""
    values = torch.ones(4, 8, 3, 3)
    values[:, 0] = torch.randn(4, 3, 3, generator=torch.Generator().manual_seed(0))
    out = fit("drop:1", split_of(values))(values)
    assert torch.isfinite(out).all() and out.abs().max() < 1e-3


def test_position_is_found_on_held_out_images_and_removed():
    values, _ = maps(images=60)
    ramp = torch.linspace(-1, 1, 6)
    values[:, 4] += 3 * ramp[:, None]
    values[:, 5] += 2 * ramp
    split = split_of(values)
    row, column = position_r2(split)
    assert row > 0.9 and column > 0.7
    found = position_directions(split)
    assert 2 <= found.shape[1] <= 8  # the others stay
    torch.testing.assert_close(found.T @ found, torch.eye(found.shape[1], dtype=torch.float64))
    removed = fit("position", split)(values)
    assert max(position_r2(split_of(removed))) < 0.1
    assert covariance(values, "position")[1].diagonal()[0] > 0.5


def test_noise_has_no_position():
    values, _ = maps(images=60)
    assert max(position_r2(split_of(values))) < 0.05
    assert position_directions(split_of(values)).shape[1] == 0


def test_a_stored_map_is_the_same_map():
    values, _ = maps()
    fitted = fit("whiten:0.5", split_of(values))
    again = Condition(values.shape[1])
    again.load_state_dict(fitted.state_dict())
    assert torch.equal(fitted(values.half()), again(values.half()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(fitted(values), again(values)) and fitted(values).dtype == torch.float32


def test_the_spectrum_falls_and_keeps_the_sum():
    values, rows = maps()
    found, vectors = spectrum(split_of(values).all)
    assert (found.diff() <= 0).all()
    assert found.sum().item() == pytest.approx(float(rows.var(dim=0, correction=0).sum()))
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(12, dtype=torch.float64))


@pytest.mark.parametrize(
    "text",
    ["", "white", "whiten", "whiten:0", "whiten:1.5", "clip:-1", "clip:x", "drop:0", "drop:1.5", "none:1"],
)
def test_conditions_that_do_not_exist_are_refused_by_name(text):
    with pytest.raises(ValueError, match=r"--model.condition is .*give none, centre, whiten:P"):
        ModelConfig(condition=text)


def test_conditions_are_read():
    assert parse_condition("whiten:0.5") == ("whiten", 0.5)
    assert parse_condition("drop:5") == ("drop", 5.0)
    assert parse_condition("position") == ("position", 0.0)
    assert ModelConfig(condition="auto").condition == "auto"
