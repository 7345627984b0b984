"""Write segmentation masks of images; in Python: ppap.load(path).predict(image)."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tqdm import tqdm

from ppap.cli import parse, required, run
from ppap.data import class_colours
from ppap.data.images import read_image, verify_image
from ppap.errors import UsageError
from ppap.evaluation.predictor import MAX_TOKENS, load
from ppap.pictures.drawing import overlay, save_index_png
from ppap.reports.masks import check_free, colours_by_id, find_images, ignored_id, write_legend
from ppap.reports.records import RANDOM_WARNING


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
    overwrite: bool = False
    """Replace files that are in the folder already."""
    device: str = "auto"
    """auto = cuda if there is one, else cpu; or a torch device such as cuda:1."""


def main(argv: Sequence[str]) -> None:
    """Command ``predict``."""
    arguments = parse(PredictArguments, argv, command="predict", description=__doc__)
    if arguments.resolution < 1:
        raise UsageError(f"--resolution is {arguments.resolution}; give at least 1 pixel")
    files = find_images(arguments.images)
    out = Path(arguments.out)
    check_free(out, files, arguments.overwrite)
    predictor = load(arguments.checkpoint, arguments.device)
    print(f"backbone: {predictor.origin}")
    names = predictor.names(arguments.probe)
    ids = predictor.ids(arguments.probe)
    colours = class_colours(predictor.engine.config.data.kind, len(names), ids)
    by_id = colours_by_id(ids, colours)
    for path in files.values():
        width, height = verify_image(path, predictor.reading)
        try:
            predictor.seen_size(width, height, arguments.resolution, arguments.max_tokens)
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from None
    write_legend(out, names, colours, predictor, arguments.probe, arguments.overwrite)
    for stem, path in tqdm(files.items(), unit="image", disable=None):
        image = read_image(path, predictor.reading)
        labels = predictor.predict(
            image, probe=arguments.probe, resolution=arguments.resolution, max_tokens=arguments.max_tokens
        )
        target = out / stem
        target.parent.mkdir(parents=True, exist_ok=True)
        save_index_png(labels, f"{target}.png", by_id, ignored_id(ids))
        overlay(image, labels, colours=by_id).save(f"{target}_overlay.jpg", quality=92)
    masks = "1 mask" if len(files) == 1 else f"{len(files)} masks"
    print(f"{masks} in {out}: NAME.png holds ids, legend.json and legend.png their names")
    if predictor.engine.net.backbone.is_random:
        print(RANDOM_WARNING)


if __name__ == "__main__":
    sys.exit(run(main))
