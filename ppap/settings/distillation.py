"""Settings of ``ppap pretrain --objective distill``: the teacher, and what is learned of it."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from ppap.settings.checks import check_field, parse_condition


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """Of --objective distill: a trained teacher, whose conditioned patch features the student learns."""

    teacher: Annotated[str | None, tyro.conf.arg(aliases=["--teacher"], metavar="WEIGHTS")] = None
    """Weights of the teacher: anything that --model.weights takes but random. It is frozen."""
    teacher_key: str | None = None
    """As --model.weights-key, of the teacher's file."""
    teacher_backbone: str = "auto"
    """As --model.backbone, of the teacher."""
    teacher_heads: int | None = None
    """As --model.heads, of the teacher."""
    pos_interp: Literal["dino", "timm"] = "dino"
    """As --model.pos-interp, of the teacher."""
    resolution: int | None = None
    """Side at which the teacher sees a square of --data.resolution [pixels], a multiple of its patch; its map
    of features is resampled to the student's patches. None = about 224."""
    squares: int = 1
    """Squares of an image of a folder, side by side along its longer side (1 = the middle): they stay the
    same in every epoch, while the student sees random crops of them."""
    condition: str = "auto"
    """What is done to the teacher's features before they are learned, as for --model.condition, fitted
    without labels to the squares that the teacher sees; auto = clip:S with S = 1 / (4 --distill.clusters)."""
    clusters: int | None = None
    """Clusters that the features are meant for, for --distill.condition auto and the table at the end; None =
    the classes of the labels, if there are any, else 27."""
    head: Literal["learned", "fixed"] = "fixed"
    """How a patch of the student becomes one of the teacher: learned = by a linear layer, thrown away at the
    end; fixed = it is one already: its channels are the teacher's leading directions, turned at random, so
    that its cosines are the teacher's."""
    loss: Literal["cosine", "smooth_l1"] = "cosine"
    """cosine = 1 - cosine of both; smooth_l1 = of their differences, in units of a channel's deviation."""
    cache: bool = True
    """Keep the teacher's features on disk, in half precision: it sees every square once. Without, it sees
    each anew in every epoch, which suits folders that are too large."""
    cache_dir: str | None = None
    """Folder of these features; None = PPAP_CACHE_DIR, or ~/.cache/ppap."""
    labels: bool = True
    """Read the labels of a folder that has any, for the table at the end and for --distill.clusters; nothing
    is learned from them."""
    measured: int = 64
    """Images that the table at the end is measured on, validation images where there are any."""
    neighbours: int = 20
    """Nearest patches, in other images, that the table compares."""

    def __post_init__(self) -> None:
        if self.condition != "auto":
            parse_condition(self.condition, "distill.condition")
        for name in ("resolution", "teacher_heads"):
            value = getattr(self, name)
            ok = value is None or value >= 1
            check_field(ok, f"distill.{name.replace('_', '-')}", value, "give at least 1")
        check_field(self.squares >= 1, "distill.squares", self.squares, "give at least 1")
        check_field(self.neighbours >= 1, "distill.neighbours", self.neighbours, "give at least 1")
        check_field(self.measured >= 2, "distill.measured", self.measured, "give at least 2 images")
        ok = self.clusters is None or 2 <= self.clusters <= 1000
        check_field(ok, "distill.clusters", self.clusters, "give 2 to 1000")
