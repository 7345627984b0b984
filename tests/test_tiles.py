"""Prediction by tiles: no seams, bounded memory, parts of files read alone, georeference kept."""

import importlib.util
import tracemalloc

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, TiffImagePlugin

from ppap.data.images import read_image
from ppap.data.rasters import Whole, by_parts, has_georeference, open_picture
from ppap.data.transforms import Geometry
from ppap.errors import UsageError
from ppap.evaluation.tiles import Tiling, label_tiles, labels_of, ramp
from ppap.evaluation.views import View
from ppap.predict import main
from ppap.reports import prediction

# rasterio says so of plain TIFF files.
pytestmark = pytest.mark.filterwarnings("ignore:Dataset has no geotransform")
needs_rasterio = pytest.mark.skipif(
    importlib.util.find_spec("rasterio") is None, reason="rasterio is not installed: pip install rasterio"
)
SIZE = (170, 130)


def picture(size=SIZE, seed=0):
    coarse = np.random.default_rng(seed).integers(0, 255, (9, 12, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


class Moody:
    """A network whose scores of a tile are those of its pixels, and an offset that no two tiles share."""

    def look(self, pixels):
        found = []
        for one in pixels:
            mood = torch.from_numpy(np.random.default_rng(int(one.sum())).normal(0, 25, (6, 1, 1))).float()
            grey = F.avg_pool2d(torch.from_numpy(one).float().mean(-1)[None, None], 4)[0, 0]
            scores = -(grey - torch.arange(6).mul(45.0)[:, None, None]).abs() + mood
            side = (one.shape[0], one.shape[1])
            found.append(View(scores, None, side, side))
        return [type("Seen", (), {"view": view})() for view in found]


def test_tiles_cover_a_picture_with_their_overlap():
    tiling = Tiling(64, 32, 0.25)
    for length in (10, 64, 65, 112, 113, 1000):
        starts, side = tiling.starts(length), min(64, length)
        assert starts[0] == 0 and starts[-1] + side == length
        assert all(0 < b - a <= 48 for a, b in zip(starts, starts[1:], strict=False))
    assert tiling.seen((1000, 40)) == (32, 20) and ramp(8, 0.25).tolist() == [
        0.25,
        0.75,
        1,
        1,
        1,
        1,
        0.75,
        0.25,
    ]
    for bad in (0.6, -0.1):
        with pytest.raises(UsageError, match="--tile-overlap is"):
            Tiling(64, 32, bad)


def test_one_tile_is_the_whole_picture(predictor):
    image = picture((50, 50))
    for crf in ("none", "native"):
        options = {"resolution": 32, "crf": crf}
        whole = predictor.predict(image, **options)
        assert torch.equal(predictor.predict(image, tile=50, **options), whole)
    assert predictor.predict(picture(), resolution=32, tile=32).shape == SIZE[::-1]
    with pytest.raises(UsageError, match="gives 256 patches.*the limit is 100"):
        predictor.predict(image, resolution=128, tile=64, max_tokens=100)


def test_no_seam_shows():
    """Labels change across the lines where tiles begin and end as often as between other neighbours."""
    geometry, share = Geometry(64, "bilinear"), {}
    for overlap in (0.0, 0.25, 0.5):
        tiling, on, off = Tiling(64, 64, overlap), [], []
        starts = tiling.starts(300)
        lines = sorted({x - 1 for start in starts for x in (start, start + 64) if 0 < x < 300})
        for seed in range(4):
            bands = label_tiles(Whole(picture((300, 300), seed)), Moody(), tiling, geometry, 3)
            labels = labels_of(bands, (300, 300), torch.arange(6))
            for turned in (labels, labels.T):
                changes = (turned[:, 1:] != turned[:, :-1]).mean(axis=0)
                on.append(changes[lines].mean())
                off.append(np.delete(changes, lines).mean())
        share[overlap] = np.mean(on) / np.mean(off)
    assert share[0.0] > 4, "without an overlap the offsets of this network show"
    # Over eight pictures of 420 pixels 1.17 and 1.03: inside the overlap, too, the offsets move borders.
    assert share[0.25] < 1.3 and share[0.5] < 1.3, share


def test_memory_grows_with_a_row_of_tiles_not_with_the_picture(predictor):
    class Endless:
        def __init__(self, height):
            self.size = (128, height)

        def region(self, left, top, width, height):
            return picture((width, height), seed=top)

    peaks = []
    lookout = predictor.lookout()
    for height in (256, 1024):
        tracemalloc.start()
        held = largest = 0
        for _, labels in label_tiles(Endless(height), lookout, Tiling(64, 32), predictor.geometry, 2):
            held += len(labels)
            largest = max(largest, len(labels))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert held == height and largest <= 64
    assert peaks[1] < 1.5 * peaks[0] + 100_000


def test_the_command_by_tiles(finished, predictor, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prediction, "_OVERLAY", 64)
    picture().save(tmp_path / "a.png")
    arguments = [str(finished), str(tmp_path / "a.png"), "--device=cpu", "--resolution=32"]
    main([*arguments, f"--out={tmp_path / 'm'}", "--tile=48", "--batch-size=3"])
    mask = np.asarray(Image.open(tmp_path / "m/a.png"))
    assert np.array_equal(mask, predictor.predict(picture(), resolution=32, tile=48).numpy())
    assert Image.open(tmp_path / "m/a_overlay.jpg").size == (64, 49)
    main([*arguments, f"--out={tmp_path / 'n'}"])
    assert "--tile 128 keeps more detail" in capsys.readouterr().out
    for wrong in (["--probabilities"], ["--features"], ["--smooth=2"]):
        with pytest.raises((UsageError, SystemExit)):
            main([*arguments, f"--out={tmp_path / 'o'}", "--tile=48", *wrong])


def geotiff(path, image, **more):
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[33550], tags.tagtype[33550] = (0.5, 0.5, 0.0), 12
    tags[33922], tags.tagtype[33922] = (0.0, 0.0, 0.0, 400000.0, 5600000.0, 0.0), 12
    tags[34735], tags.tagtype[34735] = (1, 1, 0, 3, 1024, 0, 1, 1, 1025, 0, 1, 1, 3072, 0, 1, 32633), 3
    image.save(path, tiffinfo=tags, **more)


def test_a_georeference_is_never_lost_in_silence(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prediction, "can_georeference", lambda: False)
    geotiff(tmp_path / "a.tif", picture())
    picture().save(tmp_path / "b.tif")
    assert has_georeference(tmp_path / "a.tif") and not has_georeference(tmp_path / "b.tif")
    out = tmp_path / "m"
    main([str(finished), *map(str, tmp_path.glob("*.tif")), f"--out={out}", "--resolution=32"])
    text = capsys.readouterr().out
    assert "1 images have a georeference" in text and "pip install rasterio" in text
    assert not (out / "a.tif").exists()


@needs_rasterio
@pytest.mark.parametrize("tile", [[], ["--tile=48"]], ids=["whole", "tiles"])
def test_masks_lie_where_pictures_do(finished, tmp_path, tile):
    import rasterio

    geotiff(tmp_path / "a.tif", picture(), compression="tiff_lzw")
    out = tmp_path / "m"
    arguments = [str(finished), str(tmp_path / "a.tif"), f"--out={out}", "--resolution=32", "--device=cpu"]
    main([*arguments, *tile])
    with rasterio.open(tmp_path / "a.tif") as one, rasterio.open(out / "a.tif") as mask:
        assert mask.crs == one.crs and mask.crs.to_epsg() == 32633
        assert mask.transform == one.transform and mask.transform.a == 0.5
        assert np.array_equal(mask.read(1), np.asarray(Image.open(out / "a.png")))
        table = np.array(Image.open(out / "a.png").getpalette()).reshape(-1, 3)
        assert mask.colormap(1)[3][:3] == tuple(table[3])
    with pytest.raises(UsageError, match="exists already"):
        main([*arguments, *tile])


@needs_rasterio
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "I;16"])
def test_parts_are_read_as_whole_files_are(tmp_path, predictor, mode):
    image = picture()
    if mode == "I;16":
        values = np.asarray(image.convert("L")).astype(np.uint16) * 250
        Image.fromarray(values).save(tmp_path / "a.tif")
    else:
        image.convert(mode).save(tmp_path / "a.tif")
    whole = np.asarray(read_image(tmp_path / "a.tif", predictor.reading))
    assert by_parts(tmp_path / "a.tif")
    with open_picture(tmp_path / "a.tif", predictor.reading) as part:
        assert part.size == SIZE and part.reduced(50).size == (50, 38)
        assert np.array_equal(np.asarray(part.region(30, 20, 64, 50)), whole[20:70, 30:94])
    image.convert("P").save(tmp_path / "p.tif")
    assert not by_parts(tmp_path / "p.tif"), "indices of colours are no values"
