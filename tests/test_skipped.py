"""Steps with numbers that are not finite: skipped, counted, written down, and taken again by a command."""

import copy
import json

import pytest
import torch

from ppap.cli import run
from ppap.data.loading import stream
from ppap.errors import NumberError
from ppap.methods.finite import IN_A_ROW, Gate, Skips
from ppap.runs.checkpoint import load_checkpoint
from ppap.settings.methods import HPConfig
from ppap.train import Trainer, parse_arguments
from ppap.training import replay
from tests.methods import tiny_engine
from tests.runs import TINY


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """The files of cached features and near images are those of this test run."""
    monkeypatch.setenv("PPAP_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "cache"))


QUIET = ["--train.val-every=0", "--eval.pictures=0"]


def all_of(engine):
    """Weights, buffers and moments, as bits."""
    state = copy.deepcopy({"weights": engine.weights(), "optimisers": engine.training_state()["optimisers"]})
    moments = [o["state"] for o in state["optimisers"].values()]
    flat = [t for one in moments for values in one.values() for t in values.values()]
    return [*state["weights"].values(), *flat]


def same(before, after):
    return len(before) == len(after) and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("fused", [False, True], ids=["asked", "by a flag"])
@pytest.mark.parametrize("method", ["ppap", "hp", "stego"])
def test_a_skipped_step_changes_nothing(method, fused):
    """A bad image, and a gradient alone that is not finite; HP's pool is due at the step. By a flag is as on
    GPUs: torch has the fused optimisers for CPUs too."""
    engine = tiny_engine(method, hp=HPConfig(dim=8, pool_size=8, renew_every=1, consistency=0))
    engine.gate = Gate(engine.device, fused=fused)
    for optimiser in engine.optimisers.values():
        engine.gate.prepare(optimiser)
    batch = next(iter(engine.start(engine.images)))
    engine.train_step(batch, 0)
    before = all_of(engine)
    bad = {**batch, "image": batch["image"].index_fill(0, torch.tensor([0]), float("nan"))}
    engine.train_step(bad, 1)
    assert engine.skipped and same(before, all_of(engine))
    hook = engine.linear.classifier.weight.register_hook(lambda gradient: gradient * float("inf"))
    values = engine.train_step(batch, 1)
    hook.remove()
    assert all(torch.isfinite(value) for value in values.values())
    assert engine.skipped and same(before, all_of(engine))
    engine.train_step(batch, 1)
    assert not engine.skipped and not same(before, all_of(engine))


def test_a_scaler_that_looks_for_its_scale_is_no_failure():
    gate, good, bad = Gate(torch.device("cpu")), torch.tensor(1.0), torch.tensor(float("inf"))
    assert not gate.judge([good], [bad], torch.tensor(2048.0))
    assert gate.judge([good], [bad], torch.tensor(1.0)), "no scale is left to find"
    assert gate.judge([bad], [good], torch.tensor(2048.0))
    assert gate.judge([good], [bad], None)


def test_flags_are_read_late_and_nothing_moves_after_five():
    """As on a GPU: the host looks after eight steps, of which the last three were good."""
    gate = Gate(torch.device("cpu"))
    numbers = [float("nan")] * IN_A_ROW + [0.0] * 3
    flags = [gate.judge([torch.tensor(n)], [torch.tensor(0.0)], None) for n in numbers]
    assert all(flags), "what comes after the fifth is skipped too"
    said, skips = [], Skips(gate)
    skips.say = said.append
    pairs = zip(flags, numbers, strict=True)
    skips.unread = [(i, flag, {"loss": torch.tensor(n)}, None) for i, (flag, n) in enumerate(pairs)]
    with pytest.raises(NumberError, match="step 5: not finite: loss = nan, as in the 4 steps before"):
        skips.read()
    assert [one.step for one in said] == [0, 1, 2, 3, 4]


def poisoned(trainer, steps):
    """Batches of these steps (from 0) get an image that is not finite."""
    step = trainer.engine.train_step

    def train_step(batch, number):
        if number in steps:
            batch = {**batch, "image": batch["image"] * float("nan")}
        return step(batch, number)

    trainer.engine.train_step = train_step
    return trainer


def begin(out, *options):
    request = parse_arguments([*TINY, f"--train.out={out}", "--train.log-every=1", *QUIET, *options])
    return Trainer(request.config, request.path, request.checkpoint)


def test_a_bad_batch_is_named_and_counted(tmp_path, capsys, monkeypatch):
    trainer = begin(tmp_path / "run", "--train.steps=4")
    monkeypatch.setattr(trainer.skips, "name_of", lambda i: f"\x1b[31m{i}.png")
    poisoned(trainer, {1}).run()
    out = capsys.readouterr().out
    assert out.count("step 2 skipped") == 1 and "\x1b" not in out and "\\x1b[31m" in out
    line = json.loads((tmp_path / "run/nonfinite.jsonl").read_text())
    assert line["step"] == 2 and len(line["files"]) == len(line["index"]) == 4
    assert line["files"][0] == f"\x1b[31m{line['index'][0]}.png"
    rows = [json.loads(text) for text in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["skipped_steps"] for row in rows if "skipped_steps" in row] == [0, 1, 1, 1]
    state = load_checkpoint(tmp_path / "run", "last").state()
    assert state["skips"] == {"total": 1, "in_a_row": 0} and state["step"] == 4


def test_five_in_a_row_stop_and_the_step_is_taken_again(tmp_path, capsys):
    """Across a stop and a resume; the checkpoint of before stays, and the command finds the same numbers."""
    out = tmp_path / "run"
    trainer = poisoned(begin(out, "--train.steps=9", "--train.save-every=3"), {2, 3, 4, 5, 6})
    with pytest.raises(NumberError, match=r"step 7: .*all 5 were skipped.*training\.replay.*--resume"):
        trainer.run()
    state = load_checkpoint(out, "last").state()
    assert state["step"] == 6 and state["skips"] == {"total": 4, "in_a_row": 4}
    weights = load_checkpoint(out, "last").tensors
    assert all(torch.equal(weights[k], v) for k, v in load_checkpoint(out / "nonfinite").tensors.items())
    request = parse_arguments(["--resume", str(out)])
    again = poisoned(Trainer(request.config, request.path, request.checkpoint), {6})
    with pytest.raises(NumberError, match="step 7: .*as in the 4 steps before"):
        again.run()
    assert len((out / "nonfinite.jsonl").read_text().splitlines()) == 5

    request = parse_arguments(["--resume", str(out)])
    expected = Trainer(request.config, request.path, request.checkpoint)
    want = expected.engine.train_step(next(stream(expected.loader))[2], 6)
    expected.lock.release()
    engine, batch, facts = replay.prepare(load_checkpoint(out / "nonfinite"))
    assert (facts["step"], facts["seed"], len(facts["files"])) == (6, 0, 4)
    got = engine.train_step(batch, 6)
    assert {k: v.item() for k, v in got.items()} == {k: v.item() for k, v in want.items()}
    capsys.readouterr()
    assert run(replay.main, [str(out / "nonfinite")]) == 0
    assert f"loss = {got['loss'].item()}\n" in capsys.readouterr().out
    assert run(replay.main, [str(out)]) == 3
