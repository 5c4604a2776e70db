"""People and their joints in COCO's layout: images in folders, joints in person_keypoints_SPLIT.json."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from unloaf.config.checks import brief
from unloaf.data.annotated.coco import (
    AnnotationsError,
    Notes,
    box_object,
    is_whole,
    json_of,
    named,
    parsed,
    position_of,
    root_of,
)
from unloaf.data.annotated.segmentations import is_number
from unloaf.data.consistency import some
from unloaf.data.images import Split
from unloaf.data.people.images import Marked, PeopleImages
from unloaf.printable import printable

_LARGEST_AREA = 1e10  # square pixels; COCO's evaluation leaves out what is larger
_MOST_OUTSIDE = 0.01  # of the marked joints; a set with more has coordinates of other images


class _Found(NamedTuple):
    """A person: box, area, joints as x, y and mark, whether it is a group."""

    image: int
    id: int
    box: tuple[float, float, float, float]
    area: float
    joints: list[tuple[float, float, float]]
    crowd: bool


def open_people_split(folder: Path, split: str, *, max_pixels: int) -> Split | None:
    """The people of a split, with the names of the joints as classes; None where there is no JSON file of that name.

    The file is person_keypoints_SPLIT.json or person_keypoints_SPLIT2017.json, in the folder or in annotations/, the
    images are where `unloaf.data.annotated.coco.open_coco_split` looks for them.

    Raises:
        ValueError: the file is no such JSON, an annotation does not fit its image or the joints, or images are not
            there.
    """
    file = json_of(folder, split, "person_keypoints")
    if file is None:
        return None
    found = parsed(file)
    category, names = _joints_of(found.categories, file)
    positions = {image["id"]: at for at, image in enumerate(found.images)}
    root = root_of(folder, split, [image["file_name"] for image in found.images], file)
    people, faults, notes = list[_Found](), list[str](), _Notes()
    for annotation in found.annotations:
        if annotation.get("category_id") != category:
            notes.strange.append(named(file, annotation))
            continue
        try:
            at = position_of(annotation, positions, file)
            size = found.images[at]["height"], found.images[at]["width"]
            made = _person(annotation, at, size, len(names), named(file, annotation), notes)
        except ValueError as error:
            faults.append(str(error))
            continue
        people += [] if made is None else [made]
    faults += [] if (fault := notes.too_many_outside(people, file)) is None else [fault]
    if faults:
        raise AnnotationsError(faults)
    sizes = torch.tensor([[image["height"], image["width"]] for image in found.images], dtype=torch.int64).view(-1, 2)
    files, packed = [image["file_name"] for image in found.images], _packed(people, len(names))
    images = PeopleImages.of(root, files, sizes, packed, max_pixels=max_pixels)
    return Split(images, names, notes.of(images), frozenset({str(root.resolve())}))


def _joints_of(categories: Sequence[Mapping[str, Any]], file: Path) -> tuple[int, tuple[str, ...]]:
    """The id of the one category that has joints, and their names."""
    having = [category for category in categories if category.get("keypoints")]
    if len(having) != 1:
        raise ValueError(
            f"{printable(file)}: {len(having)} of {len(categories)} categories have a list keypoints, the names of the "
            "joints; give one that has"
        )
    names = having[0]["keypoints"]
    if not (isinstance(names, list) and all(isinstance(name, str) and name.strip() for name in names)):
        raise ValueError(f"{printable(file)}: keypoints {brief(names)}; give a list of names, one for each joint")
    if len(set(names)) != len(names):
        raise ValueError(f"{printable(file)}: {len(names)} joints, {len(set(names))} names; name each once")
    return having[0]["id"], tuple(names)


class _Notes(Notes):
    """What is left out or changed, counted."""

    def __init__(self) -> None:
        super().__init__()
        self.strange: list[str] = []
        self.outside: list[str] = []
        self.without_area: list[str] = []

    def too_many_outside(self, people: Sequence[_Found], file: Path) -> str | None:
        """A fault where so many joints lie outside that images and joints are not of one size."""
        marked = len(self.outside) + sum(mark > 0 for person in people for _, _, mark in person.joints)
        if len(self.outside) <= _MOST_OUTSIDE * marked:
            return None
        return (
            f"{printable(file.name)}: {len(self.outside)} of {marked} marked joints lie outside their images, more "
            f"than 1 %: {some(self.outside, 3)}; give joints in pixels of the images, or set their mark to 0"
        )

    def of(self, images: PeopleImages) -> tuple[str, ...]:
        """The lines, with what follows from who is a target."""
        groups = int(images.others.crowd.sum())
        unmarked, empty = len(images.others.ids) - groups, len(images.files) - len(images.first_of_each_image())
        self.add(groups, f"{groups} group(s) (iscrowd) are no targets, and no prediction is blamed for them")
        self.add(unmarked, f"{unmarked} people without a marked joint are no targets, likewise")
        self.add(empty, f"{empty} of {len(images.files)} images have nobody to learn from")
        for names, what in (
            (self.outside, "marked joint(s) outside their images are taken for not marked"),
            (self.without_area, "people without an area have that of their box in OKS"),
            (self.strange, "annotation(s) of categories without joints are not read"),
        ):
            self.add(len(names), f"{len(names)} {what}: {some(names, 3)}")
        return self.lines()


def _person(
    annotation: Mapping[str, Any], at: int, size: tuple[int, int], count: int, name: str, notes: _Notes
) -> _Found | None:
    """A person of an image of this height and width; None for a box of no area, which is noted."""
    box, crowd, number = annotation.get("bbox"), annotation.get("iscrowd", 0), annotation.get("id")
    if not is_whole(number):
        raise ValueError(f"{name}: id {brief(number)}; give each annotation an integer of its own")
    if not (isinstance(box, list) and len(box) == 4 and all(is_number(value) for value in box)):
        raise ValueError(f"{name}: bbox {brief(box)}; give [left, top, width, height] in pixels")
    if crowd not in (0, 1):
        raise ValueError(f"{name}: iscrowd {brief(crowd)}; give 0 or 1")
    joints = _joints(annotation.get("keypoints"), size, count, name, notes)
    left, top, width, height = map(float, box)
    edges = (left, top, left + width, top + height)
    inside = box_object(edges, label=0, crowd=bool(crowd), area=None, size=size, name=name, notes=notes)
    if inside is None:
        return None
    area = annotation.get("area")
    if area is None:
        notes.without_area.append(name)
        area = inside.area
    elif not (is_number(area) and 0 < area <= _LARGEST_AREA):
        raise ValueError(f"{name}: area {brief(area)}; give one above 0, up to 1e10 square pixels, or leave it out")
    return _Found(at, number, inside.box, float(area), joints, bool(crowd))


def _joints(
    values: Any, size: tuple[int, int], count: int, name: str, notes: _Notes
) -> list[tuple[float, float, float]]:
    """The joints as x, y and mark; those outside of the image are not marked, and noted."""
    if not isinstance(values, list) or len(values) != 3 * count:
        has = f"{len(values)} numbers" if isinstance(values, list) else brief(values)
        raise ValueError(
            f"{name}: keypoints has {has}; give {3 * count}, x, y and visibility for each of the {count} joints"
        )
    if not all(is_number(value) and math.isfinite(value) for value in values):
        raise ValueError(f"{name}: keypoints {brief(values)}; give finite numbers")
    joints = []
    for x, y, mark in zip(values[::3], values[1::3], values[2::3], strict=True):
        if mark not in (0, 1, 2):
            raise ValueError(f"{name}: visibility {brief(mark)}; give 0 (not marked), 1 (hidden) or 2 (visible)")
        outside = mark > 0 and not (0 <= x <= size[1] and 0 <= y <= size[0])
        if outside:
            notes.outside.append(name)
        kept = mark > 0 and not outside
        joints.append((float(x), float(y), float(mark)) if kept else (0.0, 0.0, 0.0))
    return joints


def _packed(people: Sequence[_Found], count: int) -> Marked:
    return Marked(
        images=torch.tensor([person.image for person in people], dtype=torch.int64),
        ids=torch.tensor([person.id for person in people], dtype=torch.int64),
        boxes=torch.tensor([person.box for person in people], dtype=torch.float64).view(-1, 4),
        areas=torch.tensor([person.area for person in people], dtype=torch.float64),
        joints=torch.tensor([person.joints for person in people], dtype=torch.float64).view(-1, count, 3),
        crowd=torch.tensor([person.crowd for person in people], dtype=torch.bool),
    )
