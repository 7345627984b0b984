"""``contrastive_loss`` of relations and packed masks; ``test_ppap_loss.py`` compares it with a definition."""

import pytest
import torch

from ppap.kernels import PackedMasks, PropagationConfig, contrastive_loss, pack_masks, propagate
from tests.helpers import made_case


def test_packed_masks_in_place_of_relations():
    case = made_case(60, 16, 12, PropagationConfig(), 0.5)
    rel = propagate(case.features, case.anchors, case.cfg)
    wanted = contrastive_loss(case.z, rel, temperature=0.5)
    rows = torch.arange(12)
    positive, kept = rel.positives(rows), rel.positives(rows) | rel.negatives(rows)
    masks = PackedMasks(pack_masks(positive), pack_masks(kept), case.anchors)
    assert torch.allclose(contrastive_loss(case.z, masks, temperature=0.5), wanted, atol=1e-12)
    everyone = propagate(case.features, None, case.cfg)
    rows = torch.arange(60)
    pair = [
        pack_masks(m) for m in (everyone.positives(rows), everyone.positives(rows) | everyone.negatives(rows))
    ]
    wanted = contrastive_loss(case.z, everyone, temperature=0.5)
    assert torch.allclose(contrastive_loss(case.z, tuple(pair), temperature=0.5), wanted, atol=1e-12)
    with pytest.raises(ValueError, match="give PackedMasks"):
        contrastive_loss(case.z, masks[:2], temperature=0.5)


@pytest.mark.parametrize("trustworthy", [True, False])
def test_opcheck_of_the_parts(trustworthy):
    cfg = PropagationConfig(trustworthy_positives=trustworthy)
    case = made_case(40, 16, 8, cfg, 0.3).to(torch.float32)
    rel = propagate(case.features, case.anchors, cfg)
    q = rel.queries()
    relations = (rel.features, rel.anchors, q.positive, q.phi, q.negative, q.psi)
    rest = (0.3, "fp32", "fp32", 2**20, "torch")
    z = case.z.requires_grad_()
    torch.library.opcheck(torch.ops.ppap.contrastive_loss.default, (z, *relations, *rest))
    lse = torch.ops.ppap.contrastive_loss(z, *relations, *rest)[1].detach()
    arguments = (torch.ones(8), lse, z.detach(), *relations, *rest)
    torch.library.opcheck(torch.ops.ppap.contrastive_loss_backward.default, arguments)


@pytest.mark.parametrize("impl", ["torch", "cpp"])
def test_several_chunks_give_what_one_gives(impl):
    case = made_case(300, 48, 120, PropagationConfig(), 0.3).to(torch.float32)
    rel = propagate(case.features, case.anchors, case.cfg, impl=impl)
    z, results = case.z.requires_grad_(), []
    for budget in (2**29, 300_000):
        loss = contrastive_loss(z, rel, temperature=0.3, memory_budget=budget, impl=impl)
        results.append((loss, torch.autograd.grad(loss.sum(), z)[0]))
    for whole, parts in zip(*results, strict=True):
        torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-5)
