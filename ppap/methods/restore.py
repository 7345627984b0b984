"""The state of a training put back into an engine, or refused where it is not that of such an engine."""

from typing import Any

import torch

from ppap.errors import DataError
from ppap.methods.engine import Engine
from ppap.settings.plain import misfit

_COUNTERS = {"step": int, "best": float, "validated": int, "engine": dict[str, Any]}
_MISMATCH = (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError)
"""What torch raises of a state that another program made up."""


def restore(engine: Engine, state: Any, step: int, where: str) -> None:
    """Put optimisers, loss scale and generators back.

    Args:
        engine: built as the one that was saved.
        state: what :meth:`ppap.runs.checkpoint.Checkpoint.state` returned.
        step: of the weights.
        where: the checkpoint, for messages.

    Raises:
        DataError: it is the state of something else.
    """
    remedy = "its weights can be used, but no training goes on from it"
    if isinstance(state, dict):
        wrong = next((f"it lacks {name}" for name in _COUNTERS if name not in state), None)
        wrong = wrong or misfit(state, _COUNTERS)
    else:
        wrong = f"it holds a {type(state).__name__}"
    if wrong is None and state["step"] != step:
        wrong = f"it is of step {state['step']}, its weights are of step {step}"
    groups = {name: _types(optimiser) for name, optimiser in engine.optimisers.items()}
    if wrong is None:
        try:
            engine.load_training_state(state["engine"])
            wrong = _wrong_sizes(engine)
            if wrong is None and any(_types(engine.optimisers[name]) != groups[name] for name in groups):
                wrong = "settings of an optimiser are of another type"
        except _MISMATCH as error:
            wrong = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if wrong is not None:
        raise DataError(f"{where}/state.pt is not the state of such a training ({wrong}); {remedy}")


def _types(optimiser: torch.optim.Optimizer) -> list[dict[str, bool]]:
    """Setting -> whether it is a number, of each group."""
    return [
        {name: isinstance(value, int | float) for name, value in group.items()}
        for group in optimiser.param_groups
    ]


def _wrong_sizes(engine: Engine) -> str | None:
    for name, optimiser in engine.optimisers.items():
        for parameter, own in optimiser.state.items():
            for key, value in own.items():
                if key == "step":
                    if not (torch.is_tensor(value) and value.numel() == 1):
                        return f"optimiser {name}: step is no number"
                elif not torch.is_tensor(value) or value.shape != parameter.shape:
                    return f"optimiser {name}: {key} is not of its weight's shape"
    return None
