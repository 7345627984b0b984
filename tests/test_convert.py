"""Checkpoints in the layouts of the published codes: outputs against their heads, written out plainly."""

import os
import re
import signal
import sys
import tempfile
import types
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import ppap
from ppap.cli import run
from ppap.convert import main
from ppap.errors import DataError
from ppap.preparation import published
from ppap.preparation.published import _load
from ppap.runs.checkpoint import load_checkpoint
from ppap.training.request import parse_arguments
from tests.families import random_vit

WIDTH, DIM, CLASSES = 64, 12, 27


def vit():
    return random_vit("vit_small_patch8_224")  # DINO's names are timm's


def under(prefix, state):
    return {f"{prefix}.{key}": value for key, value in state.items()}


def drawn(**shapes):
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(shape, generator=generator) / 8 for name, shape in shapes.items()}


def heads(*names):
    """cluster1 and cluster2, as their Sequentials name them."""
    shapes = {}
    for one, two in names:
        for part, out in ((f"{one}.0", DIM), (f"{two}.0", WIDTH), (f"{two}.2", DIM)):
            shapes |= {f"{part}.weight": (out, WIDTH, 1, 1), f"{part}.bias": (out,)}
    return drawn(**shapes)


def probes(dim):
    linear = drawn(weight=(CLASSES, dim, 1, 1), bias=(CLASSES,))
    return linear, drawn(clusters=(CLASSES, dim))


def saved(path, net, dim):
    linear, cluster = probes(dim)
    content = {"epoch": 3, "iter": 100, "best": 80.5, "net_model_state_dict": net}
    content |= {"linear_model_state_dict": linear, "cluster_model_state_dict": cluster}
    torch.save({**content, "net_optimizer_state_dict": None}, path)
    return path


def ppap_file(path):
    network = vit()
    block = {key: value + 0.1 for key, value in network.blocks[-1].state_dict().items()}
    head = drawn(**{"project_head.weight": (WIDTH, WIDTH), "project_head.bias": (WIDTH,)})
    return saved(path, {**under("model", network.state_dict()), **under("decoder", block), **head}, WIDTH)


def hp_file(path):
    both = heads(("cluster1", "cluster2"), ("ema_model1", "ema_model2"))
    return saved(path, under("module", {**under("model", vit().state_dict()), **both}), DIM)


def stego_file(path, monkeypatch, dataset="cocostuff27"):
    """Lightning's, its settings objects of modules that are not there when it is read."""
    linear, cluster = probes(DIM)
    net = {**under("model", vit().state_dict()), **heads(("cluster1", "cluster2"))}
    state = {**under("net", net), **under("linear_probe", linear), **under("cluster_probe", cluster)}
    state |= {**under("train_cluster_probe", cluster), "decoder.weight": torch.zeros(WIDTH, DIM, 1, 1)}
    kinds = {
        "omegaconf.dictconfig": ("DictConfig", object),
        "omegaconf.nodes": ("AnyNode", object),
        "pytorch_lightning.utilities.parsing": ("AttributeDict", dict),
    }
    made = {}
    with monkeypatch.context() as patch:
        for place, (kind, base) in kinds.items():
            made[kind] = type(kind, (base,), {"__module__": place})
            parts = place.split(".")
            for end in range(1, len(parts) + 1):
                patch.setitem(sys.modules, ".".join(parts[:end]), types.ModuleType(".".join(parts[:end])))
            setattr(sys.modules[place], kind, made[kind])
        torch.save(stego_content(state, made, dataset), path)
    return path


def stego_content(state, made, dataset):
    config, nodes = made["DictConfig"](), {}
    for key, value in {"dataset_name": dataset, "dino_feat_type": "feat", "dim": DIM}.items():
        nodes[key] = made["AnyNode"]()
        nodes[key].__dict__.update(_val=value, _parent=config)
    config.__dict__.update(_content=nodes, _metadata=None)
    hyper = made["AttributeDict"](n_classes=CLASSES, cfg=config)
    return {"epoch": 1, "global_step": 5000, "state_dict": OrderedDict(state), "hyper_parameters": hyper}


def published_code(content, image):
    """Codes of the published networks in evaluation mode (no dropout)."""
    net = content.get("net_model_state_dict") or {
        key.removeprefix("net."): value
        for key, value in content["state_dict"].items()
        if key.startswith("net.")
    }
    net = {key.removeprefix("module."): value for key, value in net.items()}

    def part(prefix):
        return {key.removeprefix(prefix): v for key, v in net.items() if key.startswith(prefix)}

    def head(name, x):
        return F.conv2d(x, net[f"{name}.weight"], net[f"{name}.bias"])

    network = vit()
    network.load_state_dict(part("model."))
    grid = (image.shape[2] // 8, image.shape[3] // 8)
    if decoder := part("decoder."):
        tokens = {}
        hook = network.blocks[-1].register_forward_pre_hook(lambda _, args: tokens.update(x=args[0]))
        network.forward_features(image)
        hook.remove()
        return block(tokens["x"], decoder, network.norm)[:, 1:].transpose(1, 2).unflatten(2, grid)
    f = network.forward_features(image)[:, 1:].transpose(1, 2).unflatten(2, grid)
    return head("cluster1.0", f) + head("cluster2.2", head("cluster2.0", f).relu())


def block(x, w, norm):
    """A block of DINO with one head, and the frozen final norm."""

    def linear(name, x):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    def layer_norm(name, x):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    q, k, v = linear("attn.qkv", layer_norm("norm1", x)).chunk(3, dim=-1)
    x = x + linear("attn.proj", (q @ k.mT / WIDTH**0.5).softmax(-1) @ v)
    return norm(x + linear("mlp.fc2", F.gelu(linear("mlp.fc1", layer_norm("norm2", x)))))


@pytest.fixture(params=["ppap", "hp", "stego"])
def checkpoint(request, tmp_path, monkeypatch):
    path = tmp_path / f"{request.param}.pth"
    makers = {"ppap": ppap_file, "hp": hp_file, "stego": lambda p: stego_file(p, monkeypatch)}
    return request.param, makers[request.param](path)


@torch.no_grad()
def test_a_run_computes_what_the_published_network_does(checkpoint, tmp_path, capsys):
    method, path = checkpoint
    out = tmp_path / "run"
    main([str(path), "cocostuff27-vits8", "--out", str(out)])
    assert f"method {method}, 27 classes" in capsys.readouterr().out
    engine = ppap.load(str(out)).engine
    content, image = _load(path), torch.randn(2, 3, 64, 64)
    want = published_code(content, image)
    code = engine.code(image)
    torch.testing.assert_close(code, want, rtol=1e-4, atol=1e-4)
    linear, cluster = probes(code.shape[1])
    torch.testing.assert_close(engine.linear.logits(code), F.conv2d(code, *linear.values()))
    cosine = torch.einsum("bchw,nc->bnhw", F.normalize(code, dim=1), F.normalize(cluster["clusters"], dim=1))
    torch.testing.assert_close(engine.cluster.logits(code), cosine, rtol=1e-4, atol=1e-5)
    info = load_checkpoint(out).info
    assert info["converted"]["file"] == path.name and re.match("[0-9a-f]{64}", info["converted"]["sha256"])
    if method == "stego":
        assert (info["converted"]["dataset_name"], info["config"]["stego"]["dim"]) == ("cocostuff27", DIM)
    else:
        assert (info["converted"]["epoch"], info["converted"]["best"]) == (3, 80.5)
    if method == "hp":
        both = heads(("cluster1", "cluster2"), ("ema_model1", "ema_model2"))
        assert torch.equal(engine.net.average.linear.weight, both["ema_model1.0.weight"])
    request = parse_arguments(["--resume", str(out)])
    assert request.checkpoint.info["step"] == 0 and request.checkpoint.state()["step"] == 0


TRACE = Path(tempfile.gettempdir()) / "ppap-convert-was-here"


class Evil:
    def __reduce__(self):
        return os.system, (f"touch {TRACE}",)


def damaged(content, path):
    torch.save(content, path)
    return path


def with_net(**tensors):
    return lambda c: {**c, "net_model_state_dict": {**c["net_model_state_dict"], **tensors}}


def without_bias(content):
    del content["net_model_state_dict"]["decoder.norm1.bias"]
    return content


def with_linear(content):
    return {
        **content,
        "linear_model_state_dict": {"weight": torch.zeros(3, 64, 1, 1), "bias": torch.zeros(3)},
    }


NAN = {"decoder.norm1.bias": torch.full((64,), torch.nan)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: {**c, "hyper_parameters": Evil()}, "posix.system, which no such checkpoint needs"),
        (lambda c: {"a": torch.zeros(1)}, "is no checkpoint of PPAP, HP or STEGO: it holds a; wanted net_"),
        (without_bias, "lacks block.norm1.bias"),
        (with_net(x=torch.zeros(1)), "form of its own .*no tensor: x"),
        (with_net(**NAN), "block.norm1.bias are not finite"),
        (with_net(**{"model.cls_token": torch.zeros(3)}), "cls_token"),
        (with_linear, "has 3 classes"),
    ],
)
def test_other_files_are_refused_by_name(change, message, tmp_path, capsys):
    path = ppap_file(tmp_path / "a.pth")
    damaged(change(torch.load(path, weights_only=True)), path)
    assert run(main, [str(path), "cocostuff27-vits8", "--out", str(tmp_path / "run")]) in (2, 3, 4)
    error = capsys.readouterr().err
    assert re.search(message, error) and "a.pth" in error and "Traceback" not in error
    assert not (tmp_path / "run").exists() and not TRACE.exists()


def test_a_stop_leaves_no_run(tmp_path, monkeypatch, capsys):
    path = ppap_file(tmp_path / "a.pth")
    real = published._engine

    def asked(*args):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(published, "_engine", asked)
    assert run(main, [str(path), "cocostuff27-vits8", "--out", str(tmp_path / "run")]) == 75
    assert not (tmp_path / "run").exists()


def test_what_does_not_fit_is_refused(tmp_path, monkeypatch, capsys):
    path = stego_file(tmp_path / "a.ckpt", monkeypatch, "cityscapes")
    out = ["--out", str(tmp_path / "run")]
    for name, message in (
        ("cocostuff27-vits8", "was trained on cityscapes"),
        ("cocostuff27-vits16", "patches of 8 pixels"),
        ("demo", "no checkpoint was published for the preset demo; give one of cocostuff27"),
        ("cityscape-vits8", "did you mean 'cityscapes-vits8'"),
    ):
        dataset = path if "trained" in message else ppap_file(tmp_path / "b.pth")
        assert run(main, [str(dataset), name, *out]) == 2
        assert message in capsys.readouterr().err
    content = path.read_bytes()
    for cut in (0, 100, len(content) // 2):
        path.write_bytes(content[:cut])
        assert run(main, [str(path), "cityscapes-vits8", *out]) == DataError.exit_code
        assert "cannot read the checkpoint" in capsys.readouterr().err
    (tmp_path / "run").mkdir()
    (tmp_path / "run/mine").touch()
    assert run(main, [str(path), "cityscapes-vits8", *out]) == 2
    assert sorted(os.listdir(tmp_path / "run")) == ["mine"]
