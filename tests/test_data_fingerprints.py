"""Fingerprints of every kind of data: the same in every process, another one for other data.

What is kept on disk goes by them: one that no other process finds is computed and stored again at each start.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from ppap.data import KINDS, build_dataset
from ppap.data.pairs import PairedDataset, PairedFiles, Part, name_array
from ppap.data.transforms import Geometry
from ppap.settings.config import DataConfig
from tests.runs import make_folder
from tests.trees import (
    cityscapes_tree,
    coco_tree,
    five_crop_tree,
    imagenet_s_tree,
    potsdam_mat_tree,
    potsdam_mmseg_tree,
)

ROOT = Path(__file__).parent.parent
CODE = """
import json, sys
from types import SimpleNamespace
from ppap.settings.config import DataConfig, from_dict
from ppap.data import build_dataset
from pathlib import Path
from ppap.nets.feature_cache import _describe, _store
from ppap.methods.neighbours import _hash
from tests.methods import tiny_engine

engine, found = tiny_engine("stego"), {}
for name, options in json.loads(sys.stdin.read()).items():
    for split in ("train", "val"):
        dataset = build_dataset(from_dict(options, DataConfig), split)
        found[f"{name} {split}"] = dataset.fingerprint()
    found[f"{name} features"] = _store(Path("x"), _describe(engine.net, dataset, "fp16")).meta["hash"]
    found[f"{name} neighbours"] = _hash(engine.method, SimpleNamespace(dataset=dataset))
print(json.dumps(found))
"""


def trees(root: Path) -> dict[str, DataConfig]:
    """Name -> settings of small data of every kind and layout, made below `root`."""
    make_folder(root / "folder")
    make_folder(root / "unlabelled", labels=False)
    for kind in ("coco", "crops"):
        coco_tree(root / kind, 2)
    five_crop_tree(root / "crops", 10)
    cityscapes_tree(root / "cityscapes", 1)
    potsdam_mat_tree(root / "blocks")
    potsdam_mmseg_tree(root / "tiles")
    imagenet_s_tree(root / "imagenet")
    made = {
        "scenes": {"kind": "scenes", "scenes_train": 6, "scenes_val": 4, "scenes_size": 32},
        "folder": {"kind": "folder", "ignore_ids": (9,)},
        "unlabelled": {"kind": "folder"},
        "coco": {"kind": "cocostuff27", "crop": "none"},
        "coco15": {"kind": "cocostuff15", "crop": "none", "root": "coco"},
        "coco3": {"kind": "cocostuff3", "crop": "none", "root": "coco"},
        "crops": {"kind": "cocostuff27"},
        "cityscapes": {"kind": "cityscapes27", "crop": "none"},
        "blocks": {"kind": "potsdam3"},
        "tiles": {"kind": "potsdam3"},
        "imagenet": {"kind": "imagenet_s", "imagenet_s_train": "train-semi"},
    }
    shared = {"partial": True, "resolution": 32, "eval_resolution": 32}
    return {
        name: DataConfig(**{**shared, **options, "root": str(root / options.get("root", name))})
        for name, options in made.items()
    }


@pytest.fixture(scope="module")
def configs(tmp_path_factory) -> dict[str, DataConfig]:
    return trees(tmp_path_factory.mktemp("trees"))


def in_a_process(configs: dict[str, DataConfig], seed: int) -> dict[str, str]:
    """What a process of its own says: name and split -> fingerprint, and the names of two caches."""
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        input=json.dumps({name: vars(config) for name, config in configs.items()}),
        env={**os.environ, "PYTHONHASHSEED": str(seed), "PYTHONPATH": str(ROOT)},
        cwd=ROOT,
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_two_processes_find_the_same_caches(configs):
    assert {config.kind for config in configs.values()} == set(KINDS), "a kind is missing above"
    first, second = (in_a_process(configs, seed) for seed in (1, 2))
    assert [name for name in first if first[name] != second[name]] == []
    assert len(first) == 4 * len(configs) == len(set(first.values())), "different data, different names"


@pytest.mark.parametrize("name", ["folder", "coco", "crops", "cityscapes", "blocks", "tiles", "imagenet"])
@pytest.mark.parametrize("what", ["image", "label"])
def test_another_file_is_another_fingerprint(name, what, tmp_path):
    config = trees(tmp_path)[name]
    before = build_dataset(config, "train")
    kept = before.fingerprint()
    assert kept == build_dataset(config, "train").fingerprint()
    if isinstance(before, PairedDataset):
        path = Path(getattr(before.files, f"{what}_path")(0))
        later = path.stat().st_mtime_ns + 1_000_000
        os.utime(path, ns=(later, later))
    else:
        path = (before._images if what == "image" else before._labels)[0]
        path.write_bytes(path.read_bytes() + b"\0")  # what follows the end of an image is not read
    assert build_dataset(config, "train").fingerprint() != kept


@pytest.mark.parametrize(
    "change", [{"resolution": 64}, {"interpolation": "bilinear"}, {"scenes_seed": 1, "ignore_ids": (8,)}]
)
def test_other_settings_are_another_fingerprint(configs, change):
    for name in ("scenes", "folder", *(["blocks"] if "resolution" in change else [])):
        kept = build_dataset(configs[name], "train").fingerprint()
        options = {**change, "ignore_ids": change.get("ignore_ids", configs[name].ignore_ids)}
        if name == "folder":
            options["classes"] = 10
        assert build_dataset(replace(configs[name], **options), "train").fingerprint() != kept, name


def some_ids(path: str) -> np.ndarray:
    raise NotImplementedError


def other_ids(path: str) -> np.ndarray:
    raise NotImplementedError


@dataclass(repr=False)
class Nameless:
    """A reader whose repr is its address."""

    def __call__(self, path: str) -> np.ndarray:
        raise NotImplementedError


def test_a_reader_is_named_without_its_address():
    def of(reader):
        part = Part(PairedFiles(name_array([]), ("", ""), ("", "")), reader, "nowhere")
        return PairedDataset(part, Geometry(32), ("a",)).fingerprint()

    assert of(some_ids) == of(some_ids) != of(other_ids)
    with pytest.raises(TypeError, match="another one in every process"):
        of(Nameless())
