"""Every method by the name that ``--method`` takes."""

from ppap.methods.base import Method
from ppap.methods.hp import HP
from ppap.methods.oracle import Oracle
from ppap.methods.ppap import PPAP
from ppap.methods.stego import STEGO
from ppap.settings.config import Config

METHODS: dict[str, type[Method]] = {
    "ppap": PPAP,
    "frozen": Method,
    "fixed": PPAP,
    "tps": PPAP,
    "ans": PPAP,
    "random": PPAP,
    "oracle": Oracle,
    "hp": HP,
    "stego": STEGO,
}

TITLES = {
    "colour": "plain colours",
    "frozen": "frozen features",
    "conditioned": "frozen, conditioned",
    "fixed": "fixed threshold",
    "tps": "TPS alone",
    "ans": "ANS alone",
    "random": "random positives",
    "stego": "STEGO",
    "hp": "Hidden Positives",
    "ppap": "PPAP",
    "oracle": "sets of the labels",
}
"""Method, or a row that needs no training -> its name for people, in the order of tables."""


def method_of(config: Config) -> type[Method]:
    """The class of ``config.method``."""
    return METHODS[config.method]
