"""A training step of the demo, reading included: from images or cached features, by backend of the loss."""

from dataclasses import replace

import pytest

from bench.machine import DEVICE
from ppap.data import build_datasets
from ppap.data.loading import stream
from ppap.kernels import available_backends, use_backend
from ppap.methods.engine import build_engine
from ppap.nets.feature_cache import cache_features
from ppap.settings.presets import demo

STEPS = 4  # timed together: one step alone would show the loader's prefetching
BACKENDS = [name for name, reason in available_backends().items() if reason is None]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("source", ["images", "cached"])
def test_training_step(source, backend, tmp_path, measure, request):
    config = demo()
    config = replace(
        config,
        data=replace(config.data, scenes_train=64, scenes_val=1, workers=0),
        # Numbers where the demo leaves the choice to the run.
        model=replace(config.model, condition="none"),
        loss=replace(config.loss, phi0=0.8, psi0=0.55),
        optim=replace(config.optim, lr=3e-3),
    )
    data = build_datasets(config.data).train
    engine = build_engine(config, data.classes, DEVICE)
    batch_size = config.train.batch_size
    if source == "cached":
        data = cache_features(engine.net, data, root=tmp_path, batch_size=batch_size, device=DEVICE)
    batches = stream(engine.start(data))
    step = iter(range(10**9))

    steps = 1 if request.config.getoption("--quick") else STEPS

    def run() -> None:
        with use_backend(backend):
            for _ in range(steps):
                engine.train_step(next(batches)[2], next(step))

    measure(run, f"demo: {steps} training steps of {batch_size} images")
