"""Share a run on the Hugging Face Hub: ppap.load("hf-hub:OWNER/NAME") and ppap predict take it from there.

What goes up: the weights (safetensors), the settings, and a page made of the run's scores. What stays here:
pictures, metrics, optimisers, and the names of folders. Log in first: hf auth login.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from ppap.cli import parse, run
from ppap.reports.sharing import push, write_repository


@dataclass(frozen=True, kw_only=True)
class PushArguments:
    """Options of ``ppap push``."""

    checkpoint: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN_OR_CHECKPOINT")]
    """Run directory or checkpoint folder."""
    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OWNER/NAME")]
    """Repository of the hub, which is made if it is not there."""
    private: bool = False
    """Make a new repository one that its owner alone sees."""
    message: str | None = None
    """Of the commit; None = the step that was trained to."""
    folder: str | None = None
    """Write the repository's files to this new folder, and send nothing."""


def main(argv: Sequence[str]) -> None:
    """Command ``push``."""
    arguments = parse(PushArguments, argv, command="push", description=__doc__)
    if arguments.folder is not None:
        written = write_repository(arguments.checkpoint, arguments.name, arguments.folder)
        print("\n".join(f"written: {path}" for path in written))
        return
    address = push(arguments.checkpoint, arguments.name, private=arguments.private, message=arguments.message)
    print(f'shared: {address}; in Python: ppap.load("hf-hub:{arguments.name}")')


if __name__ == "__main__":
    sys.exit(run(main))
