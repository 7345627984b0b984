"""The same probes on several codes: what a method is worth, apart from the noise of its probes.

Every row (plain colours, frozen features, a fixed threshold, PPAP) gets the same treatment: the codes of the
training images are computed once, a linear probe is trained on them with the same steps, rate, batches and
seed, and clusters are found in them as ``eval.cluster_init`` says: of several cluster probes trained like it
the one with the least loss, or fitted centres, from several seeds if ``compare.clusterings`` asks for a mean
score. Labels choose nothing; they train the linear probe, match clusters to classes, and score.

Legend: n training images, B images, D channels, h w patch grid, H W pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, Subset
from tqdm import tqdm

from ppap.data import Datasets, EpochSampler, val_loader
from ppap.data.loading import stream
from ppap.errors import NumberError
from ppap.evaluation.evaluate import BatchCode, Evaluation, evaluate
from ppap.methods.engine import Engine, build_engine
from ppap.methods.finite import Skips
from ppap.methods.table import TITLES
from ppap.nets.clustering import cosine_kmeans, linked_clusters
from ppap.nets.feature_cache import Sources
from ppap.nets.model import patch_rows
from ppap.nets.probes import ClusterProbe, LinearProbe
from ppap.runs.randomness import own_randomness
from ppap.settings.config import Config
from ppap.stopping import each

FITTED: dict[Literal["kmeans", "linkage"], str] = {"kmeans": "k-means", "linkage": "average linkage"}
"""Ways of ``eval.cluster_init`` to find clusters in finished codes -> what a report calls them."""
CodeOf = Callable[[Tensor], Tensor]
"""Images (B, 3, H, W) -> code (B, D, h, w)."""


class Row(NamedTuple):
    """One method of a comparison."""

    code_of: CodeOf
    """Images (B, 3, H, W) on the device -> code (B, D, h, w)."""
    probes: tuple[ClusterProbe, LinearProbe]
    scores: Evaluation
    """Of both probes on the validation images."""


def compare(
    config: Config,
    data: Datasets,
    sources: Sources,
    engine: Engine,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, Row]:
    """Measure the rows that ``config.compare.rows`` names.

    Args:
        config: of the run; rows that need training repeat it with another method.
        data: the datasets; the validation images need labels.
        sources: of the training and of the validation images.
        engine: the run's trained network, for the row of its method and for frozen.
        should_stop: asked between batches; True ends the comparison with InterruptedError.

    Returns:
        Row name -> result, in the order of :data:`TITLES`.

    Raises:
        NumberError: a loss is not finite.
        InterruptedError: see `should_stop`.
    """
    settings = config.compare
    rows = {}
    for name in (name for name in TITLES if name in settings.rows):
        if name == "conditioned" and engine.net.condition is None:
            tqdm.write(f"{TITLES[name]:<19} left out: --model.condition is none, so it is the row above")
            continue
        code_of, batch_code, own = _row(name, config, data, sources, engine, should_stop)
        probes, clusterings = _probes(batch_code, own.train, data.train.classes, engine, config, should_stop)
        scores = evaluate(
            batch_code,
            probes,
            data.val,
            config.eval,
            patch_size=engine.net.backbone.patch_size,
            device=engine.device,
            workers=config.data.workers,
            should_stop=should_stop,
            source=own.val,
            clusterings=clusterings,
        )
        rows[name] = Row(code_of, probes, scores)
        tqdm.write(f"{TITLES[name]:<19} {summary_text(scores)}")
    return rows


def summary_text(scores: Evaluation) -> str:
    """One line of a row's scores, with standard deviations where they are means over several clusterings."""
    spread = scores.spread()
    return " ".join(
        f"{key} {value:.2f}" + (f" ± {spread[key]:.2f}" if key in spread else "")
        for key, value in scores.summary().items()
    )


def _row(
    name: str,
    config: Config,
    data: Datasets,
    sources: Sources,
    engine: Engine,
    should_stop: Callable[[], bool],
) -> tuple[CodeOf, BatchCode, Sources]:
    """Code of images, code of batches, and what gives these batches."""
    if name == "colour":
        code_of = colour_code(engine.net.backbone.patch_size)
        return code_of, lambda batch: code_of(batch["image"].to(engine.device)), Sources(data.train, data.val)
    if name == "frozen":
        return engine.frozen_code, engine.frozen_code_of, sources
    if name == "conditioned":
        return engine.conditioned_code, engine.conditioned_code_of, sources
    if name != config.method:
        engine = train_variant(variant(config, name), sources.train, engine, should_stop)
    return engine.code, engine.code_of, sources


def variant(config: Config, method: str) -> Config:
    """The run's settings with another method; fixed has a threshold of its own, if one is given."""
    phi0 = config.compare.own_phi0
    if method == "fixed" and phi0 is not None:
        config = replace(config, loss=replace(config.loss, phi0=phi0))
    return replace(config, method=method)


def train_variant(
    config: Config, training_set: Dataset[dict[str, Any]], engine: Engine, should_stop: Callable[[], bool]
) -> Engine:
    """A network trained as `config` says, with the initial weights, batches and steps of `engine`'s run.

    What `config` leaves to be chosen is as in that run.
    """
    with own_randomness():
        trained = build_engine(
            config, engine.classes, engine.device, choices=engine.choices, condition=engine.net.condition
        )
        batches = stream(trained.start(training_set, should_stop=should_stop))
        total, skips = trained.method.data.total_steps, Skips(trained.gate)
        for step in tqdm(range(total), desc="baseline", unit="step", leave=False, disable=None):
            _, _, batch = next(batches)
            values = trained.train_step(batch, step)
            skips.add(step, trained.skipped, values)
            if should_stop():
                raise InterruptedError
        skips.read()
    return trained


def _probes(
    batch_code: BatchCode,
    source: Dataset[dict[str, Any]],
    classes: int,
    engine: Engine,
    config: Config,
    should_stop: Callable[[], bool],
) -> tuple[tuple[ClusterProbe, LinearProbe], dict[str, list[ClusterProbe]]]:
    """Both probes, and further clusterings: see ``compare.clusterings``."""
    settings, seed, init = config.compare, config.train.seed, config.eval.cluster_init
    with own_randomness():
        codes, labels = codes_of(batch_code, source, settings.images, config, should_stop)
        probes = fit_probes(
            codes,
            labels,
            classes,
            config,
            seed=seed,
            patch_size=engine.net.backbone.patch_size,
            device=engine.device,
            should_stop=should_stop,
        )
        further: dict[str, list[ClusterProbe]] = {}
        for name in (name for name in FITTED if init in FITTED and settings.clusterings > 1):
            other = replace(config, eval=replace(config.eval, cluster_init=name))
            numbers = range(name == init, settings.clusterings)
            seeds = [further_seed(seed, number) for number in each(numbers)]
            further["" if name == init else name] = [
                fitted_clusters(codes, classes, other, one, engine.device) for one in seeds
            ]
    return probes, further


def further_seed(seed: int, number: int) -> int:
    """Of clustering `number`, 0 the first: apart from those of runs whose seeds follow each other."""
    return seed + 1_000 * number


@torch.no_grad()
def codes_of(
    batch_code: BatchCode,
    source: Dataset[dict[str, Any]],
    limit: int,
    config: Config,
    should_stop: Callable[[], bool] = lambda: False,
) -> tuple[Tensor, Tensor]:
    """Codes (n, D, h, w) fp32 and labels (n, H, W) int64 on the CPU of at most `limit` images of `source`.

    The images are spread evenly over the dataset and come in its order.
    """
    count = min(limit, len(source))
    part = Subset(source, [i * len(source) // count for i in range(count)])
    codes, labels = [], []
    loader = val_loader(part, config.eval.batch_size, config.data.workers)
    for batch in each(tqdm(loader, desc="codes", unit="batch", leave=False, disable=None)):
        codes.append(batch_code(batch).float().cpu())
        labels.append(batch["label"])
        if should_stop():
            raise InterruptedError
    return torch.cat(codes), torch.cat(labels)


def fit_probes(
    codes: Tensor,
    labels: Tensor,
    classes: int,
    config: Config,
    *,
    seed: int,
    patch_size: int,
    device: torch.device,
    should_stop: Callable[[], bool] = lambda: False,
) -> tuple[ClusterProbe, LinearProbe]:
    """Fit both probes to fixed codes.

    Args:
        codes: (n, D, h, w) float32.
        labels: (n, H, W) int64, -1 = ignored; for the linear probe alone.
        classes: number of classes and of clusters.
        config: its section ``compare`` has steps, rate, batch size and starts; ``eval.cluster_init``.
        seed: of initial weights and batches.
        patch_size: side of a patch [pixels].
        device: where they are trained.
        should_stop: asked after each step; True raises InterruptedError.

    Returns:
        The cluster probe, the best of ``compare.starts`` by its loss over all codes, or as
        :func:`fit_clusters` makes it; and the linear probe.
    """
    settings = config.compare
    torch.manual_seed(seed)
    linear = LinearProbe(codes.shape[1], classes).to(device)
    fitted = config.eval.cluster_init != "random"
    drawn = 0 if fitted else settings.starts
    starts = [ClusterProbe(codes.shape[1], classes).to(device) for _ in range(drawn)]
    parameters = [p for probe in (linear, *starts) for p in probe.parameters()]
    optimiser = torch.optim.Adam(parameters, lr=settings.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, settings.steps)
    sampler = EpochSampler(len(codes), min(settings.batch_size, len(codes)), seed)
    for step in each(tqdm(range(settings.steps), desc="probes", unit="step", leave=False, disable=None)):
        epoch, place = divmod(step, sampler.steps_per_epoch)
        index = torch.from_numpy(sampler.order(epoch)[place * sampler.batch_size :][: sampler.batch_size])
        code, label = codes[index].to(device), labels[index].to(device)
        loss = linear.loss(code, label, patch_size)
        if starts:
            loss = loss + cluster_losses(starts, code).sum()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        schedule.step()
        if should_stop():
            raise InterruptedError
    if fitted:
        return fitted_clusters(codes, classes, config, seed, device), linear
    with torch.no_grad():
        parts = [codes[i : i + settings.batch_size] for i in range(0, len(codes), settings.batch_size)]
        total = sum(cluster_losses(starts, part.to(device)) * len(part) for part in parts)
    return starts[int(total.argmin())], linear


def fitted_clusters(
    codes: Tensor, classes: int, config: Config, seed: int, device: torch.device
) -> ClusterProbe:
    """A cluster probe as :func:`fit_clusters` makes it."""
    probe = ClusterProbe(codes.shape[1], classes).to(device)
    fit_clusters(probe, codes, config, seed)
    return probe


def fit_clusters(probe: ClusterProbe, codes: Tensor, config: Config, seed: int) -> None:
    """Put centres of the patches of codes (n, D, h, w), found as ``eval.cluster_init`` says, into a probe.

    Raises:
        NumberError: the code is not finite.
        DataError: fewer patches than clusters.
    """
    if not torch.isfinite(codes).all():
        raise NumberError("the code is not finite: no clusters can be found in it")
    rows, clusters = patch_rows(codes), len(probe.clusters)
    if config.eval.cluster_init == "linkage":
        found = linked_clusters(rows, clusters, seed=seed)
    else:
        found = cosine_kmeans(rows, clusters, starts=config.compare.starts, seed=seed)
    with torch.no_grad():
        probe.clusters.copy_(found.centres)


def settle_clusters(
    engine: Engine,
    batch_code: BatchCode,
    source: Dataset[dict[str, Any]],
    should_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Fit the engine's cluster probe to the codes of its training images, where ``--eval.cluster-init``
    says so.

    Args:
        engine: whose probe it is; nothing else of it changes, no random state either.
        batch_code: batch of `source` -> code.
        source: training images, or their cached features.
        should_stop: asked between batches; True raises InterruptedError.

    Raises:
        DataError: fewer patches than clusters.
    """
    config = engine.config
    if config.eval.cluster_init == "random":
        return
    with own_randomness():
        codes, _ = codes_of(batch_code, source, config.compare.images, config, should_stop)
        fit_clusters(engine.cluster, codes, config, config.train.seed)


def cluster_losses(starts: Sequence[ClusterProbe], code: Tensor) -> Tensor:
    """:meth:`ClusterProbe.loss` of several probes on a code (B, D, h, w), by one product: (S,)."""
    centres = torch.cat([F.normalize(start.clusters, dim=1) for start in starts])
    cosines = F.conv2d(F.normalize(code, dim=1), centres[:, :, None, None])
    return -cosines.unflatten(1, (len(starts), -1)).amax(dim=2).mean(dim=(0, 2, 3))


def colour_code(patch_size: int) -> CodeOf:
    """Mean and standard deviation of the colours of each patch, (B, 6, h, w): what needs no network.

    Sides that are no multiple of the patch are padded like the network's input, with the mean colour.
    """

    def code_of(image: Tensor) -> Tensor:
        image = F.pad(image, (0, -image.shape[3] % patch_size, 0, -image.shape[2] % patch_size))
        mean = F.avg_pool2d(image, patch_size)
        square = F.avg_pool2d(image.square(), patch_size)
        return torch.cat([mean, (square - mean.square()).clamp(min=0).sqrt()], dim=1)

    return code_of
