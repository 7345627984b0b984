"""``dense_crf``: every implementation against a direct use of pydensecrf, its limits, its registration."""

import threading

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ppap.data import build_datasets
from ppap.kernels import dense_crf, dense_crf_batch, native
from ppap.kernels.dense_crf import native_impl, reference
from ppap.kernels.dense_crf.limits import check_lattice, spans
from ppap.settings.presets import demo
from tests.crf_cases import CONTESTED, TOLERANCE, example

try:
    from pydensecrf.densecrf import DIAG_KERNEL, NORMALIZE_SYMMETRIC, DenseCRF2D
except ImportError:
    DenseCRF2D = None

needs_package = pytest.mark.skipif(
    DenseCRF2D is None, reason="pydensecrf is missing: pip install pydensecrf2"
)
needs_library = pytest.mark.skipif(native.reason() is not None, reason=str(native.reason()))
ISAS = list(native.available_isas()) if native.reason() is None else ["portable"]
IMPLS = [
    *(pytest.param(f"cpp {isa}", marks=needs_library) for isa in ISAS),
    "reference",
    pytest.param("pydensecrf", marks=needs_package),
]


@pytest.fixture(params=IMPLS)
def impl(request, monkeypatch):
    """Every implementation, the native one with every instruction set of this machine."""
    name, _, isa = request.param.partition(" ")
    if isa:
        monkeypatch.setenv("PPAP_CPU_ISA", isa)
    return name


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


SIZES = [
    pytest.param(5, 33, 47, id="ragged"),
    pytest.param(27, 20, 20, id="27 classes"),
    pytest.param(40, 16, 15, id="40 classes"),
    pytest.param(64, 9, 17, id="64 classes"),
    pytest.param(2, 1, 9, id="one pixel high"),
    pytest.param(2, 9, 1, id="one pixel wide"),
    pytest.param(3, 1, 1, id="one pixel"),
    pytest.param(1, 8, 9, id="one class"),
    pytest.param(300, 6, 5, id="300 classes"),
]


@needs_package
@pytest.mark.parametrize(("classes", "height", "width"), SIZES)
def test_equals_a_direct_use_of_the_package(classes, height, width, impl):
    image, scores = example(classes, height, width)
    q = dense_crf(image, scores, impl=impl)
    assert q.dtype == torch.float32 and q.shape == scores.shape
    np.testing.assert_allclose(q.numpy(), by_hand(image, scores), rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(q.sum(dim=0), torch.ones(height, width), rtol=0, atol=1e-5)


@needs_package
def test_every_parameter_counts(impl):
    image, scores = example(4, 24, 30)
    default = dense_crf(image, scores, impl=impl)
    for options in (
        {"iterations": 3},
        {"gaussian": (2.5, 3)},
        {"gaussian": (1, 1)},
        {"gaussian": (1, 0)},
        {"bilateral": (20, 3, 4)},
        {"bilateral": (67, 30, 4)},
        {"bilateral": (67, 3, 0.5)},
        {"bilateral": (67, 3, 0)},
    ):
        q = dense_crf(image, scores, impl=impl, **options)
        np.testing.assert_allclose(q.numpy(), by_hand(image, scores, **options), rtol=0, atol=TOLERANCE)
        assert (q - default).abs().max() > 1e-4, options


@pytest.fixture(scope="module")
def scene():
    """Part of a generated scene (80, 88, 3), and logits as of a network: coarse, resized, with mistakes."""
    config = demo().data
    dataset = build_datasets(config, ("val",)).val
    image, label = dataset.pixels(0), dataset[0]["label"]
    height, width = 80, 88
    one_hot = F.one_hot(label[:height, :width].clamp(min=0), dataset.classes).permute(2, 0, 1)[None].float()
    coarse = 5 * F.avg_pool2d(one_hot, 8)
    coarse = coarse + torch.randn(coarse.shape, generator=torch.Generator().manual_seed(0))
    logits = F.interpolate(coarse, (height, width), mode="bilinear")[0]
    return np.ascontiguousarray(image[:height, :width]), logits


@needs_package
@pytest.mark.parametrize("picture", ["scene", "noise", "black", "grey"])
def test_agrees_on_pictures(picture, scene, impl):
    image, logits = scene
    if picture == "noise":
        image = np.random.default_rng(0).integers(0, 256, image.shape, dtype=np.uint8)
    elif picture != "scene":
        image = np.full_like(image, {"black": 0, "grey": 128}[picture])
    wanted = torch.from_numpy(by_hand(image, logits.numpy()))
    q = dense_crf(image, logits, impl=impl)
    difference = (q - wanted).abs().amax(dim=0)
    assert difference.max() <= CONTESTED and (difference > TOLERANCE).sum() <= 0.002 * difference.numel()
    # Labels may differ where two classes tie within the tolerance.
    assert (q.argmax(dim=0) != wanted.argmax(dim=0)).sum() <= 1e-4 * difference.numel()
    assert (q.argmax(dim=0) != logits.argmax(dim=0)).any()


def test_a_feature_lies_in_its_simplex():
    """At the origin as worked out by hand; elsewhere the weighted vertices add up to the feature."""
    coordinates, weights = reference.enclosing_simplices(np.zeros((1, 2), np.float32))
    np.testing.assert_array_equal(coordinates[0, 0], [0, 0])
    np.testing.assert_allclose(weights[0], [1, 0, 0])
    feature = np.random.default_rng(0).uniform(0, 40, (500, 5)).astype(np.float32)
    coordinates, weights = reference.enclosing_simplices(feature)
    assert weights.min() > -1e-5 and np.allclose(weights.sum(axis=1), 1, atol=1e-5)
    # The weighted vertices are the elevated feature; coordinate d is minus the sum of the others.
    full = np.concatenate([coordinates, -coordinates.sum(axis=2, keepdims=True)], axis=2)
    assert (full % 6 == np.arange(6)[None, :, None]).all(), "vertex r leaves remainder r"
    scale = np.sqrt(2 / 3) * 6 / np.sqrt((np.arange(5) + 1) * (np.arange(5) + 2))
    scaled = feature * scale
    elevated = np.zeros((500, 6))
    for j in range(6):
        elevated[:, j] = scaled[:, j:].sum(axis=1) - (j * scaled[:, j - 1] if j else 0)
    np.testing.assert_allclose((weights[:, :, None] * full).sum(axis=1), elevated, atol=2e-3)


def test_aligns_noisy_scores_to_the_edge(impl):
    image, scores = example(3, 40, 40)
    truth = np.where(np.arange(40) < 20, 0, 2)[None, :].repeat(40, axis=0)
    before = (scores.argmax(axis=0) == truth).mean()
    after = (dense_crf(image, scores, impl=impl).numpy().argmax(axis=0) == truth).mean()
    assert before < 0.8 and after > 0.99


def test_no_iterations_give_the_clipped_softmax(impl):
    image, scores = example(3, 7, 8)
    scores[0] += 40  # clips the others
    clipped = torch.from_numpy(scores).softmax(0).clamp(1e-5, 1)
    q = dense_crf(image, scores, iterations=0, impl=impl)
    torch.testing.assert_close(q, clipped / clipped.sum(0), rtol=2e-6, atol=1e-7)


@needs_library
def test_bits_do_not_depend_on_threads_or_company():
    pairs = [
        (example(c, 30, 41, seed=c)[0], [example(c, 30, 41, seed=c + i)[1] for i in range(2)])
        for c in (3, 9, 20)
    ]
    alone = [[dense_crf(image, part) for part in maps] for image, maps in pairs]
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            together = list(dense_crf_batch(pairs))
            assert all(
                torch.equal(a, b)
                for x, y in zip(alone, together, strict=True)
                for a, b in zip(x, y, strict=True)
            )
    finally:
        torch.set_num_threads(before)


@needs_package
def test_a_batch_of_any_implementation(impl):
    image, scores = example(3, 12, 10)
    (results,) = dense_crf_batch([(image, (scores, scores[:2]))], iterations=2, impl=impl)
    for q, part in zip(results, (scores, scores[:2]), strict=True):
        np.testing.assert_allclose(q.numpy(), by_hand(image, part, iterations=2), rtol=0, atol=TOLERANCE)


@needs_library
def test_a_batch_draws_few_images_and_ends_with_its_threads():
    image, scores = example(3, 12, 10)
    drawn = 0

    def pairs():
        nonlocal drawn
        while True:
            drawn += 1
            yield image, (scores,)

    results = dense_crf_batch(pairs())
    for i in range(5):
        next(results)
        assert drawn <= i + 1 + 2 * torch.get_num_threads()
    results.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ppap-crf")]


@needs_library
def test_an_error_in_a_batch_is_raised():
    image, scores = example(3, 12, 10)
    with pytest.raises(ValueError, match="NaN or infinite"):
        list(dense_crf_batch([(image, (scores,)), (image, (scores * np.nan,))]))


@needs_library
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_reads_every_float_type(dtype):
    image, scores = example(3, 12, 10)
    scores = torch.from_numpy(scores).to(dtype)
    expected = dense_crf(image, scores.float())
    q = dense_crf(torch.from_numpy(image), scores)
    assert q.dtype == torch.float32
    torch.testing.assert_close(q, expected, rtol=0, atol=0)


@pytest.mark.filterwarnings("error")
def test_reads_any_memory_layout_and_leaves_it_alone(impl):
    image, scores = example(3, 12, 10)
    expected = dense_crf(image, scores, impl=impl)
    kept = image.copy(), scores.copy()
    strided = np.asfortranarray(scores), image[:, ::-1].copy()[:, ::-1]
    flipped_twice = np.flip(np.flip(scores, 2).copy(), 2)
    image.setflags(write=False)
    scores.setflags(write=False)
    permuted = torch.from_numpy(kept[1]).permute(1, 2, 0).contiguous().permute(2, 0, 1)
    for given in ((image, scores), (strided[1], strided[0]), (image, flipped_twice), (image, permuted)):
        assert torch.equal(dense_crf(*given, impl=impl), expected)
    assert np.array_equal(image, kept[0]) and np.array_equal(scores, kept[1])
    assert torch.equal(dense_crf(image, scores.astype(np.longdouble), impl=impl), expected)


def test_large_scores_stay_finite(impl):
    image, scores = example(3, 12, 10)
    q = dense_crf(image, scores * 1e30, impl=impl)
    assert torch.isfinite(q).all()


def test_strong_kernels_stay_finite(impl):
    image, scores = example(3, 12, 10)
    q = dense_crf(image, scores, gaussian=(1, 300), bilateral=(67, 3, 4000), impl=impl)
    assert torch.isfinite(q).all() and torch.allclose(q.sum(dim=0), torch.ones(12, 10), atol=1e-5)


@needs_package
@needs_library
def test_coordinates_near_the_limit():
    """Just inside the native limit the keys do not run into each other."""
    image, scores = example(2, 3, 40)
    bilateral = (0.03, 0.12, 4)
    with pytest.raises(ValueError, match="lattice"):
        # Not through the op: the sanitizers, which run this test too, do not follow torch's exceptions.
        check_lattice(
            "bilateral", spans(3, 40, (1, 3), (0.02, 0.1, 4))["bilateral"], native_impl.LIMITS["bilateral"]
        )
    q = dense_crf(image, scores, bilateral=bilateral)
    np.testing.assert_allclose(q.numpy(), by_hand(image, scores, bilateral=bilateral), rtol=0, atol=TOLERANCE)


def operands(impl):
    image, scores = (torch.from_numpy(array) for array in example(3, 6, 7))
    return image, [scores, scores[:2].clone()], 2, [1.0, 3.0], [67.0, 3.0, 4.0], impl


def test_opcheck(impl):
    torch.library.opcheck(torch.ops.ppap.dense_crf.default, operands(impl))


def test_compiles_without_a_graph_break(impl):
    image, (scores, _), *_ = operands(impl)
    compiled = torch.compile(
        lambda i, s: dense_crf(i, s, impl=impl).argmax(dim=0), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(image, scores), dense_crf(image, scores, impl=impl).argmax(dim=0))


@needs_library
def test_a_backward_pass_raises():
    image, (scores, _), *_ = operands("cpp")
    q = dense_crf(image, scores.requires_grad_())
    with pytest.raises(RuntimeError, match="not differentiable"):
        q.sum().backward()
    with torch.no_grad():
        assert not dense_crf(image, scores).requires_grad
    ((q,),) = dense_crf_batch([(image, (scores,))])
    assert not q.requires_grad
