"""Check a public data set, and make of it what training reads.

cocostuff27, cocostuff15, cocostuff3, cityscapes27: cuts every training image into five crops, below
ROOT/cropped. potsdam3: cuts raw tiles into blocks, in --out; the numbering is that of the sorted tiles, the
split a seeded draw, since the published ones are unseeded. imagenet_s needs nothing made. An interrupted
command goes on when it is given again; originals are never touched. docs/datasets.md says which archives to
get and how the folders must look.
"""

import sys
from collections.abc import Sequence

from ppap.cli import parse, run
from ppap.errors import PpapError, UsageError
from ppap.preparation.request import PrepareArguments, prepare


def main(argv: Sequence[str]) -> None:
    """Command ``prepare``."""
    arguments = parse(PrepareArguments, argv, command="prepare", description=__doc__)
    try:
        prepare(arguments)
    except ValueError as error:
        raise UsageError(_own_options(error)) from None
    except PpapError as error:
        raise type(error)(_own_options(error)) from None


def _own_options(error: Exception) -> str:
    """The text of an error, with the options of training under the names that they have here."""
    return str(error).replace("--data.crop-ratio", "--ratio").replace("--data.", "--")


if __name__ == "__main__":
    sys.exit(run(main))
