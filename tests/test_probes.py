"""Probes against plain formulas, their gradients, and the way from patches to pixels."""

import pytest
import torch
import torch.nn.functional as F

from ppap.nets.probes import ClusterProbe, LinearProbe, upsample


def resize(features, size):
    return F.interpolate(features, size=size, mode="bilinear", align_corners=False)


# Linear probe


def linear_case(size=(32, 48)):
    torch.manual_seed(0)
    probe, code = LinearProbe(12, 5), torch.randn(2, 12, 4, 6)
    return probe, code, torch.randint(-1, 5, (2, *size))


def test_linear_loss_is_the_mean_over_labelled_pixels():
    probe, code, label = linear_case()
    label[0, :4] = 255
    label[1, 3, 3] = 5
    weight, bias = probe.classifier.weight[:, :, 0, 0], probe.classifier.bias
    logits = torch.einsum("cd,bdhw->bchw", weight, code) + bias[:, None, None]
    logp = resize(logits, (32, 48)).log_softmax(dim=1)
    picked = [
        -logp[b, label[b, i, j], i, j] for b, i, j in torch.nonzero((label >= 0) & (label < 5)).tolist()
    ]
    torch.testing.assert_close(probe.loss(code, label), torch.stack(picked).mean())
    torch.testing.assert_close(probe.logits(code), logits)


@pytest.mark.parametrize("value", [-1, 5, 255])
def test_linear_loss_without_a_label_is_zero_with_a_graph(value):
    probe, code, label = linear_case()
    loss = probe.loss(code, torch.full_like(label, value))
    loss.backward()
    assert loss.item() == 0
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in probe.parameters())


def test_linear_loss_reaches_the_probe_and_never_the_code():
    probe, code, label = linear_case()
    code.requires_grad_(True)
    probe.loss(code, label).backward()
    assert code.grad is None and all(p.grad.abs().sum() > 0 for p in probe.parameters())


def test_linear_loss_cuts_the_added_pixels():
    probe, code, _ = linear_case()
    label = torch.randint(0, 5, (2, 30, 41))
    logits = resize(probe.logits(code), (32, 48))[:, :, :30, :41]
    torch.testing.assert_close(probe.loss(code, label, patch_size=8), F.cross_entropy(logits, label))


# Cluster probe


def test_cluster_logits_are_cosines():
    torch.manual_seed(0)
    probe, code = ClusterProbe(12, 5), torch.randn(2, 12, 4, 6)
    truth = F.cosine_similarity(code[:, None], probe.clusters[None, :, :, None, None], dim=2)
    torch.testing.assert_close(probe.logits(code), truth)
    torch.testing.assert_close(probe.logits(code * 1e3), truth)
    assert torch.equal(probe.logits(torch.zeros_like(code)), torch.zeros(2, 5, 4, 6))


def test_cluster_loss_and_gradient():
    torch.manual_seed(0)
    probe = ClusterProbe(3, 3)
    probe.clusters.data = torch.tensor([[2.0, 0, 0], [0, 5, 0], [0, 0, -1]])
    # The first patch is nearest to centre 0 (cosine 0.8), the second to centre 1 (cosine 1), none to 2.
    code = torch.tensor([[0.8, 0.6, 0], [0, 3, 0]]).T.reshape(1, 3, 1, 2).requires_grad_(True)
    loss = probe.loss(code)
    torch.testing.assert_close(loss, torch.tensor(-0.9))
    loss.backward()
    assert code.grad is None
    # d(-cos)/d centre = -(unit code - cos unit centre) / |centre|, half of it for the mean over two patches.
    torch.testing.assert_close(probe.clusters.grad, torch.tensor([[0, -0.15, 0], [0, 0, 0], [0, 0, 0]]))


def test_cluster_centres_start_as_standard_normal_from_the_global_seed():
    torch.manual_seed(7)
    one = ClusterProbe(384, 100).clusters
    torch.manual_seed(7)
    assert torch.equal(one, ClusterProbe(384, 100).clusters) and one.shape == (100, 384)
    assert abs(one.mean().item()) < 0.02 and abs(one.std().item() - 1) < 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_probes_stay_fp32_under_autocast(dtype):
    torch.manual_seed(0)
    linear, cluster = LinearProbe(12, 5), ClusterProbe(12, 5)
    code, label = torch.randn(2, 12, 4, 6), torch.randint(0, 5, (2, 32, 48))
    plain = [linear.loss(code, label), cluster.loss(code), linear.logits(code), cluster.logits(code)]
    with torch.autocast("cpu", dtype=dtype):
        mixed = [linear.loss(code, label), cluster.loss(code), linear.logits(code), cluster.logits(code)]
    for one, two in zip(plain, mixed, strict=True):
        assert two.dtype == torch.float32 and torch.equal(one, two)
    assert cluster.logits(code.to(dtype)).dtype == torch.float32


# Up-sampling


def test_upsample_of_whole_patches_is_plain_resizing():
    features = torch.randn(2, 3, 5, 7)
    assert torch.equal(upsample(features, 8, (40, 56)), resize(features, (40, 56)))


@pytest.mark.parametrize("size", [(33, 50), (40, 49), (34, 56)])
def test_upsample_cuts_the_added_pixels(size):
    features = torch.randn(2, 3, 5, 7)
    out = upsample(features, 8, size)
    assert out.shape == (2, 3, *size)
    assert torch.equal(out, resize(features, (40, 56))[:, :, : size[0], : size[1]])


def test_upsample_keeps_patches_where_they_are():
    """Away from borders the value at the centre of a patch is the mean of its neighbourhood in a ramp."""
    ramp = torch.arange(7.0).expand(1, 1, 5, 7)
    out = upsample(ramp, 8, (37, 53))
    columns = (torch.arange(53) + 0.5) / 8 - 0.5
    torch.testing.assert_close(out[0, 0, 0], columns.clamp(0, 6))


@pytest.mark.parametrize("size", [(32, 56), (41, 56), (40, 48), (40, 57)])
def test_upsample_refuses_a_grid_of_another_image(size):
    with pytest.raises(ValueError, match="do not cover"):
        upsample(torch.zeros(1, 3, 5, 7), 8, size)
