"""The ops of PPAP: proxy averages, packed relations, masked log-softmax, the fused loss, dense CRF.

Needs only torch (and Triton for its backend); never imports the rest of ppap. Read ``dispatch.py`` for how a
backend is chosen, ``availability.py`` for why one cannot be, ``<op>/reference.py`` for what an op computes.
"""

from .availability import available_backends
from .budget import MemoryBudgetError
from .contrastive_loss import contrastive_loss
from .dense_crf import dense_crf, dense_crf_batch
from .dispatch import use_backend
from .guards import NonFiniteError
from .masked_log_softmax import masked_log_softmax
from .masks import PackedMasks, pack_masks, unpack_masks
from .ppap_loss import ppap_loss
from .propagate import PropagationConfig, Relations, propagate
from .proxy_average import proxy_average
from .relation_masks import relation_masks

__all__ = [
    "MemoryBudgetError",
    "NonFiniteError",
    "PackedMasks",
    "PropagationConfig",
    "Relations",
    "available_backends",
    "contrastive_loss",
    "dense_crf",
    "dense_crf_batch",
    "masked_log_softmax",
    "pack_masks",
    "ppap_loss",
    "propagate",
    "proxy_average",
    "relation_masks",
    "unpack_masks",
    "use_backend",
]
