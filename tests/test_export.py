"""Networks as ONNX and TorchScript: they say what the predictor says."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ppap
from ppap.errors import DataError, NumberError, UsageError
from ppap.export import main
from ppap.exports import command, places
from ppap.exports.check import TOLERANCE, compare
from ppap.exports.files import open_onnx, open_torchscript
from ppap.exports.positions import position_by_products
from ppap.nets.backbone import resize_position
from tests.test_names import write as write_names

ROOT = Path(__file__).parents[1]


def picture(size):
    """(H, W, 3) uint8 of coarse colours, and the same as a batch of one, 0 to 1."""
    rng = np.random.default_rng(1)
    coarse = Image.fromarray(rng.integers(0, 255, (5, 6, 3)).astype(np.uint8))
    pixels = np.asarray(coarse.resize((size[1], size[0]), Image.Resampling.BICUBIC))
    return pixels, torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255


@pytest.fixture(scope="module")
def onnx_file(finished, tmp_path_factory):
    """Of any size."""
    pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    out = tmp_path_factory.mktemp("onnx") / "network.onnx"
    main([str(finished), "--format=onnx", f"--out={out}", "--dynamic-size"])
    return out


@pytest.mark.parametrize("size", [(32, 32), (37, 56)])
def test_onnx_says_what_the_predictor_says(onnx_file, predictor, size):
    pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    found = compare(predictor, "cluster", open_onnx(onnx_file), [size], seed=3)
    assert found.images == 4 and found.error <= 1e-4 and found.equal > 0.999
    pixels, batch = picture(size)
    labels = open_onnx(onnx_file)(batch)[1][0]
    wanted = predictor.predict(Image.fromarray(pixels), resolution=min(size))
    assert (labels == wanted).float().mean() > 0.999


def test_onnx_holds_what_a_user_needs(onnx_file, predictor):
    import onnx

    model = onnx.load(onnx_file)
    found = {one.key: json.loads(one.value) for one in model.metadata_props}
    assert found["names"] == list(predictor.names()) and found["ids"] == list(predictor.ids())
    assert found["mean"] == [0.485, 0.456, 0.406] and found["resolution"] == 32
    axes = [one.dim_param or one.dim_value for one in model.graph.input[0].type.tensor_type.shape.dim]
    assert axes == ["batch", 3, "height", "width"]
    assert [one.name for one in model.graph.output] == ["logits", "labels"]


def archive(path):
    """All of a file, the parts of a zip unpacked."""
    if not zipfile.is_zipfile(path):
        return path.read_bytes()
    with zipfile.ZipFile(path) as file:
        return b"".join(file.read(name) for name in file.namelist())


def test_no_path_of_this_machine_is_in_the_file(onnx_file, finished, predictor, tmp_path):
    names = write_names(tmp_path / "names.json", predictor.engine.cluster.clusters, c0={"name": "a"})
    script = tmp_path / "network.pt"
    main([str(finished), "--format=torchscript", f"--out={script}", f"--names={names}"])
    for path in (onnx_file, script):
        content = archive(path)
        for place in (ROOT, tmp_path, Path(torch.__file__).parent):
            assert str(place).encode() not in content, (path.name, place)


def test_torchscript_of_one_size_with_names(finished, predictor, tmp_path, capsys):
    names = write_names(
        tmp_path / "names.json",
        predictor.engine.cluster.clusters,
        c0={"name": "süß", "id": 70},
        c1={"merge_into": 0},
        c2={"ignore": True},
    )
    out = tmp_path / "network.pt"
    options = ["--format=torchscript", f"--out={out}", f"--names={names}", "--size", "40", "53"]
    main([str(finished), *options])
    assert "labels equal in 100.00 %" in capsys.readouterr().out
    pixels, batch = picture((40, 53))
    logits, labels = open_torchscript(out)(batch.repeat(2, 1, 1, 1))
    named = ppap.load(finished, device="cpu", names=names)
    wanted = named.predict(Image.fromarray(pixels), resolution=40)
    assert logits.shape == (2, len(named.engine.cluster.clusters), 40, 53)
    assert torch.equal(labels[1], wanted)
    kept = {"ppap.json": ""}
    torch.jit.load(str(out), _extra_files=kept)
    described = json.loads(kept["ppap.json"])
    assert "süß" in described["names"] and described["channel_ids"][:3] == [70, 70, -1]
    with pytest.raises(UsageError, match="network.pt exists already"):
        main([str(finished), *options])


def test_torchscript_of_any_size_and_the_linear_probe(finished, predictor, tmp_path):
    out = tmp_path / "linear.pt"
    main([str(finished), "--format=torchscript", f"--out={out}", "--probe=linear", "--dynamic-size"])
    assert compare(predictor, "linear", open_torchscript(out), [(45, 33), (8, 70)]).error <= 1e-4


@pytest.mark.parametrize("rule", ["dino", "timm"])
@pytest.mark.parametrize("stored", [(4, 4), (3, 5)])
def test_positions_by_products(rule, stored):
    position = torch.randn(1, 2 + stored[0] * stored[1], 3, generator=torch.Generator().manual_seed(0))
    for grid in [stored, (4, 4), (9, 6), (2, 3), (1, 1), (30, 2)]:
        found = position_by_products(position, stored, grid, num_prefix=2, rule=rule)
        wanted = resize_position(position, stored, grid, num_prefix=2, rule=rule)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


def test_a_file_that_differs_is_not_kept(finished, predictor, tmp_path, monkeypatch):
    def wrong(path):
        running = open_torchscript(path)
        return lambda image: (running(image)[0] + 10 * TOLERANCE * 10, running(image)[1])

    monkeypatch.setattr(command, "open_torchscript", wrong)
    out = tmp_path / "network.pt"
    with pytest.raises(NumberError, match="differs from torch, so it is not kept"):
        main([str(finished), "--format=torchscript", f"--out={out}"])
    assert not [*tmp_path.iterdir()]
    assert predictor.engine.net.backbone.resize is resize_position


def test_what_is_refused_before_any_work(finished, predictor, tmp_path, monkeypatch):
    def export(*options, source=finished, kind="torchscript"):
        main([str(source), f"--format={kind}", f"--out={tmp_path / 'network'}", *options])

    with pytest.raises(DataError, match="none"):
        export(source=tmp_path / "none")
    other = write_names(tmp_path / "names.json")
    with pytest.raises(DataError, match="clusters of another run"):
        export(f"--names={other}")
    with pytest.raises(UsageError, match="--size 4 40 is smaller than a patch; give at least 8"):
        export("--size", "4", "40")
    with pytest.raises(UsageError, match="gives 250000 patches .*limit is 16384"):
        export("--size", "4000", "4000")
    with pytest.raises(UsageError, match="--with-images is for --format coco-panoptic"):
        export("--with-images")
    with pytest.raises(UsageError, match="--names are of clusters"):
        export(f"--names={other}", "--probe=linear")
    with pytest.raises(SystemExit):
        export(kind="tflite")
    monkeypatch.setattr(places.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="onnx needs onnx, onnxscript: pip install onnx onnxscript"):
        export(kind="onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["names.json"]


def test_rotary_positions_are_of_one_size(predictor, monkeypatch):
    from ppap.exports.network import check_size

    vit = predictor.engine.net.backbone.vit
    monkeypatch.setattr(vit, "rope", torch.nn.Identity(), raising=False)
    with pytest.raises(UsageError, match="--dynamic-size: the rotary positions"):
        check_size(predictor, (32, 32), True)
    check_size(predictor, (32, 32), False)


def test_what_cannot_be_read_is_not_said_to_be_unwritable(tmp_path):
    out, source = tmp_path / "out" / "model", tmp_path / "out" / "images" / "gone.png"
    with (
        pytest.raises(DataError, match=r"cannot read .*gone.png \(No such file or directory\)"),
        places.beside(out),
    ):
        source.read_bytes()
    with (
        pytest.raises(DataError, match=r"cannot write .*model \(No space left on device\)"),
        places.beside(out),
    ):
        raise OSError(28, "No space left on device")
    with pytest.raises(DataError, match="cannot write"), places.beside(out) as new:
        (new / "no such folder" / "file").write_bytes(b"")
    assert not any(out.parent.iterdir())
