"""Masks as COCO, for CVAT and Datumaro: what the formats' own readers find is what the masks hold."""

import json
import zipfile

import numpy as np
import pytest
from PIL import Image

from ppap.errors import DataError, UsageError
from ppap.export import main
from ppap.exports.labelling import distinct_colours
from ppap.exports.masks import MaskClass, open_masks
from ppap.pictures.drawing import save_index_png
from ppap.reports.masks import colours_by_id

CLASSES = ((3, "sky", (0, 114, 178)), (7, "Straße, nass", (230, 159, 0)), (40, "水 <b>", (0, 158, 115)))
NAMES = ("a b", "süd/bild ü", "c")


def write_legend(folder, classes=CLASSES, ignored=255):
    rows = [{"id": i, "name": name, "rgb": list(rgb)} for i, name, rgb in classes]
    record = {"probe": "cluster", "ignored_id": ignored, "classes": rows}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "legend.json").write_text(json.dumps(record))


def write_masks(folder, classes=CLASSES, ignored=255):
    """A folder as `ppap predict` leaves it, beside the images; name -> ids, -1 = none."""
    rng, found = np.random.default_rng(0), {}
    ids = [i for i, _, _ in classes]
    colours = colours_by_id(ids, np.array([rgb for _, _, rgb in classes], np.uint8))
    for number, name in enumerate(NAMES):
        coarse = rng.choice([*ids, -1], (4 + number, 6))
        found[name] = np.kron(coarse, np.ones((5, 7), int))[:-1]
        found[name][0, 0] = ids[0]
        for root in (folder, folder.parent / "images"):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
        save_index_png(found[name], folder / f"{name}.png", colours, ignored)
        picture = Image.fromarray(rng.integers(0, 255, (*found[name].shape, 3)).astype(np.uint8))
        picture.save(folder / f"{name}_overlay.jpg")
        picture.save(folder.parent / "images" / f"{name}.jpg")
    write_legend(folder, classes, ignored)
    return found


@pytest.fixture
def masks(tmp_path):
    return write_masks(tmp_path / "masks")


@pytest.fixture
def export(tmp_path):
    """Export the folder of masks; where to."""

    def run(kind, *options):
        out = tmp_path / f"out-{kind}"
        main([str(tmp_path / "masks"), f"--format={kind}", f"--out={out}", *options])
        return out

    return run


def test_coco_panoptic(masks, export, tmp_path):
    out = export("coco-panoptic", f"--images={tmp_path / 'images'}", "--with-images")
    record = json.loads((out / "annotations/panoptic_default.json").read_text())
    assert [one["name"] for one in record["categories"]] == [name for _, name, _ in CLASSES]
    images = {one["id"]: one for one in record["images"]}
    for one in record["annotations"]:
        image = images[one["image_id"]]
        wanted = masks[image["file_name"].removesuffix(".jpg")]
        with Image.open(out / "images/default" / image["file_name"]) as picture:
            assert picture.size == (image["width"], image["height"])
        rgb = np.asarray(Image.open(out / "annotations/panoptic_default" / one["file_name"])).astype(int)
        values = rgb @ [1, 256, 65536]
        found = np.full(values.shape, -1)
        for segment in one["segments_info"]:
            where = values == segment["id"]
            found[where] = segment["category_id"]
            x, y, w, h = segment["bbox"]
            assert where.sum() == segment["area"] == where[y : y + h, x : x + w].sum()
        assert np.array_equal(found, wanted)


def test_panopticapi_reads_the_pictures(masks, export):
    utils = pytest.importorskip("panopticapi.utils", reason="panopticapi is not installed")
    out = export("coco-panoptic")
    rgb = np.asarray(Image.open(out / "annotations/panoptic_default/c.png"))
    assert np.array_equal(utils.rgb2id(rgb), np.where(masks["c"] < 0, 0, masks["c"]))


def test_coco_instances(masks, export, tmp_path):
    coco = pytest.importorskip("pycocotools.coco", reason="pycocotools is not installed")
    out = export("coco-instances")
    found = coco.COCO(str(out / "annotations/instances_default.json"))
    assert [found.cats[i]["name"] for i, _, _ in CLASSES] == [name for _, name, _ in CLASSES]
    for image in found.imgs.values():
        wanted = masks[image["file_name"].removesuffix(".jpg")]
        ids = np.full(wanted.shape, -1)
        for one in found.loadAnns(found.getAnnIds(imgIds=image["id"])):
            region = found.annToMask(one).astype(bool)
            assert (ids[region] == -1).all() and one["area"] == region.sum()
            ids[region] = one["category_id"]
        assert np.array_equal(ids, wanted)


def test_a_class_0_moves_all_categories(export, tmp_path):
    masks = write_masks(tmp_path / "masks", ((0, "a", (1, 2, 3)), (255, "b", (4, 5, 6))), 254)
    out = export("coco-panoptic")
    record = json.loads((out / "annotations/panoptic_default.json").read_text())
    assert [(one["id"], one["mask_id"]) for one in record["categories"]] == [(1, 0), (256, 255)]
    rgb = np.asarray(Image.open(out / "annotations/panoptic_default/c.png")).astype(int)
    assert np.array_equal(rgb @ [1, 256, 65536] - 1, masks["c"])


@pytest.mark.parametrize("kind", ["cvat", "datumaro", "coco-panoptic", "coco-instances"])
def test_datumaro_reads_it(masks, export, kind, tmp_path):
    dm = pytest.importorskip("datumaro", reason="datumaro is not installed")
    out = export(kind, f"--images={tmp_path / 'images'}", "--with-images")
    if kind == "cvat":
        with zipfile.ZipFile(out) as archive:
            names = archive.namelist()
            archive.extractall(tmp_path / "unpacked")
        assert {"labelmap.txt", "ImageSets/Segmentation/default.txt", "JPEGImages/c.jpg"} <= {*names}
        out = tmp_path / "unpacked"
    reader = {
        "cvat": "voc_segmentation",
        "coco-panoptic": "coco_panoptic",
        "coco-instances": "coco_instances",
    }
    dataset = dm.Dataset.import_from(str(out), reader.get(kind, kind))
    labels = dataset.categories()[dm.AnnotationType.label]
    ids = {name: i for i, name, _ in CLASSES}
    assert {*ids} <= {label.name for label in labels.items}
    assert sorted(item.id for item in dataset) == sorted(masks)
    for item in dataset:
        found = np.full(masks[item.id].shape, -1)
        for one in item.annotations:
            if one.type == dm.AnnotationType.mask:
                found[one.image.astype(bool)] = ids[labels[one.label].name]
        assert np.array_equal(found, masks[item.id])


def test_colours_of_cvat_are_distinct():
    classes = tuple(MaskClass(i, str(i), rgb) for i, rgb in enumerate([(0, 0, 0), (9, 9, 9), (9, 9, 9)]))
    found = distinct_colours(classes)
    assert len({*found, (0, 0, 0)}) == 4 and found[1] == (9, 9, 9)


@pytest.mark.parametrize("name", ["a:b", "#a", "background", " a"])
def test_names_that_cvat_cannot_hold(tmp_path, export, name):
    pytest.importorskip("datumaro", reason="datumaro is not installed")
    write_masks(tmp_path / "masks", ((1, name, (1, 2, 3)), (2, "b", (4, 5, 6))))
    with pytest.raises(DataError, match="class 1 is called .*another name in names.json"):
        export("cvat")


def test_what_is_wrong_with_a_folder(masks, export, tmp_path):
    folder = tmp_path / "masks"
    with pytest.raises(DataError, match="no folder .*none"):
        open_masks(str(tmp_path / "none"))
    with pytest.raises(DataError, match="legend.json cannot be read .*ppap predict"):
        open_masks(str(tmp_path / "images"))
    write_legend(tmp_path / "empty")
    with pytest.raises(DataError, match="empty has no masks.*ppap.predict"):
        open_masks(str(tmp_path / "empty"))
    (folder / ".unfinished.json").write_text("{}")
    with pytest.raises(UsageError, match="is not finished.*again"):
        open_masks(str(folder))
    (folder / ".unfinished.json").unlink()
    (tmp_path / "images/c.jpg").unlink()
    with pytest.raises(DataError, match="c.png has no image among --images"):
        open_masks(str(folder), [str(tmp_path / "images")])
    Image.new("RGB", (5, 5)).save(tmp_path / "images/c.jpg")
    with pytest.raises(DataError, match="c.jpg has 5 x 5 pixels"):
        open_masks(str(folder), [str(tmp_path / "images")])
    write_legend(folder, CLASSES[:2])
    with pytest.raises(DataError, match="has the id 40, which .*legend.json lacks"):
        export("coco-panoptic")
    assert not (tmp_path / "out-coco-panoptic").exists() and not [*tmp_path.glob(".out*")]
    for content in ("{", "[]", '{"ignored_id": 255, "classes": []}', '{"ignored_id": 255, "classes": [{}]}'):
        (folder / "legend.json").write_text(content)
        with pytest.raises(DataError, match="legend.json.*predict the images again"):
            open_masks(str(folder))


def test_nothing_is_written_over(masks, export, tmp_path):
    out = export("coco-panoptic")
    with pytest.raises(UsageError, match="out-coco-panoptic exists already"):
        export("coco-panoptic")
    assert (out / "annotations/panoptic_default.json").exists()
    with pytest.raises(UsageError, match="lies in the folder of the masks"):
        main([str(tmp_path / "masks"), "--format=coco-panoptic", f"--out={tmp_path / 'masks/coco'}"])
    with pytest.raises(UsageError, match="--names is for --format onnx, torchscript"):
        export("coco-instances", "--names=names.json")
    with pytest.raises(UsageError, match="--with-images copies those of --images"):
        export("coco-instances", "--with-images")
