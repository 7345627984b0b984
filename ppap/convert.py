"""Make a run of a checkpoint that the published code of PPAP, HP or STEGO wrote.

FILE is what that code saved, PRESET the data set and backbone it was trained with, such as cocostuff27-vits8.
Which of the three methods it is, the file shows. The run in --out serves ppap eval, ppap predict and
ppap.load; ppap train --resume trains it on from step 0, with optimisers that begin anew. The matching of
clusters and classes is not in such files: ppap eval finds it, ppap predict names clusters by numbers. No code
of a file is executed.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ppap.cli import parse, run
from ppap.errors import DataError, UsageError
from ppap.preparation.published import convert
from ppap.runs.rundir import new_run_path


@dataclass(frozen=True, kw_only=True)
class ConvertArguments:
    """Options of ``ppap convert``."""

    file: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="FILE")]
    """Checkpoint of the published code, such as best.pth."""
    preset: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="PRESET")]
    """Preset of its data set and backbone; ppap train --help lists them."""
    out: str = ""
    """Run directory to write, which does not exist yet; must be given."""


def main(argv: Sequence[str]) -> None:
    """Command ``convert``."""
    arguments = parse(ConvertArguments, argv, command="convert", description=__doc__)
    if not arguments.out:
        raise UsageError("--out is not given; name a new folder")
    path = Path(arguments.file)
    if not path.is_file():
        raise DataError(f"{path} is no file; give a checkpoint of the published code")
    try:
        out = new_run_path(arguments.out, arguments.preset)
    except UsageError:
        raise UsageError(f"--out {arguments.out} exists already; give another folder") from None
    engine = convert(path, arguments.preset, out)
    print(f"converted: {engine.net.backbone.origin}")
    print(
        f"method {engine.config.method}, {engine.classes} classes, code of {engine.net.code_width} channels"
    )
    if engine.config.method == "hp":
        print(
            "the projection and the pools of HP are not in such files: drawn, or filled, if it is trained on"
        )
    print(f"run: {out}; measure it: python -m ppap.eval {out} --data.root DIR")


if __name__ == "__main__":
    sys.exit(run(main))
