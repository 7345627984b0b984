"""Every setting of a run: nested frozen dataclasses, the only source of defaults.

The command line is generated from these classes (``ppap.cli``), named runs are built from them
(``ppap.settings.presets``), and a run directory stores them as ``config.json``. Impossible values are refused
on construction.
"""

import dataclasses
import difflib
import hashlib
import json
import math
import types
import typing
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro

from ppap.errors import UsageError
from ppap.settings.checks import check_field, check_rate, parse_condition
from ppap.settings.data import DataConfig as DataConfig  # parts of Config, imported from here
from ppap.settings.evaluation import CompareConfig as CompareConfig
from ppap.settings.evaluation import EvalConfig as EvalConfig
from ppap.settings.evaluation import NeighboursConfig as NeighboursConfig
from ppap.settings.methods import HPConfig as HPConfig
from ppap.settings.methods import Method
from ppap.settings.methods import StegoConfig as StegoConfig
from ppap.settings.plain import misfit


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Backbone and the two streams (ViT of timm; protocol: DINO ViT-S or ViT-B)."""

    backbone: str = "auto"
    """timm architecture, such as vit_small_patch16_224; auto = what --model.weights names or holds."""
    weights: str = "vit_small_patch16_224.dino"
    """timm pretrained name (vit_small_patch16_dinov3.lvd1689m), repository of the Hugging Face hub
    (facebook/dinov2-small), .pth or .safetensors file, directory, or one of the words embedded (a small ViT
    pretrained on generated scenes, in the package) and random; docs/backbones.md lists the families. A
    name is downloaded the first time; with --offline, as with HF_HUB_OFFLINE=1, the hub's cache alone
    serves."""
    weights_key: str | None = None
    """Which backbone of a file that holds several: its section or prefix, such as teacher or student; None =
    the only one, or else the teacher."""
    patch_size: int | None = None
    """Patch side [pixels]; None = the architecture's own."""
    width: int | None = None
    """Channels D of a token; None = the architecture's own."""
    depth: int | None = None
    """Number of blocks; None = the architecture's own."""
    heads: int | None = None
    """Attention heads; None = the architecture's own."""
    image_size: int | None = None
    """Image side of the position embedding [pixels]; None = the architecture's own."""
    pos_interp: Literal["dino", "timm"] = "dino"
    """Resizing of the position embedding: dino = the original's rule (scale offset 0.1), timm =
    antialiased.
    """
    guidance_dropout: float = 0.1
    """Share of guidance channels dropped per training image (published: 0.1; the paper mentions none)."""
    condition: str = "none"
    """What is done to the frozen features before they are compared to form sets, by one map fitted to the
    training images without labels; what is trained keeps the backbone's own features. none = as they are
    (published); centre = minus their mean; whiten:P = component of variance v divided by v^(P/2), 0 < P <= 1;
    clip:S = components with more than the share S of the variance are reduced to it, the mean to half of
    the spread; drop:K = without the K leading components; position = without the directions that a patch's
    row and column can be read from; auto = clip:S with S = 1 / (4 K) for K clusters, printed beside others
    with figures that need no labels."""

    def __post_init__(self) -> None:
        if self.condition != "auto":
            parse_condition(self.condition)
        for name in ("patch_size", "width", "depth", "heads", "image_size"):
            value = getattr(self, name)
            check_field(
                value is None or value >= 1, f"model.{name.replace('_', '-')}", value, "give at least 1"
            )
        check_field(
            0 <= self.guidance_dropout < 1, "model.guidance-dropout", self.guidance_dropout, "give 0 <= p < 1"
        )


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """PPAP's propagation (paper Eq. 1-7) and contrastive loss (Eq. 8)."""

    phi0: float | Literal["auto"] = 0.55
    """Initial threshold of the positives [cosine]; auto = such that the sets of the first patches have the
    size --loss.positives asks for."""
    psi0: float | Literal["auto"] = 0.15
    """Initial threshold below which patches are negatives [cosine]; auto = such that 89 % of the patches that
    are no positives are negatives, as in the paper."""
    positives: float = 0.4
    """Size of a positive set that phi0 auto aims for [average clusters = patches / clusters]; the paper's own
    settings end between 0.15 and 1."""
    steps: int = 2
    """Propagation steps T."""
    sigma_pos: float = 3.0
    """Divides the proxy's movement before it lowers phi (Eq. 3)."""
    sigma_amb: float = 4.0
    """Divides the proxy's movement before it raises psi (Eq. 5)."""
    temperature: float = 0.8
    """Temperature tau of the softmax."""
    base_temperature: float | None = 0.07
    """The loss is multiplied by temperature / base_temperature (published code); None = by 1 (Eq. 8)."""
    chunk: int = 784
    """Anchors are drawn and averaged per chunk of this many consecutive patches."""
    anchor_divisor: int = 4
    """One patch in this many is an anchor (published: 4 for patch 16, 16 for patch 8)."""
    precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """Products of the loss; auto = the autocast type, else that of the inputs."""
    memory_budget_mib: int = 512
    """Limit of all temporaries of the loss [MiB]; method hp keeps to it too."""

    def __post_init__(self) -> None:
        for name in ("sigma_pos", "sigma_amb", "temperature", "base_temperature"):
            value = getattr(self, name)
            ok = (value is None and name == "base_temperature") or (value > 0 and math.isfinite(value))
            check_field(ok, f"loss.{name.replace('_', '-')}", value, "give a finite positive number")
        for name in ("phi0", "psi0"):
            value = getattr(self, name)
            ok = value == "auto" or (not isinstance(value, str) and math.isfinite(value))
            check_field(ok, f"loss.{name}", value, "give a finite cosine, or auto")
        check_field(
            0 < self.positives <= 100, "loss.positives", self.positives, "give a number of average clusters"
        )
        check_field(self.steps >= 0, "loss.steps", self.steps, "give 0 or more")
        for name in ("chunk", "anchor_divisor", "memory_budget_mib"):
            value = getattr(self, name)
            check_field(value >= 1, f"loss.{name.replace('_', '-')}", value, "give at least 1")


Amp = Literal["auto", "off", "fp16", "bf16"]
"""Mixed precision of the forward pass."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Optimisers of the network and of the two probes (protocol: no schedule, no warm-up)."""

    name: Literal["adam", "adamw"] = "adamw"
    """Optimiser of the trainable block and the projection."""
    lr: float | Literal["auto"] = 1e-3
    """Learning rate of what is trained. auto = 3e-4 where the backbone's blocks have a layer scale (DINOv2,
    DINOv3), else 1e-3; for the heads of hp and stego 5e-4."""
    projection_lr: float | None = None
    """Learning rate of PPAP's projection; None = --optim.lr (published), as always for that of hp."""
    weight_decay: float = 0.01
    """Weight decay of the trainable block and the projection (adamw: decoupled)."""
    clip_norm: float | None = 10.0
    """Largest L2 norm of the network's gradient; the probes are not clipped. None = no clipping."""
    linear_lr: float = 1e-3
    """Learning rate of the linear probe (Adam)."""
    cluster_lr: float = 1e-3
    """Learning rate of the cluster probe (Adam)."""
    amp: Amp = "auto"
    """Mixed precision of the forward pass: auto = fp16 with loss scaling on CUDA, off on CPUs; on those with
    AVX512-BF16 or AMX bf16 is faster."""

    def __post_init__(self) -> None:
        for name in ("lr", "projection_lr", "linear_lr", "cluster_lr"):
            value = getattr(self, name)
            if not (name == "lr" and value == "auto") and not (name == "projection_lr" and value is None):
                check_rate(f"optim.{name.replace('_', '-')}", value)
        check_rate("optim.weight-decay", self.weight_decay, zero=True)
        check_field(
            self.clip_norm is None or (self.clip_norm > 0 and math.isfinite(self.clip_norm)),
            "optim.clip-norm",
            self.clip_norm,
            "give a positive number",
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The training loop."""

    batch_size: int = 64
    """Images per step."""
    selection: Literal["last", "best"] = "last"
    """Checkpoint that the report, eval, predict and load take: last = the last step, decided beforehand; best
    = the largest sum of the four scores on the labelled validation images, as published. Both are
    written."""
    extra_clusters: int = 0
    """Centres of the cluster probe beyond one per class; --eval.unmatched says what their pixels count."""
    epochs: int = 5
    """Passes over the training images, though no fewer steps than --train.least-steps; --train.steps, when
    given, decides instead."""
    least_steps: int = 0
    """Steps at least, whatever --train.epochs says, for folders of few images."""
    steps: int | None = None
    """Number of steps; None = epochs."""
    val_every: int = 100
    """Steps between validations; 0 = only at the end."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl."""
    save_every: int = 100
    """Steps between saves of checkpoints/last; 0 = only when stopped and at the end."""
    keep: int = 0
    """Saves of which a folder checkpoints/step-NUMBER stays beside last and best, the newest ones; 0 = none.
    Give one of them to ppap eval, ppap predict, ppap.load or --resume."""
    seed: int = 0
    """Seed of initial weights, sample order, anchors and dropout."""
    device: str = "auto"
    """auto = cuda if there is one, else cpu; or a torch device such as cuda:1."""
    exchange: Literal["auto", "gather", "ring"] = "auto"
    """How the ranks of torchrun see each other's patches: gather = all on every rank; ring = a block at a
    time passes by, and no rank's memory grows with their number; auto = gather while what is gathered fits
    into --loss.memory-budget-mib. Without torchrun it means nothing."""
    log: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Where metrics and pictures go beside the run's own files: tensorboard = RUN/tensorboard; wandb =
    Weights & Biases. Both are packages to install."""
    out: str | None = None
    """Run directory; None = runs/PRESET-DATE-TIME. An existing run is continued with --resume RUN, never
    overwritten."""

    def __post_init__(self) -> None:
        check_field(self.batch_size >= 1, "train.batch-size", self.batch_size, "give at least 1")
        check_field(self.epochs >= 1, "train.epochs", self.epochs, "give at least 1")
        check_field(0 <= self.seed < 2**63, "train.seed", self.seed, "give 0 to 2^63 - 1")
        check_field(self.steps is None or self.steps >= 1, "train.steps", self.steps, "give at least 1")
        check_field(self.log_every >= 1, "train.log-every", self.log_every, "give at least 1")
        for name in ("least_steps", "val_every", "save_every", "keep", "extra_clusters"):
            value = getattr(self, name)
            check_field(value >= 0, f"train.{name.replace('_', '-')}", value, "give 0 or more")


@dataclass(frozen=True, kw_only=True)
class Config:
    """All settings of a run."""

    preset: Annotated[str, tyro.conf.Fixed, tyro.conf.Suppress] = "folder"
    """Name of the preset these settings started from."""
    protocol: Literal["code", "paper"] = "code"
    """Where the paper and its published code differ: code = the preset as it stands, paper = as the paper
    says it (ppap.settings.protocol has the list). Any other option given beside it wins."""
    method: Method = "ppap"
    """What is trained. ppap = Progressive Proxy Anchor Propagation; frozen = nothing but the probes, on the
    backbone's features; fixed, tps, ans = PPAP without propagation, with trustworthy positives alone, with
    ambiguous patches excluded alone (Table 5); random = a control, PPAP with the sets of random patches;
    oracle = a yardstick that reads the training labels: the loss with the sets of true classes; hp = Hidden
    Positives; stego = STEGO. With hp or stego, the defaults of --optim and --train are those that the method
    published for the preset's data, where it did; hp caches no features.
    """
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    hp: HPConfig = field(default_factory=HPConfig)
    stego: StegoConfig = field(default_factory=StegoConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    compare: CompareConfig = field(default_factory=CompareConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def of_seed(config: Config, seed: int) -> Config:
    """Settings of one of several runs; no folder's name is among them, so that a set of runs may be moved.

    Raises:
        UsageError: an impossible seed.
    """
    try:
        return dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed, out=None))
    except ValueError as error:
        raise UsageError(f"--seeds: {error}") from None


def to_dict(config: Any) -> dict[str, Any]:
    """A config as plain containers, ready for JSON (tuples become lists)."""
    plain: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return plain


def from_dict(values: dict[str, Any], kind: type = Config, where: str = "config") -> Any:
    """Rebuild a config from :func:`to_dict`; unknown keys are refused with the nearest valid name.

    Raises:
        UsageError: an unknown key or an impossible value.
    """
    if not isinstance(values, dict):
        raise UsageError(f"{where} is no object with fields, but {type(values).__name__}")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    hints = typing.get_type_hints(kind)
    built = {}
    for key, value in values.items():
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; valid: {', '.join(fields)}"
            raise UsageError(f"{where} has no field {key!r}{hint}")
        if dataclasses.is_dataclass(hints[key]):
            built[key] = from_dict(value, hints[key], f"{where}.{key}")
        else:
            built[key] = tuple(value) if _is_tuple(hints[key]) and isinstance(value, list) else value
    if wrong := misfit(
        values, {key: hint for key, hint in hints.items() if not dataclasses.is_dataclass(hint)}
    ):
        raise UsageError(f"{where}.{wrong}")
    try:
        return kind(**built)
    except (ValueError, TypeError, OverflowError) as error:
        raise UsageError(f"{where}: {error}") from None


def _is_tuple(hint: Any) -> bool:
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return any(typing.get_origin(option) is tuple for option in options)


_LATER = {
    "data": ("images", "labels", "label_ids", "label_colours", "bands", "value_range", "exif", "max_pixels"),
    "eval": ("extra_clusters",),
    "train": ("exchange", "keep", "log"),
}
"""Settings that came after runs were hashed; unless they are given, a run has the hash that it had."""


def config_hash(config: Any) -> str:
    """First 12 hex digits of the sha256 of the config's canonical JSON, but for the run's folder.

    The same run written to another folder (``train.out``) has the same hash.
    """
    return _hash_of(to_dict(config))


def hashes_of(values: dict[str, Any]) -> set[str]:
    """The hashes that :func:`config_hash` gives, or once gave, to the settings that a file holds.

    Those that are later now were like all others while they were new.
    """
    return {_hash_of(values), _hash_of(values, later={})}


def _hash_of(values: dict[str, Any], later: dict[str, tuple[str, ...]] = _LATER) -> str:
    values = json.loads(json.dumps(values))
    # Of a damaged file a section may be anything.
    parts = {name: part for name, part in values.items() if isinstance(part, dict)}
    parts.get("train", {}).pop("out", None)
    if parts.get("data", {}).get("workers", 0) is None:
        parts["data"]["workers"] = 2  # what the default was when runs were first hashed
    for section, names in later.items():
        default = to_dict(getattr(Config(), section))
        part = parts.get(section, {})
        for name in names:
            if name in part and part[name] == default[name]:
                del part[name]
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]
