"""Write segmentation masks of images; in Python: ppap.load(path).predict(image)."""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ppap.cli import parse, required, run
from ppap.data import class_colours, images
from ppap.data.images import SUFFIXES, read_image, verify_image
from ppap.data.transforms import Geometry, normalise, resized_size
from ppap.errors import DataError, UsageError
from ppap.evaluation.metrics import apply_assignment
from ppap.methods.engine import Engine, for_inference, load_engine, pick_device
from ppap.pictures.drawing import IGNORED_INDEX, IGNORED_INDEX_16, legend, overlay, save_index_png
from ppap.reports.records import RANDOM_WARNING
from ppap.runs.checkpoint import load_checkpoint
from ppap.settings.config import from_dict

# A ViT attends between all pairs of tokens: memory grows with their square.
MAX_TOKENS = 16_384


class Predictor:
    """A trained network that labels images of any size.

    Attributes:
        classes: names of the ids that :meth:`predict` returns, in order.
        origin: where the backbone's weights came from.
    """

    def __init__(
        self,
        engine: Engine,
        class_names: Sequence[str],
        assignment: Sequence[int | None] | None,
        labelled: bool = True,
    ) -> None:
        """Args: the network, names of the classes, class of each cluster (None = never matched), and whether
        the linear probe has seen labels.
        """
        self.engine = engine
        self.labelled = labelled
        self.assignment = assignment
        self.origin = engine.net.backbone.origin
        self.class_names = tuple(class_names)

    def names(self, probe: str = "cluster") -> tuple[str, ...]:
        """Names of the ids of a probe: class names, or cluster 0, 1, ... where clusters have no class."""
        if probe == "linear" or self.assignment is not None:
            return self.class_names
        return tuple(f"cluster {k}" for k in range(len(self.engine.cluster.clusters)))

    @torch.no_grad()
    def predict(
        self,
        image: Image.Image,
        *,
        probe: Literal["cluster", "linear"] = "cluster",
        resolution: int = 320,
        max_tokens: int = MAX_TOKENS,
    ) -> Tensor:
        """Label map of an image.

        Args:
            image: PIL image of any size and mode.
            probe: ``cluster``, trained without labels (ids are classes where the checkpoint knows the
                matching), or ``linear``.
            resolution: shorter side that the network sees [pixels].
            max_tokens: most patches per image.

        Returns:
            (H, W) int64 ids on the CPU, at the size of the image.

        Raises:
            UsageError: an unknown probe, or more patches than `max_tokens`.
        """
        if probe not in ("cluster", "linear"):
            raise UsageError(f"probe is {probe!r}; valid: 'cluster', 'linear'")
        if probe == "linear" and not self.labelled:
            raise UsageError(
                "probe is 'linear', which this run could not train without labels; use 'cluster'"
            )
        image = image.convert("RGB")
        width, height = self.seen_size(image.width, image.height, resolution, max_tokens)
        pixels = Geometry(resolution, self.engine.config.data.interpolation).whole(image)
        code = self.engine.code(normalise(pixels)[None].to(self.engine.device))
        labels = self._labels(code, probe, (height, width), (image.height, image.width)).cpu()
        return apply_assignment(labels, self.assignment) if probe == "cluster" and self.assignment else labels

    def seen_size(self, width: int, height: int, resolution: int, max_tokens: int) -> tuple[int, int]:
        """(width, height) [pixels] at which the network sees an image.

        Raises:
            UsageError: more than `max_tokens` patches.
        """
        seen = resized_size(width, height, resolution)
        patch = self.engine.net.backbone.patch_size
        tokens = -(-seen[0] // patch) * -(-seen[1] // patch)
        if tokens > max_tokens:
            raise UsageError(
                f"an image of {width} x {height} pixels gives {tokens} patches of {patch} pixels at "
                f"--resolution {resolution}, the limit is {max_tokens} (--max-tokens); lower --resolution"
            )
        return seen

    def _labels(self, code: Tensor, probe: str, seen: tuple[int, int], size: tuple[int, int]) -> Tensor:
        """Ids with the largest score at each pixel; one class at a time, which bounds the memory."""
        engine, patch = self.engine, self.engine.net.backbone.patch_size
        if probe == "linear":
            scores = engine.linear.logits(code)
        else:
            centres = F.normalize(engine.cluster.clusters.float(), dim=1)
            scores = F.conv2d(code, centres[:, :, None, None])
        full = (code.shape[2] * patch, code.shape[3] * patch)
        best = torch.full(size, -torch.inf, device=code.device)
        labels = torch.zeros(size, dtype=torch.int64, device=code.device)
        for k in range(scores.shape[1]):
            at_seen = F.interpolate(scores[:, k : k + 1], size=full, mode="bilinear", align_corners=False)
            at_seen = at_seen[:, :, : seen[0], : seen[1]]
            score = F.interpolate(at_seen, size=size, mode="bilinear", align_corners=False)[0, 0]
            labels[score > best] = k
            best = torch.maximum(best, score)
        return labels


def load(path: str | Path, device: str = "auto") -> Predictor:
    """A trained network, ready to predict.

    Args:
        path: run directory or checkpoint folder.
        device: ``auto`` or a torch device name.

    Raises:
        DataError: no such checkpoint, or a damaged one.
        UsageError: the device is not here.

    Example:
        >>> labels = ppap.load("runs/mine").predict(Image.open("photo.jpg"))
    """
    checkpoint = load_checkpoint(path)
    chosen = pick_device(device)
    config = for_inference(from_dict(checkpoint.info["config"]), chosen)
    engine = load_engine(checkpoint, chosen, config)
    info = checkpoint.info
    return Predictor(engine, info["class_names"], info["assignment"], info["labelled"])


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
    _check_free(out, files, arguments.overwrite)
    predictor = load(arguments.checkpoint, arguments.device)
    print(f"backbone: {predictor.origin}")
    names = predictor.names(arguments.probe)
    colours = class_colours(predictor.engine.config.data.kind, len(names))
    for path in files.values():
        width, height = verify_image(path)
        try:
            predictor.seen_size(width, height, arguments.resolution, arguments.max_tokens)
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from None
    _write_legend(out, names, colours, predictor, arguments)
    for stem, path in tqdm(files.items(), unit="image", disable=None):
        image = read_image(path)
        labels = predictor.predict(
            image, probe=arguments.probe, resolution=arguments.resolution, max_tokens=arguments.max_tokens
        )
        target = out / stem
        target.parent.mkdir(parents=True, exist_ok=True)
        save_index_png(labels, f"{target}.png", colours)
        overlay(image, labels, colours=colours).save(f"{target}_overlay.jpg", quality=92)
    masks = "1 mask" if len(files) == 1 else f"{len(files)} masks"
    print(f"{masks} in {out}: NAME.png holds ids, legend.json and legend.png their names")
    if predictor.engine.net.backbone.is_random:
        print(RANDOM_WARNING)


def find_images(paths: Sequence[str]) -> dict[str, Path]:
    """Stem in the output folder -> file, of image files and folders of images.

    Raises:
        UsageError: no paths.
        DataError: a path is missing, a folder has no images, or two files would give the same mask.
    """
    files: dict[str, Path] = {}
    if not paths:
        raise UsageError("no images are given; name image files or folders after the checkpoint")
    for given in map(Path, paths):
        if not given.exists():
            raise DataError(f"there is no image or folder {given}; check the path")
        found = _found_in(given)
        if not found:
            raise DataError(
                f"{given} has no images ({', '.join(sorted(SUFFIXES))}); give files or a folder of images"
            )
        for stem, path in found:
            if stem == "legend":
                raise DataError(f"the mask of {path} would be named like the legend; rename the image")
            if stem in files and not path.samefile(files[stem]):
                raise DataError(
                    f"{files[stem]} and {path} would both become {stem}.png; predict them separately"
                )
            files[stem] = path
    return files


def _found_in(given: Path) -> list[tuple[str, Path]]:
    """(stem in the output folder, file) of one file, or of all images below a folder."""
    if not given.is_dir():
        return [(given.stem, given)]
    return [(name, path) for name, paths in images.find_images(given).items() for path in paths]


def _check_free(out: Path, files: dict[str, Path], overwrite: bool) -> None:
    if out.exists() and not out.is_dir():
        raise UsageError(f"--out {out} is a file; give a folder")
    targets = [out / f"{stem}{end}" for stem in files for end in (".png", "_overlay.jpg")]
    inputs = {path.resolve() for path in files.values()}
    clash = [path for path in targets if path.resolve() in inputs]
    if clash:
        raise UsageError(f"{clash[0]} is one of the images; give another --out")
    taken = [path for path in targets if path.exists()]
    if taken and not overwrite:
        raise UsageError(
            f"{taken[0]} exists already ({len(taken)} files); give another --out, or --overwrite"
        )


def _write_legend(
    out: Path, names: Sequence[str], colours: np.ndarray, predictor: Predictor, arguments: PredictArguments
) -> None:
    """Write the legend, unless that would give other names to the masks that are in the folder already."""
    record = {
        "probe": arguments.probe,
        "backbone": predictor.origin,
        "warning": RANDOM_WARNING if predictor.engine.net.backbone.is_random else None,
        "ignored_id": IGNORED_INDEX if len(names) <= 256 else IGNORED_INDEX_16,
        "classes": [
            {"id": i, "name": name, "rgb": [int(v) for v in colours[i]]} for i, name in enumerate(names)
        ],
    }
    text, path = json.dumps(record, indent=2) + "\n", out / "legend.json"
    if not arguments.overwrite:
        if path.exists() and path.read_text() != text:
            raise UsageError(
                f"{path} names the ids of other masks in that folder; give another --out, or --overwrite"
            )
        if (out / "legend.png").exists() and not path.exists():
            raise UsageError(f"{out / 'legend.png'} exists already; give another --out, or --overwrite")
    try:
        out.mkdir(parents=True, exist_ok=True)
        legend(names, colours).save(out / "legend.png")
        path.write_text(text)
    except OSError as error:
        raise DataError(f"cannot write to {out} ({error.strerror or error}); give another --out") from None


if __name__ == "__main__":
    sys.exit(run(main))
