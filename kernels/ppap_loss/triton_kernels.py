"""Triton kernels that look at the inputs of ``ppap_loss`` as a whole, and their launches.

The host never waits for them.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..tiles import launch

# Places in the scalars of a call: unit of the embeddings; factor of products of their planes to logits in
# powers of two; factor of a norm to a bound of the logits; not 0 where all bounds are tight; factor of the
# gradient; 1 or NaN.
UNIT, SCALE, BOUND, TIGHT, GRADIENT, POISON = range(6)
SCALARS = 6


@triton.jit
def claim_kernel(p_anchors, p_claims, p_clamped, anchors, patches, BLOCK: tl.constexpr):
    """Anchor i writes i into the claims of its patch; of two anchors of one patch one finds the other's
    there.

    Anchors out of range are clamped; nothing else of the claims is written or read.
    """
    o_anchor = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_anchor = o_anchor < anchors
    b_anchor = tl.load(p_anchors + o_anchor, m_anchor, other=0)
    b_clamped = tl.minimum(tl.maximum(b_anchor, 0), patches - 1)
    tl.store(p_clamped + o_anchor, b_clamped, m_anchor)
    tl.store(p_claims + b_clamped, o_anchor, m_anchor)


@triton.jit
def power_of_two_above(largest):
    """The power of two not below a magnitude, 1 for 0; by its exponent bits."""
    bits = largest.to(tl.int32, bitcast=True)
    exponent = (bits >> 23) + ((bits & 0x7FFFFF) != 0).to(tl.int32)
    exponent = tl.minimum(tl.maximum(exponent, 1), 254)
    return tl.where(largest == 0, 1.0, (exponent << 23).to(tl.float32, bitcast=True))


@triton.jit
def scalars_kernel(
    p_norms,
    p_anchors,
    p_claims,
    p_scalars,
    patches,
    anchors,
    bound_factor,
    logit_factor,
    gradient_factor,
    tight_bound,
    EMBEDDINGS: tl.constexpr,
    SCALED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The scalars of a call, in their places; one program.

    `p_norms` (3, patches): norms of features, and with EMBEDDINGS their norms and largest magnitudes. A norm
    that is NaN, an anchor out of range or one that another has claimed make the poison NaN.
    """
    b_bad = tl.zeros((BLOCK,), tl.int32)
    b_norm = tl.zeros((BLOCK,), tl.float32)
    b_largest = tl.zeros((BLOCK,), tl.float32)
    for i in range(0, patches, BLOCK):
        o_patch = i + tl.arange(0, BLOCK)
        m_patch = o_patch < patches
        b_feature = tl.load(p_norms + o_patch, m_patch, other=0.0)
        b_bad |= (b_feature != b_feature).to(tl.int32)
        if EMBEDDINGS:
            b_own = tl.load(p_norms + patches + o_patch, m_patch, other=0.0)
            b_bad |= (b_own != b_own).to(tl.int32)
            b_norm = tl.maximum(b_norm, b_own)
        if SCALED:
            b_largest = tl.maximum(b_largest, tl.load(p_norms + 2 * patches + o_patch, m_patch, other=0.0))
    for i in range(0, anchors, BLOCK):
        o_anchor = i + tl.arange(0, BLOCK)
        m_anchor = o_anchor < anchors
        b_anchor = tl.load(p_anchors + o_anchor, m_anchor, other=0)
        m_inside = (b_anchor >= 0) & (b_anchor < patches)
        b_claim = tl.load(p_claims + tl.where(m_inside, b_anchor, 0), m_anchor & m_inside, other=-1)
        b_bad |= (m_anchor & (b_claim != o_anchor)).to(tl.int32)
    unit = 1.0
    if SCALED:
        unit = power_of_two_above(tl.max(b_largest, 0))
    # Bounds of logits are products of two norms.
    norm = tl.max(b_norm, 0)
    tl.store(p_scalars + 0, unit)
    tl.store(p_scalars + 1, logit_factor * unit * unit)
    tl.store(p_scalars + 2, bound_factor * norm)
    tl.store(p_scalars + 3, (bound_factor * norm * norm < tight_bound).to(tl.float32))
    tl.store(p_scalars + 5, tl.where(tl.max(b_bad, 0) == 0, 1.0, float("nan")))
    tl.store(p_scalars + 4, tl.where(tl.max(b_bad, 0) == 0, gradient_factor * unit, float("nan")))


@dataclass(frozen=True)
class Claims:
    """Anchors as they came, and what shows whether they are good.

    Attributes:
        given_A: int64, contiguous.
        clamped_A: int64, in range.
        claims_N: int32, see :func:`claim_kernel`.
    """

    given_A: torch.Tensor
    clamped_A: torch.Tensor
    claims_N: torch.Tensor

    @classmethod
    def of(cls, anchors_A: torch.Tensor, patches: int) -> "Claims":
        """Let every anchor claim its patch."""
        given_A, count = anchors_A.contiguous(), anchors_A.shape[0]
        claims_N = torch.empty(patches, dtype=torch.int32, device=anchors_A.device)
        clamped_A = torch.empty_like(given_A)
        claim_kernel[(triton.cdiv(count, 1024),)](given_A, claims_N, clamped_A, count, patches, BLOCK=1024)
        return cls(given_A, clamped_A, claims_N)


def find_scalars(
    norms_3N: torch.Tensor,
    claims: Claims,
    bound_factor: float = 1.0,
    logit_factor: float = 1.0,
    gradient_factor: float = 1.0,
    tight_bound: float = 1.0,
    embeddings: bool = False,
    scaled: bool = False,
) -> torch.Tensor:
    """(SCALARS,) float32, see :func:`scalars_kernel`."""
    scalars = torch.empty(SCALARS, device=norms_3N.device)
    scalars_kernel[(1,)](
        norms_3N,
        claims.given_A,
        claims.claims_N,
        scalars,
        norms_3N.shape[1],
        claims.given_A.shape[0],
        bound_factor,
        logit_factor,
        gradient_factor,
        tight_bound,
        EMBEDDINGS=embeddings,
        SCALED=scaled,
        BLOCK=1024 if launch.interpreted() else 8192,
        num_warps=16,
    )
    return scalars
