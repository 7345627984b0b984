"""The bound whose sets are those of the labels."""

import numpy as np
import pytest
import torch

from ppap.cli import run
from ppap.config import LossConfig
from ppap.errors import UsageError
from ppap.methods.base import TrainingData
from ppap.train import main
from tests.methods import tiny_engine

GRID = 4  # of patches, in images of 32 pixels


@pytest.fixture
def engine():
    """Every patch an anchor, so that the mean sizes of the sets can be counted by hand."""
    return tiny_engine(method="oracle", loss=LossConfig(anchor_divisor=1, phi0=0.5))


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


def test_what_it_cannot_train_with_is_refused(engine, tmp_path, capsys):
    class Unlabelled:
        labelled = False

    with pytest.raises(UsageError, match="labels/train"):
        engine.method.start(TrainingData(Unlabelled(), engine.config, torch.device("cpu")), 0)
    assert run(main, ["demo", "--method", "oracle", "--loss.phi0", "1.5"]) == 2
    assert "--loss.phi0 is 1.5; give 0 <= phi0 < 1" in capsys.readouterr().err
