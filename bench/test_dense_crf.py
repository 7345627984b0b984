"""Dense CRF: native against pydensecrf, on photographs (``--photos DIR``) or scenes, and on noise."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bench.crf_pictures import CLASSES, SIDE, coloured_noise, logits_of
from ppap.data import build_datasets
from ppap.kernels import dense_crf, dense_crf_batch
from ppap.kernels.dense_crf import unavailable_reason
from ppap.settings.presets import demo

COUNT = 4
IMPLEMENTATIONS = [name for name in ("cpp", "pydensecrf") if unavailable_reason(name) is None]


def pictures(folder: Path | None) -> Iterator[np.ndarray]:
    """Images (SIDE, SIDE, 3) uint8: photographs of a folder, or generated scenes."""
    if folder is None:
        scenes = build_datasets(demo().data, ("val",)).val
        found = [Image.fromarray(np.asarray(scenes.pixels(i))) for i in range(COUNT)]
    else:
        files = sorted(folder.iterdir())
        found = [Image.open(file).convert("RGB") for file in files[:: max(len(files) // COUNT, 1)][:COUNT]]
    for image in found:
        yield np.array(image.resize((SIDE, SIDE), Image.Resampling.BILINEAR))


@pytest.fixture
def pairs(request):
    """(image, (logits,)) of COUNT pictures."""
    blocks = (torch.arange(SIDE) // 24)[:, None] * 5 + torch.arange(SIDE) // 40
    logits = logits_of(blocks % CLASSES, CLASSES, 0)
    folder = request.config.getoption("--photos")
    count = 1 if request.config.getoption("--quick") else COUNT
    return [(image, (logits,)) for image in list(pictures(Path(folder) if folder else None))[:count]]


@pytest.fixture
def threads():
    """Set torch's thread count for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
@pytest.mark.parametrize("picture", ["pictures", "noise"])
def test_one_thread(impl, picture, pairs, threads, measure):
    threads(1)
    if picture == "noise":
        pairs = [(coloured_noise(), pairs[0][1])]
    if "pydensecrf" in IMPLEMENTATIONS:  # no time is reported for a wrong result
        image, (logits,) = pairs[0]
        q, wanted = (dense_crf(image, logits, impl=name) for name in (impl, "pydensecrf"))
        assert (q - wanted).abs().max() <= 5e-4
    measure(lambda: list(dense_crf_batch(pairs, impl=impl)), f"{len(pairs)} {picture}, {CLASSES} classes")


@pytest.mark.skipif("cpp" not in IMPLEMENTATIONS, reason=str(unavailable_reason("cpp")))
def test_two_threads(pairs, threads, measure):
    threads(2)
    measure(lambda: list(dense_crf_batch(pairs)), f"{len(pairs)} pictures, {CLASSES} classes")
