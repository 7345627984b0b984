"""Small random ViTs of timm, written in the names and files of everyone who publishes such weights.

The names are spelled out here from timm's to theirs, apart from the code that turns them back.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import timm
import torch
from torch import Tensor, nn

State = dict[str, Tensor]
SIZES = {"embed_dim": 64, "depth": 2, "num_heads": 1, "img_size": 64}
MEAN, STD = [0.5, 0.4, 0.6], [0.5, 0.25, 0.4]


def random_vit(name: str, **sizes) -> nn.Module:
    """A timm ViT that takes any image size, every parameter drawn anew: one that is not loaded shows."""
    torch.manual_seed(0)
    vit = timm.create_model(name, num_classes=0, **{"dynamic_img_size": True, **SIZES, **sizes}).eval()
    for key, parameter in vit.named_parameters():
        scale = re.search(r"(norm\d?\.weight|gamma(_\d)?)$", key)
        nn.init.normal_(parameter, 1.0 if scale else 0.0, std=0.05)
    return vit


def renamed(state: State, *names: tuple[str, str]) -> State:
    for old, new in names:
        state = {re.sub(old, new, key): value for key, value in state.items()}
    return state


# Files of their own code


def with_class_position(state: State) -> State:
    """Registers as DINOv2 and transformers keep them: the class token's position apart."""
    state, entry = dict(state), torch.randn(1, 1, state["cls_token"].shape[2])
    state["cls_token"] = state["cls_token"] - entry
    state["pos_embed"] = torch.cat([entry, state["pos_embed"]], dim=1)
    return state


def official_dinov2(state: State) -> State:
    gated = state["blocks.0.mlp.fc1.weight"].shape[0] == 2 * state["blocks.0.mlp.fc2.weight"].shape[1]
    if "reg_token" in state:
        state = renamed(with_class_position(state), ("^reg_token$", "register_tokens"))
    if gated:
        state = renamed(state, (r"mlp\.fc1", "mlp.w12"), (r"mlp\.fc2", "mlp.w3"))
    return {**state, "mask_token": torch.randn(1, 64)}


def training_dinov2(state: State) -> dict[str, State]:
    """Blocks in chunks, student and teacher in one dict, heads."""
    chunked = renamed(official_dinov2(state), (r"^blocks\.(\d+)", r"blocks.0.\1"))
    student = {f"student.backbone.{key}": value + 1 for key, value in chunked.items()}
    teacher = {f"teacher.backbone.{key}": value for key, value in chunked.items()}
    return {"model": {**student, **teacher, "teacher.dino_head.last_layer.weight": torch.randn(4, 4)}}


def official_dinov3(state: State) -> State:
    names = [(r"gamma_(\d)$", r"ls\1.gamma"), ("^reg_token$", "storage_tokens")]
    names += [(r"mlp\.fc1_g", "mlp.w1"), (r"mlp\.fc1_x", "mlp.w2")]
    if "blocks.0.mlp.fc1_g.weight" in state:
        names.append((r"mlp\.fc2", "mlp.w3"))
    theirs = {key: value for key, value in state.items() if not key.endswith(("q_bias", "v_bias"))}
    theirs = renamed(theirs, *names)
    for i in range(2):
        if f"blocks.{i}.attn.q_bias" in state:
            query, value = (state[f"blocks.{i}.attn.{part}_bias"] for part in "qv")
            # What stands for the keys is masked out.
            theirs[f"blocks.{i}.attn.qkv.bias"] = torch.cat([query, torch.randn(64), value])
            mask = torch.ones(192).index_fill(0, torch.arange(64, 128), 0)
            theirs[f"blocks.{i}.attn.qkv.bias_mask"] = mask
    periods = (100.0 ** (torch.arange(16) / 16)).bfloat16()
    return {**theirs, "rope_embed.periods": periods, "mask_token": torch.zeros(1, 64)}


def mae(state: State) -> dict[str, State]:
    decoder = {"decoder_embed.weight": torch.randn(8, 64), "decoder_pos_embed": torch.randn(1, 17, 8)}
    decoder |= {"decoder_blocks.0.norm1.weight": torch.ones(8), "decoder_pred.bias": torch.randn(8)}
    return {"model": {**state, **decoder, "mask_token": torch.randn(1, 1, 8)}}


def dino_training(state: State) -> dict[str, State]:
    student = {f"module.backbone.{key}": value + 1 for key, value in state.items()}
    teacher = {f"backbone.{key}": value for key, value in state.items()}
    return {"student": student, "teacher": {**teacher, "head.mlp.0.weight": torch.randn(4, 4)}}


# Folders of transformers


def _parted(state: State, names: tuple[str, str, str]) -> State:
    """q, k, v in layers of their own, under `names` with {} for the block."""
    parted = {}
    for key, value in state.items():
        match = re.match(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)", key)
        if match:
            for name, part in zip(names, value.chunk(3), strict=True):
                parted[f"{name.format(match[1])}.{match[2]}"] = part
        else:
            parted[key] = value
    return parted


def hf_vit(state: State) -> State:
    attention = "encoder.layer.{}.attention.attention."
    state = _parted(state, tuple(attention + part for part in ("query", "key", "value")))
    return renamed(
        state,
        (r"^(cls_token)$", r"embeddings.\1"),
        ("^dist_token$", "embeddings.distillation_token"),
        ("^pos_embed$", "embeddings.position_embeddings"),
        (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"),
        (r"^norm\.", "layernorm."),
        (r"^blocks\.(\d+)\.norm1", r"encoder.layer.\1.layernorm_before"),
        (r"^blocks\.(\d+)\.norm2", r"encoder.layer.\1.layernorm_after"),
        (r"^blocks\.(\d+)\.attn\.proj", r"encoder.layer.\1.attention.output.dense"),
        (r"^blocks\.(\d+)\.mlp\.fc1", r"encoder.layer.\1.intermediate.dense"),
        (r"^blocks\.(\d+)\.mlp\.fc2", r"encoder.layer.\1.output.dense"),
    )


def hf_classifier(state: State) -> State:
    inside = {f"vit.{key}": value for key, value in hf_vit(state).items()}
    return {**inside, "classifier.weight": torch.randn(3, 64)}


def hf_mae(state: State) -> State:
    inside = {f"vit.{key}": value for key, value in hf_vit(state).items()}
    return {
        **inside,
        "decoder.decoder_embed.weight": torch.randn(8, 64),
        "decoder.mask_token": torch.zeros(8),
    }


def hf_dinov2(state: State) -> State:
    attention = "encoder.layer.{}.attention.attention."
    gated = state["blocks.0.mlp.fc1.weight"].shape[0] == 2 * state["blocks.0.mlp.fc2.weight"].shape[1]
    if "reg_token" in state:
        state = renamed(with_class_position(state), ("^reg_token$", "embeddings.register_tokens"))
    state = _parted(state, tuple(attention + part for part in ("query", "key", "value")))
    state = renamed(
        state,
        ("^cls_token$", "embeddings.cls_token"),
        ("^pos_embed$", "embeddings.position_embeddings"),
        (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"),
        (r"^norm\.", "layernorm."),
        (r"attn\.proj", "attention.output.dense"),
        (r"ls(\d)\.gamma", r"layer_scale\1.lambda1"),
        (r"^blocks", "encoder.layer"),
    )
    if gated:
        state = renamed(state, (r"mlp\.fc1", "mlp.weights_in"), (r"mlp\.fc2", "mlp.weights_out"))
    return {**state, "embeddings.mask_token": torch.randn(1, 64)}


def hf_dinov3(state: State) -> State:
    gated = "blocks.0.mlp.fc1_g.weight" in state
    state = _parted(state, tuple("layer.{}.attention." + part for part in ("q_proj", "k_proj", "v_proj")))
    up = (r"mlp\.fc1_x", "mlp.up_proj") if gated else (r"mlp\.fc1", "mlp.up_proj")
    state = renamed(
        state,
        ("^cls_token$", "embeddings.cls_token"),
        ("^reg_token$", "embeddings.register_tokens"),
        (r"^patch_embed\.proj", "embeddings.patch_embeddings"),
        (r"attn\.([qv])_bias", r"attention.\1_proj.bias"),
        (r"attn\.proj", "attention.o_proj"),
        (r"gamma_(\d)$", r"layer_scale\1.lambda1"),
        (r"mlp\.fc1_g", "mlp.gate_proj"),
        (r"mlp\.fc2", "mlp.down_proj"),
        up,
        (r"^blocks", "layer"),
    )
    return {**state, "embeddings.mask_token": torch.zeros(1, 1, 64)}


def hf_config(model_type: str, **values) -> dict:
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 1, "image_size": 64}
    return {"model_type": model_type, **sizes, "patch_size": 16, "hidden_act": "gelu", **values}


class Family(NamedTuple):
    """How one kind of weights is published."""

    architecture: str
    """timm's architecture that computes the same."""
    layout: Callable[[State], dict]
    """Its tensors in the names and sections of those who publish it."""
    config: dict | None = None
    """config.json of a folder of transformers; None = a file."""
    sizes: dict = {}  # noqa: RUF012
    """Arguments of timm's architecture beside SIZES."""
    preprocessor: dict | None = None
    eps: float | None = None
    """What the publisher's norms add to the variance, if timm's architecture has another."""


VIT, DINOV2, REG = "vit_small_patch16_224", "vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2"
GIANT, V3, V3_PLUS = "vit_giant_patch14_dinov2", "vit_small_patch16_dinov3", "vit_small_plus_patch16_dinov3"
P16, V2_MLP = {"patch_size": 16}, {"layer_norm_eps": 1e-6, "mlp_ratio": 4}
MLP = {"intermediate_size": 256, "layer_norm_eps": 1e-12}
V3_MLP = {"intermediate_size": 256, "layer_norm_eps": 1e-5, "num_register_tokens": 4, "rope_theta": 100.0}
FAMILIES = {
    "dino": Family(VIT, dict),
    "dino-training": Family(VIT, dino_training),
    "mae": Family(VIT, mae),
    "deit-distilled": Family("deit_small_distilled_patch16_224", dict),
    "dinov2": Family(DINOV2, official_dinov2, sizes=P16),
    "dinov2-registers": Family(REG, official_dinov2, sizes=P16),
    "dinov2-giant": Family(GIANT, official_dinov2, sizes={**P16, "mlp_ratio": 5.5}),
    "dinov2-training": Family(REG, training_dinov2, sizes=P16),
    "dinov2-timm": Family(REG, dict, sizes=P16),
    "dinov3": Family(V3 + "_qkvb", official_dinov3),
    "dinov3-unbiased": Family(V3, official_dinov3),
    "dinov3-plus": Family(V3_PLUS + "_qkvb", official_dinov3),
    "dinov3-timm": Family(V3_PLUS, dict),
    "hf-vit": Family(
        VIT,
        hf_classifier,
        hf_config("vit", **MLP),
        preprocessor={"image_mean": MEAN, "image_std": STD, "rescale_factor": 1 / 255},
        eps=1e-12,
    ),
    "hf-vit-file": Family(VIT, hf_vit, eps=1e-12),
    "hf-deit": Family("deit_small_distilled_patch16_224", hf_vit, hf_config("deit", **MLP), eps=1e-12),
    "hf-mae": Family(VIT, hf_mae, hf_config("vit_mae", **MLP), eps=1e-12),
    "hf-unbiased": Family(
        VIT, hf_vit, hf_config("vit", **MLP, qkv_bias=False), {"qkv_bias": False}, eps=1e-12
    ),
    "hf-dinov2": Family(DINOV2, hf_dinov2, hf_config("dinov2", **V2_MLP), P16),
    "hf-dinov2-giant": Family(
        GIANT, hf_dinov2, hf_config("dinov2", **V2_MLP, use_swiglu_ffn=True), {**P16, "mlp_ratio": 5.5}
    ),
    "hf-dinov2-registers": Family(
        REG,
        hf_dinov2,
        hf_config("dinov2_with_registers", **V2_MLP, num_register_tokens=3),
        {**P16, "reg_tokens": 3},
    ),
    "hf-dinov2-file": Family(REG, hf_dinov2, sizes=P16),
    "hf-dinov3": Family(V3 + "_qkvb", hf_dinov3, hf_config("dinov3_vit", **V3_MLP)),
    "hf-dinov3-plus": Family(
        V3_PLUS + "_qkvb",
        hf_dinov3,
        hf_config("dinov3_vit", **{**V3_MLP, "use_gated_mlp": True, "hidden_act": "silu"}),
    ),
    "hf-dinov3-file": Family(V3 + "_qkvb", hf_dinov3),
}


def write(family: Family, folder: Path) -> tuple[str, nn.Module]:
    """Put a random network of a family into an empty folder.

    Returns:
        What ``--model.weights`` takes, and the network of timm that the weights are of.
    """
    vit = random_vit(family.architecture, **family.sizes)
    for module in vit.modules():
        if isinstance(module, nn.LayerNorm) and family.eps is not None:
            module.eps = family.eps
    content = family.layout(vit.state_dict())
    folder.mkdir(exist_ok=True)
    if family.config is None:
        torch.save(content, folder / "weights.pth")
        return str(folder / "weights.pth"), vit
    tensors = {key: value.clone().contiguous() for key, value in content.items()}
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(family.config))
    if family.preprocessor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(family.preprocessor))
    return str(folder), vit
