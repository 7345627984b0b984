"""Experiments by name."""

from tests.stress.cost import memory, step_time
from tests.stress.disk import full_disks
from tests.stress.flips import bit_flips
from tests.stress.fuzz import fuzz
from tests.stress.kills import random_kills
from tests.stress.material import Experiment
from tests.stress.pairs import two_at_once
from tests.stress.phases import signals
from tests.stress.saving import kills_in_saves

EXPERIMENTS: dict[str, Experiment] = {
    "kills": random_kills,
    "saves": kills_in_saves,
    "flips": bit_flips,
    "pairs": two_at_once,
    "signals": signals,
    "fuzz": fuzz,
    "disk": full_disks,
    "memory": memory,
    "step-time": step_time,
}
