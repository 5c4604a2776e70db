"""Small sets of people, drawn here: a square of its own colour at each joint, in the layout of COCO's keypoints."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

JOINTS = ("nose", "left_shoulder", "right_shoulder", "left_hip", "right_hip")
COLOURS = ((230, 230, 230), (230, 30, 30), (30, 230, 30), (30, 30, 230), (230, 230, 30))
CATEGORIES = [{"id": 1, "name": "person", "keypoints": list(JOINTS), "skeleton": [[1, 2]]}]
_SHAPE = np.array([(0.5, 0.1), (0.2, 0.4), (0.8, 0.4), (0.3, 0.9), (0.7, 0.9)])  # in shares of the box
SIZE = (72, 96)  # height and width


def person(
    number: int, image: int, box: Sequence[float], *, marks: Sequence[int] = (2,) * 5, **more: Any
) -> dict[str, Any]:
    """A person of COCO whose joints stand in the box as they should."""
    left, top, width, height = box
    joints = [
        number if mark else 0
        for (x, y), mark in zip(_SHAPE.tolist(), marks, strict=True)
        for number in (left + x * width, top + y * height, mark)
    ]
    entry = {"id": number, "image_id": image, "category_id": 1, "bbox": list(box), "area": 0.6 * width * height}
    return entry | {"iscrowd": 0, "keypoints": joints, "num_keypoints": sum(mark > 0 for mark in marks)} | more


def picture(people: Sequence[dict[str, Any]]) -> Image.Image:
    """Squares of 7 pixels around the joints, on a dark ground."""
    pixels = np.full((*SIZE, 3), 25, np.uint8)
    for one in people:
        joints = one["keypoints"]
        for x, y, mark, colour in zip(joints[::3], joints[1::3], joints[2::3], COLOURS, strict=False):
            if mark:
                pixels[max(0, round(y - 3.5)) : round(y + 3.5), max(0, round(x - 3.5)) : round(x + 3.5)] = colour
    return Image.fromarray(pixels)


def drawn(count: int, seed: int) -> list[list[dict[str, Any]]]:
    """So many images, of one or two people."""
    generator = np.random.default_rng(seed)
    images, number = [], 0
    for at in range(1, count + 1):
        people = []
        for place in range(1 + at % 2):
            number += 1
            box = [48.0 * place + float(generator.integers(2, 8)), float(generator.integers(2, 12)), 36.0, 52.0]
            people.append(person(number, at, box))
        images.append(people)
    return images


def write(folder: Path, split: str, images: Sequence[Sequence[dict[str, Any]]]) -> Path:
    """Images and person_keypoints_SPLIT.json, whose path is returned."""
    (folder / split).mkdir(parents=True)
    for at, people in enumerate(images, start=1):
        picture(people).save(folder / split / f"{at}.png")
    entries = [
        {"id": at, "file_name": f"{at}.png", "height": SIZE[0], "width": SIZE[1]} for at in range(1, len(images) + 1)
    ]
    annotations = [one for people in images for one in people]
    file = folder / f"person_keypoints_{split}.json"
    file.write_text(json.dumps({"images": entries, "annotations": annotations, "categories": CATEGORIES}))
    return file


def people(folder: Path, *, train: int = 6, val: int = 3) -> Path:
    """A set with training and validation images: 9 and 5 people by default."""
    write(folder, "train", drawn(train, 0))
    write(folder, "val", drawn(val, 1))
    return folder
