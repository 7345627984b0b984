"""``dense_crf``: what it refuses, and implementations that are missing."""

import sys

import numpy as np
import pytest

from ppap.kernels import dense_crf, native
from ppap.kernels.dense_crf import native_impl, pydensecrf_impl
from tests.crf_cases import example
from tests.test_dense_crf import needs_library, needs_package


def replaced(**changes):
    """Valid arguments with some replaced."""
    image, scores = example(3, 6, 7)
    return {"image": image, "scores": scores} | changes


_, SCORES = example(3, 6, 7)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param(
            {"impl": "native"}, "'native'; valid: 'cpp', 'cuda', 'reference', 'pydensecrf'", id="unknown impl"
        ),
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
        pytest.param({"gaussian": (1e-46, 3)}, "finite numbers in float32", id="sigma 0 in float32"),
        pytest.param({"bilateral": (1e-46, 3, 4)}, "finite numbers in float32", id="tiny bilateral sigma"),
        pytest.param({"gaussian": (1, 1e39)}, "finite numbers in float32", id="weight infinite in float32"),
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


@pytest.mark.parametrize("options", [{"gaussian": (1e-6, 3)}, {"bilateral": (67, 1e-2, 4)}])
@pytest.mark.parametrize(
    "impl", [pytest.param("cpp", marks=needs_library), pytest.param("pydensecrf", marks=needs_package)]
)
def test_refuses_a_lattice_beyond_its_coordinates(options, impl):
    with pytest.raises(ValueError, match="lattice .* larger sigmas"):
        dense_crf(*example(3, 20, 20), impl=impl, **options)


@needs_library
def test_refuses_more_pixels_than_indices(monkeypatch):
    monkeypatch.setattr(native_impl, "PIXELS_MAX", 400)
    with pytest.raises(ValueError, match="20 x 21 pixels; give at most 400"):
        dense_crf(*example(3, 20, 21))


@pytest.fixture
def without_package(monkeypatch):
    """As if pydensecrf were not installed."""
    monkeypatch.setitem(sys.modules, "pydensecrf", None)
    monkeypatch.setitem(sys.modules, "pydensecrf.densecrf", None)
    pydensecrf_impl.unavailable_reason.cache_clear()
    yield
    pydensecrf_impl.unavailable_reason.cache_clear()


def test_a_missing_package_is_named_with_its_remedy(without_package):
    with pytest.raises(RuntimeError, match="pip install pydensecrf2 .*no longer builds"):
        dense_crf(*example(3, 6, 7), impl="pydensecrf")


def test_a_missing_library_is_named_with_its_remedy(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "FILE", tmp_path / "_cpu.so")
    native.library.cache_clear()
    try:
        with pytest.raises(RuntimeError, match="native library was not built: install a C\\+\\+ compiler"):
            dense_crf(*example(3, 6, 7))
    finally:
        native.library.cache_clear()
