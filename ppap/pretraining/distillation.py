"""``--objective distill``: a student learns the conditioned patch features of a frozen, trained teacher.

The teacher sees a whole square at its own resolution, the student a random crop of it with other colours; the
teacher's map is sampled at the centres of the student's patches, so neither patch nor resolution need agree.
Features are conditioned first (``--distill.condition``): raw ones of many networks share a mean and few
directions that carry most of every cosine, which a student would spend itself on.

With a fixed head the student's channels are the teacher's leading directions, turned by a random rotation so
that each carries alike, as the student's final norm wants it; what is exported then has the teacher's cosines
itself. A learned linear head lets the student choose its channels, and is thrown away: the features that fit
the teacher lie behind it.

Legend: B images, N patches of a student's crop, D teacher's, S student's, E compared channels.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ppap.data.patch_labels import labels_of
from ppap.errors import DataError
from ppap.methods.choices import auto_condition
from ppap.nets.backbone import Backbone
from ppap.nets.conditioning import Condition, Split, fit
from ppap.pretraining.agreement import compare, drawn_patches, speeds
from ppap.pretraining.base import Objective
from ppap.pretraining.data import Draws
from ppap.pretraining.distillation_report import BEHIND_HEAD, REFERENCE, Results, write_report
from ppap.pretraining.export import centred
from ppap.pretraining.measured import measured_images
from ppap.pretraining.teacher import Teacher
from ppap.pretraining.views import make_crops, normalised, sample_map
from ppap.runs.rundir import RunDir
from ppap.settings.pretraining import PretrainConfig


class Student(nn.Module):
    """A backbone, and the head that makes its patches comparable with the teacher's."""

    def __init__(self, backbone: Backbone, outputs: int | None) -> None:
        """`outputs` channels E of a learned head; None = the backbone's own."""
        super().__init__()
        self.backbone = backbone
        self.head = nn.Identity() if outputs is None else nn.Linear(backbone.width, outputs)

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Rows (B, N, E), fp32, of normalised images (B, 3, s, s), and the grid."""
        maps = self.backbone(images)
        with torch.autocast(images.device.type, enabled=False):
            return self.head(maps.flatten(2).transpose(1, 2)), (maps.shape[2], maps.shape[3])


class Target(nn.Module):
    """What of the teacher is learned: rows (..., D) -> (..., E), by its condition and a linear map."""

    def __init__(self, width: int, outputs: int) -> None:
        """Undefined until :meth:`fit`, or a checkpoint."""
        super().__init__()
        self.condition = Condition(width)
        self.register_buffer("basis", torch.zeros(width, outputs))
        self.register_buffer("fitted", torch.zeros((), dtype=torch.bool))

    def forward(self, rows: Tensor) -> Tensor:
        """fp32."""
        with torch.autocast(rows.device.type, enabled=False):
            return self.conditioned(rows) @ self.basis

    def conditioned(self, rows: Tensor) -> Tensor:
        """Rows (..., D) after the condition alone."""
        flat = rows.reshape(-1, rows.shape[-1])
        return self.condition(flat.T[None, :, None])[0, :, 0].T.view(rows.shape)

    def fit(self, condition: str, split: Split, *, turned: bool) -> float:
        """Fit to moments of the teacher's features.

        Args:
            condition: a name of ``--model.condition``, not auto.
            split: moments.
            turned: E leading directions, randomly turned; otherwise all D as they are (E = D). The rotation
                follows torch's global generator.

        Returns:
            Share of the conditioned features' mean square that the E directions keep.
        """
        found = fit(condition, split)
        self.condition.load_state_dict(found.state_dict())
        width, outputs = self.basis.shape
        moments, matrix = split.all, found.map.double()
        mean = (moments.mean[:width] - found.mean) @ matrix + found.shift
        # About zero, not about the mean: products are what is to be kept.
        second = matrix.T @ moments.covariance[:width, :width] @ matrix + torch.outer(mean, mean)
        if not turned:
            basis, kept = torch.eye(width, dtype=torch.float64), 1.0
        else:
            values, vectors = torch.linalg.eigh(second)
            count = min(width, outputs)
            rotation = torch.linalg.qr(torch.randn(outputs, outputs, dtype=torch.float64)).Q[:count]
            basis = vectors.flip(1)[:, :count] @ rotation
            kept = float(values.flip(0)[:count].sum() / values.sum())
        size = (basis.T @ second @ basis).trace() / outputs  # mean square of a channel becomes 1
        self.basis.copy_(basis / size.clamp(min=1e-300).sqrt())
        self.fitted.fill_(True)
        return kept


class TeacherDistillation(Objective):
    """A student and the target that it learns; the teacher itself is no part of a checkpoint."""

    verb = "distilled"

    def __init__(self, backbone: Backbone, teacher: Teacher, draws: Draws, config: PretrainConfig) -> None:
        """`backbone` becomes the student's. A learned head follows torch's generator."""
        super().__init__()
        self.config, self.teacher, self.draws = config, teacher, draws
        learned, width = config.distill.head == "learned", teacher.backbone.width
        self.student = Student(backbone.requires_grad_(True), width if learned else None)
        self.target = Target(width, width if learned else backbone.width)
        self.register_buffer("teacher_sha256", torch.tensor(list(bytes.fromhex(teacher.sha256))).byte())
        self.measured = measured_images(config)
        self.clusters = config.distill.clusters or self.measured.classes

    @property
    def product(self) -> Backbone:
        return self.student.backbone

    def describe(self) -> list[str]:
        spec, teacher = self.teacher.backbone.spec, self.teacher
        rows, columns = teacher.grid
        weights = sum(p.numel() for p in teacher.backbone.parameters()) / 1e6
        return [
            f"teacher: patch {spec['patch_size']}, width {spec['width']}, depth {spec['depth']}, "
            f"{weights:.2f} million weights, {teacher.backbone.origin}; sees {teacher.side} pixels, "
            f"{rows} x {columns} patches",
            f"table at the end: on {self.measured.description}",
            f"step: {self.config.train.batch_size} images, a crop of {self.config.views.global_size} pixels",
        ]

    def check_restored(self, tensors: Mapping[str, Tensor]) -> None:
        stored = tensors.get("teacher_sha256")
        if stored is not None and not torch.equal(stored, self.teacher_sha256.cpu()):
            raise DataError(
                f"--teacher {self.config.distill.teacher} holds other weights than this run began with; give "
                "those, wherever they are now: --teacher WEIGHTS"
            )

    def prepare(self, should_stop: Callable[[], bool]) -> None:
        """Keep the teacher's features, and fit the target to them unless a checkpoint had it.

        Raises:
            DataError, NumberError: as ``Teacher.keep``.
            InterruptedError: `should_stop` said so.
        """
        aim = self.config.distill
        if aim.cache:
            self.teacher.keep(self.draws, should_stop)
        if self.target.fitted:
            return
        split, seen = self.teacher.survey(self.draws, self.config.train.seed, should_stop)
        name, why = aim.condition, ""
        if name == "auto":
            name, why = auto_condition(self.clusters), f" (auto, for {self.clusters} clusters)"
        kept = self.target.fit(name, split, turned=aim.head == "fixed")
        text = f"target: the teacher's features conditioned by {name}{why}, fitted to {seen} squares"
        if aim.head == "fixed":
            count = min(self.target.basis.shape)
            text += f"; {count} of {self.target.basis.shape[0]} directions, which keep {100 * kept:.1f} %"
        print(text, flush=True)

    def losses(self, pixels: Tensor, generator: torch.Generator, first: int = 0) -> dict[str, Tensor]:
        """Scalars: loss (with a gradient), and cosine, the mean of student's and teacher's patches."""
        views = self.config.views
        crops = make_crops(pixels, 1, views.global_size, views.global_scale, views, generator)
        rows, grid = self.student(crops.images)
        with torch.no_grad():
            maps = self.teacher.maps_of(self.draws, pixels, first)
            target = self.target(sample_map(maps, crops.boxes[0], grid))
        cosine = F.cosine_similarity(rows, target, dim=-1).mean()
        loss = 1 - cosine if self.config.distill.loss == "cosine" else F.smooth_l1_loss(rows, target)
        return {"loss": loss, "cosine": cosine.detach()}

    def exported(self, images: Tensor) -> Backbone:
        """With a fixed head as it is: its mean is the target's, and no accident of training."""
        return self.product if self.config.distill.head == "fixed" else centred(self.product, images)

    def finish(self, exported: Backbone, run: RunDir, should_stop: Callable[[], bool]) -> None:
        """Compare student and teacher, print the table, and write ``report.md`` and ``distillation.json``."""
        device = self.teacher_sha256.device
        pixels = self.measured.pixels.to(device).float() / 255
        print(f"table: {self.measured.description}", flush=True)
        features, labels = self._features(exported, pixels)
        aim, teacher = self.config.distill, self.teacher
        scores = compare(features, REFERENCE, labels, self.clusters, aim.neighbours, should_stop)
        speed = speeds(
            {"student": lambda x: exported(normalised(x)), "teacher": teacher.maps}, pixels[: teacher.BATCH]
        )
        networks = {"student": exported, "teacher": teacher.backbone}
        write_report(run, self.config, Results(scores, speed, networks, self.measured, self.clusters, device))

    @torch.no_grad()
    def _features(self, exported: Backbone, pixels: Tensor) -> tuple[dict[str, Tensor], Tensor | None]:
        """Rows (M, P, E) of the same patches of each network, and their labels (M, P), on the CPU.

        All on the student's grid, to which the teacher's map is resampled as in training.
        """
        found: dict[str, list[Tensor]] = {}
        for part in pixels.split(self.teacher.BATCH):
            images = normalised(part)
            maps = exported(images)
            grid = (maps.shape[2], maps.shape[3])
            # The network adds pixels at the right and at the bottom up to whole patches.
            half = grid[0] * exported.patch_size / part.shape[2]
            box = torch.tensor([half - 1, half - 1, half, half], device=part.device).expand(len(part), 4)
            raw = sample_map(self.teacher.maps(part), box, grid)
            rows = {"student": maps.flatten(2).transpose(1, 2)}
            if self.config.distill.head == "learned":
                rows[BEHIND_HEAD] = self.student(images)[0]
            rows |= {"teacher": raw, REFERENCE: self.target.conditioned(raw)}
            chosen = drawn_patches(len(pixels), rows["teacher"].shape[1]).to(part.device)
            for name, values in rows.items():
                found.setdefault(name, []).append(values[:, chosen].float().cpu())
        labels = self.measured.labels
        if labels is not None:
            labels = labels_of(labels, exported.patch_size).view(len(labels), -1)[:, chosen.cpu()]
        return {name: torch.cat(values) for name, values in found.items()}, labels
