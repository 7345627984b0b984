"""What a file of results says about its origin."""

import dataclasses
import json

import torch

from ppap.reports.provenance import provenance, weights_sha256
from ppap.runs.checkpoint import load_checkpoint, save_checkpoint
from ppap.settings.config import config_hash, to_dict
from ppap.settings.presets import preset

KEYS = {"preset", "protocol", "seed", "settings", "config", "versions", "device", "backend", "precision"}
KEYS |= {"method", "crf", "weights"}


def test_everything_a_number_follows_from_is_there(tmp_path):
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.float64)}
    save_checkpoint(tmp_path / "last", tensors, {"step": 7}, {})
    config = preset("demo")
    record = provenance(config, torch.device("cpu"), load_checkpoint(tmp_path / "last"), selection="only one")
    assert json.loads(json.dumps(record)) == record
    assert set(record) == KEYS
    assert (record["preset"], record["seed"], record["protocol"]) == ("demo", 0, "code")
    assert record["config"] == to_dict(config) and record["settings"] == config_hash(config)
    assert set(record["versions"]) == {"ppap", "torch", "timm", "python"}
    assert record["precision"] == {"forward": "float32", "loss": "float32"}
    assert record["backend"] in ("cpp", "torch") and record["crf"] == "none"
    weights = record["weights"]
    assert (weights["step"], weights["selection"]) == (7, "only one")
    assert weights["checkpoint"] == str(tmp_path / "last")


def test_weights_have_one_hash_in_memory_and_in_a_checkpoint(tmp_path):
    import hashlib

    tensors = {"z": torch.randn(3, 2).T, "a": torch.ones(2, dtype=torch.int64), "m": torch.zeros(1).half()}
    save_checkpoint(tmp_path / "last", tensors, {"step": 1}, {})
    of_file = hashlib.sha256((tmp_path / "last/model.safetensors").read_bytes()).hexdigest()
    assert load_checkpoint(tmp_path / "last").sha256 == of_file == weights_sha256(tensors)
    tensors["m"] = tensors["m"] + 1
    assert weights_sha256(tensors) != of_file


def test_the_folder_of_a_run_is_no_setting():
    config = preset("demo")
    moved = dataclasses.replace(config, train=dataclasses.replace(config.train, out="elsewhere"))
    other = dataclasses.replace(config, protocol="paper")
    assert config_hash(moved) == config_hash(config) != config_hash(other)
