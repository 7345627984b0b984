"""Cross-entropy of resized scores: both forms against torch's resizing, values and gradients."""

import pytest
import torch
import torch.nn.functional as F

from ppap.kernels import native, use_backend
from ppap.kernels.pixel_cross_entropy import native_cross_entropy, runs_natively
from ppap.nets.pixel_loss import interpolation, pixel_cross_entropy

needs_library = pytest.mark.skipif(native.reason() is not None, reason="needs the native library")


def case(images, classes, grid, size, *, known=0.8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(images, classes, *grid, generator=generator, dtype=torch.float64)
    target = torch.randint(classes, (images, *size), generator=generator)
    target[torch.rand(target.shape, generator=generator) > known] = -1
    return logits.requires_grad_(), target


CASES = [
    pytest.param((3, 5, (4, 6), (32, 48)), 8, {}, id="whole patches"),
    pytest.param((2, 7, (3, 3), (19, 23)), 8, {}, id="cut off"),
    pytest.param((2, 4, (5, 3), (21, 34)), None, {}, id="resized at once"),
    pytest.param((1, 2, (1, 1), (8, 8)), 8, {}, id="one patch"),
    pytest.param((2, 1, (2, 2), (8, 8)), 4, {}, id="one class"),
    pytest.param((2, 3, (2, 2), (8, 8)), 4, {"known": 0}, id="nothing labelled"),
    pytest.param((0, 3, (2, 2), (8, 8)), 4, {}, id="no image"),
]


def torchs(logits, target, patch):
    """By torch's own resizing; it takes no empty batch."""
    height, width = target.shape[1:]
    full = (height, width) if patch is None else (logits.shape[2] * patch, logits.shape[3] * patch)
    if len(logits) == 0:
        return 0 * logits.sum()
    resized = F.interpolate(logits, size=full, mode="bilinear", align_corners=False)
    return F.cross_entropy(resized[:, :, :height, :width], target, ignore_index=-1, reduction="sum")


@pytest.mark.parametrize("blocked", [True, False])
@pytest.mark.parametrize(("sizes", "patch", "options"), CASES)
def test_both_forms_are_torchs(sizes, patch, options, blocked):
    logits, target = case(*sizes, **options)
    wanted = torchs(logits, target, patch)
    (dwanted,) = torch.autograd.grad(wanted, logits)
    found = pixel_cross_entropy(logits, target, patch, blocked=blocked)
    (dfound,) = torch.autograd.grad(2 * found, logits)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dfound, 2 * dwanted, rtol=1e-11, atol=1e-12)


ISAS = pytest.mark.parametrize("isa", native.available_isas() if native.reason() is None else [])


@needs_library
@ISAS
@pytest.mark.parametrize(
    ("sizes", "patch", "options"),
    [*CASES, ((2, 300, (3, 4), (37, 60)), 16, {}), ((1, 3, (2, 9), (50, 7)), None, {})],
)
def test_the_native_form_is_that_of_torch_in_double(sizes, patch, options, isa, monkeypatch):
    monkeypatch.setenv("PPAP_CPU_ISA", isa)
    logits, target = case(*sizes, **options)
    wanted = torchs(logits, target, patch)
    (dwanted,) = torch.autograd.grad(wanted, logits)
    single = logits.detach().float().requires_grad_()
    found = pixel_cross_entropy(single, target, patch)
    (dfound,) = torch.autograd.grad(2 * found, single)
    torch.testing.assert_close(found.double(), wanted, rtol=2e-6, atol=1e-5)
    torch.testing.assert_close(dfound.double(), 2 * dwanted, rtol=1e-5, atol=1e-5 * max(1, target.shape[1]))


@needs_library
def test_the_native_form_has_the_same_bits_on_any_number_of_threads():
    logits, target = case(5, 7, (3, 4), (24, 32))
    weights = [interpolation(3, 24, logits.float()), interpolation(4, 32, logits.float())]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            results.append(native_cross_entropy(logits.detach().float(), target, *weights, True))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


@needs_library
def test_another_backend_or_type_is_not_the_librarys(monkeypatch):
    single = torch.zeros(1, 2, 1, 1)
    assert runs_natively(single) and not runs_natively(single.double())
    with use_backend("torch"):
        assert not runs_natively(single)
    monkeypatch.setenv("PPAP_BACKEND", "torch")
    assert not runs_natively(single)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_targets_of_another_type_or_number_are_refused(backend):
    scores = torch.zeros(1, 3, 1, 1)
    with use_backend(backend):
        for kind in (torch.int32, torch.uint8):
            with pytest.raises(TypeError, match=r"give torch\.int64"):
                pixel_cross_entropy(scores, torch.zeros(1, 8, 8, dtype=kind), 8)
        with pytest.raises(ValueError, match="target has 2 images, logits have 1"):
            pixel_cross_entropy(scores, torch.zeros(2, 8, 8, dtype=torch.int64), 8)


@needs_library
def test_a_class_that_there_is_not_is_refused():
    with pytest.raises(IndexError, match="class 3, scores have 3 classes"):
        pixel_cross_entropy(torch.zeros(1, 3, 2, 2), torch.full((1, 8, 8), 3), 4)


def test_it_is_the_choice_on_cpus_and_asks_no_gradient_that_nobody_wants():
    logits, target = case(2, 3, (2, 2), (8, 8))
    assert pixel_cross_entropy(logits, target, 4).grad_fn.name() == "_BlockedBackward"
    with torch.no_grad():
        assert pixel_cross_entropy(logits, target, 4) == pixel_cross_entropy(logits, target, 4, blocked=True)


def test_large_scores_do_not_overflow():
    logits, target = case(1, 3, (2, 2), (8, 8))
    big = (1e4 * logits.detach()).float().requires_grad_()
    wanted = pixel_cross_entropy(big, target, 4, blocked=False)
    for backend in ("auto", "torch"):
        with use_backend(backend):
            found = pixel_cross_entropy(big, target, 4)
        (grad,) = torch.autograd.grad(found, big)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-2)
        assert torch.isfinite(grad).all()


def test_values_that_are_not_finite_are_not_hidden():
    logits, target = case(2, 3, (2, 2), (8, 8), known=1)
    with torch.no_grad():
        logits[1, 0, 0, 0] = float("nan")
    for scores in (logits, logits.detach().float()):
        assert torch.isnan(pixel_cross_entropy(scores, target, 4))


@pytest.mark.parametrize("blocked", [True, False])
def test_every_negative_target_is_left_out(blocked):
    logits, target = case(2, 3, (2, 2), (8, 8))
    far = torch.where(target < 0, -7, target)
    found = pixel_cross_entropy(logits, far, 4, blocked=blocked)
    torch.testing.assert_close(found, pixel_cross_entropy(logits, target, 4, blocked=blocked))


def test_weights_of_a_pixel_sum_to_one():
    weights = interpolation(3, 10, torch.zeros(1, dtype=torch.float64))
    assert weights.shape == (10, 3)
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(10, dtype=torch.float64))
