"""The yardstick whose sets are those of the labels."""

import numpy as np
import pytest
import torch

from ppap.cli import run
from ppap.settings.config import LossConfig
from ppap.train import main
from tests.methods import tiny_engine
from tests.runs import make_folder

GRID = 4  # of patches, in images of 32 pixels


@pytest.fixture
def engine():
    """Every patch an anchor, so that the mean sizes of the sets can be counted by hand."""
    return tiny_engine(method="oracle", loss=LossConfig(anchor_divisor=1))


def batch_of(labels):
    """Two images whose patches have the classes `labels` (2, GRID, GRID), one class per patch."""
    label = torch.tensor(labels).repeat_interleave(8, 1).repeat_interleave(8, 2)
    image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return {"image": image, "label": label, "index": torch.arange(2)}


def test_the_sets_are_those_of_the_labels(engine):
    labels = np.random.default_rng(0).integers(-1, 3, (2, GRID, GRID))
    known = labels[labels >= 0]
    same = (known[:, None] == known).sum(axis=1)
    out = engine.method.step(batch_of(labels), 0)
    assert out.log["positives"] == pytest.approx(float(np.mean(same - 1)))
    assert out.log["negatives"] == pytest.approx(float(np.mean(len(known) - same)))
    assert out.loss.requires_grad and out.code.shape[-2:] == (GRID, GRID)
    out.loss.backward()


def test_a_batch_without_labels_teaches_nothing(engine):
    out = engine.method.step(batch_of(np.full((2, GRID, GRID), -1)), 0)
    out.loss.backward()
    assert out.loss == out.log["positives"] == out.log["negatives"] == 0


def test_a_patch_has_the_class_of_its_middle(engine):
    """At 33 pixels a row and a column of patches lie but for one pixel in what the network adds."""
    label = torch.randint(0, 3, (2, 33, 33), generator=torch.Generator().manual_seed(0))
    image = torch.randn(2, 3, 33, 33, generator=torch.Generator().manual_seed(0))
    out = engine.method.step({"image": image, "label": label, "index": torch.arange(2)}, 0)
    middle = label[:, 4::8, 4::8].flatten()
    same = (middle[:, None] == middle).sum(dim=1).float()
    assert len(middle) == 32 and out.code.shape[-2:] == (5, 5)
    assert out.log["positives"] == pytest.approx((same - 1).mean().item())
    assert out.log["negatives"] == pytest.approx((32 - same).mean().item())


def test_unlabelled_images_are_refused_before_any_work(tmp_path, capsys):
    root = make_folder(tmp_path / "images", labels=False)
    options = [f"--data.root={root}", "--data.cache-features", f"--train.out={tmp_path / 'run'}"]
    assert run(main, ["folder", "--method", "oracle", "--model.weights", "embedded", *options]) == 2
    said = capsys.readouterr()
    assert "--method oracle needs training labels; give labels/train" in said.err and not said.out
    assert not (tmp_path / "run").exists()
