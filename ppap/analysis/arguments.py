"""What the analyses share on the command line: their options, presets, and the folder for their results."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from ppap.cli import first_positional, parse, required
from ppap.errors import DataError, UsageError
from ppap.settings.config import Config, DataConfig, LossConfig, ModelConfig
from ppap.settings.presets import describe, preset
from ppap.settings.protocol import with_protocol

Out = Annotated[str, required()]
"""Type of the option that names the folder for results."""


@dataclass(frozen=True, kw_only=True)
class AnalysisArguments:
    """Options of an analysis of features; data, model and loss default to those of the preset."""

    preset: Annotated[str, tyro.conf.Fixed, tyro.conf.Suppress] = "demo"
    """Name of the preset these settings started from."""
    out: Out = ""
    """New folder for the results."""
    images: int
    """Training images whose patches are compared."""
    anchors: int
    """Patches, drawn at random, that are looked at."""
    device: str = "auto"
    """auto = cuda if there is one, else cpu; or a torch device such as cuda:1."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)

    def __post_init__(self) -> None:
        for name in ("images", "anchors"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} is {getattr(self, name)}; give at least 1")

    def config(self, seed: int) -> Config:
        """The preset's settings with those of the command line."""
        start = preset(self.preset)
        train = replace(start.train, seed=seed, device=self.device)
        return replace(start, data=self.data, model=self.model, loss=self.loss, train=train)


def check_seed(name: str, seed: int) -> None:
    """Refuse an impossible seed with a ValueError that names the option."""
    if not 0 <= seed < 2**63:
        raise ValueError(f"--{name} is {seed}; give 0 to 2^63 - 1")


def check_seeds(seeds: Sequence[int]) -> None:
    """Refuse no, repeated or impossible ``--seeds`` with a ValueError."""
    for seed in seeds:
        check_seed("seeds", seed)
    if not seeds or len(set(seeds)) != len(seeds):
        raise ValueError(f"--seeds {' '.join(map(str, seeds))}: give different numbers, at least one")


def parse_with_preset(
    argv: Sequence[str],
    kind: type,
    name: str,
    text: str,
    *,
    adjust: Callable[[Config], Config] = lambda config: config,
    **defaults: Any,
) -> Any:
    """Options of an analysis whose settings default to those of the preset that `argv` may begin with.

    Args:
        argv: arguments after the analysis's name.
        kind: dataclass of the options; its fields that :class:`~ppap.settings.config.Config` has too take
            the preset's values.
        name: of the analysis, for the usage line.
        text: for ``--help``.
        adjust: applied to the preset's config before its values become defaults.
        **defaults: values of further fields, or functions (preset's config) -> value.
    """
    named = first_positional(argv)
    start = adjust(preset(named or "demo"))
    if "protocol" in {f.name for f in fields(kind)}:
        # Read ahead of the other options: they win over what the protocol sets.
        ahead = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        ahead.add_argument("--protocol")
        if ahead.parse_known_args(list(argv))[0].protocol == "paper":
            start = with_protocol(start, "paper")
    shared = {f.name for f in fields(kind)} & {f.name for f in fields(Config)}
    values = {field_name: getattr(start, field_name) for field_name in shared}
    values |= {key: value(start) if callable(value) else value for key, value in defaults.items()}
    return parse(
        kind,
        argv[1:] if named else argv,
        command=f"analyze {name} [PRESET]",
        description=f"{text}\n\nPresets (default: demo):\n{describe()}",
        default=kind(**values),
    )


def run_config(arguments: Config) -> Config:
    """The settings of a run among the options of an analysis, which are a subclass."""
    return Config(**{f.name: getattr(arguments, f.name) for f in fields(Config)})


def new_folder(path: str) -> Path:
    """The folder `path`, which may not hold anything yet; it is not made.

    Raises:
        UsageError: not given, or taken.
    """
    if not path:
        raise UsageError("--out is not given; name a new folder")
    out = Path(path)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"--out {out} exists already; give a new folder")
    return out


def make_folder(out: Path) -> None:
    """Make a folder for results.

    Raises:
        DataError: the disk refuses.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot make {out} ({error.strerror or error}); give another --out") from None
