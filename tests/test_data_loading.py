"""Batches: order, exact resume, independence of the number of loader processes."""

import multiprocessing
import os
import signal
import time

import pytest
import torch
from PIL import Image

from ppap.data import EpochSampler, SegmentationDataset, build_dataset, train_loader, val_loader
from ppap.data.loading import processes, stream
from ppap.data.transforms import Geometry
from ppap.errors import DataError
from ppap.settings.config import DataConfig
from ppap.train import Trainer, parse_arguments
from tests.runs import TINY


class Plain(SegmentationDataset):
    """Grey images whose brightness is their index."""

    def __init__(self, length):
        super().__init__(Geometry(16), 3)
        self.length = length

    def __len__(self):
        return self.length

    def name(self, i):
        return str(i)

    def load(self, i):
        return Image.new("RGB", (20, 16), (i, i, i)), None


class Interrupted(Plain):
    """Its processes get an interrupt while they load."""

    def load(self, i):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        return super().load(i)


def indices(loader):
    return [batch["index"].tolist() for batch in loader]


def test_an_epoch_is_a_permutation_without_the_rest():
    sampler = EpochSampler(23, 4, seed=1)
    batches = list(sampler)
    assert len(sampler) == len(batches) == 5
    flat = [i for batch in batches for i in batch]
    assert len(set(flat)) == 20 and all(len(b) == 4 for b in batches)
    assert sorted(sampler.order(0)) == list(range(23))


def test_order_depends_on_seed_and_epoch_only():
    orders = {(s, e): tuple(EpochSampler(50, 5, seed=s).order(e)) for s in (0, 1, -1) for e in (0, 1)}
    assert len(set(orders.values())) == 6
    assert orders[0, 1] == tuple(EpochSampler(50, 7, seed=0, epoch=3).order(1))


def test_the_order_is_the_same_on_every_machine():
    assert EpochSampler(8, 2, seed=0).order(0).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]


def test_steps_beyond_the_epoch_run_into_later_ones():
    assert list(EpochSampler(10, 3, 0, 0, 7)) == list(EpochSampler(10, 3, 0, 2, 1))
    with pytest.raises(ValueError, match="0 or more"):
        EpochSampler(10, 3, 0, epoch=-1)


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_continues_exactly(workers):
    data = Plain(17)
    whole = [indices(train_loader(data, 4, seed=3, epoch=e)) for e in range(2)]
    resumed = train_loader(data, 4, seed=3, workers=workers, epoch=1, start_step=2)
    assert indices(resumed) == whole[1][2:]
    resumed.batch_sampler.move_to(0)
    assert indices(resumed) == whole[0]


@pytest.mark.parametrize("workers", [0, 1])
def test_stream_goes_on_across_epochs(workers):
    data = Plain(9)
    expected = [b for e in range(3) for b in indices(train_loader(data, 4, seed=0, epoch=e))]
    batches = stream(train_loader(data, 4, seed=0, workers=workers, start_step=1))
    got = [next(batches) for _ in range(5)]
    assert [b["index"].tolist() for _, _, b in got] == expected[1:]
    assert [(e, s) for e, s, _ in got] == [(0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]


def test_batches_are_tensors_of_the_contract():
    batch = next(iter(train_loader(Plain(4), 2, seed=0)))
    assert batch["image"].shape == (2, 3, 16, 16) and batch["image"].dtype == torch.float32
    assert batch["label"].shape == (2, 16, 16) and (batch["label"] == -1).all()
    assert batch["index"].dtype == torch.int64


@pytest.mark.parametrize("workers", [0, 2])
def test_validation_keeps_order_and_the_last_partial_batch(workers):
    assert indices(val_loader(Plain(5), 2, workers)) == [[0, 1], [2, 3], [4]]


def test_workers_do_not_change_the_pixels():
    data = build_dataset(DataConfig(kind="scenes", scenes_train=4, scenes_size=32, resolution=32), "train")
    one, two = (next(iter(train_loader(data, 4, seed=0, workers=w))) for w in (0, 2))
    assert torch.equal(one["image"], two["image"]) and torch.equal(one["label"], two["label"])


def test_loading_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    indices(train_loader(Plain(4), 2, seed=0))
    indices(val_loader(Plain(4), 2))
    assert torch.equal(before, torch.get_rng_state())


def test_too_few_images_names_both_numbers():
    with pytest.raises(DataError, match=r"3 images.*batch of 8.*--train.batch-size 3"):
        train_loader(Plain(3), 8, seed=0)


def test_workers_ignore_the_interrupt():
    assert indices(val_loader(Interrupted(4), 2, workers=1)) == [[0, 1], [2, 3]]


def test_errors_of_a_worker_keep_their_type():
    class Broken(Plain):
        def load(self, i):
            raise DataError("a.jpg: truncated")

    with pytest.raises(DataError, match=r"a\.jpg: truncated"):
        indices(val_loader(Broken(2), 2, workers=1))


@pytest.mark.parametrize(("cores", "ranks", "expected"), [(2, 1, 2), (64, 1, 8), (64, 16, 4), (2, 4, 1)])
def test_processes_follow_the_cores(monkeypatch, cores, ranks, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)), raising=False)
    for name, value in (("TORCHELASTIC_RUN_ID", "1"), ("WORLD_SIZE", ranks), ("LOCAL_WORLD_SIZE", ranks)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert processes(None) == expected
    monkeypatch.setenv("OMP_NUM_THREADS", "3")  # torchrun sets 1 of its own accord
    assert processes(None) == (min(expected, 3) if ranks == 1 else expected)
    assert [processes(count) for count in (0, 1, 12)] == [0, 1, 12]


def test_the_loader_processes_end_with_the_last_step(tmp_path):
    """What follows the steps, and other runs of the same process, do not share memory with them."""
    before = {*multiprocessing.active_children()}
    request = parse_arguments([*TINY, "--data.workers=2", f"--train.out={tmp_path / 'run'}"])
    trainer = Trainer(request.config, request.path, request.checkpoint)
    validate, seen = trainer._validate, []

    def watched(stop):
        seen.append(len({*multiprocessing.active_children()} - before))
        validate(stop)

    trainer._validate = watched
    trainer.run()
    assert seen[-1] == 0 and not {*multiprocessing.active_children()} - before
