"""Every family of docs/backbones.md: features are timm's, any image size, and the spec builds it again."""

import copy
import json
import re
from pathlib import Path

import pytest
import torch
from timm.models.eva import Eva
from torch import nn

from ppap.data.transforms import denormalise
from ppap.nets.backbone import backbone_from_spec, build_backbone
from ppap.nets.model import PPAPNet
from ppap.pretraining.export import export_backbone
from ppap.settings.config import ModelConfig
from tests.families import FAMILIES, MEAN, SIZES, STD, random_vit, write


def relative(value, truth):
    return float(((value - truth).norm() / truth.norm()).detach())


def rows(features):
    return features.flatten(2).transpose(1, 2)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, tmp_path_factory):
    """Backbone of the published form, timm's network, and the family."""
    family = FAMILIES[request.param]
    weights, vit = write(family, tmp_path_factory.mktemp(request.param))
    return build_backbone(ModelConfig(weights=weights, pos_interp="timm")), vit, family


def truth(vit, family, x):
    """timm's own features of the patches, given images as the publisher normalises them."""
    if family.preprocessor is not None:
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        x = (denormalise(x) - mean) / std
    with torch.no_grad():
        return vit.forward_features(x)[:, vit.num_prefix_tokens :]


@pytest.mark.parametrize("size", [(64, 64), (96, 96), (48, 112)])
def test_features_are_those_of_timm(family, size):
    backbone, vit, kind = family
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        features = backbone(x)
    assert features.shape == (2, 64, size[0] // 16, size[1] // 16)
    assert relative(rows(features), truth(vit, kind, x)) < 1e-5
    assert backbone(torch.randn(1, 3, 70, 50)).isfinite().all()


def test_the_spec_builds_it_again(family):
    backbone, _, kind = family
    again = backbone_from_spec(json.loads(json.dumps(backbone.spec)), origin="a checkpoint")
    again.load_state_dict(backbone.state_dict())
    assert again.spec == backbone.spec
    assert ("mean" in backbone.spec) == (kind.preprocessor is not None)
    x = torch.randn(1, 3, 48, 64)
    assert torch.equal(again(x), backbone(x))
    assert torch.equal(copy.deepcopy(backbone)(x), backbone(x))


def test_an_exported_folder_is_the_same_network(family, tmp_path):
    backbone, _, _ = family
    export_backbone(backbone, tmp_path / "backbone", "a test")
    again = build_backbone(ModelConfig(weights=str(tmp_path / "backbone"), pos_interp="timm"))
    assert again.spec == backbone.spec
    x = torch.randn(1, 3, 48, 64)
    assert torch.equal(again(x), backbone(x))


def test_the_last_block_trains(family):
    """The copy starts as the frozen block, every parameter of it takes a gradient, and nothing else does."""
    backbone, vit, kind = family
    net = PPAPNet(copy.deepcopy(backbone), 0.0)
    x = torch.randn(2, 3, 48, 64)
    streams = net(x)
    assert torch.equal(streams.code, streams.guidance)
    (streams.code.square().sum() + streams.z[:, 0].sum()).backward()
    moved = {
        name for name, p in net.block.named_parameters() if p.grad is not None and p.grad.abs().max() > 0
    }
    assert moved == {name for name, _ in net.block.named_parameters()}
    assert any(name.endswith(("gamma_1", "ls1.gamma")) for name in moved) == ("dinov" in kind.architecture)
    assert any("fc1_g" in name for name in moved) == ("plus" in kind.architecture)
    assert all(p.grad is None for p in net.backbone.parameters())
    if isinstance(vit, Eva):  # rotary positions reach the copy: without them it computes something else
        net.backbone.vit.rope = None
        assert relative(net(x).code, streams.code) > 1e-4


def test_rotary_positions_follow_grid_and_mode():
    torch.manual_seed(0)
    backbone = build_backbone(
        ModelConfig(weights="random", backbone="vit_small_patch16_dinov3", width=64, depth=2, heads=1)
    )
    with torch.inference_mode():
        first = backbone(torch.ones(1, 3, 32, 64))
    assert not torch.equal(first[:, :, 0], first[:, :, 1])
    other = backbone(torch.ones(1, 3, 64, 32))
    assert other.shape[2:] == (4, 2) and torch.equal(backbone(torch.ones(1, 3, 32, 64)), first)
    net = PPAPNet(backbone, 0.0)
    with torch.inference_mode():
        net(torch.ones(1, 3, 32, 48))
    net(torch.ones(1, 3, 32, 48)).code.sum().backward()  # positions kept from there are no inference tensors


@pytest.mark.parametrize("name", ["eva02_tiny_patch14_224", "vit_small_patch16_rope_224"])
def test_other_networks_of_the_same_class(tmp_path, name):
    vit = random_vit(name, patch_size=16)
    torch.save(vit.state_dict(), tmp_path / "w.pth")
    sizes = {"width": 64, "depth": 2, "heads": 1, "image_size": 64, "patch_size": 16}
    config = ModelConfig(backbone=name, weights=str(tmp_path / "w.pth"), pos_interp="timm", **sizes)
    backbone = build_backbone(config)
    for size in (64, 96):
        x = torch.randn(1, 3, size, size)
        with torch.no_grad():
            # The final norm may stand behind the pooling.
            expected = vit.fc_norm(vit.forward_features(x)[:, vit.num_prefix_tokens :])
            assert relative(rows(backbone(x)), expected) < 1e-5
    assert SIZES["embed_dim"] == backbone.width and isinstance(backbone.norm, nn.LayerNorm)


def test_the_documented_table_is_this_list():
    text = (Path(__file__).parent.parent / "docs/backbones.md").read_text()
    assert set(re.findall(r"`test:([\w-]+)`", text)) == set(FAMILIES)
