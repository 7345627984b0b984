"""Layouts of weights: architectures told apart, one of several backbones chosen, wrong files refused."""

import json
import shutil
from functools import partial

import pytest
import safetensors.torch
import timm
import torch

from ppap.errors import DataError, UsageError
from ppap.nets.architecture import complete, infer_spec
from ppap.nets.backbone import build_backbone
from ppap.nets.layouts.huggingface import config_spec
from ppap.nets.layouts.pixels import SATELLITE, of_preprocessor
from ppap.nets.weights import open_source
from ppap.settings.config import ModelConfig
from tests.families import FAMILIES, V3_MLP, hf_config, write


def build(weights, **fields):
    return build_backbone(ModelConfig(weights=str(weights), **fields))


# Architectures of published sizes


@pytest.mark.parametrize(
    "name",
    [
        *(f"vit_{size}_patch16_224" for size in ("tiny", "small", "base", "large")),
        *(f"vit_{size}_patch8_224" for size in ("small", "base")),
        *(f"deit_{size}_distilled_patch16_224" for size in ("tiny", "small", "base")),
        *(f"vit_{size}_patch14_dinov2" for size in ("small", "base", "large", "giant")),
        *(f"vit_{size}_patch14_reg4_dinov2" for size in ("small", "base", "large", "giant")),
        *(
            f"vit_{size}_patch16_dinov3_qkvb"
            for size in ("small", "small_plus", "base", "large", "huge_plus")
        ),
        *(
            f"vit_{size}_patch16_dinov3"
            for size in ("small", "small_plus", "base", "large", "huge_plus", "7b")
        ),
    ],
)
def test_published_architectures_are_inferred(monkeypatch, name):
    # Older timm reads numbers off this one while it builds.
    monkeypatch.setattr(torch, "linspace", partial(torch.linspace, device="cpu"))
    with torch.device("meta"):
        vit = timm.create_model(name, num_classes=0)
    spec = infer_spec(vit.state_dict(), None, name)
    heads = next(m.num_heads for m in vit.blocks.modules() if hasattr(m, "num_heads"))
    sizes = {"patch_size": vit.patch_embed.patch_size[0], "width": vit.embed_dim, "depth": len(vit.blocks)}
    image = {} if vit.pos_embed is None else {"image_size": vit.patch_embed.img_size[0]}
    assert spec == {"name": name, **sizes, "heads": heads, **image}


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (hf_config("dinov2", hidden_size=384), "vit_small_patch14_dinov2"),
        (hf_config("dinov2", hidden_size=1536, use_swiglu_ffn=True), "vit_giant_patch14_dinov2"),
        (hf_config("dinov2_with_registers", hidden_size=768), "vit_base_patch14_reg4_dinov2"),
        (
            hf_config("dinov3_vit", **{**V3_MLP, "hidden_size": 384, "intermediate_size": 1536}),
            "vit_small_patch16_dinov3_qkvb",
        ),
        (
            hf_config(
                "dinov3_vit",
                **{**V3_MLP, "hidden_size": 4096, "intermediate_size": 8192, "hidden_act": "silu"},
                use_gated_mlp=True,
                query_bias=False,
                value_bias=False,
            ),
            "vit_7b_patch16_dinov3",
        ),
        (hf_config("vit", hidden_size=768, intermediate_size=3072), "vit_base_patch16_224"),
    ],
)
def test_published_configs_name_their_architecture(config, name):
    spec = complete(config_spec(config, "config.json"))
    assert spec["name"] == name and "mlp_ratio" not in spec and "registers" not in spec


# One of several backbones


def two(tmp_path, first="student", second="ema", nested=True):
    weights, vit = write(FAMILIES["dino"], tmp_path / "one")
    state = vit.state_dict()
    other = {key: value + 1 for key, value in state.items()}
    if nested:
        content = {first: {f"module.backbone.{k}": v for k, v in other.items()}, second: state, "epoch": 3}
    else:
        content = {f"{first}.{k}": v for k, v in other.items()} | {
            f"{second}.{k}": v for k, v in state.items()
        }
    torch.save(content, tmp_path / "two.pth")
    return tmp_path / "two.pth", state


@pytest.mark.parametrize("nested", [True, False])
def test_the_key_says_which(tmp_path, nested):
    file, state = two(tmp_path, nested=nested)
    for key, shift in (("ema", 0), ("student", 1)):
        backbone = build(file, weights_key=key)
        assert torch.equal(backbone.vit.norm.bias, state["norm.bias"] + shift)
        assert backbone.origin.startswith(f"file {file}, {key}")


@pytest.mark.parametrize("nested", [True, False])
def test_without_a_key_it_is_the_teacher_or_none(tmp_path, nested):
    file, state = two(tmp_path, second="teacher", nested=nested)
    backbone = build(file)
    assert torch.equal(backbone.vit.norm.bias, state["norm.bias"]) and backbone.origin.endswith(", teacher")
    file, _ = two(tmp_path, nested=nested)
    first = "student.module.backbone" if nested else "student"
    with pytest.raises(DataError, match=f"2 ViT backbones; .*--model.weights-key, one of: {first}, ema$"):
        build(file)


def test_keys_that_name_nothing(tmp_path):
    file, _ = two(tmp_path)
    with pytest.raises(UsageError, match="'teacher': .*names no backbone.*: student.module.backbone, ema$"):
        build(file, weights_key="teacher")
    with pytest.raises(UsageError, match="leave the option out"):
        build(tmp_path / "one/weights.pth", weights_key="teacher")
    with pytest.raises(UsageError, match="random weights have no sections"):
        build("random", backbone="vit_small_patch16_224", weights_key="teacher")
    with pytest.raises(UsageError, match="--model.weights-key 'teacher': .* leave the option out"):
        build("vit_small_patch16_224.dino", weights_key="teacher")


# Wrong and incomplete


def test_two_of_all_tensors_are_not_enough(tmp_path):
    weights, vit = write(FAMILIES["hf-dinov2"], tmp_path / "d")
    tensors = safetensors.torch.load_file(tmp_path / "d/model.safetensors")
    kept = {key: tensors[key] for key in tensors if "patch_embeddings" in key}
    safetensors.torch.save_file(kept, tmp_path / "d/model.safetensors")
    total = len(vit.state_dict())
    with pytest.raises(DataError, match=rf"\(2 of its {total} tensors do\): cls_token is missing"):
        build(weights)
    with pytest.raises(UsageError, match=r"no plain ViT with one class token \(2 tensors, 0 blocks\)"):
        build(tmp_path / "d/model.safetensors")


@pytest.mark.parametrize(
    ("family", "lost", "message"),
    [
        (
            "hf-dinov2",
            "encoder.layer.1.attention.attention.key.weight",
            "blocks.1.attn.qkv.weight is missing",
        ),
        ("hf-dinov3", "layer.0.attention.v_proj.weight", "blocks.0.attn.qkv.weight is missing"),
        ("hf-vit", "vit.encoder.layer.0.output.dense.bias", "blocks.0.mlp.fc2.bias is missing"),
        ("hf-dinov2-registers", "embeddings.register_tokens", "reg_token is missing"),
    ],
)
def test_a_lost_tensor_is_named(tmp_path, family, lost, message):
    weights, _ = write(FAMILIES[family], tmp_path / "d")
    tensors = safetensors.torch.load_file(tmp_path / "d/model.safetensors")
    del tensors[lost]
    safetensors.torch.save_file(tensors, tmp_path / "d/model.safetensors")
    with pytest.raises(DataError, match=message):
        build(weights)


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        (
            "hf-vit",
            {"model_type": "beit"},
            "config.json: model_type 'beit' is not supported; .*dinov3_vit, vit",
        ),
        ("hf-vit", {"model_type": "swin"}, "model_type 'swin' is not supported"),
        ("hf-vit", {"hidden_act": "quick_gelu"}, "hidden_act 'quick_gelu' is not supported; wanted 'gelu'"),
        ("hf-vit", {"num_channels": 12}, "num_channels 12 is not supported"),
        ("hf-vit", {"num_hidden_layers": "2"}, "num_hidden_layers is '2'; wanted a positive whole number"),
        ("hf-vit", {"num_hidden_layers": 3}, "blocks.2.norm1.weight is missing"),
        ("hf-vit", {"hidden_size": 128, "num_attention_heads": 2}, r"cls_token is \(1, 1, 64\), wanted"),
        ("hf-dinov2", {"layer_norm_eps": 0}, "layer_norm_eps is 0; wanted a positive number"),
        ("hf-dinov2", {"use_swiglu_ffn": True}, "mlp.fc1.weight is .* wanted"),
        ("hf-dinov3", {"rope_theta": 10000.0}, "rope_theta 10000.0 is not supported"),
        ("hf-dinov3", {"key_bias": True}, "key_bias True is not supported"),
        ("hf-dinov3", {"hidden_act": "silu"}, "hidden_act 'silu' is not supported"),
    ],
)
def test_configs_that_are_refused(tmp_path, family, change, message):
    weights, _ = write(FAMILIES[family], tmp_path / "d")
    config = json.loads((tmp_path / "d/config.json").read_text())
    (tmp_path / "d/config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises((DataError, UsageError), match=message) as caught:
        build(weights)
    assert "\n" not in str(caught.value)


def test_a_dinov3_with_other_positions_or_biased_keys_is_refused(tmp_path):
    weights, _ = write(FAMILIES["dinov3"], tmp_path)
    state = torch.load(weights)
    for change, message in (
        ({"rope_embed.periods": 10000.0 ** (torch.arange(16) / 16)}, "rope_embed.periods are not those of"),
        ({"blocks.1.attn.qkv.bias_mask": torch.full((192,), torch.nan)}, "blocks.1.attn.qkv.bias has a bias"),
    ):
        torch.save({**state, **change}, weights)
        with pytest.raises(DataError, match=message):
            build(weights)


# Shards


def sharded(folder, name="model.safetensors"):
    """The folder's one file in two, with an index."""
    tensors = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    stem, _, end = name.rpartition(".")
    places = {}
    for i in range(2):
        file = f"{stem}-0000{i + 1}-of-00002.{end}"
        part = {key: tensors[key] for key in sorted(tensors)[i::2]}
        places |= dict.fromkeys(part, file)
        if end == "bin":
            torch.save(part, folder / file)
        else:
            safetensors.torch.save_file(part, folder / file)
    (folder / f"{name}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return places


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_shards(tmp_path, name):
    weights, vit = write(FAMILIES["hf-dinov3"], tmp_path / "d")
    sharded(tmp_path / "d", name)
    for path in (weights, f"{weights}/{name}.index.json"):
        loaded = build(path).vit.state_dict()
        assert all(torch.equal(loaded[key], value) for key, value in vit.state_dict().items())


def test_shards_that_are_not_all_there(tmp_path):
    weights, _ = write(FAMILIES["hf-dinov2"], tmp_path / "d")
    places = sharded(tmp_path / "d")
    first, second = sorted({*places.values()})
    shutil.copytree(tmp_path / "d", tmp_path / "short")
    (tmp_path / "short" / second).unlink()
    with pytest.raises(DataError, match=f"1 of 2 shards are missing beside it: {second}"):
        build(tmp_path / "short")
    (tmp_path / "d" / second).write_bytes((tmp_path / "d" / first).read_bytes())
    with pytest.raises(
        DataError, match=r"00002.safetensors lacks \d+ tensors that model.safetensors.index.json"
    ):
        build(weights)
    index = tmp_path / "d/model.safetensors.index.json"
    for content, message in (
        ({}, "lists no shards"),
        ({"weight_map": {"a": "../b"}}, "names a shard '../b'"),
    ):
        index.write_text(json.dumps(content))
        with pytest.raises(DataError, match=message):
            build(weights)


# Normalisation of images


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}, {}),
        ({"image_mean": [0.5] * 3, "image_std": [0.5] * 3}, {"mean": [0.5] * 3, "std": [0.5] * 3}),
        ({"do_normalize": False}, {"mean": [0.0] * 3, "std": [1.0] * 3}),
        (
            {"image_mean": [127.5] * 3, "image_std": [127.5] * 3, "do_rescale": False},
            {"mean": [0.5] * 3, "std": [0.5] * 3},
        ),
        (
            {"image_processor": {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}},
            {"mean": [0.5] * 3, "std": [0.5] * 3},
        ),
    ],
)
def test_what_a_preprocessor_states(config, expected):
    assert of_preprocessor(config, "p") == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "image_mean is None and image_std None"),
        ({"image_mean": [0.5], "image_std": [0.5] * 3}, r"mean is \[0.5\]; wanted three numbers"),
        ({"image_mean": [0.5] * 3, "image_std": [0.5, 0.5, 0]}, "std is .* wanted three positive numbers"),
        ({"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 0}, "rescale_factor is 0"),
    ],
)
def test_preprocessors_that_are_refused(config, message):
    with pytest.raises(DataError, match=f"p: .*{message}"):
        of_preprocessor(config, "p")


def test_sources_that_state_their_statistics(tmp_path, capsys):
    weights, _ = write(FAMILIES["dinov3"], tmp_path)
    name = tmp_path / "dinov3_vits16_pretrain_sat493m-0123abcd.pth"
    shutil.copy(weights, name)
    assert {key: build(name).spec[key] for key in SATELLITE} == SATELLITE
    assert "satellite images" in capsys.readouterr().out
    assert "mean" not in build(weights).spec
    # timm's own table of pretrained models; nothing is downloaded to read it
    assert open_source("vit_large_patch16_dinov3.sat493m").spec["mean"] == SATELLITE["mean"]
    assert open_source("vit_base_patch16_224.augreg_in1k").spec["std"] == [0.5] * 3
    assert open_source("timm/vit_small_patch14_dinov2.lvd142m") == open_source(
        "vit_small_patch14_dinov2.lvd142m"
    )
    assert "mean" not in open_source("vit_small_patch14_dinov2.lvd142m").spec


def test_a_vit_without_a_preprocessor_says_what_is_assumed(tmp_path, capsys):
    weights, _ = write(FAMILIES["hf-deit"], tmp_path / "a")
    assert "mean" not in build(weights).spec
    assert "preprocessor_config.json: images get ImageNet's" in capsys.readouterr().out
    build(write(FAMILIES["hf-vit-file"], tmp_path / "c")[0])
    assert "weights.pth: images get ImageNet's" in capsys.readouterr().out
    weights, _ = write(FAMILIES["hf-dinov2"], tmp_path / "b")
    build(weights)
    assert capsys.readouterr().out == ""


def test_timm_folders_state_them_too(tmp_path):
    weights, vit = write(FAMILIES["dino"], tmp_path)
    safetensors.torch.save_file(vit.state_dict(), tmp_path / "model.safetensors")
    sizes = {"embed_dim": 64, "depth": 2, "num_heads": 1, "img_size": 64}
    config = {"architecture": "vit_small_patch16_224", "model_args": sizes}
    config["pretrained_cfg"] = {"mean": [0.5] * 3, "std": [0.5] * 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert build(tmp_path).spec["mean"] == [0.5] * 3
