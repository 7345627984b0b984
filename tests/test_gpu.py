"""The GPU backends on a GPU: the same promises as on CPUs, and those that only a device can break."""

import math

import numpy as np
import pytest
import torch

from bench.shapes import VITS16_CHUNK, loss_inputs
from ppap.kernels import (
    PropagationConfig,
    available_backends,
    dense_crf,
    dense_crf_batch,
    ppap_loss,
    propagate,
)
from ppap.kernels.dense_crf import unavailable_reason
from tests.crf_cases import CONTESTED, example
from tests.helpers import CASES, GOLDEN_NAMES, LossCase, golden_case, made_case
from tests.loss_forms import FORMS, check_backend, fused, loss_and_gradient, materialised

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def unless(name: str, reason: str | None):
    """The case `name`, skipped for `reason`: what cannot run here is named in the summary, never left out."""
    return pytest.param(name, marks=pytest.mark.skipif(reason is not None, reason=f"{name}: {reason}"))


BACKENDS = [unless(name, available_backends()[name]) for name in ("torch", "triton", "cuda")]
backends = pytest.mark.parametrize("impl", BACKENDS)
CFG = PropagationConfig()


def on_gpu(case: LossCase) -> LossCase:
    moved = {key: value.cuda() for key, value in vars(case).items() if isinstance(value, torch.Tensor)}
    return LossCase(**{**vars(case), **moved})


@backends
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", GOLDEN_NAMES)
def test_published_results(name, form, impl):
    case = on_gpu(golden_case(name))
    loss, dz = loss_and_gradient(form, case.to(torch.float32), impl=impl, precision="fp32")
    assert loss.item() == pytest.approx(case.loss, rel=2e-5, abs=0)
    assert (dz - case.dz).abs().max() <= 2e-5 * case.dz.abs().max()


@backends
@pytest.mark.parametrize("make", CASES)
def test_equals_the_reference(make, impl):
    for form in FORMS:
        check_backend(impl, on_gpu(make()), form)


@backends
@pytest.mark.parametrize("width", [192, 384, 768, 1024, 80])
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 2e-5), ("fp16", 1e-2), ("bf16", 5e-2)])
def test_widths_and_precisions(width, precision, tolerance, impl):
    case = on_gpu(made_case(1500, width, 333, PropagationConfig(), 0.3))
    wanted = loss_and_gradient(materialised, case)
    loss, dz = loss_and_gradient(fused, case.to(torch.float32), impl=impl, precision=precision)
    assert abs(loss - wanted[0]) <= tolerance * wanted[0].abs()
    assert (dz - wanted[1]).norm() <= tolerance * wanted[1].norm()


@backends
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_repeats_are_bitwise_equal(precision, impl):
    features, z, anchors = (tensor.cuda() for tensor in loss_inputs(VITS16_CHUNK))
    case = LossCase(features, z, anchors, CFG, 0.8)
    first = loss_and_gradient(fused, case, impl=impl, precision=precision)
    for _ in range(30):
        again = loss_and_gradient(fused, case, impl=impl, precision=precision)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


@backends
def test_opcheck(impl):
    case = on_gpu(made_case(300, 64, 70, CFG, 0.5)).to(torch.float32)
    z = case.z.requires_grad_()
    arguments = (case.features, z, case.anchors, CFG.as_floats(), [0.5, 0.07], 0, True, "fp16", 2**24, impl)
    torch.library.opcheck(torch.ops.ppap.ppap_loss.default, arguments)
    arguments = (case.features, case.anchors, CFG.as_floats(), "fp16", 2**24, impl)
    torch.library.opcheck(torch.ops.ppap.propagate.default, arguments)


@backends
def test_compile_and_autocast(impl):
    case = on_gpu(made_case(600, 64, 130, CFG, 0.5)).to(torch.float32)

    def step(case, z):
        return fused(case, z * 1.0, impl=impl)

    with torch.autocast("cuda", dtype=torch.float16):
        wanted = loss_and_gradient(step, case)
        got = loss_and_gradient(torch.compile(step, fullgraph=True), case)
    for value, true in zip(got, wanted, strict=True):
        torch.testing.assert_close(value, true, atol=1e-6, rtol=1e-5)
    named = loss_and_gradient(step, case)
    assert not torch.equal(named[1], wanted[1]), "autocast chose the precision"


@backends
@pytest.mark.parametrize("bad", ["features", "z", "anchors"])
def test_bad_numbers_give_nan(bad, impl):
    case = on_gpu(made_case(300, 64, 70, CFG, 0.5)).to(torch.float32)
    if bad == "anchors":
        case.anchors[3] = 300
    else:
        getattr(case, bad)[3, 2] = math.nan
    loss, dz = loss_and_gradient(fused, case, impl=impl)
    assert loss.isnan() and dz.isnan().any()


@backends
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_peak_memory(precision, impl):
    features, z, anchors = (tensor.cuda() for tensor in loss_inputs(VITS16_CHUNK))
    budget = 2**26

    def run() -> None:
        loss_and_gradient(
            fused,
            LossCase(features, z, anchors, CFG, 0.8),
            impl=impl,
            precision=precision,
            memory_budget=budget,
        )

    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    # What grows with N alone: normalised features, operands, gradient and what is added to it.
    assert torch.cuda.max_memory_allocated() - before <= budget + 10 * features.nbytes


@backends
def test_a_second_stream(impl):
    case = on_gpu(made_case(600, 64, 130, CFG, 0.5)).to(torch.float32)
    wanted = loss_and_gradient(fused, case, impl=impl)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        got = loss_and_gradient(fused, case, impl=impl)
    stream.synchronize()
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_step_is_captured_as_a_graph(precision):
    """Nothing waits for the device: what a graph replays on other values is what a call computes of them."""
    case = on_gpu(made_case(600, 64, 130, CFG, 0.5)).to(torch.float32)

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        options = {"temperature": 0.5, "impl": "triton", "precision": precision}
        loss = ppap_loss(features, z, case.anchors, CFG, **options)
        return loss.detach(), torch.autograd.grad(loss, z)[0]

    features, z = case.features.clone(), case.z.clone().requires_grad_()
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        captured = step()
    for other in (case.features.flip(0), case.features):
        with torch.no_grad():
            features.copy_(other)
        graph.replay()
        for value, wanted in zip(captured, step(), strict=True):
            assert torch.equal(value, wanted)


@backends
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_tensors_on_a_gpu_that_is_not_the_current_one(impl):
    case = on_gpu(made_case(600, 64, 130, CFG, 0.5)).to(torch.float32)
    wanted = loss_and_gradient(fused, case, impl=impl)
    moved = {
        name: value.to("cuda:1") for name, value in vars(case).items() if isinstance(value, torch.Tensor)
    }
    got = loss_and_gradient(fused, LossCase(**{**vars(case), **moved}), impl=impl)
    assert got[1].device.index == 1
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(got, wanted, strict=True))


def test_tensors_on_two_devices():
    case = made_case(30, 8, 6, CFG, 0.3).to(torch.float32)
    with pytest.raises(ValueError, match="move them to one device"):
        ppap_loss(case.features.cuda(), case.z, case.anchors, CFG, temperature=0.3)


def test_auto_takes_triton():
    reason = available_backends()["triton"]
    if reason is not None:
        pytest.skip(f"triton: {reason}")
    assert propagate(torch.randn(40, 16, device="cuda"), None, CFG).backend == "triton"


needs_crf = pytest.mark.skipif(unavailable_reason("cuda") is not None, reason=str(unavailable_reason("cuda")))
CRF_OTHERS = [unless(name, unavailable_reason(name)) for name in ("cpp", "pydensecrf")]


def crf_case(kind: str, classes: int, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """An image and scores of :func:`tests.crf_cases.example` on the GPU, or noise, or one grey."""
    image, scores = example(classes, height, width)
    if kind == "noise":
        image = np.random.default_rng(0).integers(0, 256, image.shape, dtype=np.uint8)
    elif kind == "grey":
        image = np.full_like(image, 128)
    return torch.from_numpy(image).cuda(), torch.from_numpy(scores).cuda()


@needs_crf
@pytest.mark.parametrize("other", CRF_OTHERS)
@pytest.mark.parametrize("classes", [1, 2, 27, 64])
@pytest.mark.parametrize("kind", ["halves", "noise", "grey"])
@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 300), (90, 1), (120, 161)])
def test_dense_crf_equals_the_others(kind, classes, height, width, other):
    image, scores = crf_case(kind, classes, height, width)
    q, wanted = (dense_crf(image, scores, impl=impl) for impl in ("cuda", other))
    assert q.is_cuda and (q - wanted).abs().max() <= CONTESTED
    different = (q.argmax(dim=0) != wanted.argmax(dim=0)).sum()
    assert different <= max(1, 1e-4 * height * width)


@needs_crf
@pytest.mark.parametrize("kind", ["halves", "noise", "grey"])
def test_dense_crf_repeats_bitwise(kind):
    image, scores = crf_case(kind, 27, 160, 201)
    first = dense_crf(image, scores, impl="cuda")
    for _ in range(30):
        assert torch.equal(dense_crf(image, scores, impl="cuda"), first)


@needs_crf
def test_dense_crf_takes_the_gpu_on_any_stream_and_shares_lattices():
    image, scores = crf_case("halves", 5, 70, 81)
    wanted = dense_crf(image, scores, impl="cuda"), dense_crf(image, scores[:2], impl="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results = list(dense_crf_batch([(image.cpu(), (scores, scores[:2]))] * 3))
    stream.synchronize()
    assert all(torch.equal(a, b) for maps in results for a, b in zip(maps, wanted, strict=True))


@needs_crf
def test_dense_crf_says_what_is_wrong():
    image, scores = crf_case("halves", 3, 20, 21)
    with pytest.raises(RuntimeError, match="scores on cpu; impl 'cuda' needs"):
        dense_crf(image, scores.cpu(), impl="cuda")
    with pytest.raises(ValueError, match="NaN or infinite"):
        dense_crf(image, scores * math.nan, impl="cuda")


@needs_crf
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_dense_crf_on_a_gpu_that_is_not_the_current_one():
    image, scores = crf_case("halves", 5, 70, 81)
    wanted = dense_crf(image, scores, impl="cuda")
    q = dense_crf(image, scores.to("cuda:1"), impl="cuda")
    assert q.device.index == 1 and torch.equal(q.cpu(), wanted.cpu())
