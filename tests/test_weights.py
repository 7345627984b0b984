"""Weights: every form they come in reaches the network, and every bad one is refused with a reason."""

import json

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from torch import nn

from ppap.data.scenes import make_scene
from ppap.data.transforms import normalise
from ppap.errors import DataError, NumberError, UsageError
from ppap.nets import hub
from ppap.nets.backbone import build_backbone
from ppap.nets.weights import EMBEDDED
from ppap.settings.config import ModelConfig
from ppap.settings.presets import preset

SMALL = {"backbone": "vit_small_patch16_224", "width": 48, "depth": 3, "heads": 3, "image_size": 64}


def timm_vit(name="vit_small_patch16_224", **sizes):
    """A timm ViT with random weights, norms and biases included: a tensor that is not loaded shows."""
    torch.manual_seed(0)
    vit = timm.create_model(name, **{"num_classes": 0, "weight_init": "skip", **sizes}).eval()
    for key, parameter in vit.named_parameters():
        mean = 1.0 if key.endswith((".gamma", "norm1.weight", "norm2.weight", "norm.weight")) else 0.0
        nn.init.normal_(parameter, mean, std=0.02)
    return vit


def small_vit(**sizes):
    return timm_vit(**{"embed_dim": 48, "depth": 3, "num_heads": 3, "img_size": 64, **sizes})


def small_config(weights, **fields):
    return ModelConfig(**{**SMALL, "weights": str(weights), **fields})


def same_features(backbone, vit):
    """Whether the backbone gives timm's features at the size of its position embedding."""
    x = torch.randn(1, 3, *vit.patch_embed.img_size)
    with torch.no_grad():
        ours, truth = (
            backbone(x).flatten(2).transpose(1, 2),
            vit.forward_features(x)[:, backbone.num_prefix :],
        )
    return float((ours - truth).norm() / truth.norm()) < 1e-6


# Where weights come from


def write(path, vit, config=None, name="model.safetensors", prefix=""):
    """A directory of weights, with config.json if there is a config."""
    path.mkdir()
    tensors = {prefix + key: value for key, value in vit.state_dict().items()}
    if name.endswith(".safetensors"):
        safetensors.torch.save_file(tensors, path / name)
    else:
        torch.save(tensors, path / name)
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    return str(path)


OURS = {
    "name": "vit_small_patch16_224",
    "patch_size": 16,
    "width": 48,
    "depth": 3,
    "heads": 3,
    "image_size": 64,
}
TIMM = {
    "architecture": "vit_small_patch16_224",
    "num_classes": 0,
    "model_args": {"embed_dim": 48, "depth": 3, "num_heads": 3, "img_size": [64, 64]},
    "pretrained_cfg": {"input_size": [3, 64, 64], "fixed_input_size": True},
}


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "model.pth"])
@pytest.mark.parametrize("config", [{"backbone": OURS}, TIMM], ids=["ours", "timm"])
def test_directory_names_the_architecture(tmp_path, config, name):
    vit = small_vit()
    backbone = build_backbone(ModelConfig(weights=write(tmp_path / "d", vit, config, name)))
    assert {key: backbone.spec[key] for key in OURS} == OURS
    assert same_features(backbone, vit)


def test_directory_with_legacy_timm_config(tmp_path):
    vit = timm_vit(depth=2, img_size=96)
    legacy = {"architecture": "vit_small_patch16_224", "input_size": [3, 96, 96], "fixed_input_size": True}
    weights = write(tmp_path / "d", vit, legacy)
    assert build_backbone(ModelConfig(weights=weights, depth=2)).spec["image_size"] == 96


def test_directory_without_config_is_inferred(tmp_path):
    vit = small_vit(embed_dim=128, num_heads=2)
    weights = write(tmp_path / "d", vit)
    backbone = build_backbone(ModelConfig(weights=weights))
    assert backbone.spec["heads"] == 2 and same_features(backbone, vit)


def test_directory_keeps_the_origin_of_its_weights(tmp_path):
    config = {"backbone": OURS, "origin": "random weights; results are meaningless"}
    assert build_backbone(ModelConfig(weights=write(tmp_path / "d", small_vit(), config))).is_random


@pytest.mark.parametrize(
    "prefix", ["backbone.", "backbone.vit.", "module.backbone.", "module.", "net.backbone.vit."]
)
def test_weights_inside_a_larger_network(tmp_path, prefix):
    vit = small_vit()
    tensors = {prefix + key: value for key, value in vit.state_dict().items()}
    tensors |= {"projection.weight": torch.zeros(2, 2), "block.norm1.weight": torch.zeros(48)}
    if prefix == "module.":
        tensors = {key: value for key, value in tensors.items() if key.startswith(prefix)}
        tensors["module.head.weight"] = torch.zeros(2, 2)
    safetensors.torch.save_file(tensors, tmp_path / "w.safetensors")
    assert same_features(build_backbone(small_config(tmp_path / "w.safetensors")), vit)


def test_heads_of_an_inferred_architecture(tmp_path):
    vit = small_vit()
    torch.save({"model": vit.state_dict()}, tmp_path / "w.pth")
    backbone = build_backbone(ModelConfig(weights=str(tmp_path / "w.pth"), heads=3))
    assert backbone.spec["width"] == 48 and same_features(backbone, vit)
    with pytest.raises(UsageError, match="--model.heads"):
        build_backbone(ModelConfig(weights=str(tmp_path / "w.pth")))


@pytest.mark.parametrize("name", ["vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2"])
def test_dinov2_is_inferred(tmp_path, name):
    vit = timm_vit(name, embed_dim=64, depth=2, num_heads=1, img_size=56)
    torch.save({**vit.state_dict(), "mask_token": torch.zeros(1, 64)}, tmp_path / "w.pth")
    backbone = build_backbone(ModelConfig(weights=str(tmp_path / "w.pth")))
    assert backbone.spec["name"] == name
    assert same_features(backbone, vit)


def test_half_precision_file_becomes_fp32(tmp_path):
    torch.save({key: value.half() for key, value in small_vit().state_dict().items()}, tmp_path / "w.pth")
    backbone = build_backbone(small_config(tmp_path / "w.pth"))
    assert {parameter.dtype for parameter in backbone.parameters()} == {torch.float32}


def stub_download(monkeypatch, result):
    """timm.create_model(pretrained=True) returns or raises ``result``; otherwise it works as ever."""
    real, calls = timm.create_model, []

    def create_model(name, pretrained=False, **arguments):
        if not pretrained:
            return real(name, pretrained=False, **arguments)
        calls.append((name, arguments))
        if isinstance(result, BaseException):
            raise result
        return result

    monkeypatch.setattr(timm, "create_model", create_model)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(hub, "unreachable", lambda name: None)
    return calls


def test_download(monkeypatch):
    vit = timm_vit(num_classes=10, depth=2)
    calls = stub_download(monkeypatch, vit)
    backbone = build_backbone(ModelConfig(depth=2))
    assert calls == [("vit_small_patch16_224.dino", {"depth": 2})]
    assert backbone.spec["name"] == "vit_small_patch16_224" and not backbone.is_random
    assert backbone.origin == "timm pretrained vit_small_patch16_224.dino, with depth 2"
    assert same_features(backbone, vit)


def test_download_failure_says_how_to_go_on(monkeypatch):
    stub_download(monkeypatch, OSError("cannot\nreach the hub"))
    with pytest.raises(DataError, match=r"OSError: cannot reach the hub.*--model.weights FILE.pth") as caught:
        build_backbone(ModelConfig(depth=1))
    assert "\n" not in str(caught.value) and "--model.weights embedded" in str(caught.value)


# Errors


def test_a_missing_backbone_of_pretrain_names_the_command_that_makes_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = "python -m ppap.pretrain folder --data.root DIR --train.out runs/camvid-vit;"
    with pytest.raises(DataError, match=f"runs/camvid-vit/backbone does not exist; .*{command}"):
        build_backbone(preset("camvid").model)


def damaged(path, content):
    path.write_bytes(content)
    return str(path)


class Custom:
    """A class that safe loading refuses."""


def bad_source(kind, path):
    """Weights that must be refused with a DataError."""
    vit, file = small_vit(), path / "w.pth"
    state = vit.state_dict()
    if kind == "missing":
        return str(path / "none.pth")
    if kind == "empty":
        return damaged(file, b"")
    if kind == "text":
        return damaged(file, b"not a checkpoint")
    if kind == "truncated":
        torch.save(state, file)
        return damaged(file, file.read_bytes()[:-2000])
    if kind == "truncated-safetensors":
        safetensors.torch.save_file(state, path / "w.safetensors")
        return damaged(path / "w.safetensors", (path / "w.safetensors").read_bytes()[:-2000])
    contents = {
        "pickle": {**state, "extra": Custom()},
        "list": [1, 2],
        "no-vit": {"conv.weight": torch.zeros(2)},
        "two-vits": {f"{who}.{key}": value for who in ("a", "b") for key, value in state.items()},
        "other-depth": small_vit(depth=2).state_dict(),
        "other-width": small_vit(embed_dim=24).state_dict(),
        "other-size": small_vit(img_size=32).state_dict(),
        "extra-key": {**state, "surplus": torch.zeros(1)},
    }
    torch.save(contents[kind], file)
    return str(file)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "none.pth does not exist"),
        ("empty", "cannot read weights|damaged"),
        ("text", "damaged"),
        ("truncated", "is the file complete"),
        ("truncated-safetensors", "is the file complete"),
        ("pickle", "refused for safety"),
        ("list", "holds a list"),
        ("no-vit", "holds 0 ViT backbones.*conv.weight"),
        ("two-vits", "holds 2 ViT backbones"),
        ("other-depth", "blocks.2.norm1.weight is missing.*and 9 more.*--model.backbone"),
        ("other-width", r"cls_token is \(1, 1, 24\), wanted \(1, 1, 48\)"),
        ("other-size", r"pos_embed is \(1, 5, 48\), wanted \(1, 17, 48\)"),
        ("extra-key", "surplus is not part of the network"),
    ],
)
def test_bad_files(tmp_path, kind, message):
    with pytest.raises(DataError, match=message) as caught:
        build_backbone(small_config(bad_source(kind, tmp_path)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "cannot read"),
        ("[]", "holds a list"),
        ("{}", "does not name the architecture"),
        ('{"backbone": {"width": 48}}', "name is None"),
        ('{"backbone": {"name": "vit_small_patch16_224", "heads": 1.5}}', "heads is 1.5"),
        (
            '{"architecture": "vit_small_patch16_224", "model_args": {"qk_norm": true}}',
            "qk_norm are not supported",
        ),
        (None, "has no weights"),
    ],
)
def test_bad_directories(tmp_path, config, message):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    with pytest.raises(DataError, match=message):
        build_backbone(ModelConfig(weights=str(tmp_path)))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_weights(tmp_path, value):
    state = small_vit().state_dict()
    state["blocks.1.attn.qkv.weight"][3, 3] = value
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(NumberError, match="blocks.1.attn.qkv.weight"):
        build_backbone(small_config(tmp_path / "w.pth"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weights": "random"}, "--model.backbone"),
        ({"weights": "vit_small_patch16_224.dinoo"}, "did you mean vit_small_patch16_224.dino"),
        ({"weights": "vit_smal_patch16_224.dino"}, "did you mean vit_small_patch16_224.dino"),
        ({"weights": "random", "backbone": "vit_smal_patch16_224"}, "did you mean vit_small_patch16_224"),
        ({"weights": "random", "backbone": "resnet18"}, "no plain VisionTransformer"),
        ({"weights": "random", "backbone": "resnet18", "patch_size": 8}, "no plain VisionTransformer"),
        ({"weights": "random", "backbone": "vit_small_patch16_rope_mixed_224"}, "no plain VisionTransformer"),
        ({"weights": "random", "backbone": "vit_tiny_r_s16_p8_224"}, "no plain VisionTransformer"),
        (
            {"weights": "random", "backbone": "vit_small_patch16_224", "heads": 5},
            "timm cannot build .* num_heads=5",
        ),
        ({"weights": "random", "backbone": "vit_small_patch16_224", "image_size": 8}, "smaller than a patch"),
        ({"backbone": "vit_small_patch8_224"}, "is of vit_small_patch16_224"),
    ],
)
def test_usage_errors(fields, message):
    with pytest.raises(UsageError, match=message):
        build_backbone(ModelConfig(**fields))


def test_contradicting_sizes(tmp_path):
    weights = write(tmp_path / "d", small_vit(), {"backbone": OURS})
    with pytest.raises(UsageError, match="--model.heads 6: .* has 3"):
        build_backbone(ModelConfig(weights=weights, heads=6))
    with pytest.raises(UsageError, match="is of vit_small_patch16_224"):
        build_backbone(ModelConfig(weights=weights, backbone="vit_base_patch16_224"))


def test_embedded_weights_are_small_trained_and_honest():
    backbone = build_backbone(ModelConfig(weights="embedded"))
    assert backbone.patch_size == 8 and not backbone.is_random
    assert backbone.origin.startswith("embedded weights (pretrained by ppap.pretrain on ")
    assert "synthetic scenes" in backbone.origin and str(EMBEDDED) not in backbone.origin
    assert (EMBEDDED / "model.safetensors").stat().st_size <= 4e6
    # Features that nothing has shifted would all point the same way.
    features = backbone(torch.stack([normalise(make_scene(5, "val", i)[0]) for i in range(8)]))
    assert F.normalize(features, dim=1).mean(dim=(0, 2, 3)).norm() < 0.3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("cls_token"), "must be named"),
        (lambda state: [state.pop(key) for key in list(state) if key.startswith("blocks.")], "must be named"),
        (lambda state: state.update(pos_embed=torch.zeros(1, 16, 48)), "15 patches, which is no square grid"),
        (lambda state: state.update(pos_embed=torch.zeros(17, 48)), "position embedding has the shape"),
    ],
)
def test_architecture_that_cannot_be_inferred(tmp_path, change, message):
    state = small_vit().state_dict()
    change(state)
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(UsageError, match=message):
        build_backbone(ModelConfig(weights=str(tmp_path / "w.pth"), heads=3))
