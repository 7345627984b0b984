"""Write segmentation masks of images; in Python: ppap.load(path).predict(image)."""

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from ppap.cli import parse, required, run
from ppap.data.limits import set_max_pixels
from ppap.errors import DataError, UsageError
from ppap.evaluation.predictor import load
from ppap.nets.shared_runs import local_run
from ppap.reports.masks import check_free, find_images, is_unfinished, unfinished, write_legend
from ppap.reports.prediction import MaskOptions, check_images, hints, write_masks
from ppap.reports.records import RANDOM_WARNING
from ppap.runs.checkpoint import weights_checksum
from ppap.runs.disk import sha256_of
from ppap.runs.lock import alone

_SHOWN = 20  # files in one message


@dataclass(frozen=True, kw_only=True)
class PredictArguments(MaskOptions):
    """Options of ``ppap predict``."""

    checkpoint: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN_OR_CHECKPOINT")]
    """Run directory, checkpoint folder, or hf-hub:OWNER/NAME."""
    images: Annotated[
        tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="IMAGE [IMAGE ...]"), required()
    ]
    """Image files, or folders of images."""
    out: str
    """Folder for NAME.png (class ids), NAME_overlay.jpg, legend.png and legend.json; of a GeoTIFF also
    NAME.tif with its georeference, if rasterio is installed."""
    names: str | None = None
    """names.json of `ppap atlas`: masks have a user's names, ids, colours and merges; None = class names, or
    cluster 0, 1, ..."""
    max_pixels: int | None = None
    """Images of more pixels are refused by their headers, before they are decoded [pixels]; None =
    --data.max-pixels of the run, by default 200 million."""
    overwrite: bool = False
    """Replace files that are in the folder already."""
    skip_existing: bool = False
    """Go on with a folder that is done in part: images whose mask is there are left out."""
    device: str = "auto"
    """auto = cuda if there is one, else cpu; or a torch device such as cuda:1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_pixels is not None and self.max_pixels < 1:
            raise UsageError(f"--max-pixels is {self.max_pixels}; give at least 1 pixel")
        if self.names is not None and self.probe != "cluster":
            raise UsageError(f"--names are of clusters, --probe is {self.probe!r}; leave one of them out")


def main(argv: Sequence[str]) -> None:
    """Command ``predict``; images that cannot be read are listed at the end, with the exit code of data."""
    arguments = parse(PredictArguments, argv, command="predict", description=__doc__)
    arguments = dataclasses.replace(arguments, checkpoint=str(local_run(arguments.checkpoint)))
    files = find_images(arguments.images)
    out = Path(arguments.out)
    record = _record_of(arguments)
    going_on = arguments.skip_existing or (not arguments.overwrite and is_unfinished(out, record))
    done = {stem for stem in files if going_on and (out / f"{stem}.png").exists()}
    if going_on:
        print(f"{len(done)} masks are there already, {len(files) - len(done)} to go")
    todo = {stem: path for stem, path in files.items() if stem not in done}
    check_free(out, todo, arguments.overwrite, going_on, arguments.ends())
    predictor = load(
        arguments.checkpoint, arguments.device, max_pixels=arguments.max_pixels, names=arguments.names
    )
    set_max_pixels(predictor.max_pixels)
    predictor.lookout(arguments.probe, crf=arguments.crf)  # refuses what cannot run
    print(f"backbone: {predictor.origin}")
    sizes, bad = check_images(files.values(), predictor, arguments)
    if todo and not any(path in sizes for path in todo.values()):
        raise DataError(_listed(bad))
    for hint in hints(sizes, arguments):
        print(hint)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot make {out} ({error.strerror or error}); give another --out") from None
    good = {stem: path for stem, path in files.items() if path in sizes}
    with alone(out, f"--out {out}"):
        # another process may have come first
        check_free(
            out, {s: p for s, p in good.items() if s in todo}, arguments.overwrite, going_on, arguments.ends()
        )
        write_legend(out, predictor, arguments.probe, arguments.overwrite)
        with unfinished(out, record):
            bad |= write_masks(out, good, sizes, predictor, arguments, done)
    count = len([path for path in todo.values() if path not in bad])
    masks = "1 mask" if count == 1 else f"{count} masks"
    print(f"{masks} in {out}: NAME.png holds ids, legend.json and legend.png their names")
    if predictor.engine.net.backbone.is_random:
        print(RANDOM_WARNING)
    if bad:
        raise DataError(_listed(bad))


def _record_of(arguments: PredictArguments) -> dict[str, Any]:
    """What masks follow from: a command with the same record goes on with what it left unfinished."""
    try:
        names = None if arguments.names is None else sha256_of(Path(arguments.names))
    except OSError as error:
        raise DataError(f"--names {arguments.names} cannot be read ({error.strerror or error})") from None
    return {"weights": weights_checksum(arguments.checkpoint), "names": names, **arguments.record()}


def _listed(bad: dict[Path, str]) -> str:
    if len(bad) == 1:
        return next(iter(bad.values()))
    shown = list(bad.values())[:_SHOWN]
    more = [f"... and {len(bad) - _SHOWN} more"] if len(bad) > _SHOWN else []
    return "\n  ".join([f"{len(bad)} images have no mask:", *shown, *more])


if __name__ == "__main__":
    sys.exit(run(main))
