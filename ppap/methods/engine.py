"""A method, its probes and optimisers as one unit: a training step, and the state that resuming needs."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ppap import parallel
from ppap.errors import DataError, NumberError, UsageError
from ppap.kernels import MemoryBudgetError, NonFiniteError
from ppap.methods.base import Method, TrainingData
from ppap.methods.choices import Choices, autos
from ppap.methods.finite import Gate, Held, gradient_norm
from ppap.methods.sharing import add_up, parts_of_means
from ppap.methods.table import method_of
from ppap.nets.backbone import Backbone, backbone_from_spec, build_backbone
from ppap.nets.conditioning import Condition
from ppap.nets.probes import ClusterProbe, LinearProbe
from ppap.runs.checkpoint import Checkpoint
from ppap.runs.randomness import random_state, set_random_state
from ppap.settings.config import Config, from_dict

# Loss scaling of the published code.
_INITIAL_SCALE, _GROWTH_INTERVAL = 2048.0, 1000


def pick_device(name: str) -> torch.device:
    """``auto`` = CUDA where there is one, else the CPU; or any torch device name.

    Raises:
        UsageError: an unknown device, or one that is not here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if parallel.world().several and name.startswith("cuda:"):
        raise UsageError(f"device {name!r} would serve every rank; give auto: each rank takes its own GPU")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError(f"{device.type} is no device that ppap computes on")
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"device {name!r} cannot be used ({reason}); give auto, cpu or cuda:N") from None
    return device


def amp_type(choice: str, device: torch.device) -> torch.dtype | None:
    """Autocast type of the forward pass; None = no autocast.

    Raises:
        UsageError: fp16 on a CPU, whose 16-bit products are far slower than fp32.
    """
    if choice == "off" or (choice == "auto" and device.type != "cuda"):
        return None
    if choice == "fp16" and device.type == "cpu":
        raise UsageError("--optim.amp fp16 is for GPUs; on a CPU give bf16 or off")
    return torch.bfloat16 if choice == "bf16" else torch.float16


def for_inference(config: Config, device: torch.device) -> Config:
    """`config` with a precision that `device` can evaluate in: on a CPU fp16 becomes fp32."""
    if config.optim.amp == "fp16" and device.type == "cpu":
        print("precision: trained with fp16 autocast, evaluated in fp32 on this CPU")
        return replace(config, optim=replace(config.optim, amp="off"))
    return config


class Engine(nn.Module):
    """What is trained. Build it with :func:`build_engine`, or from a checkpoint with :func:`load_engine`."""

    def __init__(
        self, method: Method, classes: int, device: torch.device, choices: Choices | None = None
    ) -> None:
        """Probes' initial weights follow torch's global generator; everything is moved to `device`.

        Args:
            method: its config holds no auto.
            classes: classes of the data, and clusters.
            device: where it computes.
            choices: what stands in its config in place of auto.
        """
        super().__init__()
        self.config = config = method.config
        self.choices = choices or Choices()
        self.device = device
        self.classes = classes
        self.method = method
        self.net = method.net.to(device)
        self.amp = amp_type(config.optim.amp, device)
        self.gate = Gate(device)
        self.skipped = torch.zeros((), dtype=torch.bool, device=device)
        """Whether the last training step was skipped: see ``ppap.methods.finite``."""
        self.refusal: str | None = None
        """What the kernels said of that step's numbers, where they refused them."""
        self.optimisers = {n: self.gate.prepare(o) for n, o in method.optimisers(config.optim).items()}
        self.renew_probes()
        scaled = self.amp == torch.float16
        self.scaler = torch.amp.GradScaler(
            device.type, init_scale=_INITIAL_SCALE, growth_interval=_GROWTH_INTERVAL, enabled=scaled
        )

    def renew_probes(self, width: int | None = None) -> None:
        """Draw both probes from torch's global generator, with fresh optimisers.

        Args:
            width: channels that they read; None = those of the method's code.
        """
        width, optim = width or self.net.code_width, self.config.optim
        self.linear = LinearProbe(width, self.classes).to(self.device)
        clusters = self.classes + self.config.train.extra_clusters
        self.cluster = ClusterProbe(width, clusters).to(self.device)
        for name, probe, lr in (
            ("linear", self.linear, optim.linear_lr),
            ("cluster", self.cluster, optim.cluster_lr),
        ):
            self.optimisers[name] = self.gate.prepare(torch.optim.Adam(probe.parameters(), lr=lr))

    @property
    def probes(self) -> tuple[ClusterProbe, LinearProbe]:
        """Cluster and linear probe, in the order evaluation takes them."""
        return self.cluster, self.linear

    def start(
        self,
        dataset: Dataset[dict[str, Any]],
        start_step: int = 0,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> DataLoader:
        """Show the method its training images; the batches that :meth:`train_step` is given from then on.

        Args:
            dataset: images, or their cached features.
            start_step: the first step, 0 but for a resumed run.
            should_stop: asked during what takes long ahead of a step, see :meth:`train_step`.

        Raises:
            UsageError, DataError: the images do not serve this method.
        """
        return self.method.start(TrainingData(dataset, self.config, self.device, should_stop), start_step)

    def train_step(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """One step on a batch, as :meth:`start` gave it, of images (B, 3, H, W) and labels (B, H, W).

        A step with a loss, a value or a gradient that is not finite changes no weight, moment, average or
        pool; ``self.skipped`` says so, on the device, and the caller counts it (``ppap.methods.finite``).

        Returns:
            Detached scalars: loss (the sum), contrast_loss (the method's own), linear_loss, cluster_loss,
            what the method logs, and grad_norm (0 where no network is trained). Where the kernels refused
            numbers that are not finite, the losses alone, as NaN.

        Raises:
            NumberError: several ranks share the step, and the kernels refuse the numbers of some (on CPUs).
            InterruptedError: `should_stop` of :meth:`start`; nothing has changed, and the step is to do.
        """
        label = batch["label"].to(self.device, non_blocking=True)
        if not (self.training and self.net.training):  # visiting every module takes milliseconds
            self.train()
        held = Held(self.method.held(step))
        whole_batch = parallel.step_of(self.config.train.batch_size)
        with torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None), whole_batch:
            try:
                with torch.no_grad():
                    self.method.before_step(step)
                out = self.method.step(batch, step)
            except NonFiniteError as error:
                # Other ranks may wait for this one in the middle of the step.
                if parallel.in_step() and not error.everywhere:
                    raise NumberError(
                        f"step {step + 1}: {error}; lower --optim.lr or check images and weights"
                    ) from None
                return self._refused(held, str(error))
            except MemoryBudgetError as error:
                raise UsageError(f"{error}; raise --loss.memory-budget-mib") from None
            linear = self.linear.loss(out.code, label, self.net.backbone.patch_size)
            cluster = self.cluster.loss(out.code)
            if shared := self.method.shared and parallel.in_step():
                linear, cluster = parts_of_means(
                    linear, cluster, label, self.classes, self.config.train.batch_size
                )
            loss = out.loss + linear + cluster
        for optimiser in self.optimisers.values():
            optimiser.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        if shared:
            linear, cluster, loss = add_up(self.optimisers, linear, cluster, out.loss)
        result = {
            "loss": loss,
            "contrast_loss": out.loss,
            "linear_loss": linear,
            "cluster_loss": cluster,
            **out.log,
        }
        result = {name: value.detach() for name, value in result.items()}
        norms = {name: self._norm(name, loss) for name in self.optimisers}
        self.refusal = None
        self.skipped = self.gate.step(result, self.optimisers, norms, self.scaler)
        held.restore(self.skipped)
        return {**result, "grad_norm": norms.get("net", torch.zeros_like(loss))}

    def _refused(self, held: Held, why: str) -> dict[str, Tensor]:
        """The outcome of a step that the kernels refused to take."""
        self.refusal = why
        bad = torch.full((), float("nan"), device=self.device)
        self.skipped = self.gate.judge([bad], [bad], None)
        held.restore(self.skipped)
        return {name: bad for name in ("loss", "contrast_loss", "linear_loss", "cluster_loss", "grad_norm")}

    def _norm(self, name: str, loss: Tensor) -> Tensor:
        """Unscale the gradient of an optimiser, and clip that of the network; its norm before."""
        optimiser = self.optimisers[name]
        self.scaler.unscale_(optimiser)
        if name != "net":
            return gradient_norm(optimiser, loss).detach()
        parameters = [p for group in optimiser.param_groups for p in group["params"]]
        limit = self.config.optim.clip_norm
        return nn.utils.clip_grad_norm_(parameters, float("inf") if limit is None else limit).detach()

    def train_probes(self, code: Tensor, label: Tensor) -> dict[str, Tensor]:
        """One step of the probes alone on a code (B, D, h, w) and labels (B, H, W): detached losses."""
        losses = {
            "linear_loss": self.linear.loss(code, label, self.net.backbone.patch_size),
            "cluster_loss": self.cluster.loss(code),
        }
        for name in ("linear", "cluster"):
            self.optimisers[name].zero_grad(set_to_none=True)
        sum(losses.values()).backward()
        for name in ("linear", "cluster"):
            self.optimisers[name].step()
        return {name: loss.detach() for name, loss in losses.items()}

    @torch.no_grad()
    def code(self, image: Tensor) -> Tensor:
        """Code (B, E, h, w) of images on the device, in evaluation mode, under the run's autocast."""
        self.eval()
        with torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None):
            return self.net.code(image).float()

    @torch.no_grad()
    def code_of(self, batch: dict[str, Tensor]) -> Tensor:
        """As :meth:`code`, of a batch of images or of cached frozen tokens."""
        if "before" not in batch:
            return self.code(batch["image"].to(self.device, non_blocking=True))
        self.eval()
        with torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None):
            return self.net.code_of(self.method.tokens(batch)).float()

    @torch.no_grad()
    def frozen_code(self, image: Tensor) -> Tensor:
        """Frozen features (B, D, h, w) of images on the device: the code of an untrained network."""
        self.eval()
        with torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None):
            return self.net.features(image)

    @torch.no_grad()
    def conditioned_code(self, image: Tensor) -> Tensor:
        """As :meth:`frozen_code`, through the map of ``--model.condition``: what sets are formed of."""
        return self.net.compared(self.frozen_code(image))

    @torch.no_grad()
    def conditioned_code_of(self, batch: dict[str, Tensor]) -> Tensor:
        """As :meth:`conditioned_code`, of a batch of images or of cached frozen tokens."""
        return self.net.compared(self.frozen_code_of(batch))

    @torch.no_grad()
    def frozen_code_of(self, batch: dict[str, Tensor]) -> Tensor:
        """As :meth:`frozen_code`, of a batch of images or of cached frozen tokens."""
        if "before" not in batch:
            return self.frozen_code(batch["image"].to(self.device, non_blocking=True))
        return self.method.tokens(batch).guidance.float()

    def weights(self) -> dict[str, Tensor]:
        """Every weight by its name in a checkpoint."""
        parts = {"": self.net, "linear.": self.linear, "cluster.": self.cluster}
        return {
            prefix + name: value
            for prefix, part in parts.items()
            for name, value in part.state_dict().items()
        }

    def load_weights(self, tensors: dict[str, Tensor], where: str) -> None:
        """Inverse of :meth:`weights`, strict.

        Raises:
            DataError: a name or a shape differs.
            NumberError: a weight is not finite.
        """
        own = self.weights()
        for name in sorted(own.keys() | tensors.keys()):
            here, there = (None if t.get(name) is None else tuple(t[name].shape) for t in (own, tensors))
            if here != there:
                raise DataError(
                    f"{where}: {name} has shape {there}, the network {here}; "
                    "is it a checkpoint of another architecture or method?"
                )
            if not torch.isfinite(tensors[name]).all():
                raise NumberError(f"{where}: weights {name} are not finite; use an earlier checkpoint")
            own[name].copy_(tensors[name])

    def training_state(self) -> dict[str, Any]:
        """Optimisers, loss scale and random generators, as plain containers."""
        return {
            "optimisers": {name: optimiser.state_dict() for name, optimiser in self.optimisers.items()},
            "scaler": self.scaler.state_dict(),
            "rng": random_state(self.device),
        }

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Inverse of :meth:`training_state`; on another kind of device its own generator starts anew."""
        for name, optimiser in self.optimisers.items():
            self.gate.load(optimiser, state["optimisers"][name])
        if state["scaler"] and self.scaler.is_enabled():
            self.scaler.load_state_dict(state["scaler"])
        set_random_state(state["rng"], self.device)


def new_backbone(config: Config) -> Backbone:
    """The frozen backbone of a new run; torch's global generator starts from ``config.train.seed``."""
    torch.manual_seed(config.train.seed)
    return build_backbone(config.model)


def build_engine(
    config: Config,
    classes: int,
    device: torch.device,
    *,
    backbone: Backbone | None = None,
    choices: Choices | None = None,
    condition: Condition | None = None,
) -> Engine:
    """A new network: the backbone's weights; what is trained is drawn with ``config.train.seed``.

    Args:
        config: settings; where one of them is auto, `choices` has its value.
        classes: classes of the data.
        device: where it computes.
        backbone: of :func:`new_backbone`, with nothing drawn from the global generator since; None = a new
        one.
        choices, condition: of :func:`ppap.methods.choices.choose`.

    Raises:
        UsageError: a setting is auto or needs a map, and nothing was chosen.
    """
    backbone = backbone or new_backbone(config)
    choices = choices or Choices()
    config = choices.apply(config)
    if unsettled := autos(config):
        raise UsageError(f"--{unsettled[0]} auto needs training images; give a value")
    if config.model.condition != "none" and condition is None:
        raise UsageError(f"--model.condition {config.model.condition} needs training images; give none")
    method = method_of(config)(config, backbone)
    method.net.condition = copy.deepcopy(condition)
    return Engine(method, classes, device, choices)


def load_engine(checkpoint: Checkpoint, device: torch.device, config: Config | None = None) -> Engine:
    """The network of a checkpoint; `config` (default: the stored one) gives everything but the architecture.

    Raises:
        DataError: weights do not fit the stored architecture.
        NumberError: a weight is not finite.
    """
    info = checkpoint.info
    choices = Choices.from_dict(info.get("choices"))
    config = choices.apply(config or from_dict(info["config"]))
    backbone = backbone_from_spec(info["backbone"], info["origin"])
    method = method_of(config)(config, backbone)
    if config.model.condition != "none":
        method.net.condition = Condition(backbone.width)  # filled from the checkpoint
    engine = Engine(method, info["classes"], device, choices)
    engine.load_weights(checkpoint.tensors, str(checkpoint.path))
    return engine
