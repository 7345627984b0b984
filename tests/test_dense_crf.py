"""``dense_crf`` against a direct use of pydensecrf, its limits, and its registration with torch."""

import importlib
import sys

import numpy as np
import pytest
import torch

from ppap.kernels import dense_crf

impl_module = importlib.import_module("ppap.kernels.dense_crf.pydensecrf_impl")

try:
    from pydensecrf.densecrf import DIAG_KERNEL, NORMALIZE_SYMMETRIC, DenseCRF2D
except ImportError:
    DenseCRF2D = None

needs_package = pytest.mark.skipif(
    DenseCRF2D is None, reason="pydensecrf is missing: pip install pydensecrf2"
)


def example(classes: int, height: int, width: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A picture of two coloured halves with noise, and noisy scores that prefer a class in each half."""
    rng = np.random.default_rng(seed)
    left = np.arange(width) < width // 2
    colour = np.where(left[None, :, None], (200, 60, 20), (20, 80, 220))
    image = np.clip(colour + rng.normal(0, 3, (height, width, 3)), 0, 255).astype(np.uint8)
    scores = rng.normal(0, 1, (classes, height, width)).astype(np.float32)
    scores[0, :, left] += 1
    scores[-1, :, ~left] += 1
    return image, scores


def by_hand(image, scores, iterations=10, gaussian=(1, 3), bilateral=(67, 3, 4)) -> np.ndarray:
    """The published protocol written out with numpy and pydensecrf, every default spelled."""
    classes, height, width = scores.shape
    shifted = np.exp(scores - scores.max(axis=0))
    probability = shifted / shifted.sum(axis=0)
    unary = -np.log(np.clip(probability, 1e-5, 1.0)).astype(np.float32).reshape(classes, -1)
    options = {"kernel": DIAG_KERNEL, "normalization": NORMALIZE_SYMMETRIC}
    crf = DenseCRF2D(width, height, classes)
    crf.setUnaryEnergy(np.ascontiguousarray(unary))
    crf.addPairwiseGaussian(sxy=gaussian[0], compat=gaussian[1], **options)
    bgr = np.ascontiguousarray(image[:, :, ::-1])
    crf.addPairwiseBilateral(sxy=bilateral[0], srgb=bilateral[1], rgbim=bgr, compat=bilateral[2], **options)
    return np.array(crf.inference(iterations)).reshape(classes, height, width)


@needs_package
@pytest.mark.parametrize(
    ("classes", "height", "width"),
    [
        pytest.param(5, 33, 47, id="ragged"),
        pytest.param(27, 20, 20, id="27 classes"),
        pytest.param(2, 1, 9, id="one pixel high"),
        pytest.param(2, 9, 1, id="one pixel wide"),
        pytest.param(3, 1, 1, id="one pixel"),
        pytest.param(1, 8, 9, id="one class"),
        pytest.param(300, 6, 5, id="300 classes"),
    ],
)
def test_equals_a_direct_use_of_the_package(classes, height, width):
    image, scores = example(classes, height, width)
    q = dense_crf(image, scores)
    assert q.dtype == torch.float32 and q.shape == scores.shape
    # Only the two softmaxes differ: a few 1e-7 in the unary energy, hardly more after ten iterations.
    np.testing.assert_allclose(q.numpy(), by_hand(image, scores), rtol=0, atol=1e-5)
    torch.testing.assert_close(q.sum(dim=0), torch.ones(height, width), rtol=0, atol=1e-5)


@needs_package
def test_every_parameter_reaches_the_package():
    image, scores = example(4, 24, 30)
    default = dense_crf(image, scores)
    for options in (
        {"iterations": 3},
        {"gaussian": (2.5, 3)},
        {"gaussian": (1, 1)},
        {"bilateral": (20, 3, 4)},
        {"bilateral": (67, 30, 4)},
        {"bilateral": (67, 3, 0.5)},
    ):
        q = dense_crf(image, scores, **options)
        np.testing.assert_allclose(q.numpy(), by_hand(image, scores, **options), rtol=0, atol=1e-5)
        assert (q - default).abs().max() > 1e-4, options


@needs_package
def test_aligns_noisy_scores_to_the_edge():
    image, scores = example(3, 40, 40)
    truth = np.where(np.arange(40) < 20, 0, 2)[None, :].repeat(40, axis=0)
    before = (scores.argmax(axis=0) == truth).mean()
    after = (dense_crf(image, scores).numpy().argmax(axis=0) == truth).mean()
    assert before < 0.8 and after > 0.99


@needs_package
def test_no_iterations_give_the_clipped_softmax():
    image, scores = example(3, 7, 8)
    scores[0] += 40  # clips the others
    clipped = torch.from_numpy(scores).softmax(0).clamp(1e-5, 1)
    torch.testing.assert_close(dense_crf(image, scores, iterations=0), clipped / clipped.sum(0))


@needs_package
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_reads_every_float_type(dtype):
    image, scores = example(3, 12, 10)
    scores = torch.from_numpy(scores).to(dtype)
    expected = dense_crf(image, scores.float())
    q = dense_crf(torch.from_numpy(image), scores)
    assert q.dtype == torch.float32
    torch.testing.assert_close(q, expected, rtol=0, atol=0)


@needs_package
@pytest.mark.filterwarnings("error")
def test_reads_any_memory_layout_and_leaves_it_alone():
    image, scores = example(3, 12, 10)
    expected = dense_crf(image, scores)
    kept = image.copy(), scores.copy()
    strided = np.asfortranarray(scores), image[:, ::-1].copy()[:, ::-1]
    flipped_twice = np.flip(np.flip(scores, 2).copy(), 2)
    image.setflags(write=False)
    scores.setflags(write=False)
    permuted = torch.from_numpy(kept[1]).permute(1, 2, 0).contiguous().permute(2, 0, 1)
    for given in ((image, scores), (strided[1], strided[0]), (image, flipped_twice), (image, permuted)):
        assert torch.equal(dense_crf(*given), expected)
    assert np.array_equal(image, kept[0]) and np.array_equal(scores, kept[1])
    assert torch.equal(dense_crf(image, scores.astype(np.longdouble)), expected)


@needs_package
def test_large_scores_stay_finite():
    image, scores = example(3, 12, 10)
    q = dense_crf(image, scores * 1e30)
    assert torch.isfinite(q).all()


def replaced(**changes):
    """Valid arguments with some replaced."""
    image, scores = example(3, 6, 7)
    return {"image": image, "scores": scores} | changes


_, SCORES = example(3, 6, 7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"impl": "native"}, "'native'; valid: 'pydensecrf'", id="unknown impl"),
        pytest.param({"scores": SCORES[0]}, r"\(C, H, W\)", id="2-D scores"),
        pytest.param({"scores": SCORES[:0]}, "each at least 1", id="no class"),
        pytest.param({"scores": SCORES.astype(np.int64)}, "float dtype", id="integer scores"),
        pytest.param({"scores": SCORES.tolist()}, "numpy array or a torch tensor", id="a list"),
        pytest.param({"scores": SCORES[:, :5]}, "resize the scores", id="other size"),
        pytest.param({"scores": SCORES * np.nan}, "NaN or infinite", id="NaN scores"),
        pytest.param({"scores": SCORES.astype(np.float64) * 1e300}, "NaN or infinite", id="beyond float32"),
        pytest.param({"scores": np.array([["a"]])}, "dtype <U1", id="strings"),
        pytest.param({"image": np.zeros((6, 7), np.uint8)}, r"\(H, W, 3\)", id="grey image"),
        pytest.param({"image": np.zeros((3, 6, 7), np.uint8)}, r"\(H, W, 3\)", id="channels first"),
        pytest.param({"image": np.zeros((6, 7, 3), np.float32)}, "uint8", id="float image"),
        pytest.param({"iterations": -1}, "integer >= 0", id="negative iterations"),
        pytest.param({"iterations": 2.5}, "integer >= 0", id="fractional iterations"),
        pytest.param({"gaussian": (0, 3)}, "sigmas > 0", id="sigma 0"),
        pytest.param({"gaussian": (1, -3)}, "weight >= 0", id="negative weight"),
        pytest.param({"gaussian": (1, 3, 4)}, "has 3 values; give 2", id="three values"),
        pytest.param({"gaussian": 1}, "give 2 numbers", id="a number"),
        pytest.param({"bilateral": (67, float("nan"), 4)}, "finite", id="NaN sigma"),
        pytest.param({"bilateral": (67, -3, 4)}, "sigmas > 0", id="negative sigma"),
    ],
)
def test_refuses_wrong_arguments(changes, message):
    arguments = replaced(**changes)
    with pytest.raises(ValueError, match=message):
        dense_crf(arguments.pop("image"), arguments.pop("scores"), **arguments)


@needs_package
@pytest.mark.parametrize("options", [{"gaussian": (1e-3, 3)}, {"bilateral": (67, 1e-2, 4)}])
def test_refuses_a_lattice_beyond_16_bits(options):
    with pytest.raises(ValueError, match="lattice"):
        dense_crf(*example(3, 20, 20), **options)


@pytest.fixture
def without_package(monkeypatch):
    """As if pydensecrf were not installed."""
    monkeypatch.setitem(sys.modules, "pydensecrf", None)
    monkeypatch.setitem(sys.modules, "pydensecrf.densecrf", None)
    impl_module.unavailable_reason.cache_clear()
    yield
    impl_module.unavailable_reason.cache_clear()


def test_a_missing_package_is_named_with_its_remedy(without_package):
    with pytest.raises(RuntimeError, match="pip install pydensecrf2 .*no longer builds"):
        dense_crf(*example(3, 6, 7))


def operands():
    image, scores = (torch.from_numpy(array) for array in example(3, 6, 7))
    return image, scores, 2, [1.0, 3.0], [67.0, 3.0, 4.0], "pydensecrf"


@needs_package
def test_opcheck():
    torch.library.opcheck(torch.ops.ppap.dense_crf.default, operands())


@needs_package
def test_compiles_without_a_graph_break():
    image, scores, *_ = operands()
    compiled = torch.compile(lambda i, s: dense_crf(i, s).argmax(dim=0), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(image, scores), dense_crf(image, scores).argmax(dim=0))


@needs_package
def test_a_backward_pass_raises():
    image, scores, *_ = operands()
    q = dense_crf(image, scores.requires_grad_())
    with pytest.raises(RuntimeError, match="not differentiable"):
        q.sum().backward()
    with torch.no_grad():
        assert not dense_crf(image, scores).requires_grad
