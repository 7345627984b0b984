"""Every family of backbones from the command line: three steps, scores, prediction, resume, cache."""

import pytest
import torch
from safetensors.torch import load_file

from ppap.errors import UsageError
from ppap.eval import main as evaluate
from ppap.predict import main as predict
from ppap.train import main as train
from tests.families import FAMILIES, write
from tests.runs import TINY, make_folder

OPTIONS = [option for option in TINY if not option.startswith("--model.")]


def run(weights, out, *options):
    train([*OPTIONS, f"--model.weights={weights}", f"--train.out={out}", "--train.steps=3", *options])
    return out


@pytest.mark.parametrize("family", FAMILIES)
def test_three_steps(tmp_path, family):
    weights, _ = write(FAMILIES[family], tmp_path / "weights")
    out = run(weights, tmp_path / "run")
    tensors = load_file(out / "checkpoints/last/model.safetensors")
    name = "block.norm1.weight"
    frozen = tensors["backbone.vit.blocks.1.norm1.weight"]
    assert tensors[name].shape == frozen.shape and not torch.equal(tensors[name], frozen)


@pytest.mark.parametrize("family", ["hf-vit", "hf-dinov3-plus", "dinov2-registers"])
def test_eval_predict_resume_and_cache(tmp_path, family):
    """Statistics of images, rotary positions and registers outlive the file that they came from."""
    folder = tmp_path / "weights"
    weights, _ = write(FAMILIES[family], folder)
    whole = run(weights, tmp_path / "whole", "--train.steps=4")
    part = run(weights, tmp_path / "part", "--train.steps=2")
    for file in folder.iterdir():
        file.unlink()
    train(["--resume", str(part), "--train.steps=4"])
    one, two = (load_file(r / "checkpoints/last/model.safetensors") for r in (whole, part))
    assert all(torch.equal(one[key], two[key]) for key in one)
    evaluate([str(whole), "--out", str(tmp_path / "eval.json")])
    images = make_folder(tmp_path / "images", labels=False, count=1) / "images" / "val"
    predict([str(whole), str(images), "--out", str(tmp_path / "masks")])
    assert any((tmp_path / "masks").rglob("*.png"))


def test_cached_features_go_by_the_statistics_of_images(tmp_path):
    weights, _ = write(FAMILIES["hf-vit"], tmp_path / "weights")
    cache = ["--data.cache-features", f"--data.cache-dir={tmp_path / 'cache'}"]
    run(weights, tmp_path / "a", *cache)
    (tmp_path / "weights/preprocessor_config.json").unlink()
    run(weights, tmp_path / "b", *cache)
    assert len(list((tmp_path / "cache/features").iterdir())) == 4, "of training and validation"


def test_hidden_positives_ask_for_plain_attention(tmp_path):
    weights, _ = write(FAMILIES["dinov3"], tmp_path / "weights")
    with pytest.raises(UsageError, match="method hp needs a last block with plain attention"):
        run(weights, tmp_path / "run", "--method=hp")
