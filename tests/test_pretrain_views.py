"""Crops, colours and masks of pretraining, and which patches show the same place."""

from dataclasses import replace

import torch
import torch.nn.functional as F

from ppap.pretraining.views import (
    change_colours,
    draw_masks,
    flattened,
    hide_patches,
    make_crops,
    match_patches,
)
from ppap.settings.pretraining import ViewsConfig

STILL = ViewsConfig(jitter=0, hue=0, grey=0)


def coordinates(batch=3, side=64):
    """Images whose red and green tell the place: 0 at the left or top edge, 1 at the right or lower one."""
    steps = (torch.arange(side) + 0.5) / side
    picture = torch.stack(
        [steps.expand(side, side), steps[:, None].expand(side, side), torch.zeros(side, side)]
    )
    return picture.expand(batch, 3, side, side).contiguous()


def places(crops, patch=4):
    """(V, B, h w, 2): what each patch of a coordinate crop says of its place, -1..1."""
    red_green = crops.images[:, :2] * torch.tensor([0.229, 0.224]).view(2, 1, 1)
    red_green = red_green + torch.tensor([0.485, 0.456]).view(2, 1, 1)
    means = F.avg_pool2d(red_green, patch).flatten(2).transpose(1, 2) * 2 - 1
    return means.unflatten(0, crops.boxes.shape[:2])


def test_crops_lie_where_their_boxes_say_and_matches_show_the_same_place(generator):
    crops = make_crops(coordinates(), 4, 32, (0.2, 0.8), STILL, generator)
    assert crops.images.shape == (12, 3, 32, 32) and crops.boxes.shape == (4, 3, 4)
    seen = places(crops)
    cx, cy, hx, hy = crops.boxes[..., None].unbind(2)
    steps = (torch.arange(8) + 0.5) / 4 - 1
    wanted = torch.stack([cx + hx * steps.repeat(8), cy + hy * steps.repeat_interleave(8)], dim=-1)
    assert torch.allclose(seen, wanted, atol=0.02)
    assert (crops.boxes[..., 2] < 0).any() and (crops.boxes[..., 2] > 0).any()
    index, found = match_patches(crops.boxes[0], (8, 8), crops.boxes[1], (8, 8))
    assert found.any()
    there = seen[1].gather(1, index[..., None].expand(-1, -1, 2))
    far = (there - seen[0]).abs() / crops.boxes[1][:, None, 2:].abs()
    assert far[found].max() < 1 / 8 + 0.05  # half a patch of the other crop


def test_a_crop_matches_itself_and_nothing_elsewhere():
    box = torch.tensor([[-0.5, -0.5, 0.4, 0.5]])
    index, found = match_patches(box, (2, 3), box, (2, 3))
    assert found.all() and index.tolist() == [[0, 1, 2, 3, 4, 5]]
    mirrored = box * torch.tensor([1, 1, -1, 1])
    assert match_patches(mirrored, (2, 3), box, (2, 3))[0].tolist() == [[2, 1, 0, 5, 4, 3]]
    index, found = match_patches(box, (2, 3), torch.tensor([[0.5, 0.5, 0.4, 0.4]]), (2, 3))
    assert not found.any() and not index.any()


def test_colours_change_only_when_asked(generator):
    images = torch.rand(6, 3, 8, 8)
    assert torch.allclose(change_colours(images, STILL, generator), images, atol=1e-5)
    grey = change_colours(images, ViewsConfig(jitter=0, hue=0, grey=1), generator)
    assert torch.allclose(grey[:, 0], grey[:, 2], atol=2e-3)
    changed = change_colours(images, ViewsConfig(), generator)
    assert (changed - images).abs().mean() > 0.02 and changed.min() >= 0 and changed.max() <= 1


def test_flattened_images_have_textures_but_no_places():
    slow = coordinates(1, 32)
    assert flattened(slow)[..., 4:-4, 4:-4].sub(0.5).abs().max() < 0.01
    fine = (torch.arange(32) % 2).float().expand(1, 3, 32, 32)
    assert flattened(fine).std() > 0.4


def test_masks_hide_whole_patches(generator):
    config = ViewsConfig(mask_odds=1, mask_share=(0.25, 0.25))
    masks = draw_masks(5, 16, config, generator)
    assert masks.sum(dim=1).tolist() == [4] * 5
    assert not draw_masks(5, 16, replace(config, mask_odds=0), generator).any()
    hidden = hide_patches(torch.ones(5, 3, 16, 16), masks, 4)
    assert torch.equal(F.avg_pool2d(hidden, 4)[:, 0].flatten(1), (~masks).float())
