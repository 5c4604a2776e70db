"""Small sets of annotated images, drawn here: coloured rectangles in the layouts of COCO and VOC."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

COLOURS = {1: (230, 30, 30), 2: (30, 230, 30)}
CATEGORIES = [{"id": 2, "name": "green"}, {"id": 1, "name": "red"}]


def rectangle(left: int, top: int, width: int, height: int) -> list[list[float]]:
    """The polygon of a rectangle."""
    return [[left, top, left + width, top, left + width, top + height, left, top + height]]


def annotation(number: int, image: int, category: int, box: Sequence[float], **more: Any) -> dict[str, Any]:
    """An object of COCO."""
    entry = {"id": number, "image_id": image, "category_id": category, "bbox": list(box), "iscrowd": 0}
    return entry | {"area": box[2] * box[3], "segmentation": rectangle(*map(int, box))} | more


def picture(boxes: Sequence[tuple[int, Sequence[float]]], *, height: int = 64, width: int = 80) -> Image.Image:
    """Rectangles of the categories' colours on black."""
    pixels = np.zeros((height, width, 3), np.uint8)
    for category, (left, top, across, down) in boxes:
        pixels[int(top) : int(top + down), int(left) : int(left + across)] = COLOURS[category]
    return Image.fromarray(pixels)


def drawn(count: int, seed: int) -> list[list[tuple[int, list[float]]]]:
    """Two objects in each of so many images: category and box."""
    generator = np.random.default_rng(seed)
    return [
        [
            (
                int(generator.integers(1, 3)),
                [float(generator.integers(0, 40)), float(generator.integers(0, 30)), 24, 26],
            )
            for _ in range(2)
        ]
        for _ in range(count)
    ]


def write_coco(folder: Path, split: str, images: Sequence[Sequence[tuple[int, Sequence[float]]]]) -> Path:
    """Images and instances_SPLIT.json, whose path is returned."""
    (folder / split).mkdir(parents=True)
    annotations: list[dict[str, Any]] = []
    for at, boxes in enumerate(images, start=1):
        picture(boxes).save(folder / split / f"{at}.png")
        annotations += [annotation(len(annotations) + i, at, kind, box) for i, (kind, box) in enumerate(boxes, start=1)]
    entries = [{"id": at, "file_name": f"{at}.png", "height": 64, "width": 80} for at in range(1, len(images) + 1)]
    file = folder / f"instances_{split}.json"
    file.write_text(json.dumps({"images": entries, "annotations": annotations, "categories": CATEGORIES}))
    return file


def coco(folder: Path, *, train: int = 8, val: int = 4) -> Path:
    """A set with training and validation images."""
    write_coco(folder, "train", drawn(train, 0))
    write_coco(folder, "val", drawn(val, 1))
    return folder


def changed(file: Path, change: Mapping[str, Any]) -> None:
    """Replaces lists of a JSON file, each by a function of the old one."""
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {key: how(content[key]) for key, how in change.items()}))


VOC_OBJECT = """<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>
<xmin>{0}</xmin><ymin>{1}</ymin><xmax>{2}</xmax><ymax>{3}</ymax></bndbox></object>"""


def write_voc(folder: Path, split: str, names: Sequence[str], objects: str) -> None:
    """Images of 80 x 64 pixels, each with these objects."""
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{name}\n" for name in names))
    for name in names:
        picture([]).save(folder / "JPEGImages" / f"{name}.png")
        size = "<size><width>80</width><height>64</height><depth>3</depth></size>"
        (folder / "Annotations" / f"{name}.xml").write_text(f"<annotation>{size}{objects}</annotation>")
