"""Training and validating from cached frozen tokens: as from images, never from stale or half-made ones."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from ppap.data import build_datasets
from ppap.errors import DataError, NumberError
from ppap.eval import main as evaluate
from ppap.methods.engine import build_engine
from ppap.nets.backbone import Backbone
from ppap.nets.feature_cache import CachedFeatures, cache_features, cache_root, frozen_of, kept_source
from ppap.settings.config import DataConfig, ModelConfig
from tests.runs import make_folder, settled_demo, tiny_run

CPU = torch.device("cpu")


@pytest.fixture
def net():
    config = settled_demo()
    model = ModelConfig(
        backbone="vit_tiny_patch16_224",
        weights="random",
        patch_size=8,
        width=24,
        depth=3,
        heads=2,
        image_size=32,
    )
    return build_engine(dataclasses.replace(config, model=model), 3, CPU).net


@pytest.fixture
def images(tmp_path):
    make_folder(tmp_path / "data")
    return lambda: (
        build_datasets(
            DataConfig(root=str(tmp_path / "data"), ignore_ids=(9,), resolution=32, eval_resolution=32),
            ("train",),
        ).train
    )


def made(net, dataset, tmp_path, **options):
    return cache_features(net, dataset, root=tmp_path / "cache", device=CPU, batch_size=4, **options)


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp16", 1e-3), ("bf16", 8e-3)])
def test_tokens_are_those_of_the_network(net, images, tmp_path, dtype, tolerance):
    dataset = images()
    cached = made(net, dataset, tmp_path, dtype=dtype)
    assert len(cached) == len(dataset)
    batch = torch.utils.data.default_collate([cached[i] for i in range(len(cached))])
    frozen = frozen_of(batch, CPU)
    wanted = net.frozen(torch.stack([dataset[i]["image"] for i in range(len(dataset))]))
    assert frozen.grid == wanted.grid
    for got, true in ((frozen.before, wanted.before), (frozen.guidance, wanted.guidance)):
        assert (got.float() - true).abs().max() <= tolerance * true.abs().max()
    assert all(torch.equal(cached[i]["label"], dataset[i]["label"]) for i in range(len(dataset)))


def test_training_agrees_with_and_without(tmp_path):
    def losses(run):
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        return [line["loss"] for line in lines if "loss" in line]

    plain = losses(tiny_run(tmp_path / "plain"))
    options = ["--data.cache-features", f"--data.cache-dir={tmp_path / 'cache'}"]
    cached = losses(tiny_run(tmp_path / "cached", *options))
    # Threshold flips of rounded similarities are part of the difference.
    assert cached == pytest.approx(plain, rel=5e-3)
    assert losses(tiny_run(tmp_path / "again", *options)) == cached
    assert len(list((tmp_path / "cache" / "features").iterdir())) == 2, (
        "the second run read the first one's caches, of training and of validation images"
    )


def test_validation_and_rows_read_the_cache_and_eval_agrees(tmp_path, monkeypatch):
    monkeypatch.setenv("PPAP_CACHE_DIR", str(tmp_path / "cache"))
    options = ["--data.cache-features", "--train.val-every=2", "--compare.rows", "frozen", "ppap"]
    tiny_run(tmp_path / "first", *options)
    passes = []
    before = Backbone.tokens_before

    def counted(self, x):
        passes.append(len(x))
        return before(self, x)

    def scores_of_eval(name, *options):
        out = tmp_path / name
        evaluate([str(again), f"--out={out}", "--eval.crf=none", *options])
        return json.loads(out.read_text())["summary"]

    monkeypatch.setattr(Backbone, "tokens_before", counted)
    again = tiny_run(tmp_path / "again", *options)
    images = [count for count in passes if count > 1]  # of single ones shapes are learned
    assert images == [4], "for the report's pictures alone"
    passes.clear()
    scores = scores_of_eval("cached.json")
    assert max(passes) == 1, "eval reads what the run left"
    final = json.loads((again / "evaluation-final.json").read_text())["summary"]
    assert {key: final[key] for key in scores} == scores
    shutil.rmtree(tmp_path / "cache")
    passes.clear()
    assert scores_of_eval("images.json") == pytest.approx(scores, abs=0.5)
    assert sum(count for count in passes if count > 1) == 3 and not (tmp_path / "cache").exists()


def test_where_nothing_was_kept_the_images_are_not_read_for_a_name(net, images, tmp_path, monkeypatch):
    monkeypatch.setenv("PPAP_CACHE_DIR", str(tmp_path / "cache"))
    dataset, config = images(), settled_demo()
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, cache_features=True))
    read, contents = [], type(dataset).fingerprint
    monkeypatch.setattr(type(dataset), "fingerprint", lambda self: read.append(1) or contents(self))
    assert kept_source(config, dataset, net) is dataset and not read
    root = cache_root(None)
    cache_features(net, dataset, root=root, dtype=config.data.cache_dtype, device=CPU)
    read.clear()
    found = kept_source(config, dataset, net)
    assert isinstance(found, CachedFeatures) and len(found) == len(dataset) and read


def test_a_stopped_computation_goes_on(net, images, tmp_path, monkeypatch):
    frozen, calls = net.frozen, []

    def stops(image):
        calls.append(len(image))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return frozen(image)

    monkeypatch.setattr(net, "frozen", stops)
    with pytest.raises(KeyboardInterrupt):
        made(net, images(), tmp_path)
    monkeypatch.undo()
    counted = []
    monkeypatch.setattr(net, "frozen", lambda image: counted.append(len(image)) or frozen(image))
    made(net, images(), tmp_path)
    # One image to learn the shapes, then the two of six that were left.
    assert counted == [1, 2]


def test_another_file_weight_or_size_is_another_cache(net, images, tmp_path):
    first = made(net, images(), tmp_path).path
    path = tmp_path / "data" / "images" / "train" / "train0.jpg"
    Image.fromarray(np.full((40, 50, 3), 7, np.uint8)).save(path)
    second = made(net, images(), tmp_path).path
    with torch.no_grad():
        next(net.backbone.parameters())[0] += 1
    third = made(net, images(), tmp_path).path
    assert len({first, second, third}) == 3


def test_values_that_do_not_fit_are_refused(net, images, tmp_path):
    with torch.no_grad():
        net.backbone.vit.blocks[0].mlp.fc2.bias += 1e5
    with pytest.raises(NumberError, match="does not fit fp16; give --data.cache-dtype bf16"):
        made(net, images(), tmp_path)
    made(net, images(), tmp_path, dtype="bf16")


def test_a_small_disk_is_told_beforehand(net, images, tmp_path, monkeypatch):
    usage = __import__("collections").namedtuple("usage", "total used free")
    monkeypatch.setattr("ppap.runs.store.shutil.disk_usage", lambda path: usage(1, 1, 100))
    with pytest.raises(DataError, match="the features need .* give another --data.cache-dir"):
        made(net, images(), tmp_path)
