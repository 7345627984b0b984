"""Settings of the evaluation and of the comparison table; parts of ``ppap.settings.config.Config``."""

import math
from dataclasses import dataclass, field
from typing import Literal

from ppap.settings.checks import check_field, check_rate
from ppap.settings.methods import Method


@dataclass(frozen=True, kw_only=True)
class NeighboursConfig:
    """Nearest neighbours among labelled embeddings (ImageNet-S; the defaults are its published values, and
    where those are for other networks, our choice)."""

    k: int = 10
    """Neighbours that decide."""
    temperature: float = 0.07
    """A neighbour weighs exp(cosine / temperature)."""
    tensor: Literal["code", "z", "guidance"] = "code"
    """What is compared (our choice): code = the trained features that the probes read, z = their projection,
    guidance = the frozen features."""
    resolution: int = 256
    """Shorter side of the images [pixels], resized bilinearly, not cropped."""
    fit: Literal["resize", "floor", "pad"] = "resize"
    """Sides that are no multiple of the patch (our choice): resize = to the nearest multiple, floor = the
    rest at the right and lower edge is cut off, pad = with the mean colour, cut off again afterwards."""
    upsample: int = 4
    """Factor by which the feature map is up-sampled, bilinearly. Published for maps of stride 32; a ViT's are
    finer already, so that smaller factors cost little."""
    rematch: bool = False
    """Also score after matching predicted to true ids by the images they occur in, beside the scores
    without."""
    masks: str | None = None
    """New folder for the predicted masks (RGB PNG, id = R + 256 G); None = not written."""
    memory_mib: int = 256
    """Limit of the comparison's temporaries [MiB]."""

    def __post_init__(self) -> None:
        for name, least in (("k", 1), ("resolution", 16), ("upsample", 1), ("memory_mib", 1)):
            value = getattr(self, name)
            check_field(
                value >= least,
                f"eval.neighbours.{name.replace('_', '-')}",
                value,
                f"give at least {least}",
            )
        check_field(
            self.temperature > 0 and math.isfinite(self.temperature),
            "eval.neighbours.temperature",
            self.temperature,
            "give a positive number",
        )


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Evaluation on the validation images."""

    protocol: Literal["auto", "probes", "neighbours"] = "auto"
    """probes = cluster probe (matched) and linear probe per pixel; neighbours = nearest neighbours among
    labelled embeddings; auto = neighbours for ImageNet-S, else probes."""
    unmatched: Literal["wrong", "drop", "many-to-one", "left-out"] = "wrong"
    """Pixels of clusters without a class, where there are more clusters than classes: wrong = wrong
    predictions; drop = left out, with every cluster beyond the number of classes (published code);
    many-to-one, left-out = as for --eval.extra-clusters."""
    extra_clusters: Literal["many-to-one", "left-out"] = "many-to-one"
    """The same where labels came after a training without any, which says nothing of their classes:
    many-to-one = after the matching one to one, each of the other clusters takes the class that most of its
    pixels have; left-out = their pixels are not counted."""
    batch_size: int = 16
    """Images per batch."""
    cluster_init: Literal["random", "kmeans", "linkage"] = "random"
    """Centres of the cluster probe. random = drawn, and trained along with the network (published); kmeans =
    fitted by k-means on the codes of the training images, without labels, before they are measured and at the
    end, so that they do not hang on the draw; linkage = likewise by k-means with four centres per cluster,
    which average linkage merges by their cosines, so that clusters may be of very different size."""
    crf: Literal["native", "pydensecrf", "none"] = "none"
    """Dense CRF on the class scores, beside the results without it, which are always reported: native = the
    library of ppap, on the GPU of the evaluation if its CUDA library was built, else on all threads;
    pydensecrf = that package, on one thread. `ppap eval` takes native by default, where it can run; in
    training it concerns the comparison at the end, never the validations."""
    crf_image: Literal["original", "published"] = "original"
    """Picture that the CRF sees: original = the pixels as loaded, published = the normalised image turned
    back and truncated, which makes some values 1 too low."""
    pictures: int = 6
    """Validation images drawn in the report."""
    neighbours: NeighboursConfig = field(default_factory=NeighboursConfig)
    """Settings of the protocol neighbours."""

    def __post_init__(self) -> None:
        check_field(self.pictures >= 0, "eval.pictures", self.pictures, "give 0 or more")
        check_field(self.batch_size >= 1, "eval.batch-size", self.batch_size, "give at least 1")


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """A table at the end of training: several codes under the same probes, whose initial weights and batches
    follow --train.seed."""

    rows: tuple[Literal["colour", "conditioned", Method], ...] = ()
    """colour = colours of the patches; conditioned = frozen features through the map of --model.condition,
    as the sets see them; the others are methods (--method), trained as this run is, but for the method,
    with its batches, steps and optimiser. Empty = no table."""
    fixed_phi0: float | Literal["same"] | None = None
    """Threshold of the row fixed [cosine]; None = --loss.phi0, or where that is auto one whose sets have the
    same size without propagation, as the row ans then has; same = --loss.phi0 for all rows, auto or not, as
    in the paper's Table 5: sets without propagation are smaller then."""
    images: int = 1024
    """Training images at most, spread over the set, that the probes learn from; their codes and labels are
    held in memory."""
    steps: int = 200
    """Steps of the probes."""
    batch_size: int = 16
    """Images per step."""
    lr: float = 0.05
    """Adam's first rate; it falls to 0 along a cosine, so that the probes settle."""
    starts: int = 5
    """Cluster probes from different initial weights; the one with the least probe loss counts. Not for
    --eval.cluster-init linkage, which starts once."""
    clusterings: int = 1
    """Clusterings of every row, from other seeds, whose mean score the table has where --eval.cluster-init is
    kmeans or linkage: a single one may lie several points off. With more than one, the other way stands
    beside it. With CRF and in pictures: the first."""

    def __post_init__(self) -> None:
        check_field(len(set(self.rows)) == len(self.rows), "compare.rows", self.rows, "name each row once")
        for name in ("images", "steps", "batch_size", "starts", "clusterings"):
            value = getattr(self, name)
            check_field(value >= 1, f"compare.{name.replace('_', '-')}", value, "give at least 1")
        check_rate("compare.lr", self.lr)
        own = self.fixed_phi0
        ok = own in (None, "same") or (not isinstance(own, str) and math.isfinite(own))
        check_field(ok, "compare.fixed-phi0", own, "give a finite cosine, or same")

    @property
    def own_phi0(self) -> float | None:
        """Threshold that the row fixed alone has [cosine]; None = that of the run."""
        return None if isinstance(self.fixed_phi0, str) else self.fixed_phi0
