"""Nearest-neighbour segmentation against a plain restatement, one position and one embedding at a time."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from ppap.data import SegmentationDataset
from ppap.data.transforms import Geometry, normalise
from ppap.errors import DataError
from ppap.evaluation import neighbours
from ppap.evaluation.neighbours import Bank, build_bank, classify, evaluate_neighbours
from ppap.settings.config import NeighboursConfig

CPU = torch.device("cpu")
PATCH = 8
SETTINGS = NeighboursConfig(k=3, resolution=24, upsample=2)


class Pictures(SegmentationDataset):
    """A few pictures of different sizes with stripes of ids 0..classes-1 and an ignored row."""

    def __init__(self, classes=4, count=3, seed=0, sizes=((30, 41), (57, 33), (40, 40))):
        super().__init__(Geometry(24), classes)
        self.seed, self.count, self.sizes = seed, count, sizes

    def __len__(self):
        return self.count

    def name(self, i):
        return f"n{i % 2:08d}/image_{i}"

    def load(self, i):
        rng = np.random.default_rng((self.seed, i))
        height, width = self.sizes[i % len(self.sizes)]
        ids = rng.integers(0, self.classes, (-(-height // 15), -(-width // 15)))
        ids = ids.repeat(15, axis=0).repeat(15, axis=1)[:height, :width].copy()
        colours = np.random.default_rng(7).integers(30, 220, (self.classes, 3))
        pixels = colours[ids] + rng.integers(-25, 25, (height, width, 3))
        ids[0] = -1
        return Image.fromarray(pixels.astype(np.uint8)), ids


def map_of(image):
    """Fixed features (1, 12, h, w) of an image whose sides may be no multiple of the patch."""
    image = F.pad(image, (0, -image.shape[3] % PATCH, 0, -image.shape[2] % PATCH))
    return F.pixel_unshuffle(F.avg_pool2d(image, PATCH // 2), 2)


def stated(bank_set, val_set, k, temperature, upsample, resolution):
    """The protocol word by word: mean IoU, and the predicted ids of every validation image."""

    def features(picture):
        width, height = picture.size
        short = min(width, height)
        size = [round(int(resolution * side / short) / PATCH) * PATCH for side in (width, height)]
        pixels = np.array(picture.resize(size, Image.Resampling.BILINEAR))
        found = map_of(normalise(pixels)[None])
        return F.interpolate(found, scale_factor=upsample, mode="bilinear", align_corners=False)[0]

    rows, labels = [], []
    for i in range(len(bank_set)):
        picture, ids = bank_set.load(i)
        found = features(picture)
        mask = F.interpolate(torch.tensor(ids)[None, None].double(), size=found.shape[1:], mode="nearest")
        for label in range(bank_set.classes):
            inside = (mask[0, 0] == label).float()
            if inside.sum() > 0:
                rows.append(F.normalize((found * inside).sum(dim=(1, 2)), dim=0))
                labels.append(label)
    classes, predictions = val_set.classes, []
    true_positive, truth_size, found_size = np.zeros((3, classes))
    for i in range(len(val_set)):
        picture, ids = val_set.load(i)
        found = features(picture)
        labelled = torch.zeros(found.shape[1:])
        for y in range(found.shape[1]):
            for x in range(found.shape[2]):
                query = F.normalize(found[:, y, x], dim=0)
                near = sorted(((float(query @ row), c) for row, c in zip(rows, labels, strict=True)))[-k:]
                weight = [
                    sum(math.exp(s / temperature) for s, c in near if c == label) for label in range(classes)
                ]
                labelled[y, x] = int(np.argmax(weight))
        full = F.interpolate(labelled[None, None], size=ids.shape, mode="nearest")[0, 0].long().numpy()
        predictions.append(full)
        for label in range(classes):
            counted = ids != -1
            true_positive[label] += ((full == label) & (ids == label) & counted).sum()
            truth_size[label] += ((ids == label) & counted).sum()
            found_size[label] += ((full == label) & counted).sum()
    iou = true_positive / (truth_size + found_size - true_positive + 1e-10)
    return 100 * iou.mean(), len(rows), predictions


def test_it_is_the_protocol_word_by_word(tmp_path):
    # Of 5 ids one never occurs: it counts as 0.
    bank_set, val_set = Pictures(4, 3), Pictures(4, 2, seed=1)
    bank_set.classes = val_set.classes = 5
    bank_set.load, val_set.load = Pictures(4, 3).load, Pictures(4, 2, seed=1).load
    miou, embeddings, predictions = stated(bank_set, val_set, 3, 0.07, 2, 24)
    bank = build_bank(map_of, bank_set, SETTINGS, patch_size=PATCH, device=CPU)
    result = evaluate_neighbours(
        map_of, bank, val_set, SETTINGS, patch_size=PATCH, device=CPU, masks=tmp_path / "masks"
    )
    assert result.embeddings == embeddings and 20 < result.scores.miou < 90
    assert result.scores.miou == pytest.approx(miou, abs=1e-9)
    assert len(result.scores.iou) == 5 and result.scores.iou[4] == 0
    for i, expected in enumerate(predictions):
        mask = np.array(Image.open(tmp_path / "masks" / f"{val_set.name(i)}.png")).astype(int)
        assert np.array_equal(mask[..., 0] + 256 * mask[..., 1], expected) and not mask[..., 2].any()


def test_memory_and_processes_change_nothing():
    g = torch.Generator().manual_seed(0)
    bank = Bank(
        F.normalize(torch.randn(700, 16, generator=g), dim=1), torch.randint(920, (700,), generator=g)
    )
    queries = F.normalize(torch.randn(333, 16, generator=g), dim=1)
    whole = classify(queries, bank, k=10, memory=2**30)
    assert torch.equal(whole, classify(queries, bank, k=10, memory=2**16))
    # As weights summed per id of 920, for the whole matrix at once.
    top, index = (queries @ bank.rows.T).topk(10)
    weights = torch.zeros(333, 920, dtype=torch.float64)
    weights.scatter_add_(1, bank.labels[index], (top.double() / 0.07).exp())
    assert torch.equal(whole, weights.argmax(dim=1))

    data = Pictures(4, 3)
    banks = [
        build_bank(map_of, data, SETTINGS, patch_size=PATCH, device=CPU, workers=workers)
        for workers in (0, 2)
    ]
    assert torch.equal(banks[0].rows, banks[1].rows) and torch.equal(banks[0].labels, banks[1].labels)


def test_memory_is_bounded():
    from tests.helpers import peak_bytes

    bank = Bank(F.normalize(torch.randn(4000, 4), dim=1), torch.arange(4000))
    queries = F.normalize(torch.randn(3000, 4), dim=1)
    budget = 2**20
    assert 4 * 4000 * 3000 > 40 * budget
    assert peak_bytes(lambda: classify(queries, bank, memory=budget)) < 1.5 * budget


def test_919_classes(tmp_path):
    data = Pictures(920, 3)
    bank = build_bank(map_of, data, SETTINGS, patch_size=PATCH, device=CPU)
    result = evaluate_neighbours(
        map_of, bank, data, replace(SETTINGS, k=1), patch_size=PATCH, device=CPU, masks=tmp_path
    )
    assert len(result.scores.iou) == 920 and max(bank.labels.tolist()) > 255
    saved = np.array(Image.open(tmp_path / "n00000000/image_0.png"))
    assert saved[..., 1].max() > 0 and not result.notes


@pytest.mark.parametrize("fit", ["resize", "floor", "pad"])
def test_every_fit_covers_the_image(fit):
    settings = replace(SETTINGS, fit=fit)
    picture = Image.fromarray(np.full((30, 41, 3), 90, np.uint8))
    pixels = neighbours.fit(picture, settings, PATCH)
    # 24 x 32 pixels after resizing to 24 x int(24 * 41 / 30).
    expected = {"resize": (24, 32), "floor": (24, 32), "pad": (24, 32)}
    assert pixels.shape[:2] == expected[fit]
    narrow = Image.fromarray(np.full((30, 44, 3), 90, np.uint8))  # 24 x 35
    pixels = neighbours.fit(narrow, settings, PATCH)
    assert pixels.shape[:2] == {"resize": (24, 32), "floor": (24, 32), "pad": (24, 35)}[fit]
    features = neighbours.position_features(map_of, normalise(pixels)[None], settings, PATCH)
    # Positions of 4 pixels: those of the padding beyond pixel 35 are cut off.
    assert features.shape[1:] == (6, 9 if fit == "pad" else 8)
    data = Pictures(4, 2)
    bank = build_bank(map_of, data, settings, patch_size=PATCH, device=CPU)
    result = evaluate_neighbours(map_of, bank, data, settings, patch_size=PATCH, device=CPU)
    assert result.scores.pixels == sum((data.load(i)[1] >= 0).sum() for i in range(2))


def test_rematching_is_by_images_and_beside_the_score():
    data = Pictures(4, 3)
    bank = build_bank(map_of, data, SETTINGS, patch_size=PATCH, device=CPU)
    turned = Bank(bank.rows, torch.tensor([0, 2, 3, 1])[bank.labels])
    settings = replace(SETTINGS, rematch=True)
    right, wrong = (
        evaluate_neighbours(map_of, b, data, settings, patch_size=PATCH, device=CPU) for b in (bank, turned)
    )
    assert wrong.scores.miou < right.scores.miou - 10
    assert right.rematched is not None
    # Three images that hold every id in different combinations would decide; by hand:
    together = torch.tensor([[9, 9, 9, 9], [9, 1, 5, 2], [9, 4, 0, 0], [9, 0, 0, 3]])
    assert neighbours.image_level_match(together).tolist() == [0, 2, 1, 3]
    counts = torch.diag(torch.tensor([5, 6, 7, 8]))[[0, 2, 3, 1]]
    shifted = torch.diag(torch.tensor([1, 1, 1, 1]))[[0, 2, 3, 1]]
    order = np.argsort(neighbours.image_level_match(shifted))
    assert torch.equal(counts[order], torch.diag(torch.tensor([5, 6, 7, 8])))


def test_what_cannot_be_measured_is_said():
    few = Pictures(2, 1)
    bank = build_bank(map_of, few, SETTINGS, patch_size=PATCH, device=CPU)
    result = evaluate_neighbours(map_of, bank, few, replace(SETTINGS, k=9), patch_size=PATCH, device=CPU)
    assert "fewer than k = 9" in result.notes[0]
    few.load = lambda i: (Pictures(2, 1).load(i)[0], None)
    with pytest.raises(DataError, match="has no mask"):
        build_bank(map_of, few, SETTINGS, patch_size=PATCH, device=CPU)
    ids = np.full((30, 41), -1)
    few.load = lambda i: (Pictures(2, 1).load(i)[0], ids)
    with pytest.raises(DataError, match="nothing to compare"):
        build_bank(map_of, few, SETTINGS, patch_size=PATCH, device=CPU)
    with pytest.raises(ValueError, match="--eval.neighbours.k is 0"):
        NeighboursConfig(k=0)
