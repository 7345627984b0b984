"""Settings of a pretraining run and its presets, in the manner of ``ppap.settings.config``."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import tyro

from ppap.errors import unknown_name
from ppap.settings.checks import check_field, check_rate
from ppap.settings.config import Amp, ModelConfig
from ppap.settings.distillation import DistillConfig


def _positive(config: Any, section: str, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        ok = math.isfinite(value) and value > 0
        check_field(ok, f"{section}.{name.replace('_', '-')}", value, "give a positive number")


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """Unlabelled images."""

    kind: Literal["scenes", "folder"] = "folder"
    """scenes = generated on the fly; folder = images under --data.root."""
    root: str | None = None
    """Folder of images, at any depth; of images/{train,val} only train is learned from, and labels never."""
    resolution: int = 256
    """Images are resized to this shorter side [pixels]; crops are taken from a random square of it, or, with
    objective distill, from --distill.squares fixed ones."""
    difficulty: Literal["easy", "hard", "both"] = "both"
    """Of generated scenes; both = in turn."""
    seed: int = 0
    """Of generated scenes; they never occur in training or validation, whatever the seeds."""
    scenes: int = 0
    """Number of generated scenes, cropped anew every time; each loader keeps those it has made in memory
    (48 KiB for 128 pixels). 0 = a new scene for every draw, which takes longer than a training step."""
    max_pixels: int = 200_000_000
    """Images of more pixels are refused by their headers, before they are decoded [pixels]."""
    workers: int | None = None
    """Loader processes; 0 = load in the main process, None = one for each core, at most 8."""

    def __post_init__(self) -> None:
        check_field(self.max_pixels >= 1, "data.max-pixels", self.max_pixels, "give at least 1 pixel")
        check_field(self.resolution >= 16, "data.resolution", self.resolution, "give at least 16 pixels")
        check_field(self.scenes >= 0, "data.scenes", self.scenes, "give 0 or more")
        check_field((self.workers or 0) >= 0, "data.workers", self.workers, "give 0 or more, or None")


@dataclass(frozen=True, kw_only=True)
class ViewsConfig:
    """Crops of an image: two global ones, seen by teacher and student, and small ones for the student; of
    objective distill one global crop, for the student."""

    global_size: int = 96
    """Side of a global crop [pixels]."""
    global_scale: tuple[float, float] = (0.25, 1.0)
    """Its share of the image's area."""
    local_size: int = 48
    """Side of a local crop [pixels]."""
    local_scale: tuple[float, float] = (0.05, 0.25)
    """Its share of the image's area."""
    locals: int = 2
    """Local crops per image."""
    jitter: float = 0.4
    """Strength of the changes of brightness, contrast and saturation."""
    hue: float = 0.15
    """Largest rotation of the hue, as a fraction of the circle."""
    grey: float = 0.2
    """Share of crops without colour."""
    flatten: float = 0.0
    """Share of crops that lose slow changes of brightness and colour, so that textures and edges must tell
    what a patch shows."""
    mask_odds: float = 0.5
    """Share of the student's global crops that lose patches."""
    mask_share: tuple[float, float] = (0.1, 0.5)
    """Share of patches that such a crop loses."""

    def __post_init__(self) -> None:
        for name in ("global_size", "local_size"):
            value = getattr(self, name)
            check_field(value >= 8, f"views.{name.replace('_', '-')}", value, "give at least 8 pixels")
        for name in ("global_scale", "local_scale", "mask_share"):
            low, high = getattr(self, name)
            remedy = "give two fractions, the smaller one first"
            check_field(0 < low <= high <= 1, f"views.{name.replace('_', '-')}", (low, high), remedy)
        check_field(self.locals >= 0, "views.locals", self.locals, "give 0 or more")
        for name in ("jitter", "hue", "grey", "flatten", "mask_odds"):
            check_field(0 <= getattr(self, name) <= 1, f"views.{name}", getattr(self, name), "give 0 to 1")


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """What is learned. But for the first one, options of --objective self."""

    kind: Annotated[Literal["self", "distill"], tyro.conf.arg(aliases=["--objective"])] = "self"
    """self = the student learns from a moving average of itself; distill = the patch features of a trained
    network, --teacher, which may be larger, of another patch and resolution."""
    image_weight: float = 1.0
    """Of the class token's assignment in another crop (DINO, arXiv 2104.14294)."""
    mask_weight: float = 1.0
    """Of the assignments of masked patches in the same crop (iBOT, arXiv 2111.07832)."""
    dense_weight: float = 1.0
    """Of the assignments of patches at the same place of the image in another crop."""
    vicreg_weight: float = 0.0
    """Of embeddings that agree between crops, patch by patch, and are spread and independent over the batch
    (VICReg, arXiv 2105.04906)."""
    vicreg_agreement: float = 5.0
    """Weight of agreement and spread there; independence of the channels has 1."""
    embedding: int = 64
    """Channels of those embeddings; fewer keep only what is most alike in different crops."""
    prototypes: int = 256
    """Outputs of both heads."""
    hidden: int = 256
    """Channels of the heads' hidden layers."""
    bottleneck: int = 64
    """Channels that are compared with the prototypes."""
    student_temperature: float = 0.1
    """Of the student's softmax."""
    teacher_temperature: float = 0.05
    """Of the teacher's assignments (sharpening)."""
    momentum: tuple[float, float] = (0.99, 0.999)
    """Of the teacher's moving average of the student, at the first and at the last step."""

    def __post_init__(self) -> None:
        weights = (self.image_weight, self.mask_weight, self.dense_weight, self.vicreg_weight)
        ok = all(math.isfinite(w) and w >= 0 for w in weights) and sum(weights) > 0
        check_field(ok, "objective weights", weights, "give 0 or more, and at least one above 0")
        _positive(self, "objective", "prototypes", "hidden", "bottleneck", "embedding", "vicreg_agreement")
        _positive(self, "objective", "student_temperature", "teacher_temperature")
        ok = all(0 <= m <= 1 for m in self.momentum)
        check_field(ok, "objective.momentum", self.momentum, "give two numbers from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class PretrainOptimConfig:
    """AdamW with a linear warm-up and a cosine decay to a hundredth."""

    lr: float = 1e-3
    """Largest learning rate."""
    weight_decay: float = 0.04
    """Of matrices; biases, norms and position embeddings have none."""
    warmup: float = 0.05
    """Share of the steps with a rising rate."""
    clip_norm: float = 3.0
    """Largest L2 norm of the gradient."""
    amp: Amp = "auto"
    """Mixed precision of the forward pass: auto = fp16 with loss scaling on CUDA, off on CPUs."""

    def __post_init__(self) -> None:
        check_rate("optim.lr", self.lr)
        check_rate("optim.weight-decay", self.weight_decay, zero=True)
        _positive(self, "optim", "clip_norm")
        check_field(0 <= self.warmup < 1, "optim.warmup", self.warmup, "give 0 <= share < 1")


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    """The pretraining loop."""

    batch_size: int = 32
    """Images per step."""
    steps: int = 10000
    """Number of steps; the schedules span them."""
    log_every: int = 20
    """Steps between lines of metrics.jsonl."""
    save_every: int = 200
    """Steps between saves of the state and of the backbone; 0 = only when stopped and at the end."""
    picture_every: int = 500
    """Steps between pictures of the features; 0 = only at the end."""
    whiten: float = 0.0
    """Exponent by which the first patch kernel evens out the variances of its inputs: 0 = drawn at random,
    0.5 = whitened. Brightness alone has most of the variance, so training sees textures much later without.
    """
    seed: int = 0
    """Seed of initial weights, order, crops and masks."""
    device: str = "auto"
    """auto = cuda if there is one, else cpu; or a torch device such as cuda:1."""
    out: str | None = None
    """Run directory; None = runs/PRESET-DATE-TIME. An existing run is continued with --resume RUN, never
    overwritten."""

    def __post_init__(self) -> None:
        _positive(self, "train", "batch_size", "steps", "log_every")
        check_field(0 <= self.whiten <= 0.5, "train.whiten", self.whiten, "give 0 to 0.5")
        for name in ("save_every", "picture_every"):
            value = getattr(self, name)
            check_field(value >= 0, f"train.{name.replace('_', '-')}", value, "give 0 or more")


def small_vit() -> ModelConfig:
    """A ViT for CPUs: patch 8, 128 channels, 6 blocks, 1.2 million weights."""
    return ModelConfig(
        backbone="vit_tiny_patch16_224",
        weights="random",
        patch_size=8,
        width=128,
        depth=6,
        heads=4,
        image_size=64,
    )


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """All settings of a pretraining run."""

    preset: Annotated[str, tyro.conf.Fixed, tyro.conf.Suppress] = "folder"
    """Name of the preset these settings started from."""
    data: SourceConfig = field(default_factory=SourceConfig)
    model: ModelConfig = field(default_factory=small_vit)
    """Architecture; --model.weights other than random starts from trained weights."""
    views: ViewsConfig = field(default_factory=ViewsConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    optim: PretrainOptimConfig = field(default_factory=PretrainOptimConfig)
    train: LoopConfig = field(default_factory=LoopConfig)


def scenes() -> PretrainConfig:
    """Generated scenes and a small ViT for CPUs: the recipe of the weights that come with the package."""
    return PretrainConfig(
        preset="scenes",
        data=SourceConfig(kind="scenes", resolution=128, scenes=6144, difficulty="easy", workers=1),
        views=ViewsConfig(
            global_size=64,
            global_scale=(0.2, 0.7),
            locals=0,
            jitter=0.5,
            hue=0.5,
            grey=0.3,
            flatten=0.6,
            mask_odds=0,
        ),
        # A short run: a slower teacher would still hold weights of its beginning at the end.
        objective=_vicreg(),
        optim=PretrainOptimConfig(lr=2e-3),
        train=LoopConfig(batch_size=16, steps=4000, whiten=0.5),
    )


def _vicreg() -> ObjectiveConfig:
    return ObjectiveConfig(
        image_weight=0, mask_weight=0, dense_weight=0, vicreg_weight=1, embedding=128, momentum=(0.98, 0.998)
    )


def folder() -> PretrainConfig:
    """A folder of images and a small ViT for CPUs."""
    return PretrainConfig(
        preset="folder",
        data=SourceConfig(kind="folder", resolution=256, workers=1),
        views=ViewsConfig(
            global_size=96, global_scale=(0.1, 0.6), locals=0, jitter=0.5, hue=0.1, flatten=0.2, mask_odds=0
        ),
        objective=_vicreg(),
        optim=PretrainOptimConfig(lr=2e-3),
        train=LoopConfig(batch_size=8, steps=6000, whiten=0.5),
    )


def folder_gpu() -> PretrainConfig:
    """A folder of images and a ViT of width 192 and depth 12, patch 8; meant for one GPU."""
    model = ModelConfig(
        backbone="vit_tiny_patch16_224",
        weights="random",
        patch_size=8,
        width=192,
        depth=12,
        heads=3,
        image_size=96,
    )
    return PretrainConfig(preset="folder-gpu", model=model, train=LoopConfig(batch_size=64))


def distilled(config: PretrainConfig) -> PretrainConfig:
    """A preset's settings where the objective is distill: larger crops, one of each image, milder colours."""
    scenes, gpu = config.data.kind == "scenes", config.preset == "folder-gpu"
    patches_of_16 = replace(small_vit(), patch_size=16, width=192, heads=3, image_size=160)
    views = ViewsConfig(
        global_size=96 if scenes else 160,
        global_scale=(0.3, 1.0),
        locals=0,
        jitter=0.3,
        hue=0.05,
        grey=0.1,
        mask_odds=0,
    )
    steps = config.train.steps if gpu else 3000  # an hour on two cores
    return replace(
        config,
        data=replace(config.data, resolution=128, scenes=2048)
        if scenes
        else replace(config.data, resolution=224),
        model=config.model if scenes or gpu else patches_of_16,
        views=views,
        objective=replace(config.objective, kind="distill"),
        optim=replace(config.optim, lr=2e-3),
        train=replace(config.train, batch_size=64 if gpu else 16, steps=steps, whiten=0.5),
    )


PRESETS: dict[str, Callable[[], PretrainConfig]] = {
    "scenes": scenes,
    "folder": folder,
    "folder-gpu": folder_gpu,
}


def preset(name: str) -> PretrainConfig:
    """The config called `name`.

    Raises:
        UsageError: there is none; the message names the nearest.
    """
    if name not in PRESETS:
        raise unknown_name("preset", name, PRESETS)
    return PRESETS[name]()
