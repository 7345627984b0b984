"""The training loop: read :meth:`Trainer.run`; ``ppap.methods.engine`` has a step."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ppap import parallel
from ppap.data import Datasets, EpochSampler, build_datasets
from ppap.data.ids import as_trained
from ppap.data.loading import stream
from ppap.errors import DataError, NumberError, PpapError, Stopped, UsageError
from ppap.evaluation.comparison import Row, compare, settle_clusters
from ppap.evaluation.crf import require_crf
from ppap.evaluation.evaluate import Evaluation, evaluate
from ppap.methods.base import TrainingData
from ppap.methods.choices import look_and_choose
from ppap.methods.drift import Watch
from ppap.methods.engine import Engine, build_engine, load_engine, new_backbone, pick_device
from ppap.methods.restore import restore
from ppap.methods.table import METHODS
from ppap.nets.feature_cache import sources_of
from ppap.nets.hub import offline
from ppap.nets.model import Network
from ppap.reports.markdown import write_report
from ppap.reports.records import FINAL_SCORES, RANDOM_WARNING, comparison_record, evaluation_record
from ppap.reports.terminal import drift_hint, sets_hint, sets_words
from ppap.runs.checkpoint import Checkpoint, check_newest, check_unsaved, load_checkpoint
from ppap.runs.randomness import own_randomness
from ppap.runs.rundir import RunDir
from ppap.runs.trackers import check_trackers
from ppap.settings.config import Config, config_hash
from ppap.stopping import Interrupted, StopRequest
from ppap.training.guard import backend_of, changed_data, data_facts, memory_error, step_text
from ppap.training.ranks import anywhere, by_first, check_ranks, goes_on, other_ranks, records_of
from ppap.training.rows import comparison_rows
from ppap.training.saving import contents, go_back, save
from ppap.training.skipped import SkipLog


class Trainer:
    """One run, from its datasets to its report."""

    def __init__(self, config: Config, path: Path, checkpoint: Checkpoint | None = None) -> None:
        """Load data and network; nothing is written yet.

        Args:
            config: all settings.
            path: run directory, new unless `checkpoint` is given.
            checkpoint: where to continue; None = a new run.

        Raises:
            UsageError, DataError, NumberError: see the parts.
        """
        self.config, self.resumed = config, checkpoint is not None
        self.run_dir, self.lock = records_of(path)
        try:
            self.begun = (path / "config.json").exists()
            if self.begun:
                self.lock.take()
                check_newest(checkpoint, path) if checkpoint is not None else check_unsaved(path)
            self.begins_at = None if checkpoint is None else checkpoint.path
            self._load(checkpoint)
        except BaseException:
            self.lock.release()
            raise

    def _load(self, checkpoint: Checkpoint | None) -> None:
        """Data and network, as they were in `checkpoint` or as a new run begins with them."""
        config, path = self.config, self.run_dir.path
        device = pick_device(config.train.device)
        self.backend = backend_of(device)
        require_crf(config.eval.crf, device)
        check_trackers(config.train.log)
        for name in {config.method, *config.compare.rows} - {"colour", "conditioned"}:
            METHODS[name].check(replace(config, method=name))
        known = config.data if checkpoint is None else as_trained(config.data, checkpoint.info)
        check_ranks(config.train.batch_size)
        self.data: Datasets = build_datasets(known)
        if self.data.val is not None and self.data.val.unscored:
            raise DataError(self.data.val.unscored)
        self.data_facts = data_facts(self.data)
        if checkpoint is not None and (warning := changed_data(checkpoint.info, self.data_facts)):
            print(warning)
        if METHODS[config.method].needs_labels and not self.data.train.labelled:
            raise UsageError(f"--method {config.method} needs training labels; give labels/train")
        self.rows = comparison_rows(config, self.data)
        self.step, self.best, self.validated = 0, float("-inf"), -1
        self.evaluation: Evaluation | None = None
        self.hint: str | None = None
        self.assignment: list[int | None] | None = None
        self.stop = StopRequest()
        # What would stop the run after minutes of features is seen before them.
        EpochSampler(len(self.data.train), config.train.batch_size, config.train.seed)
        state = self._build(checkpoint, device)
        self.total = TrainingData(self.data.train, config, device).total_steps
        if self.step > self.total:
            raise UsageError(
                f"--train.steps or --train.epochs ask for {self.total} steps, {path} has done {self.step}; "
                "give as many or more"
            )
        self.loader = self.engine.start(self.sources.train, self.step, lambda: anywhere(self.stop))
        watched = config.method != "frozen" and parallel.world().first
        self.watch = Watch(self.engine, self.sources.train) if watched else None
        self.skips = SkipLog(self.engine, path, self.data.train.name, lambda: contents(self))
        if checkpoint is not None:
            self.skips.restore(state.get("skips"), str(checkpoint.path))
        self.started = time.perf_counter()

    def _build(self, checkpoint: Checkpoint | None, device: torch.device) -> dict[str, Any]:
        """Network and training set; the state in `checkpoint`, empty for a new run."""
        config, classes = self.config, self.data.train.classes
        if checkpoint is None:
            backbone = new_backbone(config)
            net = Network(backbone).to(device)
            with own_randomness():
                self.sources = sources_of(config, self.data, net, device)
                clusters, source = classes + config.train.extra_clusters, lambda: self.sources.train
                looking = partial(look_and_choose, config, net, source, device, clusters)
                choices, condition = parallel.from_first(looking)
            self.engine = build_engine(
                config, classes, device, backbone=backbone, choices=choices, condition=condition
            )
            return {}
        self.engine = load_engine(checkpoint, device, config)
        self.sources = sources_of(config, self.data, self.engine.net, device)
        if self.engine.classes != classes:
            raise DataError(
                f"the data has {classes} classes, {checkpoint.path} {self.engine.classes}; "
                "resume with the data the run was started with"
            )
        state = checkpoint.state()
        restore(self.engine, state, checkpoint.info["step"], str(checkpoint.path))
        self.step, self.best, self.validated = state["step"], state["best"], state["validated"]
        if said := other_ranks(state):
            print(said)
        self.assignment = checkpoint.info["assignment"]
        return state

    def run(self) -> RunDir:
        """Train to the end, validating, saving and logging on the way; write the report.

        Raises:
            Stopped: interrupted; the state is saved.
            NumberError: loss or gradient were not finite, in several steps in a row.
        """
        try:
            self._begin()
            return self._run()
        finally:
            self.run_dir.trackers.close()
            self.lock.release()

    def _run(self) -> RunDir:
        train = self.config.train
        with (
            self.stop as stop,
            self._nothing_lost(),
            tqdm(total=self.total, initial=self.step, unit="step", disable=None, desc="train") as bar,
        ):
            since, images = time.perf_counter(), 0
            batches = stream(self.loader)
            if self.resumed and self._due(train.val_every) and self.validated != self.step:
                self._validate(stop)
            while self.step < self.total:
                epoch, batch = self._next_batch(batches, stop)
                values = self._step(batch, epoch)
                self.step += 1
                images += train.batch_size
                bar.update()
                if self.step % train.log_every == 0 or self.step == self.total or self.step == 1:
                    speed = images / (time.perf_counter() - since)
                    bar.set_postfix_str(self._log(values, epoch, speed))
                    since, images = time.perf_counter(), 0
                if anywhere(stop):
                    self._stop()
                if self._due(train.val_every) and self.step < self.total:
                    paused = time.perf_counter()
                    self._validate(stop)
                    since += time.perf_counter() - paused
                if self._due(train.save_every):
                    self._save("last")
            batches.close()
            self.loader = None  # its processes end, and what they hold is free for what follows
            if self.validated != self.step or self.evaluation is None:
                self._validate(stop)
            self._save("last")
            if not goes_on():
                return self.run_dir
            rows = self._compare(stop)
            selected = self._selected(stop)
        try:
            self._report(rows, *selected)
        except Interrupted:
            raise Stopped(
                "stopped before the report was written, all steps are done; "
                f"continue with: python -m ppap.train --resume {self.run_dir.path}"
            ) from None
        return self.run_dir

    @contextmanager
    def _nothing_lost(self) -> Iterator[None]:
        """Save what was trained before an error ends the run, whatever an evaluation says or memory lacks."""
        try:
            yield
        except (Stopped, NumberError):
            raise
        except Exception as error:
            if parallel.world().several:  # others may be anywhere in a step: the last checkpoint stands
                raise
            with suppress(PpapError):
                self._save("last")
            if (said := memory_error(error, self.run_dir.path)) is not None:
                raise said from None
            raise

    def _selected(self, stop: StopRequest) -> tuple[Engine, Evaluation | None, Checkpoint]:
        """Network, scores and checkpoint that ``--train.selection`` takes."""
        checkpoint = load_checkpoint(self.run_dir.path)
        if checkpoint.info["step"] == self.step:
            return self.engine, self.evaluation, checkpoint
        engine = load_engine(checkpoint, self.engine.device, self.config)
        tqdm.write(f"selected: step {checkpoint.info['step']}, {checkpoint.selection}")
        return engine, self._measure(engine, stop), checkpoint

    def _next_batch(self, batches: Iterator, stop: StopRequest) -> tuple[int, dict[str, Tensor]]:
        try:
            epoch, _, batch = next(batches)
        except RuntimeError:
            # A loader process that was stopped together with this one: nothing of the run is lost.
            if stop.asked:
                self._stop()
            raise
        return epoch, batch

    def _step(self, batch: dict[str, Tensor], epoch: int) -> dict[str, Tensor]:
        facts = self.skips.facts(epoch, batch)
        try:
            values = self.engine.train_step(batch, self.step)
        except InterruptedError:  # during long work ahead of the step, which is done anew
            self._stop()
        facts = facts._replace(refusal=self.engine.refusal)
        self.skips.add(self.step, self.engine.skipped, values, facts)
        return values

    def _due(self, every: int) -> bool:
        return every > 0 and self.step > 0 and self.step % every == 0

    def _begin(self) -> None:
        if self.begun:
            if parallel.world().first:
                go_back(self.run_dir, self.begins_at)
                self.skips.begin(self.step)
            self.run_dir.reopen(self.config, self.step)
        else:
            self.run_dir.create(self.config, self.lock)
        self.run_dir.follow(self.config, self.step, offline())
        print(f"data: {self.data.description}")
        print(f"backbone: {self.engine.net.backbone.origin}")
        print(step_text(self.engine, self.backend))
        start = f"continued at step {self.step}" if self.resumed else "new run"
        if self.step >= self.total:
            start += ": all steps are done; what is left is to measure and to report"
        if chosen := self.engine.choices.summary(self.config.method):
            print(f"chosen without labels: {chosen}")
        settings = f"settings {config_hash(self.config)}"
        print(f"run: {self.run_dir.path} ({start}, {self.total} steps, {settings})", flush=True)

    def _log(self, values: dict[str, Tensor], epoch: int, speed: float) -> str:
        """Write a line of metrics, and print one where there is no progress bar."""
        self.skips.read()
        row = {"step": self.step, "epoch": epoch, **{name: value.item() for name, value in values.items()}}
        row["skipped_steps"] = self.skips.total
        if self.watch is not None:
            row["neighbours_kept"] = self.watch.kept()
        self.run_dir.append({**row, "images_per_s": speed})
        text = (
            f"loss {row['loss']:.3f} contrast {row['contrast_loss']:.3f} linear {row['linear_loss']:.3f} "
            f"cluster {row['cluster_loss']:.3f}, {sets_words(row)}{speed:.1f} images/s"
        )
        if not sys.stderr.isatty():
            left = (self.total - self.step) * self.config.train.batch_size / speed
            words = f"{left:.0f} s" if left < 90 else f"{left / 60:.0f} min"
            end = f", {words} of steps left" if self.step < self.total else ""
            print(f"step {self.step}/{self.total} {text}{end}", flush=True)
        hint = drift_hint(row) or (sets_hint(row) if self.engine.method.propagation else None)
        if hint and hint != self.hint:
            tqdm.write(f"step {self.step}: {hint}")
        self.hint = hint
        return text

    def _validate(self, stop: StopRequest) -> None:
        self.skips.read()
        labelled = self.data.val is not None and self.data.val.labelled
        if labelled or self.step >= self.total:
            self._settle(stop)
        if self.data.val is None or not self.data.val.labelled:
            self.validated = self.step
            return
        self.evaluation = self._measure(self.engine, stop)
        summary = self.evaluation.summary()
        self.assignment = list(self.evaluation.plain["cluster"].assignment)
        if self.validated != self.step:  # a finished run that is resumed measures once more for its report
            self.run_dir.append({"step": self.step, **summary})
        self.validated = self.step
        tqdm.write(f"step {self.step} validation: " + " ".join(f"{k} {v:.2f}" for k, v in summary.items()))
        # The published rule: the best sum of the four scores, which looks at labels.
        total = sum(summary.values())
        if total >= self.best:
            self.best = total
            self._save("best")

    def _settle(self, stop: StopRequest) -> None:
        """Clusters of the code as it is now, where ``--eval.cluster-init`` asks for that."""
        engine, source = self.engine, self.sources.train
        try:
            by_first(
                engine.cluster, lambda: settle_clusters(engine, engine.code_of, source, lambda: stop.asked)
            )
        except InterruptedError:
            self._stop()
        except NumberError as error:
            raise NumberError(f"step {self.step}: {error}; lower --optim.lr") from None

    def _measure(self, engine: Engine, stop: StopRequest) -> Evaluation:
        """Both probes of a network on the labelled validation images, without CRF."""
        try:
            return evaluate(
                engine.code_of,
                (engine.cluster, engine.linear if self.data.train.labelled else None),
                self.data.val,
                replace(self.config.eval, crf="none"),
                patch_size=engine.net.backbone.patch_size,
                device=engine.device,
                workers=self.config.data.workers,
                should_stop=lambda: stop.asked,
                source=self.sources.val,
            )
        except InterruptedError:
            self._stop()
        except NumberError as error:
            raise NumberError(f"step {self.step}: {error}; or lower --optim.lr") from None

    def _compare(self, stop: StopRequest) -> dict[str, Row]:
        """The table of ``--compare.rows``; it starts anew where it was interrupted."""
        if not self.rows:
            return {}
        tqdm.write("comparison: the same probes for every row")
        try:
            rows = compare(self.config, self.data, self.sources, self.engine, lambda: stop.asked)
        except InterruptedError:
            self._stop()
        self.run_dir.write_sealed(
            "comparison.json", comparison_record(self.config, self.engine, rows, self.step)
        )
        return rows

    def _save(self, name: str) -> None:
        self.skips.read()
        if parallel.world().first:
            save(self, name)

    def _stop(self) -> None:
        self._save("last")
        raise Stopped(
            f"stopped at step {self.step} of {self.total}; "
            f"continue with: python -m ppap.train --resume {self.run_dir.path}"
        )

    def _report(
        self, rows: dict[str, Row], engine: Engine, evaluation: Evaluation | None, checkpoint: Checkpoint
    ) -> None:
        dataset = self.data.val or self.data.train
        minutes = (time.perf_counter() - self.started) / 60
        facts = [
            f"checkpoint: step {checkpoint.info['step']}, {checkpoint.selection}",
            f"data: {self.data.description}",
            f"{minutes:.1f} minutes since the last start",
        ]
        if chosen := engine.choices.summary(self.config.method):
            facts.append(f"chosen without labels: {chosen}")
        if evaluation is not None:
            record = evaluation_record(self.config, engine, checkpoint, evaluation)
            self.run_dir.write_sealed(FINAL_SCORES, record)
        write_report(self.run_dir, self.config, engine, dataset, evaluation, facts, rows)
        self.run_dir.trackers.pictures(self.step, self.run_dir.pictures)
        self.run_dir.write_config(self.config, finished=True)
        print(f"report: {self.run_dir.path / 'report.md'}")
        if self.engine.net.backbone.is_random:
            print(RANDOM_WARNING)
