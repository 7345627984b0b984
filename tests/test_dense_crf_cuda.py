"""``dense_crf`` of the CUDA library without a GPU: emulated on CPU tensors, thread after thread."""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from ppap.evaluation import crf
from ppap.kernels import dense_crf, dense_crf_batch, native_cuda
from ppap.kernels.dense_crf import automatic, cuda_impl, reference, unavailable_reason
from tests.crf_cases import CONTESTED, example
from tests.helpers import peak_bytes
from tests.test_dense_crf import scene  # noqa: F401

CUDA_SOURCES = Path(__file__).parents[1] / "csrc" / "cuda"
CASES = [
    pytest.param("scene", 12, 80, 88, id="scene"),
    pytest.param("noise", 5, 40, 44, id="noise"),
    pytest.param("black", 12, 48, 60, id="black"),
    pytest.param("grey", 3, 40, 70, id="grey"),
    pytest.param("halves", 1, 17, 19, id="one class"),
    pytest.param("halves", 27, 20, 33, id="27 classes"),
    pytest.param("noise", 64, 9, 17, id="64 classes"),
    pytest.param("halves", 300, 6, 5, id="300 classes"),
    pytest.param("halves", 2, 1, 300, id="one pixel high"),
    pytest.param("noise", 2, 90, 1, id="one pixel wide"),
    pytest.param("halves", 3, 1, 1, id="one pixel"),
]


@pytest.fixture
def emulated(emulated_cuda, monkeypatch):
    """The implementation "cuda" on CPU tensors."""
    monkeypatch.setattr(native_cuda, "library", lambda: emulated_cuda)
    monkeypatch.setattr(cuda_impl, "_DEVICES", ("cpu",))
    yield emulated_cuda
    emulated_cuda.ppap_cuda_backwards(0)


def picture(kind: str, classes: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """An image (H, W, 3) and scores (C, H, W)."""
    image, scores = example(classes, height, width)
    if kind == "noise":
        image = np.random.default_rng(0).integers(0, 256, image.shape, dtype=np.uint8)
    elif kind != "halves":
        image = np.full_like(image, {"black": 0, "grey": 128}[kind])
    return image, scores


@pytest.mark.parametrize(("kind", "classes", "height", "width"), CASES)
def test_equals_the_reference_and_the_native_one(kind, classes, height, width, scene, emulated):  # noqa: F811
    image, scores = picture(kind, classes, height, width) if kind != "scene" else scene
    q = dense_crf(image, scores, impl="cuda")
    assert q.dtype == torch.float32 and q.shape == scores.shape and torch.isfinite(q).all()
    for impl in ("reference", "cpp"):
        if unavailable_reason(impl) is not None:
            continue
        wanted = dense_crf(image, scores, impl=impl)
        assert (q - wanted).abs().max() <= CONTESTED
        # Labels may differ where two classes tie within rounding.
        best = wanted.topk(min(classes, 2), dim=0).values
        clear = best[0] - best[-1] > 1e-4 if classes > 1 else torch.ones_like(best[0], dtype=torch.bool)
        different = q.argmax(dim=0) != wanted.argmax(dim=0)
        assert not (different & clear).any() and different.sum() <= max(1, 1e-4 * different.numel())


@pytest.mark.parametrize(
    "options",
    [
        {"iterations": 0},
        {"iterations": 1},
        {"gaussian": (2.5, 1)},
        {"gaussian": (1, 0)},
        {"bilateral": (20, 30, 0.5)},
        {"bilateral": (67, 3, 0)},
        {"gaussian": (1, 0), "bilateral": (67, 3, 0)},
    ],
)
def test_every_parameter_counts(options, emulated):
    image, scores = example(4, 24, 30)
    q, wanted = (dense_crf(image, scores, impl=impl, **options) for impl in ("cuda", "reference"))
    torch.testing.assert_close(q, wanted, rtol=0, atol=2e-5)
    assert (q - dense_crf(image, scores, impl="cuda")).abs().max() > 1e-4


@pytest.mark.parametrize("kind", ["scene", "noise", "black"])
def test_bits_do_not_depend_on_the_order_of_threads_or_on_company(kind, scene, emulated):  # noqa: F811
    image, scores = scene if kind == "scene" else picture(kind, 5, 40, 44)
    image, scores = torch.from_numpy(image), torch.as_tensor(scores)
    first = dense_crf(image, scores, impl="cuda")
    emulated.ppap_cuda_backwards(1)
    assert torch.equal(dense_crf(image, scores, impl="cuda"), first)
    emulated.ppap_cuda_backwards(0)
    ((together, fewer),) = dense_crf_batch([(image, (scores, scores[:2]))], impl="cuda")
    assert torch.equal(together, first)
    assert torch.equal(fewer, dense_crf(image, scores[:2], impl="cuda"))


def test_strong_kernels_and_large_scores_stay_finite(emulated):
    image, scores = example(3, 12, 10)
    for options in ({"gaussian": (1, 300), "bilateral": (67, 3, 4000)}, {}):
        assert torch.isfinite(dense_crf(image, scores * 1e30, impl="cuda", **options)).all()


def test_coordinates_near_the_limit(emulated):
    image, scores = example(2, 3, 40)
    bilateral = (0.03, 0.12, 4)
    with pytest.raises(ValueError, match="lattice"):
        dense_crf(image, scores, bilateral=(0.02, 0.1, 4), impl="cuda")
    q, wanted = (dense_crf(image, scores, bilateral=bilateral, impl=i) for i in ("cuda", "reference"))
    torch.testing.assert_close(q, wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", ["halves", "noise"])
def test_memory_is_bounded_as_said(kind, emulated):
    # So many pixels that the hash tables just double.
    image, scores = (torch.from_numpy(array) for array in picture(kind, 12, 105, 139))
    pixels = image[..., 0].numel()
    position = np.stack(np.divmod(np.arange(pixels), 139)[::-1], 1).astype(np.float32)
    colour = image.flip(2).reshape(-1, 3).numpy() / np.float32(3)
    vertices = sum(
        len(np.unique(reference.enclosing_simplices(feature)[0].reshape(-1, feature.shape[1]), axis=0))
        for feature in (np.concatenate([position / 67, colour], axis=1), position)
    )
    peak = peak_bytes(lambda: cuda_impl.dense_crf(image, [scores], 2, (1.0, 3.0), (67.0, 3.0, 4.0)))
    said = (600 + 10 * 12) * pixels + (60 + 8 * 12) * vertices
    assert said / 2 <= peak <= said


def test_the_op_is_registered(emulated):
    image, scores = (torch.from_numpy(array) for array in example(3, 6, 7))
    arguments = (image, [scores, scores[:2].clone()], 2, [1.0, 3.0], [67.0, 3.0, 4.0], "cuda")
    torch.library.opcheck(torch.ops.ppap.dense_crf.default, arguments)
    compiled = torch.compile(lambda i, s: dense_crf(i, s).argmax(dim=0), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(image, scores), dense_crf(image, scores, impl="cuda").argmax(dim=0))


def test_scores_on_a_gpu_take_it_if_it_was_built(emulated_cuda, emulated, monkeypatch):
    image, scores = example(3, 12, 10)
    assert automatic("cpu") == "cuda" and unavailable_reason() is None
    assert torch.equal(dense_crf(image, scores), dense_crf(image, scores, impl="cuda"))
    ((q,),) = dense_crf_batch([(image, (scores,))])
    assert torch.equal(q, dense_crf(image, scores, impl="cuda"))
    monkeypatch.setattr(cuda_impl, "_DEVICES", ("cuda",))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    assert automatic("cuda") == "cuda" and automatic("cpu") == "cpp"
    assert crf.crf_implementation("native", "cuda").endswith("CUDA library, A GPU")
    assert crf.crf_device("native", "cuda").type == "cuda" and crf.native_crf_missing("cuda") is None
    assert {crf.crf_device(*way).type for way in (("native", "cpu"), ("pydensecrf", "cuda"))} == {"cpu"}
    monkeypatch.setattr(native_cuda, "reason", lambda: "not built")
    assert automatic("cuda") == "cpp" and crf.crf_device("native", "cuda").type == "cpu"


def test_an_evaluation_uses_it(emulated):
    image, scores = (torch.from_numpy(array) for array in example(3, 12, 10))
    tasks = [crf.CRFTask(image, (scores, scores[:2]), payload=i) for i in range(3)]
    for i, result in enumerate(crf.run_crf(tasks, "native")):
        assert result.payload == i
        for labels, part in zip(result.labels, tasks[i].scores, strict=True):
            assert torch.equal(labels, dense_crf(image, part, impl="cuda").argmax(dim=0))


def test_what_it_cannot_do_is_said(emulated, monkeypatch):
    image, scores = example(3, 20, 21)
    with pytest.raises(ValueError, match="8192 classes; impl 'cuda' takes at most 8191"):
        dense_crf(image[:1, :1], np.zeros((8192, 1, 1), np.float32), impl="cuda")
    with monkeypatch.context() as patch:
        patch.setattr(cuda_impl, "PIXELS_MAX", 400)
        with pytest.raises(ValueError, match="20 x 21 pixels; impl 'cuda' takes at most 400"):
            dense_crf(image, scores, impl="cuda")

    def too_large(*arguments):
        raise torch.cuda.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(cuda_impl, "_inference", too_large)
        with pytest.raises(MemoryError, match="not enough GPU memory for 20 x 21 pixels; give a smaller"):
            dense_crf(image, scores, impl="cuda")
    monkeypatch.setattr(cuda_impl, "_DEVICES", ("cuda",))
    with pytest.raises(RuntimeError, match="no GPU" if not torch.cuda.is_available() else "on one GPU"):
        dense_crf(image, scores, impl="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(RuntimeError, match="scores on cpu; impl 'cuda' needs all of them on one GPU"):
        dense_crf(image, scores, impl="cuda")


def test_a_library_that_was_not_built_is_named_with_its_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("PPAP_CACHE_DIR", str(tmp_path))
    native_cuda.library.cache_clear()
    try:
        with pytest.raises(RuntimeError, match="CUDA library was not built; build it: python -m ppap.doctor"):
            dense_crf(*example(3, 6, 7), impl="cuda")
        assert automatic("cuda") == "cpp"
    finally:
        native_cuda.library.cache_clear()


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_nvcc_does_not_contract_what_decides_the_simplices(tmp_path):
    out = tmp_path / "crf.ptx"
    subprocess.run(
        ["nvcc", "-std=c++17", "-O3", "-ptx", str(CUDA_SOURCES / "dense_crf.cu"), "-o", str(out)], check=True
    )
    bodies = out.read_text().split(".entry ")[1:]
    embed = [body for body in bodies if "Embed" in body.split("(")[0]]
    assert len(embed) == 2 and any("fma.rn.f32" in body for body in bodies)
    assert all("mul.rn.f32" in body and "fma.rn.f32" not in body for body in embed)
