"""Prediction for those who go on from there: CRF, probabilities, features, films, batches and threads."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from ppap.errors import UsageError
from ppap.evaluation.crf import run_crf
from ppap.evaluation.evaluate import CLUSTER_SHARPNESS, pixel_scores
from ppap.predict import main
from ppap.reports import prediction


def film(folder, count, size=(48, 32)):
    """Frames 1 to `count`, of slowly changing colours with noise."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 255, (4, 6, 3)).astype(np.uint8)
    base = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)).astype(int)
    frames = []
    for i in range(1, count + 1):
        pixels = (base + rng.integers(-60, 60, base.shape)).clip(0, 255).astype(np.uint8)
        frames.append(Image.fromarray(pixels))
        frames[-1].save(folder / f"frame{i}.png")
    return frames


def probabilities(predictor, image):
    """(groups, H, W) of a picture of 48 x 32 pixels, seen as it is."""
    from ppap.data.transforms import normalise

    engine = predictor.engine
    code = engine.code(normalise(np.asarray(image))[None])
    cosines = pixel_scores(code, (engine.cluster, None), engine.net.backbone.patch_size, (32, 48))[0]
    return (CLUSTER_SHARPNESS * cosines).softmax(dim=0)


def test_probabilities_features_and_crf(finished, predictor, tmp_path):
    (frame,) = film(tmp_path / "in", 1)
    options = ["--resolution=32", "--device=cpu", "--crf=native", "--probabilities", "--features"]
    main([str(finished), str(tmp_path / "in"), f"--out={tmp_path / 'out'}", *options])
    kept = np.load(tmp_path / "out/frame1_probabilities.npz")
    values, ids = kept["probabilities"], kept["ids"]
    assert values.dtype == np.float16 and values.shape[1:] == (32, 48) and len(ids) == len(values)
    assert np.allclose(values.astype(np.float32).sum(0), 1, atol=5e-3)
    from ppap.evaluation.crf import CRFTask

    task = CRFTask(np.asarray(frame), (probabilities(predictor, frame).log(),))
    (wanted,) = next(run_crf([task], "native")).labels
    mask = np.asarray(Image.open(tmp_path / "out/frame1.png")).astype(int)
    ignored = json.loads((tmp_path / "out/legend.json").read_text())["ignored_id"]
    assert np.array_equal(np.where(mask == ignored, -1, mask), ids[wanted.numpy()])
    found = np.load(tmp_path / "out/frame1_features.npz")
    assert found["features"].shape[1:] == (4, 6) and found["features"].dtype == np.float16
    assert found["patch"] == 8 and found["size"].tolist() == [32, 48]


def test_probabilities_of_merged_clusters_are_their_sum(finished, predictor, tmp_path):
    from tests.test_names import write

    (frame,) = film(tmp_path / "in", 1)
    centres = predictor.engine.cluster.clusters
    path = write(tmp_path / "names.json", centres, c5={"merge_into": 1}, c2={"ignore": True})
    options = [f"--names={path}", "--resolution=32", "--device=cpu", "--probabilities"]
    main([str(finished), str(tmp_path / "in"), f"--out={tmp_path / 'out'}", *options])
    kept = np.load(tmp_path / "out/frame1_probabilities.npz")
    plain = probabilities(predictor, frame).numpy()
    assert kept["ids"].tolist() == [0, 1, 3, 4, 6, 7, -1]
    assert np.allclose(kept["probabilities"][1], plain[1] + plain[5], atol=1e-3)
    assert np.allclose(kept["probabilities"][6], plain[2], atol=1e-3)


def test_frames_are_smoothed_in_the_order_of_their_numbers(finished, predictor, tmp_path):
    frames = film(tmp_path / "in", 11)
    options = ["--resolution=32", "--device=cpu", "--smooth=3", "--probabilities"]
    out = tmp_path / "out"
    arguments = [str(finished), str(tmp_path / "in"), f"--out={out}", *options]
    main([*arguments, "--batch-size=4"])
    each = [probabilities(predictor, frame).numpy() for frame in frames]
    for i in (0, 1, 10):
        found = np.load(out / f"frame{i + 1}_probabilities.npz")["probabilities"]
        assert np.allclose(found, np.mean(each[max(0, i - 2) : i + 1], axis=0), atol=1e-3)
    before = {path.name: path.read_bytes() for path in out.glob("*.png")}
    for i in (5, 11):
        (out / f"frame{i}.png").unlink()
    main([*arguments, "--skip-existing", "--batch-size=1"])
    after = {path.name: path.read_bytes() for path in out.glob("*.png")}
    assert after == before, "frames that are done count for those after them"


@pytest.mark.parametrize("workers", [0, 3])
def test_batches_and_threads_change_nothing(finished, predictor, tmp_path, workers):
    film(tmp_path / "in", 3)
    film(tmp_path / "in" / "other", 2, (32, 64))
    (tmp_path / "in" / "broken.jpg").write_bytes(b"\xff\xd8\xff no image")
    out, options = tmp_path / "out", ["--resolution=32", "--device=cpu", f"--workers={workers}"]
    with pytest.raises(Exception, match="broken.jpg"):
        main([str(finished), str(tmp_path / "in"), f"--out={out}", *options])
    for name in ("frame1", "frame3", "other/frame2"):
        wanted = predictor.predict(tmp_path / f"in/{name}.png", resolution=32)
        assert np.array_equal(np.asarray(Image.open(out / f"{name}.png")), wanted.numpy())


def test_wrong_options_are_named(finished, tmp_path, monkeypatch):
    film(tmp_path / "in", 1)
    arguments = [str(finished), str(tmp_path / "in"), f"--out={tmp_path / 'out'}"]
    for option in ("--smooth=0", "--batch-size=0", "--workers=-1", "--resolution=0"):
        with pytest.raises((UsageError, SystemExit)):
            main([*arguments, option])
    monkeypatch.setattr("ppap.evaluation.crf.unavailable_reason", lambda *of: "it is not built")
    with pytest.raises(UsageError, match="--crf native cannot run here: it is not built; or give --crf"):
        main([*arguments, "--crf=native"])
    assert not (tmp_path / "out").exists()
    assert prediction.MaskOptions().record()["smooth"] == 1 and torch.is_grad_enabled()
