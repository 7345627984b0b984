"""Write segmentation masks of images; in Python: ppap.load(path).predict(image)."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro
from tqdm import tqdm

from ppap.cli import parse, required, run
from ppap.data import class_colours
from ppap.data.images import read_image, verify_image
from ppap.data.limits import set_max_pixels
from ppap.errors import DataError, UsageError
from ppap.evaluation.predictor import MAX_TOKENS, Predictor, load
from ppap.pictures.drawing import overlay, save_index_png, save_whole
from ppap.reports.masks import (
    check_free,
    colours_by_id,
    find_images,
    ignored_id,
    is_unfinished,
    unfinished,
    write_legend,
)
from ppap.reports.records import RANDOM_WARNING
from ppap.runs.checkpoint import weights_checksum
from ppap.runs.lock import alone
from ppap.stopping import each

_SHOWN = 20  # files in one message


@dataclass(frozen=True, kw_only=True)
class PredictArguments:
    """Options of ``ppap predict``."""

    checkpoint: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="RUN_OR_CHECKPOINT")]
    """Run directory or checkpoint folder."""
    images: Annotated[
        tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="IMAGE [IMAGE ...]"), required()
    ]
    """Image files, or folders of images."""
    out: str
    """Folder for NAME.png (class ids), NAME_overlay.jpg, legend.png and legend.json."""
    probe: Literal["cluster", "linear"] = "cluster"
    """cluster = found without labels; linear = trained with labels."""
    resolution: int = 320
    """Shorter side that the network sees [pixels]; masks have the size of the image."""
    max_tokens: int = MAX_TOKENS
    """Most patches per image; memory grows with their square."""
    max_pixels: int | None = None
    """Images of more pixels are refused by their headers, before they are decoded [pixels]; None =
    --data.max-pixels of the run, by default 200 million."""
    overwrite: bool = False
    """Replace files that are in the folder already."""
    skip_existing: bool = False
    """Go on with a folder that is done in part: images whose mask is there are left out."""
    device: str = "auto"
    """auto = cuda if there is one, else cpu; or a torch device such as cuda:1."""


def main(argv: Sequence[str]) -> None:
    """Command ``predict``; images that cannot be read are listed at the end, with the exit code of data."""
    arguments = parse(PredictArguments, argv, command="predict", description=__doc__)
    if arguments.resolution < 1:
        raise UsageError(f"--resolution is {arguments.resolution}; give at least 1 pixel")
    if arguments.max_pixels is not None and arguments.max_pixels < 1:
        raise UsageError(f"--max-pixels is {arguments.max_pixels}; give at least 1 pixel")
    files = find_images(arguments.images)
    out = Path(arguments.out)
    record = _record_of(arguments)
    going_on = arguments.skip_existing or (not arguments.overwrite and is_unfinished(out, record))
    if going_on:
        done = {stem for stem in files if (out / f"{stem}.png").exists()}
        files = {stem: path for stem, path in files.items() if stem not in done}
        print(f"{len(done)} masks are there already, {len(files)} to go")
    check_free(out, files, arguments.overwrite, going_on)
    predictor = load(arguments.checkpoint, arguments.device, max_pixels=arguments.max_pixels)
    set_max_pixels(predictor.max_pixels)
    print(f"backbone: {predictor.origin}")
    names = predictor.names(arguments.probe)
    colours = class_colours(predictor.engine.config.data.kind, len(names), predictor.ids(arguments.probe))
    bad = _check(files, predictor, arguments)
    good = {stem: path for stem, path in files.items() if path not in bad}
    if files and not good:
        raise DataError(_listed(bad))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot make {out} ({error.strerror or error}); give another --out") from None
    with alone(out, f"--out {out}"):
        # another process may have come first
        check_free(out, good, arguments.overwrite, going_on)
        write_legend(out, names, colours, predictor, arguments.probe, arguments.overwrite)
        with unfinished(out, record):
            bad |= _write_masks(out, good, predictor, arguments, colours)
    count = len([path for path in files.values() if path not in bad])
    masks = "1 mask" if count == 1 else f"{count} masks"
    print(f"{masks} in {out}: NAME.png holds ids, legend.json and legend.png their names")
    if predictor.engine.net.backbone.is_random:
        print(RANDOM_WARNING)
    if bad:
        raise DataError(_listed(bad))


def _record_of(arguments: PredictArguments) -> dict[str, Any]:
    """What masks follow from: a command with the same record goes on with what it left unfinished."""
    weights = weights_checksum(arguments.checkpoint)
    return {"weights": weights, "probe": arguments.probe, "resolution": arguments.resolution}


def _write_masks(
    out: Path,
    good: dict[str, Path],
    predictor: Predictor,
    arguments: PredictArguments,
    colours: np.ndarray,
) -> dict[Path, str]:
    """Masks and overlays of all images; the files whose pixels cannot be decoded, and why."""
    ids, bad = predictor.ids(arguments.probe), {}
    by_id = colours_by_id(ids, colours)
    for stem, path in each(tqdm(good.items(), unit="image", disable=None)):
        try:
            image = read_image(path, predictor.reading)
        except DataError as error:  # pixels that the look at the file did not decode
            bad[path] = str(error)
            continue
        labels = predictor.predict(
            image, probe=arguments.probe, resolution=arguments.resolution, max_tokens=arguments.max_tokens
        )
        target = out / stem
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            # The mask comes last: where it is there, the image is done.
            save_whole(overlay(image, labels, colours=by_id), f"{target}_overlay.jpg", quality=92)
            save_index_png(labels, f"{target}.png", by_id, ignored_id(ids))
        except OSError as error:
            reason = error.strerror or error
            raise DataError(
                f"cannot write {target}.png ({reason}); make room and give the same command again"
            ) from None
    return bad


def _check(files: dict[str, Path], predictor: Predictor, arguments: PredictArguments) -> dict[Path, str]:
    """File -> what is wrong with it, of those that cannot be read; all are looked at before the first mask.

    Raises:
        UsageError: an image has more patches than the limit.
    """
    bad = {}
    for path in each(files.values()):
        try:
            width, height = verify_image(path, predictor.reading)
            predictor.seen_size(width, height, arguments.resolution, arguments.max_tokens)
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from None
        except DataError as error:
            bad[path] = str(error)
    return bad


def _listed(bad: dict[Path, str]) -> str:
    if len(bad) == 1:
        return next(iter(bad.values()))
    shown = list(bad.values())[:_SHOWN]
    more = [f"... and {len(bad) - _SHOWN} more"] if len(bad) > _SHOWN else []
    return "\n  ".join([f"{len(bad)} images have no mask:", *shown, *more])


if __name__ == "__main__":
    sys.exit(run(main))
