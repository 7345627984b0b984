"""What the kernels are compared with: the published algorithm in plain torch, and compiled torch chunks."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ppap.kernels import PropagationConfig
from ppap.kernels.plain_products import computing_on
from ppap.kernels.ppap_loss import Composition, Settings, torch_impl
from ppap.kernels.ppap_loss.chunks import chunked_loss
from ppap.kernels.relation_masks.reference import relation_masks

BASE_TEMPERATURE = 0.07


def published(
    features: Tensor, z: Tensor, anchors: Tensor, cfg: PropagationConfig, temperature: float, chunks: int = 64
) -> Tensor:
    """Mean loss as the published code forms it: anchors x patches x channels products, gradients by autograd.

    Anchors are taken in `chunks` parts, as one part an image of a batch of 64.
    """
    f_ND = F.normalize(features, dim=1)
    sums, counts = [], []
    for anchors_C in anchors.chunk(chunks):
        v_CD, phi_C, psi_C = f_ND[anchors_C], cfg.phi0, cfg.psi0
        for _ in range(cfg.steps):
            positive_CN = v_CD @ f_ND.T > torch.as_tensor(phi_C, device=f_ND.device).reshape(-1, 1)
            product_CND = positive_CN[:, :, None] * f_ND[None]
            moved_CD = F.normalize(product_CND.sum(dim=1), dim=1)
            del product_CND
            movement_C = 1 - F.cosine_similarity(v_CD, moved_CD, dim=1)
            phi_C, psi_C = phi_C - movement_C / cfg.sigma_pos, psi_C + movement_C / cfg.sigma_amb
            v_CD = moved_CD
        phi_C, psi_C = (
            torch.as_tensor(value, device=f_ND.device).expand(len(v_CD)) for value in (phi_C, psi_C)
        )
        positive_CN, kept_CN = relation_masks(v_CD, phi_C, f_ND, psi_C, anchors_C)
        logits_CN = z[anchors_C] @ z.T / temperature
        logits_CN = logits_CN - logits_CN.max(dim=1, keepdim=True).values.detach()
        log_total_C1 = (torch.exp(logits_CN) * kept_CN).sum(dim=1, keepdim=True).log()
        count_C = positive_CN.sum(dim=1)
        hit_C = (positive_CN * (logits_CN - log_total_C1)).sum(dim=1)
        sums.append(-(hit_C / count_C.clamp(min=1)).sum())
        counts.append((count_C > 0).sum())
    return torch.stack(sums).sum() / torch.stack(counts).sum() * temperature / BASE_TEMPERATURE


def compiled_chunks(temperature: float, cfg: PropagationConfig, precision: str, budget: int) -> Callable:
    """(features, z, anchors) -> (loss, dz): the torch backend, each chunk compiled by ``torch.compile``."""

    # Every shape is compiled anew: past its limit of recompilations torch.compile would run eagerly, unsaid.
    limit = torch._dynamo.config
    limit.recompile_limit = limit.accumulated_recompile_limit = 1024

    def run(features: Tensor, z: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
        count, z_NE = anchors.shape[0], z.float()
        settings = Settings(cfg, temperature, BASE_TEMPERATURE, count, True, precision, budget)
        with computing_on(features.device):
            chunk = torch.compile(Composition.of("torch", features, z_NE, settings).chunk, dynamic=False)
            rows = torch_impl.chunk_rows(features, z_NE, settings)
            loss_A, dz, num_positives, _ = chunked_loss(chunk, z_NE, anchors, count, True, rows)
        scale = temperature / BASE_TEMPERATURE
        return loss_A.sum() / (num_positives > 0).sum().clamp(min=1) * scale, dz * (scale / count)

    return run
