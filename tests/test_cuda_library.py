"""The kernels of the CUDA library without a GPU: their bodies emulated on the CPU, and compiled by nvcc.

The emulation runs what stands around the tensor-core product: tiles, edges, thresholds, packing, sums and
layouts.
"""

import ctypes
import math
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from bench.cuda_build import resources, table
from bench.shapes import clustered
from ppap.kernels import PropagationConfig, availability, native, native_cuda, pack_masks
from ppap.kernels.cache import cache_folder
from ppap.kernels.masked_log_softmax import cuda_impl as log_softmax_impl
from ppap.kernels.masked_log_softmax import reference as log_softmax
from ppap.kernels.ppap_loss import Settings, composed_chunks, cuda_impl
from ppap.kernels.precision import normalise
from tests.helpers import CASES, GOLDEN_NAMES, golden_case, made_case, peak_bytes
from tests.loss_forms import FORMS, check_backend, fused, loss_and_gradient, materialised

PRECISIONS = {"fp32": 0, "fp16": 1, "bf16": 2, "plain fp32": 3}
SHAPES = [(37, 203, 32), (1, 1, 16), (130, 300, 33), (64, 128, 70)]


@pytest.fixture
def library(emulated_cuda):
    return emulated_cuda


@pytest.fixture
def call(library):
    """Call an entry point; tensors become addresses, whole numbers int64."""

    def run(name: str, *arguments: torch.Tensor | int | None, precision: str | None = None) -> None:
        passed = [ctypes.c_void_p(None)]  # the stream
        passed += [] if precision is None else [ctypes.c_int(PRECISIONS[precision])]
        for value in arguments:
            if isinstance(value, int):
                passed.append(ctypes.c_int64(value))
            else:
                passed.append(ctypes.c_void_p(None if value is None else value.data_ptr()))
        assert getattr(library, f"ppap_cuda_{name}")(*passed) == 0

    return run


def bits_of(call, mask: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Patch-major bits of a mask (C, N), and their stride."""
    rows, columns = mask.shape
    stride = 4 * -(-rows // 32)
    bits, counts = torch.full((columns, stride), 255, dtype=torch.uint8), torch.empty(rows, dtype=torch.int64)
    call("from_public", pack_masks(mask), rows, columns, bits, stride, counts)
    assert torch.equal(counts, mask.sum(1))
    return bits, stride


def mask_of(call, bits: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Words (C, ceil(N / 32)) of patch-major bits."""
    words = torch.empty((rows, -(-columns // 32)), dtype=torch.int32)
    call("to_public", bits, bits.shape[1], rows, columns, words)
    return words


@pytest.mark.parametrize(("anchors", "rows", "width"), SHAPES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_similarity_and_sums(call, anchors, rows, width, precision):
    keys, queries = clustered(rows, width, 1, clusters=5), clustered(anchors, width, 2, clusters=5)
    phi, psi = torch.linspace(0, 0.9, anchors), torch.linspace(-0.2, 0.5, anchors)
    scale = torch.tensor(0.5)
    sim = queries.double() @ keys.double().T
    wanted = sim > phi[:, None].double(), (sim > phi[:, None].double()) | (sim < psi[:, None].double())
    stride = 4 * -(-anchors // 32)
    positive, kept = (torch.full((rows, stride), 255, dtype=torch.uint8) for _ in range(2))
    counts = torch.zeros((2, anchors), dtype=torch.int64)
    arguments = (queries, anchors, keys, rows, width, scale, phi / 2, psi / 2, positive, kept, stride)
    call("relation_masks", *arguments, counts[0], counts[1], precision=precision)
    for bits, count, mask in zip((positive, kept), counts, wanted, strict=True):
        assert torch.equal(mask_of(call, bits, anchors, rows), pack_masks(mask))
        assert torch.equal(count, mask.sum(1))
    # Positives that are read, as for other queries of the negatives.
    again, read = torch.full_like(kept, 255), torch.zeros(anchors, dtype=torch.int64)
    arguments = (queries, anchors, keys, rows, width, scale, None, psi / 2, positive, again, stride)
    call("relation_masks", *arguments, None, read, precision=precision)
    assert torch.equal(again, kept) and torch.equal(read, counts[1])
    for parts in (1, 3):
        sums = torch.full((parts, anchors, width), math.nan)
        call("proxy_average", positive, stride, anchors, keys, rows, width, parts, sums)
        exact = wanted[0].double() @ keys.double()
        torch.testing.assert_close(sums.sum(0).double(), exact, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize(("anchors", "rows", "width"), SHAPES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_log_sum_exp_and_weights(call, library, anchors, rows, width, precision):
    g = torch.Generator().manual_seed(rows)
    own, z = clustered(anchors, width, 3), clustered(rows, width, 4)
    positive = torch.rand(anchors, rows, generator=g) < 0.1
    kept = positive | (torch.rand(anchors, rows, generator=g) < 0.5)
    (positive_bits, stride), (kept_bits, _) = bits_of(call, positive), bits_of(call, kept)
    scale = torch.tensor(math.log2(math.e) / 0.3)
    side = 64 if precision == "plain fp32" else 128
    tiles = -(-rows // side)
    top, total, hit = (torch.full((tiles, anchors), math.nan) for _ in range(3))
    operands = (own, anchors, z, rows, width, scale, positive_bits, kept_bits, stride)
    call("log_sum_exp", *operands, top, total, hit, precision=precision)
    parts = torch.where(total > 0, top.double() + total.double().log2(), -torch.inf)
    lse = torch.logsumexp(parts * math.log(2), 0) / math.log(2)
    z_own, z_all = own.double().requires_grad_(), z.double()
    loss = log_softmax.masked_log_softmax(z_own, z_all, positive, kept, 0.3)
    count = positive.sum(1)
    got = torch.where(count > 0, (lse - hit.double().sum(0) / count.clamp(min=1)) * math.log(2), 0.0)
    torch.testing.assert_close(got, loss.detach(), atol=2e-5, rtol=2e-5)
    has = count > 0
    share = (has / count.clamp(min=1)).float()
    weights = torch.full((rows, anchors), math.nan)
    lse = torch.where(has, lse, torch.inf).float()
    call("weights", *operands, lse, share, weights, precision=precision)
    dz = (weights.T.double() / 2**14) @ z_all / 0.3
    torch.testing.assert_close(dz, torch.autograd.grad(loss.sum(), z_own)[0], atol=2e-5, rtol=1e-4)
    assert library.ppap_cuda_abi_version() == native_cuda.ABI


@pytest.fixture
def emulated(library, monkeypatch):
    """The cuda backend's implementations on CPU tensors; the emulation writes weights in float32."""
    monkeypatch.setattr(native_cuda, "library", lambda: library)
    monkeypatch.setattr(log_softmax_impl, "weight_type", lambda precision: torch.float32)
    monkeypatch.setitem(availability._reasons, "cuda", None)
    monkeypatch.setitem(availability.DEVICES, "cuda", ("cpu",))


@pytest.mark.parametrize("name", GOLDEN_NAMES)
@pytest.mark.parametrize("form", FORMS)
def test_published_results(name, form, emulated):
    case = golden_case(name)
    loss, dz = loss_and_gradient(form, case.to(torch.float32), precision="fp32", impl="cuda")
    assert loss.item() == pytest.approx(case.loss, rel=2e-5, abs=0)
    assert (dz.double() - case.dz).abs().max() <= 2e-5 * case.dz.abs().max()


@pytest.mark.parametrize("make", CASES)
@pytest.mark.parametrize("form", FORMS)
def test_equals_the_reference(make, form, emulated):
    check_backend("cuda", make(), form)


def test_several_chunks(emulated):
    case = made_case(300, 48, 201, PropagationConfig(), 0.3)
    budget = 60 * cuda_impl.bytes_per_anchor(case.features, case.z)
    for case.group_size in (None, 4, 100):
        check_backend("cuda", case, fused, memory_budget=budget)


def test_embeddings_of_any_norm(emulated):
    case = made_case(100, 32, 70, PropagationConfig(), 0.3)
    case.z = case.z * torch.logspace(-3, 3, 100, dtype=torch.float64)[:, None]
    wanted = loss_and_gradient(materialised, case)
    for form in FORMS:
        got = loss_and_gradient(form, case.to(torch.float32), precision="fp32", impl="cuda")
        assert (got[0] - wanted[0]).abs() <= 2e-6 * wanted[0].abs()
        assert (got[1] - wanted[1]).norm() <= 2e-5 * wanted[1].norm()


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_sixteen_bit_precisions_run(precision, emulated):
    case = made_case(260, 64, 70, PropagationConfig(), 0.3)
    wanted = loss_and_gradient(materialised, case)
    got = loss_and_gradient(fused, case.to(torch.float32), precision=precision, impl="cuda")
    assert (got[1] - wanted[1]).norm() <= 0.02 * wanted[1].norm()


def test_temporaries_stay_within_the_budget(emulated):
    case = made_case(1500, 63, 768, PropagationConfig(), 0.3).to(torch.float32)
    unit = normalise(case.features, torch.float32)
    budget = 256 * cuda_impl.bytes_per_anchor(unit, case.z)

    def run():
        settings = Settings(case.cfg, 0.3, 0.07, 768, True, "fp32", budget)
        return composed_chunks("cuda", unit, case.z, case.anchors, settings)

    # Beyond the budget: the gradient, what is added to it, scaled features and embeddings.
    assert peak_bytes(run) <= budget + 7 * case.z.nbytes


def test_not_built_or_not_buildable_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("PPAP_CACHE_DIR", str(tmp_path))
    native_cuda.library.cache_clear()
    try:
        assert "was not built; build it: python -m ppap.doctor --build-cuda" in availability._probe("cuda")
        file = native_cuda.builder().cuda_file(cache_folder())
        assert file.is_relative_to(tmp_path)
        monkeypatch.setattr(native_cuda.builder().shutil, "which", lambda name: None)
        with pytest.raises(native.NativeError, match=r"nvcc is not on the PATH.* \(all of it: .*log"):
            native_cuda.build()
        assert "nvcc is not on the PATH" in file.with_suffix(".log").read_text()
        file.write_text("no library")
        assert "cannot be loaded" in native_cuda.reason()
    finally:
        native_cuda.library.cache_clear()


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_nvcc_compiles_every_kernel_without_spills(tmp_path):
    report = native_cuda.builder().build_cuda(tmp_path / "cuda.so", (75, 90))  # each takes as long
    assert (tmp_path / "cuda.so").stat().st_size > 100_000
    assert "warning" not in report
    built = native_cuda.with_sizes(ctypes.CDLL(str(tmp_path / "cuda.so")))
    assert built.ppap_cuda_abi_version() == native_cuda.ABI and built.ppap_cuda_crf_classes_max() == 8191
    found = resources(report)
    assert {row.architecture for row in found} == {"sm_75", "sm_90"} and len(found) > 40
    assert not any(row.spilled for row in found) and all(0 < row.registers <= 255 for row in found)
    assert "| `CountWords` |" in table(found) or shutil.which("c++filt") is None


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_shared_memory_is_aligned_for_tensor_cores(tmp_path):
    """wmma loads and stores at multiples of 256 bits alone; tile.cuh checks the offsets, this the start."""
    alignments = []
    for unit in ("relation_masks", "masked_log_softmax"):
        source, out = Path(native_cuda.builder().HERE) / "cuda" / f"{unit}.cu", tmp_path / f"{unit}.ptx"
        command = ["nvcc", "-std=c++17", "-arch=compute_80", "-ptx", str(source), "-o", str(out)]
        subprocess.run(command, check=True, capture_output=True)
        alignments += re.findall(r"\.shared \.align (\d+)", out.read_text())
    assert alignments and all(int(alignment) % 32 == 0 for alignment in alignments)
