"""The two streams: what each computes, what a gradient reaches, dropout, the split for a cache."""

import pytest
import timm
import torch
import torch.nn.functional as F

from ppap.nets.backbone import backbone_from_spec, build_backbone
from ppap.nets.model import FrozenTokens, Network, PPAPNet, Streams, build_net, patch_rows
from ppap.settings.config import ModelConfig

SMALL = {"backbone": "vit_small_patch16_224", "width": 48, "depth": 3, "heads": 3, "image_size": 64}


def small_net(seed=0, **fields):
    torch.manual_seed(seed)
    return build_net(ModelConfig(**{**SMALL, "weights": "random", **fields}))


def moved(net):
    """The net after something changed its block, so that code and guidance differ."""
    for parameter in net.trainable_parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    return net


def images(*size):
    torch.manual_seed(1)
    return torch.randn(2, 3, *(size or (48, 80)))


def test_streams_follow_the_definition(tmp_path):
    """Against timm's own blocks, one at a time."""
    torch.manual_seed(0)
    vit = timm.create_model(
        "vit_small_patch16_224", num_classes=0, embed_dim=48, depth=3, num_heads=3, img_size=64
    )
    torch.save(vit.eval().state_dict(), tmp_path / "w.pth")
    net = moved(small_net(weights=str(tmp_path / "w.pth"))).eval()
    x = images(64, 64)
    with torch.no_grad():
        out = net(x)
        before = vit._pos_embed(vit.patch_embed(x))
        before = vit.blocks[1](vit.blocks[0](before))
        guidance = vit.norm(vit.blocks[2](before))[:, 1:]
        code = vit.norm(net.block(before))[:, 1:]
        z = F.normalize(code.reshape(-1, 48) @ net.projection.weight.T + net.projection.bias, dim=1)
    assert isinstance(out, Streams) and out.grid == (4, 4)
    torch.testing.assert_close(out.guidance, guidance.transpose(1, 2).reshape(2, 48, 4, 4))
    torch.testing.assert_close(out.code, code.transpose(1, 2).reshape(2, 48, 4, 4))
    torch.testing.assert_close(out.z, z)
    assert not torch.allclose(out.code, out.guidance, atol=1e-2)


def test_before_training_code_equals_guidance():
    net = small_net().eval()
    out = net(images())
    torch.testing.assert_close(out.code, out.guidance)
    assert net.block is not net.backbone.vit.blocks[-1]


@pytest.mark.parametrize("size", [(48, 80), (50, 70), (64, 64)])
def test_rows_are_in_image_row_column_order(size):
    net = moved(small_net()).eval()
    x = images(*size)
    out = net(x)
    h, w = out.grid
    assert out.z.shape == (2 * h * w, 48) and out.code.shape == out.guidance.shape == (2, 48, h, w)
    torch.testing.assert_close(out.z.norm(dim=1), torch.ones(2 * h * w))
    pick = out.code[1, :, h - 1, 0]
    torch.testing.assert_close(out.z[h * w + (h - 1) * w], F.normalize(net.projection(pick), dim=0))
    rows = patch_rows(out.guidance)
    assert torch.equal(rows[h * w + 1], out.guidance[1, :, 0, 1])
    assert rows.data_ptr() == out.guidance.data_ptr(), "rows of a map must not be copied"


def test_gradient_reaches_block_and_projection_only():
    net = moved(small_net())
    norm = [value.clone() for value in net.backbone.norm.state_dict().values()]
    x = images().requires_grad_(True)
    out = net(x)
    assert not out.guidance.requires_grad
    (out.z * torch.randn_like(out.z)).sum().backward()
    reached = {name for name, parameter in net.named_parameters() if parameter.grad is not None}
    wanted = {name for name, _ in net.named_parameters() if name.startswith(("block.", "projection."))}
    assert reached == wanted and x.grad is None
    assert all(parameter.grad.abs().sum() > 0 for parameter in net.trainable_parameters())
    assert {id(p) for p in net.trainable_parameters()} == {id(p) for p in net.parameters() if p.requires_grad}
    torch.optim.AdamW(net.trainable_parameters(), lr=0.1).step()
    for old, new in zip(norm, net.backbone.norm.state_dict().values(), strict=True):
        assert torch.equal(old, new)


def test_gradient_passes_through_the_norm():
    """Analytic gradient of the code through the frozen LayerNorm equals a finite difference in float64."""
    torch.manual_seed(0)
    norm = small_net().backbone.norm.double()
    norm.weight.data.normal_(1, 0.3)
    t = torch.randn(2, 48, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(norm, (t,)) and norm.weight.grad is None


def test_one_step_moves_code_and_leaves_guidance():
    net = small_net(guidance_dropout=0.0)
    x = images()
    before = net(x)
    optimiser = torch.optim.AdamW(net.trainable_parameters(), lr=1e-2)
    (before.z[0] @ before.z.T).sum().backward()
    optimiser.step()
    after = net(x)
    assert torch.equal(before.guidance, after.guidance) and torch.equal(net.features(x), after.guidance)
    assert not torch.allclose(before.code, after.code, atol=1e-3)


def test_dropout_drops_whole_channels_per_image():
    net = small_net(guidance_dropout=0.25, width=192)
    x = images()
    clean, out = net.features(x), net(x)
    assert torch.equal(net.frozen(x).guidance, clean), "a cache must hold features without dropout"
    share = out.guidance / clean
    torch.testing.assert_close(share, share[:, :, :1, :1].expand_as(share))
    kept = share[:, :, 0, 0]
    dropped = kept == 0
    torch.testing.assert_close(kept[~dropped], torch.full_like(kept[~dropped], 1 / 0.75))
    assert not torch.equal(dropped[0], dropped[1])
    again = net(x)
    assert not torch.equal(again.guidance, out.guidance) and torch.equal(again.z, out.z)


def test_dropout_rate_and_mean():
    net = small_net(guidance_dropout=0.1)
    frozen = FrozenTokens(torch.zeros(200, 2, 48), torch.ones(200, 48, 1, 1), (1, 1))
    torch.manual_seed(0)
    guidance = net.forward_tokens(frozen).guidance
    # 9600 draws: five standard deviations are 0.015 for the rate and 0.017 for the mean.
    assert abs((guidance == 0).float().mean().item() - 0.1) < 0.015
    assert abs(guidance.mean().item() - 1) < 0.017


@pytest.mark.parametrize("mode", ["eval", "zero"])
def test_no_dropout_in_evaluation_or_when_off(mode):
    net = small_net(guidance_dropout=0.5 if mode == "eval" else 0.0).train(mode == "zero")
    x = images()
    assert torch.equal(net(x).guidance, net.features(x))


def test_frozen_backbone_ignores_training_mode():
    net = small_net().train()
    assert net.training and net.block.training and not net.backbone.training
    assert not any(module.training for module in net.backbone.modules())


def test_code_alone():
    net = moved(small_net())
    x = images(50, 70)
    full = net(x)
    assert torch.equal(net.code(x), full.code) and torch.equal(net.code_of(net.frozen(x)), full.code)
    assert net.code_width == full.code.shape[1]
    untrained = Network(net.backbone)
    assert torch.equal(untrained.code(x), net.features(x)) and untrained.code_width == 48


def test_forward_is_frozen_then_forward_tokens():
    net = moved(small_net()).eval()
    x = images()
    frozen = net.frozen(x)
    assert frozen.before.shape == (2, 1 + 15, 48) and not frozen.before.requires_grad
    whole, split = net(x), net.forward_tokens(frozen)
    for one, two in zip(whole, split, strict=True):
        assert one == two if isinstance(one, tuple) else torch.equal(one, two)
    half = net.forward_tokens(FrozenTokens(frozen.before.half(), frozen.guidance.half(), frozen.grid))
    assert half.guidance.dtype == half.code.dtype == half.z.dtype == torch.float32
    torch.testing.assert_close(half.z, whole.z, atol=5e-3, rtol=0)


@pytest.mark.parametrize("fast", [False, True], ids=["norm", "timm-fast-norm"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_outputs_are_fp32_under_autocast(dtype, fast):
    net = moved(small_net(guidance_dropout=0.0))
    net.backbone.norm._fast_norm = fast
    x = images()
    with torch.autocast("cpu", dtype=dtype):
        mixed = net(x)
        features = net.features(x)
    for value in (mixed.guidance, mixed.code, mixed.z, features):
        assert value.dtype == torch.float32
    assert net.backbone.patch_map(torch.randn(1, 5, 48, dtype=dtype), (2, 2)).dtype == torch.float32
    mixed.z.sum().backward()
    # Blocks run in the low precision; bf16 keeps 8 bits.
    torch.testing.assert_close(mixed.guidance, net(x).guidance, atol=0.1, rtol=0.05)
    torch.testing.assert_close(mixed.z.norm(dim=1), torch.ones(len(mixed.z)))


def test_initial_weights_follow_the_global_seed():
    one, two, other = small_net(seed=5), small_net(seed=5), small_net(seed=6)
    same = [
        torch.equal(a, b) for a, b in zip(one.state_dict().values(), two.state_dict().values(), strict=True)
    ]
    assert all(same) and not torch.equal(one.projection.weight, other.projection.weight)


def test_network_survives_a_round_trip_without_its_weights_file(tmp_path):
    net = moved(small_net()).eval()
    again = PPAPNet(backbone_from_spec(net.backbone.spec, "a checkpoint"), 0.0).eval()
    again.load_state_dict(net.state_dict(), strict=True)
    x = images()
    assert torch.equal(again(x).z, net(x).z) and torch.equal(again.features(x), net.features(x))
    # The whole network's file serves as the weights of another network's frozen half.
    torch.save(net.state_dict(), tmp_path / "net.pth")
    backbone = build_backbone(ModelConfig(**SMALL, weights=str(tmp_path / "net.pth")))
    assert torch.equal(backbone(x), net.features(x))


def test_register_tokens_are_dropped():
    fields = {"backbone": "vit_small_patch14_reg4_dinov2", "image_size": 56}
    net = small_net(**fields).eval()
    out = net(images(60, 56))
    assert (
        out.grid == (5, 4)
        and out.z.shape == (2 * 20, 48)
        and net.frozen(images(60, 56)).before.shape[1] == 25
    )
