"""One run of a study in a process of its own: ``python -m ppap.analysis.cell FOLDER < request``.

Not for people: :func:`ppap.analysis.study.run_cells` starts it.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from ppap.analysis.study import Cell, run_cell
from ppap.cli import run
from ppap.settings.config import from_dict


def main(argv: Sequence[str]) -> None:
    """Run the cell that standard input describes in the folder of cells ``argv[0]``."""
    request = json.load(sys.stdin)
    run_cell(Path(argv[0]), Cell(**{**request, "config": from_dict(request["config"])}))


if __name__ == "__main__":
    sys.exit(run(main))
