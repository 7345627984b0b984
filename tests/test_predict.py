"""Prediction: masks of images of any size, from the command line and from Python."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import ppap
from ppap.cli import run
from ppap.errors import DataError, UsageError
from ppap.predict import main
from ppap.reports import prediction
from ppap.reports.masks import find_images
from ppap.reports.strips import predict_crop
from tests.runs import TINY, make_folder


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    """What `auto` takes here: results are compared exactly with those of training on the CPU."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)


def picture(width, height, seed=0):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 255, (4, 4, 3)).astype(np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("size", [(64, 64), (33, 50), (200, 31), (1, 1), (3, 90)])
@pytest.mark.parametrize("probe", ["cluster", "linear"])
def test_masks_have_the_size_of_the_image(predictor, size, probe):
    labels = predictor.predict(picture(*size), probe=probe, resolution=32)
    assert labels.shape == size[::-1] and labels.dtype == torch.int64
    assert 0 <= labels.min() and labels.max() < 8


def test_a_square_of_the_resolution_gives_the_labels_of_the_evaluation(predictor):
    image = picture(32, 32)
    from ppap.data.transforms import normalise
    from ppap.evaluation.metrics import apply_assignment

    cluster, linear = predict_crop(predictor.engine, normalise(np.asarray(image)))
    assert torch.equal(predictor.predict(image, probe="linear", resolution=32), linear)
    wanted = apply_assignment(cluster, predictor.assignment)
    assert torch.equal(predictor.predict(image, resolution=32), wanted)


def test_any_mode_of_image(predictor):
    wanted = predictor.predict(picture(40, 40).convert("L").convert("RGB"), resolution=32)
    assert torch.equal(predictor.predict(picture(40, 40).convert("L"), resolution=32), wanted)


def test_too_many_patches_name_the_limit(predictor):
    with pytest.raises(UsageError, match="the limit is 100 .*lower --resolution"):
        predictor.predict(picture(64, 64), resolution=320, max_tokens=100)


def test_the_command_writes_masks_overlays_and_a_legend(finished, tmp_path, capsys):
    images = tmp_path / "photos"
    (images / "sub").mkdir(parents=True)
    picture(60, 45).save(images / "a.jpg")
    picture(31, 70).save(images / "sub" / "b.png")
    out = tmp_path / "masks"
    main([str(finished), str(images), f"--out={out}", "--resolution=32"])
    assert "random weights" in capsys.readouterr().out
    mask = Image.open(out / "sub" / "b.png")
    assert mask.mode == "P" and mask.size == (31, 70)
    record = json.loads((out / "legend.json").read_text())
    assert [entry["name"] for entry in record["classes"]][:2] == ["sky", "water"]
    for entry in record["classes"]:
        assert mask.getpalette()[3 * entry["id"] : 3 * entry["id"] + 3] == entry["rgb"]
    assert Image.open(out / "a_overlay.jpg").size == (60, 45)
    assert (out / "legend.png").exists()
    labels = ppap.load(finished).predict(Image.open(images / "sub" / "b.png"), resolution=32)
    assert np.array_equal(np.asarray(mask), labels.numpy())


def test_nothing_is_overwritten_silently(finished, tmp_path):
    picture(40, 40).save(tmp_path / "a.png")
    original = (tmp_path / "a.png").read_bytes()
    arguments = [str(finished), str(tmp_path / "a.png"), "--resolution=32"]
    with pytest.raises(UsageError, match="is one of the images; give another --out"):
        main([*arguments, f"--out={tmp_path}"])
    with pytest.raises(UsageError, match="is one of the images"):
        main([*arguments, f"--out={tmp_path}", "--overwrite"])
    assert (tmp_path / "a.png").read_bytes() == original
    out = tmp_path / "masks"
    main([*arguments, f"--out={out}"])
    with pytest.raises(UsageError, match="exists already .*--overwrite"):
        main([*arguments, f"--out={out}"])
    main([*arguments, f"--out={out}", "--overwrite"])


def test_a_checkpoint_folder_alone_serves(finished, predictor, tmp_path):
    alone = tmp_path / "somewhere else"
    shutil.copytree(finished / "checkpoints" / "best", alone)
    image = picture(40, 50)
    assert torch.equal(
        ppap.load(alone).predict(image, resolution=32), predictor.predict(image, resolution=32)
    )


def test_clusters_without_labels_are_numbered(tmp_path):
    from ppap.train import main as train

    root = make_folder(tmp_path / "data", labels=False)
    vit = ["--model.backbone=vit_tiny_patch16_224", "--model.weights=random", "--model.patch-size=8"]
    options = [
        f"--data.root={root}",
        "--data.classes=4",
        f"--train.out={tmp_path / 'run'}",
        "--train.steps=1",
    ]
    train(["folder", *TINY[5:], *vit, *options])
    predictor = ppap.load(tmp_path / "run")
    assert predictor.names() == ("cluster 0", "cluster 1", "cluster 2", "cluster 3")
    with pytest.raises(UsageError, match="could not train without labels"):
        predictor.predict(picture(40, 40), probe="linear")


def test_bad_input(finished, tmp_path, capsys):
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not an image")
    (tmp_path / "empty").mkdir()
    for images, words in (
        (tmp_path / "none.jpg", "no image or folder"),
        (tmp_path / "empty", "has no images"),
        (tmp_path / "broken.jpg", "broken.jpg"),
    ):
        assert run(main, [str(finished), str(images), f"--out={tmp_path / 'masks'}"]) == 3
        errors = capsys.readouterr().err
        assert words in errors and "Traceback" not in errors
    with pytest.raises(SystemExit) as error:
        main([str(finished), "x.jpg"])
    assert error.value.code == 2, "--out is required"


def test_a_legend_never_names_other_masks(finished, tmp_path):
    picture(40, 40).save(tmp_path / "a.png")
    picture(40, 40).save(tmp_path / "b.png")
    picture(40, 40).save(tmp_path / "legend.png")
    out = tmp_path / "masks"
    main([str(finished), str(tmp_path / "a.png"), f"--out={out}", "--resolution=32"])
    main([str(finished), str(tmp_path / "b.png"), f"--out={out}", "--resolution=32"])
    picture(40, 40).save(tmp_path / "c.png")
    with pytest.raises(UsageError, match="names the ids of other masks"):
        main([str(finished), str(tmp_path / "c.png"), f"--out={out}", "--resolution=32", "--probe=linear"])
    with pytest.raises(DataError, match="named like the legend"):
        main([str(finished), str(tmp_path / "legend.png"), f"--out={out}"])
    (out / "legend.json").write_bytes(b"\xff" + (out / "legend.json").read_bytes())
    with pytest.raises(UsageError, match="names the ids of other masks"):
        main([str(finished), str(tmp_path / "c.png"), f"--out={out}", "--resolution=32"])


def test_every_image_is_looked_at_before_the_first_mask(finished, tmp_path):
    folder = tmp_path / "photos"
    folder.mkdir()
    picture(40, 40).save(folder / "a.png")
    picture(9000, 20).save(folder / "z.png")
    with pytest.raises(UsageError, match="z.png: an image of 9000 x 20 pixels"):
        main(
            [str(finished), str(folder), f"--out={tmp_path / 'masks'}", "--resolution=32", "--max-tokens=200"]
        )
    assert not (tmp_path / "masks").exists()
    (folder / "z.png").write_bytes(b"no image")
    with pytest.raises(DataError, match="z.png"):
        main([str(finished), str(folder), f"--out={tmp_path / 'masks'}"])
    assert (tmp_path / "masks/a.png").exists()


def test_existing_legends_and_hidden_files_stay(finished, tmp_path):
    photos, out = tmp_path / "photos", tmp_path / "masks"
    photos.mkdir()
    out.mkdir()
    picture(40, 40).save(photos / "a.png")
    (photos / "._a.png").write_bytes(b"not an image")
    (out / "legend.png").write_bytes(b"precious")
    with pytest.raises(UsageError, match="legend.png exists already"):
        main([str(finished), str(photos), f"--out={out}", "--resolution=32"])
    assert (out / "legend.png").read_bytes() == b"precious"
    main([str(finished), str(photos), f"--out={tmp_path / 'other'}", "--resolution=32"])
    (tmp_path / "file").write_text("")
    with pytest.raises((DataError, UsageError), match="file"):
        main([str(finished), str(photos), f"--out={tmp_path / 'file' / 'x'}", "--resolution=32"])


def test_a_network_trained_in_fp16_predicts_on_a_cpu(finished, tmp_path, capsys):
    from tests.runs import edit_info

    folder = tmp_path / "last"
    shutil.copytree(finished / "checkpoints/last", folder)

    def fp16(info):
        info["config"]["optim"]["amp"] = "fp16"

    edit_info(folder, fp16)
    labels = ppap.load(folder, device="cpu").predict(picture(40, 40), resolution=32)
    assert "evaluated in fp32" in capsys.readouterr().out
    last = ppap.load(finished / "checkpoints/last", device="cpu")
    assert torch.equal(labels, last.predict(picture(40, 40), resolution=32))


def test_no_images_is_an_error(finished, tmp_path):
    with pytest.raises(UsageError, match="no images are given"):
        main([str(finished), f"--out={tmp_path / 'masks'}"])


def test_two_files_of_one_name_are_refused(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        picture(8, 8).save(tmp_path / name / "same.png")
    with pytest.raises(DataError, match="both become same.png"):
        find_images([str(tmp_path / "a" / "same.png"), str(tmp_path / "b" / "same.png")])


class Kill(BaseException):
    """Stands for SIGKILL: nothing catches it."""


@pytest.mark.parametrize("where", ["overlay", "save_index_png", "save_whole"])
def test_a_stop_at_an_image_leaves_nothing_undone(finished, tmp_path, monkeypatch, capsys, where):
    for name in ("a", "b"):
        (tmp_path / "in").mkdir(exist_ok=True)
        picture(40, 40, ord(name)).save(tmp_path / "in" / f"{name}.jpg")
    out, calls, real = tmp_path / "in" / "masks", [], getattr(prediction, where)

    def second(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise Kill
        return real(*args, **kwargs)

    arguments = [str(finished), str(tmp_path / "in"), f"--out={out}", "--resolution=32"]
    with monkeypatch.context() as patch:
        patch.setattr(prediction, where, second)
        with pytest.raises(Kill):
            main(arguments)
    assert (out / "a.png").exists() and not (out / "b.png").exists()
    main([*arguments, "--skip-existing"])
    assert "1 masks are there already, 1 to go" in capsys.readouterr().out, "what is written is no image"
    wanted = ["a.png", "a_overlay.jpg", "b.png", "b_overlay.jpg", "legend.json", "legend.png"]
    assert sorted(path.name for path in out.iterdir()) == wanted
    with pytest.raises(UsageError, match="exists already"):
        main(arguments)


@pytest.mark.parametrize("name", ["legend.json", "legend.png"])
def test_a_stop_at_the_legend_blocks_nothing(finished, tmp_path, monkeypatch, name):
    picture(40, 40).save(tmp_path / "a.jpg")
    out, replace, rename = tmp_path / "masks", os.replace, Path.replace

    def stop(source, target, real):
        if Path(target).name == name:
            raise Kill
        return real(source, target)

    arguments = [str(finished), str(tmp_path / "a.jpg"), f"--out={out}", "--resolution=32"]
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", lambda source, target: stop(source, target, replace))
        patch.setattr(Path, "replace", lambda source, target: stop(source, target, rename))
        with pytest.raises(Kill):
            main(arguments)
    main([*arguments, "--skip-existing"])
    assert {path.name for path in out.iterdir()} >= {"a.png", "legend.json", "legend.png"}


def test_a_full_disk_says_how_to_go_on(finished, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    picture(40, 40).save(tmp_path / "a.jpg")
    monkeypatch.setattr(prediction, "save_index_png", full)
    with pytest.raises(
        DataError, match="a.png .No space left on device.; make room and give the same command again"
    ):
        main([str(finished), str(tmp_path / "a.jpg"), f"--out={tmp_path / 'masks'}", "--resolution=32"])
