"""Probes trained on the frozen backbone alone: the rows that the paper calls DINO."""

import torch
from tqdm import tqdm

from ppap.data import SegmentationDataset, train_loader
from ppap.data.loading import stream
from ppap.evaluation.comparison import settle_clusters
from ppap.methods.engine import Engine
from ppap.methods.finite import check_finite
from ppap.nets.feature_cache import CachedFeatures
from ppap.stopping import each


def train_frozen_probes(engine: Engine, dataset: SegmentationDataset | CachedFeatures, steps: int) -> None:
    """Draw both probes anew and train them on the frozen features, as training does on the code.

    The same optimisers, rates, batch size, sample order and losses; the network itself is not touched.

    Args:
        engine: network whose probes are replaced.
        dataset: training images, or their cached features; without labels the linear probe stays as drawn.
        steps: number of steps.

    Raises:
        DataError: fewer images than one batch.
        NumberError: a loss is not finite.
    """
    train = engine.config.train
    loader = train_loader(dataset, train.batch_size, train.seed, engine.config.data.workers)
    torch.manual_seed(train.seed)
    engine.renew_probes(engine.net.backbone.width)
    batches = stream(loader)
    for step in each(tqdm(range(steps), desc="frozen probes", unit="step", disable=None)):
        _, _, batch = next(batches)
        code = engine.frozen_code_of(batch)
        losses = engine.train_probes(code, batch["label"].to(engine.device))
        if step % train.log_every == 0 or step == steps - 1:
            check_finite(losses, step)
    settle_clusters(engine, engine.frozen_code_of, dataset)
