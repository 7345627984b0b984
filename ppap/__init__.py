"""Unsupervised semantic segmentation by progressive proxy anchor propagation.

Start with ``ppap.load`` (a trained network, ready to predict), ``ppap.kernels`` (the ops) or ``python -m
ppap.train``. Nothing heavy is imported before it is used.
"""

import importlib
import os
from typing import Any

__version__ = "0.1.0"

# Run from a source tree, ppap.kernels is the folder `kernels` beside this package.
if not os.path.isdir(os.path.join(os.path.dirname(__file__), "kernels")):
    __path__.append(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

_LAZY = {
    "load": "ppap.evaluation.predictor",
    "Predictor": "ppap.evaluation.predictor",
    "kernels": None,
    "Config": "ppap.settings.config",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'ppap' has no attribute {name!r}; public: {', '.join(sorted(_LAZY))}")
    module = importlib.import_module(_LAZY[name] or f"ppap.{name}")
    return getattr(module, name) if _LAZY[name] else module


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
