"""Which patches are anchors, and the averaging of the training loss."""

import pytest
import torch

from bench.shapes import clustered
from ppap.kernels.ppap_loss import reference
from ppap.methods.loss import PPAPLoss, draw_anchors
from ppap.settings.config import LossConfig


@pytest.mark.parametrize(
    ("patches", "chunk", "divisor", "total", "per_chunk"),
    [
        (50_176, 784, 16, 3136, 49),  # ViT-S/8, 64 crops (published)
        (12_544, 784, 4, 3136, 196),  # ViT-S/16
        (1000, 784, 16, 49 + 13, 49),  # a last chunk of 216 patches
        (100, 784, 4, 25, 25),  # fewer patches than a chunk
        (785, 784, 16, 49 + 1, 49),  # a last chunk of one patch
        (5, 784, 16, 1, 1),
    ],
)
def test_anchors_per_chunk(patches, chunk, divisor, total, per_chunk):
    anchors, size = draw_anchors(patches, chunk, divisor, seed=0, step=0)
    assert (len(anchors), size) == (total, per_chunk)
    assert anchors.dtype == torch.int64
    assert anchors.unique().numel() == total and 0 <= anchors.min() and anchors.max() < patches
    for group, members in enumerate(anchors.split(size)):
        assert (members // min(chunk, patches) == group).all(), "every group lies in its own chunk"


def test_anchors_depend_on_seed_and_step_alone():
    torch.manual_seed(1)
    first = draw_anchors(200, 50, 5, seed=3, step=7)[0]
    torch.manual_seed(2)
    assert torch.equal(first, draw_anchors(200, 50, 5, seed=3, step=7)[0])
    others = [draw_anchors(200, 50, 5, seed, step)[0] for seed, step in ((3, 8), (4, 7), (7, 3))]
    assert not any(torch.equal(first, other) for other in others)


def test_anchors_share_no_random_bits_with_the_sample_order():
    from ppap.data import EpochSampler

    anchors = draw_anchors(64, 64, 1, seed=5, step=1)[0]
    assert len(anchors) == 64
    few = draw_anchors(64, 64, 8, seed=5, step=1)[0]
    assert sorted(few.tolist()) != sorted(EpochSampler(64, 1, seed=5).order(1)[:8].tolist())


def test_every_patch_of_a_chunk_becomes_an_anchor_equally_often():
    counts = torch.zeros(40)
    for step in range(400):
        counts[draw_anchors(40, 20, 4, seed=0, step=step)[0]] += 1
    # Each patch is drawn with probability 1/4: 100 of 400, standard deviation 8.7.
    assert counts.min() > 60 and counts.max() < 140


def test_loss_is_the_mean_over_chunks_of_the_mean_over_anchors():
    config = LossConfig(chunk=30, anchor_divisor=5, temperature=0.3)
    loss = PPAPLoss(config, seed=1)
    features, z = clustered(100, 16, seed=0, clusters=5), clustered(100, 16, seed=1, clusters=5)
    result = loss(features, z, step=2)
    anchors, _ = draw_anchors(100, 30, 5, seed=1, step=2)
    wanted = []
    for chunk in range(4):
        mine = anchors[anchors // 30 == chunk]
        wanted.append(reference.ppap_loss(features, z, mine, loss.propagation, temperature=0.3))
    torch.testing.assert_close(result.loss, torch.stack(wanted).mean())
    rel = reference.propagate(features, anchors, loss.propagation)
    torch.testing.assert_close(result.positives, rel.positive.sum(1).float().mean())
    torch.testing.assert_close(result.negatives, (rel.kept & ~rel.positive).sum(1).float().mean())
