"""Settings of the data; part of ``ppap.settings.config.Config``."""

import re
from dataclasses import dataclass
from typing import Literal

from ppap.settings.checks import check_field

DataKind = Literal[
    "scenes", "folder", "cocostuff27", "cocostuff15", "cocostuff3", "cityscapes27", "potsdam3", "imagenet_s"
]


_ONLY_FOLDER = "leave it out, or give --data.kind folder: the other kinds read their files their own way"


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Images and labels."""

    kind: DataKind = "folder"
    """scenes = generated on the fly, folder = images (and labels, if any) under --data.root; the others are
    public benchmarks under --data.root (docs/datasets.md has their files)."""
    root: str | None = None
    """Folder with images/{train,val} and, optionally, labels/{train,val}; another layout of docs/files.md;
    any folder of unlabelled images; or the folder of the benchmark."""
    images: str | None = None
    """Pattern of the images below --data.root, such as 'photos/{split}/*.jpg': * = part of a name, **/ = any
    folders, {split} = train and val (kind folder); None = a layout of docs/files.md is recognised."""
    labels: str | None = None
    """Pattern of the labels, with --data.images: what its stars stand for is the name of the image."""
    classes: int | None = None
    """Number of classes, and of clusters. None = the ids in the labels that are not ignored, 27 where there
    are no labels. Benchmarks know their own; imagenet_s: 919, 300 or 50 says which one, if the folder does
    not."""
    crop: Literal["five", "none"] = "five"
    """Training images of cocostuff* and cityscapes27: five = the crops that ppap prepare makes (published),
    none = whole images."""
    crop_ratio: float = 0.5
    """Side of a crop as a share of the image's; names the folder of crops."""
    crop_root: str | None = None
    """Folder that holds cropped/, if ppap prepare was given another --out; None = --data.root."""
    coco_list: Literal["auto", "full", "7", "few6"] = "auto"
    """Which list of COCO training images: full = 97,702 (what the published code reads), 7 = 49,629 (what
    papers quote), few6 = COCO-Stuff-3's own; auto = full, 7, few6 for cocostuff27, 15, 3. Validation takes
    list 7, cocostuff3 its few6 if training does."""
    imagenet_s_train: Literal["train", "train-semi"] = "train"
    """Training images of imagenet_s: train = all, without labels, train-semi = ten labelled ones a class."""
    partial: bool = False
    """Accept a benchmark of which images are missing; scores are then not comparable with published ones."""
    ignore_ids: tuple[int, ...] = (255,)
    """Label ids that are left out: of the classes, of losses and of metrics."""
    label_ids: tuple[int, ...] = ()
    """Label ids of the classes, one each, such as 0 80 160; empty = chosen by what the labels hold, and said.
    -1 = a class, and so a cluster, without an id (kind folder)."""
    label_colours: tuple[str, ...] = ()
    """Colours of the ids 0, 1, ... in labels by colour, each as #rrggbb; empty = from a legend file beside
    them, or from their palettes where those differ; else labels hold ids (kind folder)."""
    bands: tuple[int, ...] = ()
    """Bands taken for red, green and blue, counted from 1, or one for grey (kind folder); empty = the first
    three, of up to four."""
    value_range: tuple[float, ...] = ()
    """Lowest and highest value of images with more than 8 bits, which become black and white (kind folder);
    empty = 0 and 65535, or where most of that is not used, by percentiles, which are said."""
    exif: Literal["apply", "ignore"] = "apply"
    """EXIF rotation of images: apply = labels are drawn on the upright picture, ignore = on the stored pixels
    (kind folder)."""
    class_names: tuple[str, ...] = ()
    """Names of the classes in the order of their ids; empty = class 0, class 1, ..."""
    resolution: int = 224
    """Side of the square training crop [pixels]: shorter side resized to it, then cropped in the centre."""
    eval_resolution: int = 320
    """Side of the square validation crop [pixels]."""
    interpolation: Literal["nearest", "bilinear"] = "nearest"
    """Resizing of images (labels: always nearest). The published code uses nearest for both."""
    max_pixels: int = 200_000_000
    """Images and labels of more pixels are refused by their headers, before they are decoded [pixels]."""
    workers: int | None = None
    """Loader processes; 0 = load in the main process, None = one for each core, at most 8."""
    cache_features: bool = False
    """Compute the frozen tokens of all images once; train and validate from disk, equal within rounding."""
    cache_limit_gib: float | None = None
    """Features of a split that would fill more [GiB on disk] are computed anew in every pass; None = all are
    kept."""
    cache_dtype: Literal["fp16", "bf16"] = "fp16"
    """Type of the cached tokens."""
    cache_dir: str | None = None
    """Folder of the cache; None = PPAP_CACHE_DIR, or ~/.cache/ppap."""
    scenes_train: int = 512
    """Generated training scenes (kind scenes)."""
    scenes_val: int = 64
    """Generated validation scenes (kind scenes)."""
    scenes_size: int = 128
    """Side of a generated scene [pixels] (kind scenes)."""
    scenes_seed: int = 0
    """Seed of the generated scenes; training and validation never share a scene."""
    scenes_difficulty: Literal["easy", "hard"] = "easy"
    """hard = more objects and occlusion, stronger changes of scale, wider palettes, fog, dusk and rain."""

    def __post_init__(self) -> None:
        check_field(
            self.classes is None or 1 <= self.classes <= 1000, "data.classes", self.classes, "give 1 to 1000"
        )
        check_field(
            0 < self.crop_ratio < 1, "data.crop-ratio", self.crop_ratio, "give a share between 0 and 1"
        )
        self._check_kind()
        self._check_files()
        for name in ("resolution", "eval_resolution", "scenes_size"):
            value = getattr(self, name)
            check_field(value >= 16, f"data.{name.replace('_', '-')}", value, "give at least 16 pixels")
        for name in ("scenes_train", "scenes_val"):
            value = getattr(self, name)
            check_field(value >= 1, f"data.{name.replace('_', '-')}", value, "give at least 1")
        check_field(self.max_pixels >= 1, "data.max-pixels", self.max_pixels, "give at least 1 pixel")
        check_field((self.workers or 0) >= 0, "data.workers", self.workers, "give 0 or more, or None")
        limit = self.cache_limit_gib
        check_field(limit is None or limit > 0, "data.cache-limit-gib", limit, "give more than 0")

    def _check_kind(self) -> None:
        """Refuse what only folders of one's own have, beside a kind that reads its files its own way."""
        for name in ("images", "labels", "label_ids", "label_colours", "bands", "value_range"):
            value = getattr(self, name)
            option = f"data.{name.replace('_', '-')}"
            check_field(self.kind == "folder" or not value, option, value, _ONLY_FOLDER)
        check_field(self.kind == "folder" or self.exif == "apply", "data.exif", self.exif, _ONLY_FOLDER)

    def _check_files(self) -> None:
        """Refuse impossible ids, names, colours, bands and ranges."""
        check_field(
            all(0 <= i <= 255 for i in self.ignore_ids),
            "data.ignore-ids",
            self.ignore_ids,
            "give ids from 0 to 255",
        )
        check_field(
            all(-1 <= i < 1000 for i in self.label_ids)
            and len({*self.label_ids} - {-1}) == len([i for i in self.label_ids if i >= 0]),
            "data.label-ids",
            self.label_ids,
            "give different ids from 0 to 999, -1 for a class without one",
        )
        check_field(
            not self.label_ids or self.classes in (None, len(self.label_ids)),
            "data.classes",
            self.classes,
            f"the ids of the labels, by --data.label-ids or by the training, are {len(self.label_ids)}; "
            "leave it out",
        )
        check_field(
            not self.class_names or not self.label_ids or len(self.label_ids) == len(self.class_names),
            "data.class-names",
            self.class_names,
            f"give one name for each of the {len(self.label_ids)} --data.label-ids, or none",
        )
        check_field(
            not self.class_names or self.classes in (None, len(self.class_names)),
            "data.class-names",
            self.class_names,
            f"give one name for each of the {self.classes} classes, or none",
        )
        check_field(
            all(re.fullmatch("#[0-9a-fA-F]{6}", c) for c in self.label_colours)
            and len({*self.label_colours}) == len(self.label_colours) <= 256,
            "data.label-colours",
            self.label_colours,
            "give different colours as #rrggbb, at most 256",
        )
        check_field(
            len(self.bands) in (0, 1, 3) and all(band >= 1 for band in self.bands),
            "data.bands",
            self.bands,
            "give three numbers from 1, or one for grey",
        )
        check_field(
            self.value_range == ()
            or (len(self.value_range) == 2 and self.value_range[0] < self.value_range[1]),
            "data.value-range",
            self.value_range,
            "give the lowest and the highest value",
        )
