"""What ``ppap prepare`` is asked for, and which part of the preparation does it."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ppap.data import build_dataset, build_datasets
from ppap.data.base import SPLITS
from ppap.data.cocostuff import TRAIN_LISTS
from ppap.data.crops import folder_name
from ppap.data.loading import processes
from ppap.data.pairs import WORDS, data_root
from ppap.errors import UsageError
from ppap.preparation.crops import CropSettings, make_crops
from ppap.preparation.potsdam import cut_tiles, find_tiles, has_raw_tiles
from ppap.preparation.verify import class_table, decode_all
from ppap.settings.config import DataConfig
from ppap.settings.presets import PRESETS

Prepared = Literal["cocostuff27", "cocostuff15", "cocostuff3", "cityscapes27", "potsdam3", "imagenet_s"]


@dataclass(frozen=True, kw_only=True)
class PrepareArguments:
    """Options of ``ppap prepare``."""

    dataset: tyro.conf.Positional[Prepared]
    """Which data set."""
    root: Annotated[str, tyro.conf.arg(metavar="DIR")]
    """Folder of the data set."""
    out: str | None = None
    """Where results go; None = --root. Raw Potsdam tiles need a new folder."""
    check: bool = False
    """Make nothing: decode every image and label, and print how often each class occurs."""
    ratio: float = 0.5
    """Side of a crop as a share of the image's."""
    quality: int = 75
    """JPEG quality of the crops (published: 75)."""
    lossless: bool = False
    """Write the crops as PNG, without loss, instead of JPEG."""
    coco_list: Literal["auto", "full", "7", "few6"] = "auto"
    """COCO training images, as --data.coco-list: auto = full (97,702), 7, few6 for cocostuff27, 15, 3."""
    classes: int | None = None
    """Categories of imagenet_s (919, 300 or 50), if the folder does not say."""
    lists: str | None = None
    """Folder with labelled_train.txt and labelled_test.txt for raw Potsdam tiles, in this command's numbers:
    225 * tile + 15 * row + column."""
    seed: int = 0
    """Seed of the split of raw Potsdam tiles."""
    workers: int | None = None
    """Processes that make crops; 0 = this one, None = one for each core, at most 8."""
    partial: bool = False
    """Accept a data set of which images are missing."""


def prepare(arguments: PrepareArguments) -> None:
    """Check a data set, or make of it what is asked for.

    Raises:
        UsageError, DataError: see the parts. Their messages name options as training does.
        ValueError: an impossible option.
    """
    config = DataConfig(
        kind=arguments.dataset,
        root=arguments.root,
        crop="none",
        crop_ratio=arguments.ratio,
        coco_list=arguments.coco_list,
        classes=arguments.classes,
        partial=arguments.partial,
    )
    raw = arguments.dataset == "potsdam3" and _is_raw(data_root(config))
    if raw and arguments.check:
        tiles = find_tiles(data_root(config), arguments.partial)
        print(f"{len(tiles.images)} image tiles, {len(tiles.labels)} label tiles: ready to be cut")
    elif raw:
        print(_cut(arguments, data_root(config)))
    elif arguments.check or arguments.dataset in ("potsdam3", "imagenet_s"):
        _check(config, arguments)
    else:
        _crop(config, arguments)


def _is_raw(root: Path) -> bool:
    prepared = any((base / "imgs").is_dir() for base in (root, root / "potsdam"))
    return not prepared and has_raw_tiles(root)


def _cut(arguments: PrepareArguments, root: Path) -> str:
    if arguments.out is None:
        raise UsageError("--out is not given; name a new folder for the blocks of the raw tiles")
    tiles = find_tiles(root, arguments.partial)
    lists = None if arguments.lists is None else Path(arguments.lists).expanduser()
    return cut_tiles(tiles, Path(arguments.out).expanduser(), arguments.seed, lists)


def _crop(config: DataConfig, arguments: PrepareArguments) -> None:
    quality = None if arguments.lossless else arguments.quality
    settings = CropSettings(arguments.ratio, quality, processes(arguments.workers))
    source = "sorted by name"
    if config.kind in TRAIN_LISTS:
        which = TRAIN_LISTS[config.kind] if config.coco_list == "auto" else config.coco_list
        # Crops always hold the 27 classes; 15 and 3 are taken from them.
        config, source = replace(config, kind="cocostuff27", coco_list=which), f"list {which}"
    dataset = build_dataset(config, "train")
    out = Path(arguments.out or arguments.root).expanduser()
    print(f"{len(dataset):,} training images ({source}): {5 * len(dataset):,} crops", flush=True)
    folder = make_crops(dataset, out, _crop_name(config), source, settings)
    print(f"written: {folder}")
    print(f"train with: {_train_command(arguments)}")


def _train_command(arguments: PrepareArguments) -> str:
    """The first preset of the data set, with the options that these crops need."""
    kind = arguments.dataset
    named = [name for name, make in PRESETS.items() if make().data.kind == kind]
    words = ["ppap train", *(named[:1] or ["cocostuff27-vits8", f"--data.kind {kind}"])]
    words.append(f"--data.root {arguments.root}")
    words += [f"--data.crop-root {arguments.out}"] if arguments.out else []
    words += [f"--data.crop-ratio {arguments.ratio}"] if arguments.ratio != DataConfig().crop_ratio else []
    return " ".join(words + (["--data.partial"] if arguments.partial else []))


def _crop_name(config: DataConfig) -> str:
    return "cocostuff27" if config.kind in TRAIN_LISTS else "cityscapes"


def _check(config: DataConfig, arguments: PrepareArguments) -> None:
    datasets = build_datasets(config)
    print(datasets.description)
    if not arguments.check:
        print(f"nothing has to be made; ppap prepare {arguments.dataset} --check decodes every file")
        return
    named = {WORDS[split]: getattr(datasets, split) for split in SPLITS}
    out = Path(arguments.out or arguments.root).expanduser()
    if (out / "cropped" / folder_name(_crop_name(config), config.crop_ratio)).is_dir():
        named["crops"] = build_dataset(replace(config, crop="five", crop_root=str(out)), "train")
    counts = {word: decode_all(dataset, f"{word} files") for word, dataset in named.items()}
    print(class_table(datasets.val.class_names, counts))
    print("every file decodes")
