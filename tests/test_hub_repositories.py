"""Repositories of the hub as --model.weights: from a cache folder, or refused within seconds."""

import time

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError

from ppap import cli
from ppap.errors import DataError, UsageError
from ppap.nets import hub
from ppap.nets.backbone import build_backbone
from ppap.settings.config import ModelConfig
from tests.families import FAMILIES, write
from tests.test_hub import closed_port, hub_of_our_own  # noqa: F401
from tests.test_layouts import sharded

NAME = "facebook/dinov2-small"


def put_in_cache(cache, family="hf-dinov2", name=NAME, revision="main"):
    """What a download leaves: the network that the files are of, and their folder."""
    folder = cache / f"models--{name.replace('/', '--')}"
    (folder / "refs" / revision).parent.mkdir(parents=True)
    (folder / "refs" / revision).write_text("0" * 40)
    snapshot = folder / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir()
    return write(FAMILIES[family], snapshot)[1], snapshot


def build(weights, **fields):
    return build_backbone(ModelConfig(weights=weights, **fields))


@pytest.mark.parametrize(
    "weights", [NAME, f"hf-hub:{NAME}", f"https://huggingface.co/{NAME}", f"https://huggingface.co/{NAME}/"]
)
def test_offline_the_cache_serves(tmp_path, monkeypatch, capsys, weights):
    vit, _ = put_in_cache(tmp_path / "hub")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(hub, "_first", None)  # nothing is tried
    backbone = build(weights)
    assert backbone.origin == f"hub {NAME}" and backbone.name == "vit_small_patch14_dinov2"
    assert torch.equal(backbone.vit.blocks[1].attn.qkv.weight, vit.blocks[1].attn.qkv.weight)
    assert f"{NAME} from the hub's cache: --offline" in capsys.readouterr().out


def test_a_revision_and_shards(tmp_path, monkeypatch):
    _, snapshot = put_in_cache(tmp_path / "hub", "hf-vit", "me/vit", revision="v2")
    places = sharded(snapshot)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    backbone = build("me/vit@v2")
    assert backbone.origin == "hub me/vit@v2" and backbone.spec["std"] == [0.5, 0.25, 0.4]
    with pytest.raises(DataError, match="lacks its config.json"):
        build("me/vit")
    shard = min(places.values())
    (snapshot / shard).unlink()
    with pytest.raises(DataError, match=f"me/vit is no file or directory here, and .* lacks its {shard}"):
        build("me/vit@v2")


def test_what_the_cache_lacks_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(hub.constants, "ENDPOINT", f"http://127.0.0.1:{closed_port()}")
    began = time.monotonic()
    with pytest.raises(
        DataError, match="no connection to 127.0.0.1:.*lacks its config.json.*embedded"
    ) as caught:
        build(NAME)
    assert time.monotonic() - began < 10 and "\n" not in str(caught.value)
    _, snapshot = put_in_cache(tmp_path / "hub")
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(DataError, match="lacks its model.safetensors"):
        build(NAME)


def test_the_command_ends_within_seconds(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hub.constants, "ENDPOINT", f"http://127.0.0.1:{closed_port()}")
    began = time.monotonic()
    assert cli.main(["train", "demo", f"--model.weights={NAME}", f"--train.out={tmp_path / 'run'}"]) == 3
    assert time.monotonic() - began < 30
    assert capsys.readouterr().err.startswith(f"error: --model.weights {NAME} is no file or directory here")
    assert not (tmp_path / "run").exists()


def test_an_unsuitable_model_is_refused_before_its_weights_are_fetched(tmp_path, monkeypatch):
    asked = []
    (tmp_path / "config.json").write_text('{"model_type": "beit"}')

    def get(repository, file, revision=None):
        asked.append(file)
        if file == "config.json":
            return str(tmp_path / file)
        raise EntryNotFoundError(file)

    monkeypatch.setattr(hub, "no_connection", lambda url: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", get)
    with pytest.raises(DataError, match="model_type 'beit' is not supported"):
        build("microsoft/beit-base")
    assert asked == ["config.json", "preprocessor_config.json"]
    (tmp_path / "config.json").unlink()
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda *a, **k: (_ for _ in ()).throw(EntryNotFoundError("x"))
    )
    with pytest.raises(DataError, match="the repository has no config.json"):
        build("me/files")


def test_a_network_that_fails_halfway_is_no_missing_file(monkeypatch):
    error = LocalEntryNotFoundError("the hub\nwent away")
    monkeypatch.setattr(hub, "no_connection", lambda url: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a, **k: (_ for _ in ()).throw(error))
    with pytest.raises(DataError, match="cannot get config.json from the hub .*the hub went away.*try again"):
        build("me/files")


def test_a_repository_that_is_not_there(monkeypatch):
    error = RepositoryNotFoundError.__new__(RepositoryNotFoundError)
    monkeypatch.setattr(hub, "no_connection", lambda url: None)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a, **k: (_ for _ in ()).throw(error))
    with pytest.raises(DataError, match="no public repository of .*hf auth login"):
        build("me/nothing")


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ("facebook/dinov2-small", ("facebook/dinov2-small", None)),
        ("hf-hub:runs/vit", ("runs/vit", None)),
        ("me/vit@v2", ("me/vit", "v2")),
        ("runs/vit", None),  # the folder runs is here
        ("else/where.pth", None),
        ("runs-of-mine/backbone", None),
        ("./a/b", None),
        ("a/b/c", None),
        ("vit_small_patch16_224.dino", None),
        ("~/vit", None),
    ],
)
def test_what_is_a_repository(tmp_path, monkeypatch, weights, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert hub.repository_name(weights) == expected


def test_paths_and_prefixes_that_lead_nowhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(DataError, match="runs/vit does not exist; .*or hf-hub:runs/vit for a repository"):
        build("runs/vit")
    with pytest.raises(UsageError, match="names no repository; give hf-hub:OWNER/NAME"):
        build("hf-hub:dinov2")
    with pytest.raises(UsageError, match="neither a file .*OWNER/NAME"):
        build("dinov2-small")
