"""Backbone: features against timm, both position rules against independent oracles, any image size."""

import argparse
import copy
import json
import math

import numpy as np
import pytest
import timm
import torch
from torch import nn

from ppap.errors import UsageError
from ppap.nets.backbone import backbone_from_spec, build_backbone, resize_position
from ppap.settings.config import ModelConfig

SMALL = {"backbone": "vit_small_patch16_224", "width": 48, "depth": 3, "heads": 3, "image_size": 64}


def timm_vit(name="vit_small_patch16_224", **sizes):
    """A timm ViT with random weights, norms and biases included: a tensor that is not loaded shows."""
    torch.manual_seed(0)
    vit = timm.create_model(name, num_classes=0, weight_init="skip", **sizes).eval()
    for key, parameter in vit.named_parameters():
        mean = 1.0 if key.endswith((".gamma", "norm1.weight", "norm2.weight", "norm.weight")) else 0.0
        nn.init.normal_(parameter, mean, std=0.02)
    return vit


def small_vit(**sizes):
    return timm_vit(**{"embed_dim": 48, "depth": 3, "num_heads": 3, "img_size": 64, **sizes})


def small_config(weights, **fields):
    return ModelConfig(**{**SMALL, "weights": str(weights), **fields})


def rows(features):
    """(B, D, h, w) -> (B, h w, D)."""
    return features.flatten(2).transpose(1, 2)


def relative(value, truth):
    return float((value - truth).norm() / truth.norm())


def bicubic_axis(stored, wanted, scale):
    """Dense (wanted, stored) matrix of torch's bicubic (a = -0.75, half-pixel centres, clamped border)."""

    def weight(t):
        t, a = abs(t), -0.75
        if t <= 1:
            return (a + 2) * t**3 - (a + 3) * t**2 + 1
        return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0

    matrix = np.zeros((wanted, stored))
    for i in range(wanted):
        source = (i + 0.5) / scale - 0.5
        for j in range(math.floor(source) - 1, math.floor(source) + 3):
            matrix[i, min(max(j, 0), stored - 1)] += weight(source - j)
    return matrix


def dino_position(position, stored, grid, num_prefix=1):
    """DINO's rule in float64: scale (size + 0.1) / stored per axis, no antialiasing."""
    position = position.detach().double().numpy()
    prefix, patches = position[:, :num_prefix], position[0, num_prefix:].reshape(stored, stored, -1)
    down = bicubic_axis(stored, grid[0], (grid[0] + 0.1) / stored)
    right = bicubic_axis(stored, grid[1], (grid[1] + 0.1) / stored)
    patches = np.einsum("ir,jc,rcd->ijd", down, right, patches)
    both = np.concatenate([prefix, patches.reshape(1, grid[0] * grid[1], -1)], axis=1)
    return torch.from_numpy(both).float()


def full_checkpoint(vit):
    """A DINO training checkpoint: prefixes, heads, a student that differs, its arguments as a Namespace."""
    state = vit.state_dict()
    student = {f"module.backbone.{key}": value + 1 for key, value in state.items()}
    teacher = {f"backbone.{key}": value for key, value in state.items()}
    teacher |= {"head.mlp.0.weight": torch.randn(8, 8), "head.last_layer.weight_g": torch.ones(4, 1)}
    return {
        "student": student | {"module.head.mlp.0.weight": torch.randn(8, 8)},
        "teacher": teacher,
        "optimizer": {"state": {}, "param_groups": [{"lr": 1e-3, "params": [0]}]},
        "epoch": 100,
        "args": argparse.Namespace(arch="vit_small", patch_size=16, out_dim=65536, use_fp16=True, lr=0.0005),
        "dino_loss": {"center": torch.zeros(1, 4)},
    }


# DINO checkpoints at full size


@pytest.fixture(scope="module", params=[16, 8], ids=["vits16", "vits8"])
def dino(request, tmp_path_factory):
    """A ViT-S of timm, and two backbones: from its flat state dict, and from a whole training checkpoint."""
    patch, folder = request.param, tmp_path_factory.mktemp("dino")
    vit = timm_vit(f"vit_small_patch{patch}_224")
    torch.save(vit.state_dict(), folder / "flat.pth")
    torch.save(full_checkpoint(vit), folder / "full.pth")
    return vit, *(
        build_backbone(ModelConfig(weights=str(folder / name))) for name in ("flat.pth", "full.pth")
    )


def test_dino_files_match_timm_at_224(dino):
    vit, flat, full = dino
    patch = vit.patch_embed.patch_size[0]
    assert len(vit.state_dict()) == 150
    assert (
        flat.spec
        == full.spec
        == {
            "name": f"vit_small_patch{patch}_224",
            "patch_size": patch,
            "width": 384,
            "depth": 12,
            "heads": 6,
            "image_size": 224,
            "pos_interp": "dino",
        }
    )
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        ours, truth = flat(x), vit.forward_features(x)[:, 1:]
    assert ours.shape == (1, 384, 224 // patch, 224 // patch)
    assert relative(rows(ours), truth) < 1e-6
    for key, value in vit.state_dict().items():
        assert torch.equal(flat.vit.state_dict()[key], value) and torch.equal(
            full.vit.state_dict()[key], value
        )
    assert not flat.is_random and "flat.pth" in flat.origin


def test_both_rules_match_their_oracles_at_320(dino):
    vit, backbone, _ = dino
    patch = vit.patch_embed.patch_size[0]
    # The position embedding enters before the first block, so three blocks tell as much as twelve, sooner.
    vit, backbone = copy.deepcopy(vit), copy.deepcopy(backbone)
    vit.blocks, backbone.vit.blocks = vit.blocks[:3], backbone.vit.blocks[:3]
    name, sizes = f"vit_small_patch{patch}_224", {"num_classes": 0, "depth": 3, "weight_init": "skip"}
    dynamic = timm.create_model(name, dynamic_img_size=True, **sizes).eval()
    dynamic.load_state_dict(vit.state_dict())
    resized = timm.create_model(name, img_size=320, **sizes).eval()
    position = dino_position(vit.pos_embed, 224 // patch, (320 // patch, 320 // patch))
    resized.load_state_dict({**vit.state_dict(), "pos_embed": position})
    x = torch.randn(1, 3, 320, 320)
    with torch.no_grad():
        features = {}
        for backbone.pos_interp in ("dino", "timm"):
            features[backbone.pos_interp] = rows(backbone(x))
        dino_truth, timm_truth = resized.forward_features(x)[:, 1:], dynamic.forward_features(x)[:, 1:]
    assert relative(features["dino"], dino_truth) < 1e-6
    assert relative(features["timm"], timm_truth) < 1e-6
    # The two rules differ by far more than rounding, so the lines above tell them apart.
    assert relative(features["timm"], dino_truth) > 1e-3


# Position rules


@pytest.mark.parametrize("size", [(64, 64), (80, 80), (48, 96), (16, 16), (256, 32)])
def test_timm_rule_matches_dynamic_img_size(tmp_path, size):
    vit = small_vit(dynamic_img_size=True)
    torch.save(vit.state_dict(), tmp_path / "w.pth")
    backbone = build_backbone(small_config(tmp_path / "w.pth", pos_interp="timm"))
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        assert relative(rows(backbone(x)), vit.forward_features(x)[:, 1:]) < 1e-6


@pytest.mark.parametrize("grid", [(4, 4), (5, 5), (3, 3), (1, 1), (2, 8), (8, 2), (29, 17), (1, 64)])
@pytest.mark.parametrize("num_prefix", [0, 1, 5])
def test_dino_position_matches_oracle(grid, num_prefix):
    position = torch.randn(1, num_prefix + 16, 6)
    ours = resize_position(position, (4, 4), grid, num_prefix=num_prefix, rule="dino")
    if grid == (4, 4):
        assert ours is position
        return
    torch.testing.assert_close(ours, dino_position(position, 4, grid, num_prefix), atol=2e-5, rtol=0)
    assert torch.equal(ours[:, :num_prefix], position[:, :num_prefix])


def test_dino_position_resized_when_only_the_count_matches():
    position = torch.randn(1, 17, 6)
    ours = resize_position(position, (4, 4), (2, 8), num_prefix=1, rule="dino")
    assert ours.shape == position.shape and not torch.allclose(ours, position)


def test_dino_position_keeps_every_grid():
    """floor(stored * scale) is the wanted size for all sizes that images have."""
    for stored in (4, 14, 28, 37):
        for wanted in range(1, 200):
            grid = (wanted, 3)
            ours = resize_position(
                torch.zeros(1, stored**2, 1), (stored, stored), grid, num_prefix=0, rule="dino"
            )
            assert ours.shape[1] == wanted * 3


# Image sizes


@pytest.mark.parametrize("size", [(50, 64), (64, 33), (17, 90), (1, 1)])
def test_ragged_sizes_are_zero_padded_right_and_bottom(size):
    backbone = build_backbone(small_config("random"))
    x = torch.randn(2, 3, *size)
    grid = (math.ceil(size[0] / 16), math.ceil(size[1] / 16))
    padded = torch.zeros(2, 3, grid[0] * 16, grid[1] * 16)
    padded[:, :, : size[0], : size[1]] = x
    before, last, found = backbone.tokens(x)
    assert found == grid and before.shape == last.shape == (2, 1 + grid[0] * grid[1], 48)
    assert torch.equal(backbone(x), backbone(padded)) and backbone(x).shape == (2, 48, *grid)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 4, 32, 32), (1, 3, 0, 32), (0, 3, 32, 32)])
def test_images_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match="must be"):
        build_backbone(small_config("random"))(torch.zeros(shape))


# Architectures


@pytest.mark.parametrize(
    ("name", "prefix"),
    [
        ("vit_small_patch14_dinov2", 1),
        ("vit_small_patch14_reg4_dinov2", 5),
        ("deit_small_distilled_patch16_224", 2),
        ("vit_base_patch16_gap_224", 0),
        ("vit_base_patch16_siglip_224", 0),
        ("vit_base_patch16_clip_224", 1),
        ("flexivit_small", 1),
    ],
)
def test_other_vits_of_timm(tmp_path, name, prefix):
    sizes = {"embed_dim": 48, "depth": 2, "num_heads": 3, "img_size": 112}
    vit = timm_vit(name, **sizes)
    torch.save(vit.state_dict(), tmp_path / "w.pth")
    fields = {"width": 48, "depth": 2, "heads": 3, "image_size": 112}
    backbone = build_backbone(ModelConfig(backbone=name, weights=str(tmp_path / "w.pth"), **fields))
    assert backbone.num_prefix == prefix
    x = torch.randn(1, 3, 112, 112)
    with torch.no_grad():
        assert relative(rows(backbone(x)), vit.forward_features(x)[:, prefix:]) < 1e-6
    assert backbone(torch.randn(1, 3, 150, 70)).isfinite().all()


@pytest.mark.parametrize("name", ["vit_medium_patch16_reg4_gap_256", "vit_base_patch16_rpn_224"])
def test_norm_behind_the_pooling_is_used_per_patch(tmp_path, name):
    vit = timm_vit(name, embed_dim=48, depth=2, num_heads=3, img_size=64)
    nn.init.normal_(vit.fc_norm.weight, 1.0, 0.3)
    assert isinstance(vit.norm, nn.Identity)
    torch.save(vit.state_dict(), tmp_path / "w.pth")
    backbone = build_backbone(small_config(tmp_path / "w.pth", backbone=name, depth=2))
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        truth = vit.fc_norm(vit.forward_features(x)[:, vit.num_prefix_tokens :])
        assert relative(rows(backbone(x)), truth) < 1e-6
    # Built again from its own file, where the norm stands under the plain name.
    torch.save(backbone.state_dict(), tmp_path / "again.pth")
    again = build_backbone(small_config(tmp_path / "again.pth", backbone=name, depth=2))
    assert torch.equal(again(x), backbone(x))


def test_backbone_is_frozen_and_stays_in_evaluation_mode():
    backbone = build_backbone(small_config("random"))
    backbone.train()
    assert not any(module.training for module in backbone.modules())
    assert not any(parameter.requires_grad for parameter in backbone.parameters())


def test_spec_rebuilds_the_network():
    backbone = build_backbone(small_config("random", patch_size=8, pos_interp="timm"))
    again = backbone_from_spec(json.loads(json.dumps(backbone.spec)), origin="a checkpoint")
    again.load_state_dict(backbone.state_dict())
    assert again.spec == backbone.spec and again.origin == "a checkpoint" and not again.is_random
    x = torch.randn(1, 3, 40, 24)
    assert torch.equal(again(x), backbone(x))


def test_random_weights_follow_the_global_seed_and_say_so():
    torch.manual_seed(3)
    one = build_backbone(small_config("random"))
    torch.manual_seed(3)
    two = build_backbone(small_config("random"))
    assert all(
        torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True)
    )
    assert one.is_random and "random weights; results are meaningless" in one.origin


def test_weights_of_another_family_are_blamed_on_the_weights():
    with pytest.raises(UsageError, match="--model.weights resnet50.a1_in1k: resnet50.a1_in1k is no plain"):
        build_backbone(ModelConfig(weights="resnet50.a1_in1k"))
    with pytest.raises(UsageError, match="--model.backbone resnet50 is no plain"):
        build_backbone(ModelConfig(weights="random", backbone="resnet50"))
