"""Analyses: ``python -m ppap.analyze NAME [PRESET] [--section.field value ...]``.

Each is a module of ``ppap.analysis.commands``; what they compute is beside them in ``ppap.analysis``.
"""

import importlib
import sys
from collections.abc import Sequence

from ppap.cli import first_positional, run
from ppap.errors import UsageError, unknown_name

ANALYSES = {
    "backbone": "whether a backbone suits the images, and what suits it, before any training",
    "thresholds": "which phi0 and psi0 suit a backbone and a data set, without labels",
    "positives": "which patches become positives of an anchor, step by step (Fig. 5)",
    "sets": "how large and how pure the sets of PPAP, HP and others are (Table 6, Fig. 1b)",
    "ablation": "what each half of the method contributes, over seeds (Table 5)",
    "sweep": "scores over grids of sigma_pos, sigma_amb, phi0 and psi0 (Fig. 4)",
    "benchmark": "a preset's data under several methods and seeds, beside the paper (Tables 1-4)",
    "compare": "image, truth and the masks of several runs side by side (Fig. 3)",
}
"""Name -> what it answers; ``ppap.analysis.commands`` has a module of that name."""


def main(argv: Sequence[str]) -> None:
    """Command ``analyze``."""
    name = first_positional(argv)
    if name is None:
        print(f"usage: ppap analyze {{{','.join(ANALYSES)}}} [PRESET] [options]\n\n{_overview()}")
        if set(argv) & {"-h", "--help"}:
            sys.exit(0)
        raise UsageError(f"name an analysis: {', '.join(ANALYSES)}")
    if name not in ANALYSES:
        raise unknown_name("analysis", name, ANALYSES)
    importlib.import_module(f"ppap.analysis.commands.{name}").main(list(argv[1:]))


def _overview() -> str:
    lines = [f"  {name:<11} {what}" for name, what in ANALYSES.items()]
    return "analyses:\n" + "\n".join(lines) + "\n\nppap analyze NAME --help lists the options of one."


if __name__ == "__main__":
    sys.exit(run(main))
