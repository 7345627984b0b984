"""The pretraining loop: read :meth:`Pretrainer.run`.

What is learned: ``ppap.pretraining.objective`` (self) and ``ppap.pretraining.distillation`` (distill).
"""

import math
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ppap.data.transforms import normalise
from ppap.errors import DataError, Stopped, UsageError
from ppap.escaping import some
from ppap.methods.engine import amp_type, pick_device
from ppap.methods.finite import Gate, Held, Skipped, Skips
from ppap.nets.backbone import Backbone, backbone_from_spec, build_backbone
from ppap.pretraining.base import Objective
from ppap.pretraining.data import Draws, build_draws, draws_loader
from ppap.pretraining.distillation import TeacherDistillation
from ppap.pretraining.export import draw_features, export_backbone
from ppap.pretraining.objective import Distillation
from ppap.pretraining.start import whiten_patches
from ppap.pretraining.teacher import Teacher, check_settings
from ppap.reports.provenance import device_name
from ppap.runs.checkpoint import Checkpoint, check_newest, check_unsaved, save_checkpoint
from ppap.runs.lock import FolderLock
from ppap.runs.rundir import RunDir
from ppap.settings.config import config_hash, to_dict
from ppap.settings.pretraining import PretrainConfig, PretrainOptimConfig
from ppap.stopping import StopRequest

_PICTURED = 8  # images in the picture of the features
_CENTRED = 32  # images that the exported features are centred on


class Pretrainer:
    """One run, from its images to its backbone."""

    def __init__(self, config: PretrainConfig, path: Path, checkpoint: Checkpoint | None = None) -> None:
        """Find the images and build the network; nothing is written yet.

        Args:
            config: all settings.
            path: run directory, new unless `checkpoint` is given.
            checkpoint: where to continue; None = a new run.

        Raises:
            UsageError, DataError, NumberError: see the parts.
        """
        self.config, self.run_dir, self.resumed = config, RunDir(path), checkpoint is not None
        self.lock = FolderLock(path, f"--resume {path}")
        try:
            self.begun = (path / "config.json").exists()
            if self.begun:
                self.lock.take()
                check_newest(checkpoint, path) if checkpoint is not None else check_unsaved(path)
            self._load(checkpoint)
        except BaseException:
            self.lock.release()
            raise

    def _load(self, checkpoint: Checkpoint | None) -> None:
        """Images and network, as they were in `checkpoint` or as a new run begins with them."""
        config = self.config
        check_settings(config)
        self.device = pick_device(config.train.device)
        self.amp = amp_type(config.optim.amp, self.device)
        teacher = None
        if config.objective.kind == "distill":
            teacher = Teacher(config.distill, self.device, self.amp)
        self.draws = build_draws(config)
        self.step = 0
        torch.manual_seed(config.train.seed)
        if checkpoint is None:
            backbone = build_backbone(config.model)
        else:
            backbone = backbone_from_spec(checkpoint.info["backbone"], checkpoint.info["origin"])
        self.start = "random weights" if backbone.is_random else backbone.origin
        _check_crops(config, backbone.patch_size)
        if checkpoint is None and config.train.whiten:
            whiten_patches(backbone, self.draws, config)
        model: Objective
        if teacher is None:
            model = Distillation(backbone, config)
        else:
            model = TeacherDistillation(backbone, teacher, self.draws, config)
        self.model = model.to(self.device)
        self.gate = Gate(self.device)
        self.optimiser = self.gate.prepare(_optimiser(self.model.student, config.optim))
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp == torch.float16)
        self.skips = _SkippedDraws(self.gate, self.draws, config.train.batch_size)
        if checkpoint is not None:
            self._restore(checkpoint)

    def run(self) -> RunDir:
        """Train to the end, saving and drawing on the way.

        Raises:
            Stopped: interrupted; the state is saved.
            NumberError: loss or gradient were not finite, in several steps in a row.
        """
        try:
            with StopRequest() as stop:
                self._announce()
                self._prepare(stop)
                self._train(stop)
                self._finish(stop)
            return self.run_dir
        finally:
            self.lock.release()

    def _finish(self, stop: StopRequest) -> None:
        """Picture, backbone, and whatever the objective measures of it."""
        self._draw()
        exported = self._save()
        folder = self.run_dir.path / "backbone"
        print(f"backbone: {folder}; use it with: python -m ppap.train PRESET --model.weights {folder}")
        try:
            self.model.finish(exported, self.run_dir, lambda: stop.asked)
        except InterruptedError:
            raise self._stopped("all steps are done, what is measured at the end is not") from None

    def _train(self, stop: StopRequest) -> None:
        train = self.config.train
        loader = draws_loader(self.draws, self.config, self.step, self.device.type == "cuda")
        with tqdm(
            total=train.steps, initial=self.step, unit="step", disable=None, desc="pretrain", leave=True
        ) as bar:
            since, images = time.perf_counter(), 0
            for batch in loader:
                values = self._train_step(batch)
                self.step += 1
                images += len(batch)
                bar.update()
                if self.step % train.log_every == 0 or self.step in (1, train.steps):
                    bar.set_postfix_str(self._log(values, images / (time.perf_counter() - since)))
                    since, images = time.perf_counter(), 0
                if stop.asked:
                    self._save()
                    raise self._stopped(f"stopped at step {self.step} of {train.steps}")
                paused = time.perf_counter()
                if self._due(train.picture_every):
                    self._draw()
                if self._due(train.save_every):
                    self._save()
                since += time.perf_counter() - paused

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0 and self.step < self.config.train.steps

    def _announce(self) -> None:
        """Say what the run is made of, before anything takes long."""
        spec = self.model.product.spec
        print(f"data: {self.draws.description}")
        weights = sum(p.numel() for p in self.model.product.parameters()) / 1e6
        print(
            f"network: patch {spec['patch_size']}, width {spec['width']}, depth {spec['depth']}, "
            f"{weights:.2f} million weights, started from {self.start}"
        )
        *lines, last = self.model.describe()
        for line in lines:
            print(line)
        print(f"{last}; {device_name(self.device)}, autocast {self.amp or 'off'}", flush=True)

    def _prepare(self, stop: StopRequest) -> None:
        """Whatever the objective needs, then the run directory."""
        config = self.config
        try:
            self.model.prepare(lambda: stop.asked)
        except InterruptedError:
            if self.resumed:
                raise self._stopped(f"stopped at step {self.step} of {config.train.steps}") from None
            raise Stopped(
                "stopped before the first step; the same command goes on with what is on disk already"
            ) from None
        if self.begun:
            self.run_dir.reopen(config, self.step)
        else:
            self.run_dir.create(config, self.lock)
        start = f"continued at step {self.step}" if self.resumed else "new run"
        settings = f"settings {config_hash(config)}"
        print(f"run: {self.run_dir.path} ({start}, {config.train.steps} steps, {settings})", flush=True)

    def _train_step(self, batch: Tensor) -> dict[str, Tensor]:
        """One step on (B, 3, S, S) uint8 images; crops depend on the seed and the step alone."""
        optim, step = self.config.optim, self.step
        for group in self.optimiser.param_groups:
            group["lr"] = optim.lr * rate(step, self.config.train.steps, optim.warmup)
        held = Held(self.model.moving())
        pixels = batch.to(self.device, non_blocking=True).float() / 255
        generator = torch.Generator(self.device).manual_seed(_mixed(self.config.train.seed, step))
        with torch.autocast(self.device.type, dtype=self.amp, enabled=self.amp is not None):
            values = self.model.losses(pixels, generator, step * len(batch))
        self.optimiser.zero_grad(set_to_none=True)
        self.scaler.scale(values["loss"]).backward()
        self.scaler.unscale_(self.optimiser)
        norm = nn.utils.clip_grad_norm_(self.model.student.parameters(), optim.clip_norm).detach()
        values = {name: value.detach() for name, value in values.items()}
        skip = self.gate.step(values, {"student": self.optimiser}, {"student": norm}, self.scaler)
        values["grad_norm"] = norm
        self.model.after_step(step)
        held.restore(skip)
        self.skips.add(step, skip, values)
        return values

    def _log(self, values: dict[str, Tensor], speed: float) -> str:
        """Write a line of metrics, and print one where there is no progress bar."""
        self.skips.read()
        row = {"step": self.step, **{name: value.item() for name, value in values.items()}}
        row["skipped_steps"] = self.skips.total
        self.run_dir.append({**row, "lr": self.optimiser.param_groups[0]["lr"], "images_per_s": speed})
        parts = [f"{k.removesuffix('_loss')} {v:.3f}" for k, v in row.items() if k.endswith("_loss")]
        text = f"loss {row['loss']:.3f} {' '.join(parts)} {speed:.1f} images/s"
        if not sys.stderr.isatty():
            print(f"step {self.step}/{self.config.train.steps} {text}", flush=True)
        return text

    def _draw(self) -> None:
        path = self.run_dir.pictures / f"features_{self.step:06d}.png"
        draw_features(self.model.product, self._images(_PICTURED), path, f"step {self.step}")

    def _images(self, count: int) -> Tensor:
        """The first images, whole and unchanged: (count, 3, S, S) normalised, on the device."""
        images = [normalise(self.draws[n].permute(1, 2, 0).numpy()) for n in range(count)]
        return torch.stack(images).to(self.device)

    def _save(self) -> Backbone:
        """Write the state, and what is handed out, which is returned."""
        self.skips.read()
        backbone, count = self.model.product, self.step * self.config.train.batch_size
        origin = f"{self.model.verb} by ppap.pretrain on {self.draws.origin}, {count} images read"
        if not backbone.is_random:
            origin += f", starting from {self.start}"
        info = {
            "config": to_dict(self.config),
            "backbone": backbone.spec,
            "origin": backbone.origin,
            "step": self.step,
        }
        state = {
            "step": self.step,
            "optimiser": self.optimiser.state_dict(),
            "scaler": self.scaler.state_dict(),
            "skips": self.skips.state(),
        }
        save_checkpoint(self.run_dir.checkpoints / "last", self.model.state_dict(), info, state)
        exported = self.model.exported(self._images(_CENTRED))
        export_backbone(exported, self.run_dir.path / "backbone", origin)
        return exported

    def _restore(self, checkpoint: Checkpoint) -> None:
        self.model.check_restored(checkpoint.tensors)
        wrong = [
            name
            for name, value in self.model.state_dict().items()
            if getattr(checkpoint.tensors.get(name), "shape", None) != value.shape
        ]
        if wrong or len(checkpoint.tensors) != len(self.model.state_dict()):
            raise DataError(f"{checkpoint.path} does not fit its own settings; is it a pretraining run?")
        self.model.load_state_dict(checkpoint.tensors)
        state = checkpoint.state()
        self.step = state["step"]
        self.gate.load(self.optimiser, state["optimiser"])
        self.skips.restore(state.get("skips"), str(checkpoint.path))
        self.scaler.load_state_dict(state["scaler"])

    def _stopped(self, what: str) -> Stopped:
        return Stopped(f"{what}; continue with: python -m ppap.pretrain --resume {self.run_dir.path}")


class _SkippedDraws(Skips):
    """Names the images of a skipped step, which follow from its number."""

    def __init__(self, gate: Gate, draws: Draws, batch_size: int):
        super().__init__(gate)
        self.draws, self.batch_size = draws, batch_size

    def say(self, skipped: Skipped) -> None:
        first = skipped.step * self.batch_size
        names = some([self.draws.name(first + i) for i in range(self.batch_size)])
        tqdm.write(f"step {skipped.step + 1} skipped, {skipped.why}; its images: {names}")


def rate(step: int, steps: int, warmup: float) -> float:
    """Learning rate at a step as a fraction of its largest: linear warm-up, cosine decay to 0.01."""
    rise = round(warmup * steps)
    if step < rise:
        return (step + 1) / rise
    return 0.01 + 0.99 * (1 + math.cos(math.pi * (step - rise) / max(steps - rise, 1))) / 2


def _mixed(seed: int, step: int) -> int:
    """One seed from two numbers; neighbouring ones give unrelated streams."""
    return (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + 1) % 2**63


def _optimiser(student: nn.Module, optim: PretrainOptimConfig) -> torch.optim.AdamW:
    decayed, plain = [], []
    for name, value in student.named_parameters():
        small = value.ndim < 2 or name.endswith(("pos_embed", "_token"))
        (plain if small else decayed).append(value)
    groups = [
        {"params": decayed, "weight_decay": optim.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=optim.lr)


def _check_crops(config: PretrainConfig, patch_size: int) -> None:
    sizes = [("global-size", config.views.global_size)]
    sizes += [("local-size", config.views.local_size)] if config.views.locals else []
    for name, size in sizes:
        if size % patch_size:
            near = max(round(size / patch_size), 1) * patch_size
            raise UsageError(
                f"--views.{name} {size} is no multiple of the patch of {patch_size} pixels; give {near}"
            )
