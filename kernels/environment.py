"""The environment variables that the kernels read."""

import os
import warnings

VARIABLES = ("PPAP_BACKEND", "PPAP_AUTOTUNE", "PPAP_CPU_ISA", "PPAP_CACHE_DIR", "PPAP_BUILD_CUDA")


def autotune_wanted() -> bool:
    """Whether PPAP_AUTOTUNE asks for a search of launch configurations.

    Raises:
        ValueError: it is neither 0 nor 1.
    """
    value = os.environ.get("PPAP_AUTOTUNE") or "0"
    if value not in ("0", "1"):
        raise ValueError(f"PPAP_AUTOTUNE is {value!r}; give 0 or 1")
    return value == "1"


def warn_of_unknown_variables() -> None:
    """Say which variables of our prefix nothing reads."""
    unknown = sorted(key for key in os.environ if key.startswith("PPAP_") and key not in VARIABLES)
    if unknown:
        warnings.warn(
            f"unknown environment variables {unknown}; ppap reads {', '.join(VARIABLES)}", stacklevel=2
        )
