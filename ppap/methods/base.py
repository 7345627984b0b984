"""What a training method is: its network, its loss on a batch, its optimisers, and the data it asks for.

The engine does the rest for every method alike: probes, autocast, loss scaling, clipping, checkpoints. The
table of methods is in ``ppap.methods.table``; CONTRIBUTING.md says how to add one.

Legend: B images, h w patch grid, D channels of the backbone, E of the code.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ppap.data import EpochSampler, train_loader
from ppap.data.loading import stream
from ppap.kernels import PropagationConfig
from ppap.nets.backbone import Backbone
from ppap.nets.feature_cache import frozen_of
from ppap.nets.model import FrozenTokens, Network
from ppap.parallel import gather, in_step, share, shares, world
from ppap.settings.config import Config, OptimConfig

# Orders of the training images that are not those of any epoch start here.
_FAR = 2**62


class ShareSampler(EpochSampler):
    """Of every batch the indices that are this rank's, in the order that one process has."""

    def __iter__(self) -> Iterator[list[int]]:
        return (batch[share(self.batch_size)] for batch in super().__iter__())


class Outcome(NamedTuple):
    """What a method makes of a batch."""

    code: Tensor
    """(B, E, h, w): what the probes read, detached there."""
    loss: Tensor
    """The method's own loss, a scalar; the probes' losses are added to it."""
    log: dict[str, Tensor]
    """Scalars for metrics.jsonl. Names with "loss" in them get a curve each in the report."""


@dataclass(frozen=True)
class TrainingData:
    """The training images as a method may ask for them."""

    dataset: Dataset[dict[str, Any]]
    """Images, or their cached features."""
    config: Config
    device: torch.device
    should_stop: Callable[[], bool] = lambda: False
    """Asked between the batches of long work ahead of a step; True ends that step with InterruptedError."""

    @property
    def steps_per_epoch(self) -> int:
        """Batches of an epoch; the incomplete last one is dropped."""
        return len(self.dataset) // self.config.train.batch_size

    @property
    def total_steps(self) -> int:
        """Steps of the run."""
        train = self.config.train
        return train.steps or max(train.epochs * self.steps_per_epoch, train.least_steps)

    def own_loader(self, start_step: int) -> DataLoader:
        """The run's batches from a step on, of each the images that are this rank's."""
        return self.loader(start_step, sampler=ShareSampler) if world().several else self.loader(start_step)

    def loader(self, start_step: int = 0, **options: Any) -> DataLoader:
        """The run's batches from a step on; the options are those of :func:`ppap.data.train_loader`."""
        train = self.config.train
        return train_loader(
            self.dataset,
            train.batch_size,
            train.seed,
            self.config.data.workers,
            start_step=start_step,
            pin_memory=self.device.type == "cuda",
            **options,
        )

    def shuffled(self, number: int) -> Iterator[dict[str, Tensor]]:
        """Batches without end in an order of their own, a pure function of the run's seed and `number`."""
        train, workers = self.config.train, self.config.data.workers
        # An order has room for 2^20 passes before it meets the next one.
        epoch = _FAR + number * 2**20
        loader = train_loader(self.dataset, train.batch_size, train.seed, workers, epoch)
        return (batch for _, _, batch in stream(loader))


class Method:
    """Base of all methods: the frozen backbone, of which only the probes learn."""

    propagation: PropagationConfig | None = None
    """Settings of the propagation, for pictures of its sets; None = the method has none."""
    shared = True
    """Whether each rank takes some images of a batch, and the method's loss is over those of all ranks. False
    = every rank takes whole batches: frozen features alone are shared out, and all the rest is done by
    each."""
    needs_labels = False
    """Whether training reads the labels of the training images, beyond those of the linear probe."""

    def __init__(self, config: Config, backbone: Backbone) -> None:
        """Build the network, on the CPU; its initial weights follow torch's global generator.

        Args:
            config: all settings of the run.
            backbone: frozen network with its weights.
        """
        self.config = config
        self.net = Network(backbone)
        self.data: TrainingData | None = None

    @classmethod
    def check(cls, config: Config) -> None:
        """Refuse settings that this method cannot train with, before any work.

        Raises:
            UsageError: with the remedy.
        """

    def optimisers(self, optim: OptimConfig) -> dict[str, torch.optim.Optimizer]:
        """Name -> optimiser of what the method trains. The gradient of ``net`` is clipped, others are not."""
        return {}

    def start(self, data: TrainingData, start_step: int) -> DataLoader:
        """The batches that :meth:`step` is given, from `start_step` on; called once before training.

        A batch is a dict as :func:`ppap.data.train_loader` gives it; a method may add to it.
        """
        self.data = data
        return data.own_loader(start_step) if self.shared else data.loader(start_step)

    def before_step(self, step: int) -> None:
        """Called before each step, in training mode, under autocast and without gradient.

        Raises:
            InterruptedError: ``data.should_stop`` asked for it; network and random generators are as before.
        """

    def held(self, step: int) -> Iterable[Tensor]:
        """What a step changes beside the weights of the optimisers: averages, queues, pools.

        It is put back where the step's numbers are not finite.
        """
        return ()

    def step(self, batch: dict[str, Tensor], step: int) -> Outcome:
        """Code and loss of a batch, in training mode under the run's autocast.

        Random draws follow torch's global generators, whose state a checkpoint holds, or are a pure function
        of seed and `step`: so a resumed run is the same run.

        Args:
            batch: on the CPU or the device; see :meth:`start` and :meth:`tokens`.
            step: number of the training step, from 0.
        """
        code = self.net.code_of(self.tokens(batch))
        return Outcome(code, code.new_zeros(()), {})

    def describe(self, patches: int) -> str:
        """What a step of `patches` patches takes, in words for the first lines of a run."""
        return "only the probes learn"

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.net.parameters()).device

    def tokens(self, batch: dict[str, Tensor], prefix: str = "") -> FrozenTokens:
        """Frozen tokens of a batch of images, or of cached tokens.

        Args:
            batch: its keys ``image``, or ``before`` and ``guidance``, are read.
            prefix: in front of these keys.
        """
        if f"{prefix}before" in batch:
            return frozen_of(batch, self.device, prefix)
        images = batch[f"{prefix}image"]
        if self.shared or not in_step():
            return self.net.frozen(images.to(self.device, non_blocking=True))
        counts = [part.stop - part.start for part in shares(len(images))]
        own = self.net.frozen(images[share(len(images))].to(self.device, non_blocking=True))
        return FrozenTokens(gather(own.before, counts), gather(own.guidance, counts), own.grid)


def net_optimiser(
    parameters: list[nn.Parameter], optim: OptimConfig, projection: nn.Module | None = None
) -> torch.optim.Optimizer:
    """The optimiser that ``--optim`` describes, of all parameters, those of ``projection`` among them.

    With ``--optim.projection-lr`` those are a group of their own.
    """
    kind = torch.optim.AdamW if optim.name == "adamw" else torch.optim.Adam
    groups: list[dict[str, Any]] = [{"params": parameters}]
    if projection is not None and optim.projection_lr is not None:
        own = {id(p) for p in projection.parameters()}
        groups = [
            {"params": [p for p in parameters if id(p) not in own]},
            {"params": [p for p in parameters if id(p) in own], "lr": optim.projection_lr},
        ]
    return kind(groups, lr=optim.lr, weight_decay=optim.weight_decay)
