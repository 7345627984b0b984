"""The native CPU library on every instruction set of this machine: parity, repeats, threads, absence."""

import ctypes
import functools
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import native_build
from bench.shapes import clustered
from ppap.kernels import (
    PropagationConfig,
    availability,
    available_backends,
    masked_log_softmax,
    native,
    pack_masks,
    ppap_loss,
    propagate,
    proxy_average,
    relation_masks,
    unpack_masks,
)
from ppap.kernels.masked_log_softmax import native_impl as contrast
from ppap.kernels.masked_log_softmax import reference as log_softmax
from ppap.kernels.ppap_loss import Settings, composed_chunks
from ppap.kernels.precision import normalise
from ppap.kernels.proxy_average import reference as averages
from ppap.kernels.relation_masks import reference as relations
from tests import test_train
from tests.helpers import CASES, GOLDEN_NAMES, golden_case, made_case, peak_bytes
from tests.loss_forms import (
    FORMS,
    check_backend,
    check_sixteen_bits,
    fused,
    loss_and_gradient,
)
from tests.runs import tiny_run
from tests.test_masked_log_softmax import inputs, loss_and_gradients, packed

ROOT = Path(__file__).parents[1]
NO_COMPILER = shutil.which("g++") is None and shutil.which("clang++") is None
pytestmark = pytest.mark.skipif(
    NO_COMPILER and native.reason() is not None, reason="no C++ compiler, so no native library"
)
ISAS = list(native.available_isas()) if native.reason() is None else ["portable"]
natively = functools.partial(loss_and_gradient, impl="cpp")


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    monkeypatch.setenv("PPAP_CPU_ISA", request.param)
    return request.param


@pytest.fixture
def threads():
    """Set torch's thread count for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", GOLDEN_NAMES)
@pytest.mark.parametrize("form", FORMS)
def test_published_results(name, form, isa):
    case = golden_case(name)
    loss, dz = natively(form, case.to(torch.float32), precision="fp32")
    assert loss.item() == pytest.approx(case.loss, rel=2e-5, abs=0)
    assert (dz.double() - case.dz).abs().max() <= 2e-5 * case.dz.abs().max()


check = functools.partial(check_backend, "cpp")


@pytest.mark.parametrize("make", CASES)
@pytest.mark.parametrize("form", FORMS)
def test_equals_the_reference(make, form, isa):
    check(make(), form)


@pytest.mark.parametrize("group_size", [None, 4, 100])
def test_several_chunks_and_groups(group_size, isa):
    """Chunks of anchors by the masks' budget, groups of 32 by that of the exponentials."""
    case = made_case(300, 48, 201, PropagationConfig(), 0.3)
    case.group_size = group_size
    check(case, memory_budget=2 * 300 * 4 * 32 + 4096)


def test_embeddings_without_channels(isa):
    """Every logit is 0: the loss is the logarithm of the number kept, and there is no gradient."""
    case = made_case(90, 16, 45, PropagationConfig(), 0.3).to(torch.float32)
    z = torch.zeros(90, 0, requires_grad=True)
    arguments = (case.features, z, case.anchors, case.cfg)
    loss, wanted = (ppap_loss(*arguments, temperature=0.3, impl=name) for name in ("cpp", "torch"))
    loss.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=1e-6) and z.grad.shape == (90, 0)


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    rows=st.integers(1, 300),
    width=st.integers(1, 80),
    share=st.floats(0, 1),
    phi0=st.floats(-0.2, 1.0),
    psi0=st.floats(-0.4, 0.9),
    steps=st.integers(0, 2),
    temperature=st.floats(0.01, 2),
)
def test_equals_the_reference_for_any_shape(rows, width, share, phi0, psi0, steps, temperature):
    case = made_case(rows, width, round(share * rows), PropagationConfig(phi0, psi0, steps), temperature)
    sets = propagate(case.features, case.anchors, case.cfg, impl="torch")
    single = propagate(case.features.float(), case.anchors, case.cfg, impl="cpp")
    if not torch.equal(sets.num_positives, single.num_positives):
        # A similarity on a threshold falls on either side in float32; rare, and never far from it.
        assert (sets.num_positives - single.num_positives).abs().sum() <= 2
        return
    check(case, tolerance=1e-4 if temperature < 0.05 else 2e-5)


@pytest.mark.parametrize(
    ("anchors", "rows", "width"), [(37, 203, 32), (1, 1, 16), (0, 30, 16), (5, 0, 16), (65, 257, 7)]
)
def test_proxy_average(anchors, rows, width, isa):
    keys, queries = clustered(rows, width, seed=1, clusters=5), clustered(anchors, width, seed=2, clusters=5)
    threshold = torch.linspace(-0.5, 0.9, anchors)
    wanted = averages.proxy_average(*(t.double() for t in (queries, keys, threshold)))
    proxy, count = proxy_average(queries, keys, threshold, precision="fp32", impl="cpp")
    assert torch.equal(count, wanted[1])
    torch.testing.assert_close(proxy.double(), wanted[0], atol=2e-6, rtol=0)


@pytest.mark.parametrize(("anchors", "rows"), [(37, 203), (1, 1), (0, 30), (130, 300)])
@pytest.mark.parametrize("negative", [False, True])
def test_relation_masks(anchors, rows, negative, isa):
    keys = clustered(rows, 32, seed=1, clusters=5)
    index = torch.randperm(rows, generator=torch.Generator().manual_seed(3))[:anchors]
    neg_queries = clustered(anchors, 32, seed=4, clusters=5) if negative else None
    phi, psi = torch.linspace(0, 0.9, anchors), torch.linspace(-0.2, 0.5, anchors)
    exact = [t.double() for t in (keys[index], phi, keys, psi)]
    wanted = relations.relation_masks(*exact, index, None if neg_queries is None else neg_queries.double())
    got, *counts = relation_masks(
        keys[index], phi, keys, psi, index, neg_queries, precision="fp32", impl="cpp", memory_budget=40_000
    )
    for words, count, mask in zip(got[:2], counts, wanted, strict=True):
        assert torch.equal(unpack_masks(words, rows), mask)
        assert torch.equal(count, mask.sum(1))


@pytest.mark.parametrize(
    ("anchors", "rows", "width"), [(37, 203, 33), (1, 1, 16), (0, 30, 16), (130, 300, 64)]
)
def test_masked_log_softmax(anchors, rows, width, isa):
    arguments = inputs(anchors, rows, width)
    weights = torch.linspace(0.5, 2, anchors).double()
    wanted = loss_and_gradients(log_softmax.masked_log_softmax, *arguments, weights)
    z_anchors, z, positive, kept = arguments
    got = loss_and_gradients(
        packed, z_anchors.float(), z.float(), positive, kept, weights.float(), impl="cpp", memory_budget=2**18
    )
    for value, true, tolerance in zip(got, wanted, (1e-5, 2e-5, 2e-5), strict=True):
        scale = max(true.abs().max().item(), 1.0) if true.numel() else 1.0
        torch.testing.assert_close(value.double(), true, atol=tolerance * scale, rtol=0)


@pytest.mark.parametrize(("precision", "error"), [("fp32", 2e-6), ("bf16", 1e-2)])
@pytest.mark.parametrize("scale", [1e-6, 1e3, 1e6, 1e9])
def test_any_finite_norm(scale, precision, error, isa):
    z_anchors, z, positive, kept = inputs(20, 100, 32, scale=scale)
    weights = torch.ones(20).double()
    wanted = loss_and_gradients(log_softmax.masked_log_softmax, z_anchors, z, positive, kept, weights)
    got = loss_and_gradients(
        packed, z_anchors.float(), z.float(), positive, kept, weights.float(), precision=precision, impl="cpp"
    )
    unit = max(1.0, float((z_anchors @ z.T).abs().max()) / 0.3)
    assert ((got[0] - wanted[0]).abs() <= error * unit).all()
    assert all(torch.isfinite(value).all() for value in got)


def test_logits_that_overflow_are_not_passed_over(isa):
    z_anchors, z, positive, kept = inputs(20, 100, 32, dtype=torch.float32, scale=1e25)
    loss = packed(z_anchors, z, positive, kept, 0.3, impl="cpp", precision="fp32")
    assert not torch.isfinite(loss[positive.any(1)]).any()


def test_no_memory_is_an_exception():
    """Not the end of the process; in a process of its own with little address space."""
    code = (
        "import resource, torch; from ppap.kernels import native\n"
        "bits = torch.full((400_000, 4), 255, dtype=torch.uint8)\n"
        "keys, sums = torch.ones(400_000, 1), torch.empty(32, 1)\n"
        "size = int(open('/proc/self/statm').read().split()[0]) * 4096\n"
        "resource.setrlimit(resource.RLIMIT_AS, (size + 2**20, -1))\n"
        "from ppap.kernels.proxy_average.native_impl import _Arguments as kind\n"
        "tensors = dict(positive=bits, keys=keys, key_scale=None, key_pairs=None, sums=sums)\n"
        "try: native.run('proxy_average', kind, **tensors, C=32, N=400_000, D=1, stride=4)\n"
        "except MemoryError as error: print(error)\n"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert "could not allocate memory" in done.stdout, done.stderr


@pytest.mark.parametrize(("precision", "flips"), [("fp16", 5e-4), ("bf16", 5e-3)])
def test_sixteen_bit_precisions(precision, flips, isa):
    """Operands are rounded; sums and weights stay in float32."""
    case = made_case(400, 64, 150, PropagationConfig(), 0.3)
    check_sixteen_bits("cpp", case, precision, flips)


@pytest.mark.parametrize("form", FORMS)
def test_the_number_of_threads_changes_no_bit(form, isa, threads):
    case = made_case(2000, 48, 301, PropagationConfig(), 0.3).to(torch.float32)
    threads(1)
    first = natively(form, case)
    for count in (2, 3, 7):
        threads(count)
        assert all(torch.equal(a, b) for a, b in zip(natively(form, case), first, strict=True))


def test_repeats_are_bitwise_equal(isa, threads):
    case = made_case(1000, 48, 301, PropagationConfig(), 0.3).to(torch.float32)
    threads(2)
    first = natively(fused, case)
    for _ in range(30):
        assert all(torch.equal(a, b) for a, b in zip(natively(fused, case), first, strict=True))


def test_callers_on_two_threads():
    case = made_case(600, 48, 301, PropagationConfig(), 0.3).to(torch.float32)
    first, found = natively(fused, case), []
    workers = [threading.Thread(target=lambda: found.append(natively(fused, case))) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 4
    assert all(torch.equal(loss, first[0]) and torch.equal(dz, first[1]) for loss, dz in found)


def test_after_a_fork():
    """As in a loader's worker, which leaves torch one thread: nothing of the parent's threads is needed."""
    code = (
        "import os, torch; from ppap.kernels import *; torch.set_num_threads(2)\n"
        "f = torch.nn.functional.normalize(torch.randn(500, 32), dim=1)\n"
        "run = lambda: propagate(f, None, PropagationConfig(), impl='cpp').num_positives.sum().item()\n"
        "wanted, child = run(), os.fork()\n"
        "if child == 0:\n"
        "    torch.set_num_threads(1); torch.get_num_threads = lambda: 2\n"
        "    os._exit(0 if run() == wanted else 1)\n"
        "assert os.waitpid(child, 0)[1] == 0 and run() == wanted\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, check=True, timeout=60)


@pytest.mark.parametrize("group_size", [None, 60])
def test_temporaries_stay_within_the_budget(group_size):
    """Tensors; what the library allocates for itself (packed rows, partial sums) is in the estimate too."""
    case = made_case(3000, 31, 400, PropagationConfig(), 0.3).to(torch.float32)
    unit, budget = normalise(case.features, torch.float32), 2**20

    def run():
        settings = Settings(case.cfg, 0.3, 0.07, group_size or 400, True, "fp32", budget)
        return composed_chunks("cpp", unit, case.z, case.anchors, settings)

    assert contrast.split_budget(budget, 3000, 1, True)[1] == 32, "several groups"
    # Beyond the budget: padded embeddings, gradient and its part inside a group.
    assert peak_bytes(run) <= budget + 4 * case.z.nbytes


def test_bits_past_the_last_column_count_for_nothing():
    z_anchors, z, positive, kept = (t.float() if t.is_floating_point() else t for t in inputs(5, 40, 16))
    wanted = packed(z_anchors, z, positive, kept, 0.3, impl="torch")
    got = masked_log_softmax(z_anchors, z, (~pack_masks(~positive), ~pack_masks(~kept)), 0.3, impl="cpp")
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_sizes_that_both_sides_know(isa):
    """What is padded in Python is whole panels there; a tile of patches is some rows at least."""
    found, index = native.library(), native.isa()
    assert found.ppap_panel() == native.PANEL and native.GROUP % native.PANEL == 0
    rows = [found.ppap_tile_rows(index, ctypes.c_int64(width)) for width in (1, 384, 2**20)]
    assert rows[0] > rows[1] > rows[2] >= 4
    assert native.tile_bytes(10 * rows[1], 384) == 80 and native.tile_bytes(10 * rows[1] + 1, 384) == 88


def test_layout_of_masks():
    for rows, columns in [(1, 1), (31, 33), (32, 32), (33, 300), (100, 64)]:
        mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(0)) < 0.3
        words, bits = pack_masks(mask), native.empty_bits(columns, rows)
        counts, back = torch.empty(rows, dtype=torch.int64), torch.empty_like(pack_masks(mask))
        native.call("from_public", words, rows, columns, bits, native.stride(rows), counts)
        native.call("to_public", bits, native.stride(rows), rows, columns, back)
        assert torch.equal(back, words) and torch.equal(counts, mask.sum(1))
        row, column = rows - 1, columns - 1
        assert bool(bits[column, row // 8] >> (row % 8) & 1) == bool(mask[row, column])


def test_opcheck_and_compile():
    case = made_case(60, 16, 12, PropagationConfig(), 0.5).to(torch.float32)
    arguments = (case.features, case.z.requires_grad_(), case.anchors, case.cfg.as_floats(), [0.5, 0.07])
    torch.library.opcheck(torch.ops.ppap.ppap_loss.default, (*arguments, 0, True, "fp32", 2**22, "cpp"))
    for form in FORMS:
        run = functools.partial(form, impl="cpp")
        got = loss_and_gradient(torch.compile(run, fullgraph=True, backend="aot_eager"), case)
        for value, true in zip(got, loss_and_gradient(run, case), strict=True):
            torch.testing.assert_close(value, true, atol=1e-7, rtol=1e-6)


def test_auto_on_a_cpu_takes_it():
    assert available_backends()["cpp"] is None
    assert propagate(torch.randn(40, 16), None, PropagationConfig()).backend == "cpp"
    assert propagate(torch.randn(40, 16).double(), None, PropagationConfig()).backend == "torch"


def test_a_run_has_the_loss_curve_of_the_torch_backend(tmp_path, monkeypatch):
    curves = {}
    for backend in ("torch", "cpp"):
        monkeypatch.setenv("PPAP_BACKEND", backend)
        options = ("--train.steps=20", "--train.val-every=0", "--train.save-every=20", "--optim.lr=0.01")
        run_dir = tiny_run(tmp_path / backend, *options)
        curves[backend] = [row["contrast_loss"] for row in test_train.rows(run_dir).values()]
    assert len(curves["torch"]) == 20 and curves["torch"][-1] < curves["torch"][0]
    assert curves["cpp"] != curves["torch"], "both backends ran"
    assert curves["cpp"] == pytest.approx(curves["torch"], rel=2e-5)


def test_an_unknown_instruction_set_is_refused(monkeypatch):
    monkeypatch.setenv("PPAP_CPU_ISA", "sse9")
    with pytest.raises(ValueError, match="PPAP_CPU_ISA is 'sse9'; this machine has: auto, .*portable"):
        proxy_average(torch.eye(3), torch.eye(3), torch.zeros(3), impl="cpp")


def test_without_the_library_the_reason_is_said(monkeypatch, tmp_path):
    def reason_of(file: Path) -> str:
        monkeypatch.setattr(native, "FILE", file)
        native.library.cache_clear()
        return availability._probe("cpp")

    try:
        assert "was not built: install a C++ compiler" in reason_of(tmp_path / "none.so")
        (tmp_path / "broken.so").write_text("no library")
        assert "cannot be loaded" in reason_of(tmp_path / "broken.so")
        built_for = native.ABI
        monkeypatch.setattr(native, "ABI", 99)
        assert f"has interface {built_for}, this version of ppap needs 99" in reason_of(
            ROOT / "kernels" / "_cpu.so"
        )
    finally:
        monkeypatch.undo()
        native.library.cache_clear()


@pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is not installed")
def test_functions_shared_by_instruction_sets_run_everywhere():
    """The linker keeps one copy of an inline function: that of the unit without special instructions."""
    for name, body in native_build.functions(native_build.disassembly(native.FILE)):
        shared = re.match(r"_ZNK?St\w|_ZSt\w", name)
        own = re.search("4avx2|6avx512|10avx512bf16", name)  # made of the set's own types, shared with nobody
        assert not shared or own or not re.search(r"\tv[a-z]", body), (
            f"{name} holds vector instructions of one instruction set"
        )


def test_an_installation_without_a_compiler(tmp_path):
    """setup.py builds everything else, and says what is missing."""
    tree = tmp_path / "tree"
    shutil.copytree(
        ROOT, tree, ignore=shutil.ignore_patterns(".git", ".venv", "runs", "*.so", "build", "*.egg-info")
    )
    environment = {**os.environ, "PATH": str(tmp_path), "CXX": ""}
    command = [sys.executable, "setup.py", "-q", "build", "--build-lib", str(tmp_path / "lib")]
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "installed without its native CPU kernels: no C++ compiler" in done.stderr
    assert (tmp_path / "lib" / "ppap" / "kernels" / "native.py").exists()
    assert not list((tmp_path / "lib").rglob("_cpu.so"))
