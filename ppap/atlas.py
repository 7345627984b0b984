"""Make a page of a run's clusters, on which to give them names, merge them and save names.json.

atlas.html is one file that any browser opens from the disk. Its names.json is for ``ppap predict --names``,
``ppap eval --names`` and ``ppap.load(run, names=...)``.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ppap.cli import parse, run
from ppap.errors import DataError, UsageError
from ppap.evaluation.predictor import load
from ppap.reports.atlas import AtlasOptions, default_path, make_atlas
from ppap.reports.measure import check_writable
from ppap.runs.disk import write_whole


@dataclass(frozen=True, kw_only=True)
class AtlasArguments(AtlasOptions):
    """Options of ``ppap atlas``."""

    checkpoint: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN_OR_CHECKPOINT")]
    """Run directory or checkpoint folder."""
    images: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[IMAGE ...]")] = ()
    """Image files, or folders of images; none = the validation images of the run, or its training images
    where it has none, with their labels."""
    out: str | None = None
    """HTML file; None = atlas.html in the run."""
    overwrite: bool = False
    """Replace the file if it is there; names are kept apart, in names.json."""
    device: str = "auto"
    """auto = cuda if there is one, else cpu; or a torch device such as cuda:1."""


def main(argv: Sequence[str]) -> None:
    """Command ``atlas``."""
    arguments = parse(AtlasArguments, argv, command="atlas", description=__doc__)
    out = default_path(arguments.checkpoint) if arguments.out is None else Path(arguments.out)
    if out.is_dir():
        raise UsageError(f"--out {out} is a folder; give a file, such as {out / 'atlas.html'}")
    if out.exists() and not arguments.overwrite:
        raise UsageError(f"{out} exists already; give another --out, or --overwrite")
    predictor = load(arguments.checkpoint, arguments.device)
    check_writable(out)
    html = make_atlas(predictor, arguments.checkpoint, arguments.images, arguments)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_whole(out, html)
    except OSError as error:
        raise DataError(f"cannot write {out} ({error.strerror or error}); give another --out") from None
    print(
        f"{out} ({len(html.encode()) / 1e6:.1f} MB): open it in a browser, name the clusters, save names.json"
    )
    print(f"then: python -m ppap.predict {arguments.checkpoint} IMAGES --names names.json --out masks")


if __name__ == "__main__":
    sys.exit(run(main))
