"""Masks as COCO's JSON: segments of whole classes (panoptic), or an object per connected region (instances).

Files lie as in COCO: ``annotations/panoptic_default.json`` with its PNGs in ``annotations/panoptic_default``,
or ``annotations/instances_default.json``; images, if they are wanted, in ``images/default``.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ppap.exports.masks import Masks
from ppap.pictures.drawing import save_whole
from ppap.stopping import check

SUBSET = "default"


def category_ids(masks: Masks) -> dict[int, int]:
    """Id in masks -> category: the same, or all one more where a class has 0, which is none in COCO."""
    more = int(any(one.id == 0 for one in masks.classes))
    return {one.id: one.id + more for one in masks.classes}


def write_panoptic(masks: Masks, out: Path, with_images: bool) -> str:
    """Write panoptic annotations: every class of an image is one segment, whose id is its category.

    Args:
        masks: what to write.
        out: new folder.
        with_images: copy the images too.

    Returns:
        What was written, for people.
    """
    categories, annotations, segments = category_ids(masks), [], 0
    record = _record(masks, panoptic=True)
    pictures = out / "annotations" / f"panoptic_{SUBSET}"
    for number, (name, ids) in enumerate(masks.each(), 1):
        record["images"].append(_image(masks, number, name, ids))
        values, found = np.zeros(ids.shape, np.uint32), []
        for one in np.unique(ids[ids >= 0]).tolist():
            where = ids == one
            values[where] = categories[one]
            rows, columns = np.flatnonzero(where.any(axis=1)), np.flatnonzero(where.any(axis=0))
            box = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
            found.append(
                {
                    "id": categories[one],
                    "category_id": categories[one],
                    "area": int(where.sum()),
                    "bbox": [int(value) for value in box],
                    "iscrowd": 0,
                }
            )
        path = pictures / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        colours = np.stack([values & 255, values >> 8 & 255, values >> 16], axis=-1).astype(np.uint8)
        save_whole(Image.fromarray(colours), path)
        annotations.append({"image_id": number, "file_name": f"{name}.png", "segments_info": found})
        segments += len(found)
    record["annotations"] = annotations
    _write(record, out, "panoptic")
    _copy_images(masks, out, with_images)
    return f"{len(masks.files)} images, {segments} segments"


def write_instances(masks: Masks, out: Path, with_images: bool) -> str:
    """Write an object per connected region (pixels that share a side) as RLE; as :func:`write_panoptic`."""
    from pycocotools import mask as rle
    from scipy import ndimage

    categories, annotations = category_ids(masks), []
    record = _record(masks, panoptic=False)
    for number, (name, ids) in enumerate(masks.each(), 1):
        record["images"].append(_image(masks, number, name, ids))
        for one in np.unique(ids[ids >= 0]).tolist():
            regions, _ = ndimage.label(ids == one)
            mask = np.zeros(ids.shape, np.uint8, order="F")
            for region, place in enumerate(ndimage.find_objects(regions), 1):
                check()
                mask[place] = regions[place] == region
                code = rle.encode(mask)
                mask[place] = 0
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": number,
                        "category_id": categories[one],
                        "segmentation": {"size": code["size"], "counts": code["counts"].decode()},
                        "area": int(rle.area(code)),
                        "bbox": [int(value) for value in rle.toBbox(code)],
                        "iscrowd": 0,
                    }
                )
    record["annotations"] = annotations
    _write(record, out, "instances")
    _copy_images(masks, out, with_images)
    return f"{len(masks.files)} images, {len(annotations)} regions"


def _record(masks: Masks, panoptic: bool) -> dict[str, Any]:
    categories = category_ids(masks)
    more = {one.id: {"isthing": 0, "color": list(one.rgb)} if panoptic else {} for one in masks.classes}
    return {
        "info": {"description": "masks of ppap predict"},
        "licenses": [],
        "images": [],
        "categories": [
            {"id": categories[one.id], "name": one.name, "supercategory": "", "mask_id": one.id}
            | more[one.id]
            for one in masks.classes
        ],
    }


def _image(masks: Masks, number: int, name: str, ids: np.ndarray) -> dict[str, Any]:
    height, width = ids.shape
    return {"id": number, "file_name": masks.file_name(name), "width": width, "height": height}


def _write(record: dict[str, Any], out: Path, kind: str) -> None:
    folder = out / "annotations"
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, ensure_ascii=False)
    (folder / f"{kind}_{SUBSET}.json").write_text(text, encoding="utf-8")


def _copy_images(masks: Masks, out: Path, wanted: bool) -> None:
    for name in masks.images if wanted else ():
        path = out / "images" / SUBSET / masks.file_name(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(masks.images[name], path)
