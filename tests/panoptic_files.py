"""Small panoptic sets, drawn here: two kinds of things on two kinds of stuff, in COCO's layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

# By their ids: 3 and 8 are stuff, 5 and 9 things.
CATEGORIES = [
    {"id": 9, "name": "ball", "isthing": 1},
    {"id": 3, "name": "sky", "isthing": 0},
    {"id": 5, "name": "box", "isthing": 1},
    {"id": 8, "name": "grass", "isthing": 0},
]
COLOURS = {0: (0, 0, 0), 3: (40, 90, 230), 5: (230, 30, 30), 8: (30, 200, 30), 9: (240, 240, 30)}


def drawn(seed: int, *, height: int = 48, width: int = 64) -> tuple[np.ndarray, dict[int, int]]:
    """Ids of the pixels, and the category of each id: sky over grass, two things on them, and a void corner."""
    generator = np.random.default_rng(seed)
    ids = np.full((height, width), 70_001)  # more than 16 bits
    ids[height // 2 :] = 12
    for number, at in ((300, 0), (301, 1)):
        top = int(generator.integers(4, height - 20))
        left = int(generator.integers(2, width // 2 - 18)) + at * width // 2
        ids[top : top + 16, left : left + 16] = number
    ids[:2, :2] = 0
    return ids, {70_001: 3, 12: 8, 300: 5, 301: 9}


def write(folder: Path, split: str, images: list[tuple[np.ndarray, dict[int, int]]]) -> Path:
    """Images and PNGs of segments in SPLIT/images and SPLIT/panoptic, and panoptic_SPLIT.json, which is returned."""
    for part in ("images", "panoptic"):
        (folder / split / part).mkdir(parents=True, exist_ok=True)
    entries: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for at, (ids, kinds) in enumerate(images, start=1):
        table = {number: COLOURS[kinds.get(number, 0)] for number in np.unique(ids).tolist()}
        pixels = np.array([[table[number] for number in row] for row in ids.tolist()], np.uint8)
        Image.fromarray(pixels).save(folder / split / "images" / f"{at}.png")
        coded = np.stack([ids % 256, ids // 256 % 256, ids // 65536], 2).astype(np.uint8)
        Image.fromarray(coded).save(folder / split / "panoptic" / f"{at}.png")
        entries.append({"id": at, "file_name": f"{at}.png", "height": ids.shape[0], "width": ids.shape[1]})
        segments = [{"id": number, "category_id": kind, "iscrowd": 0} for number, kind in kinds.items()]
        annotations.append({"image_id": at, "file_name": f"{at}.png", "segments_info": segments})
    file = folder / f"panoptic_{split}.json"
    file.write_text(json.dumps({"images": entries, "annotations": annotations, "categories": CATEGORIES}))
    return file


def panoptic(folder: Path, *, train: int = 8, val: int = 4, **size: int) -> Path:
    """A set with training and validation images."""
    write(folder, "train", [drawn(at, **size) for at in range(train)])
    write(folder, "val", [drawn(100 + at, **size) for at in range(val)])
    return folder
