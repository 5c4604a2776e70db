"""Sets in COCO's layout: images in folders, their objects in instances_SPLIT.json."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import torch

from unloaf.config.checks import brief
from unloaf.data.annotated.images import AnnotatedImages, Objects
from unloaf.data.annotated.segmentations import is_number, segmentation_text
from unloaf.data.consistency import some
from unloaf.data.images import Split
from unloaf.files.writing import read_text
from unloaf.printable import printable

_LARGEST = 4 << 30  # bytes of a JSON file; those of COCO have half of one
_YEAR = "2017"
_LARGEST_AREA = 1e10  # square pixels; COCO's evaluation leaves out what is larger
_THINNEST = 0.01  # pixels: in float32, mirrored at the far edge of a large image, a thinner box may have no area
LONGEST_SIDE = 1 << 24  # side of an image in pixels, beyond which float32 knows no single pixel


def open_coco_split(folder: Path, split: str, *, masks: bool, max_pixels: int) -> Split | None:
    """The images of a split and the objects in them; None where there is no JSON file of that name.

    The file is instances_SPLIT.json or instances_SPLIT2017.json, in the folder or in annotations/, the images are in
    SPLIT/, SPLIT2017/, SPLIT/images/ or images/ of it, or where file_name leads from the folder.

    Raises:
        ValueError: the file is no such JSON, an annotation does not fit its image or its class, or images are not
            there.
    """
    file = json_of(folder, split, "instances")
    if file is None:
        return None
    found = parsed(file)
    images, names, positions = found.images, found.classes, {image["id"]: at for at, image in enumerate(found.images)}
    root = root_of(folder, split, [image["file_name"] for image in images], file)
    by_image: list[list[_Object]] = [[] for _ in images]
    notes, faults = Notes(), []
    for annotation in found.annotations:
        try:
            at = position_of(annotation, positions, file)
            made = _object(annotation, images[at], found.numbers, file, notes, masks=masks)
        except ValueError as error:
            faults.append(str(error))
            continue
        if made is not None:
            by_image[at].append(made)
    if faults:
        raise AnnotationsError(faults)
    files = [image["file_name"] for image in images]
    sizes = torch.tensor([[image["height"], image["width"]] for image in images], dtype=torch.int64).view(-1, 2)
    empty = sum(not objects for objects in by_image)
    notes.add(empty, f"{empty} of {len(files)} images have no object; they are trained on as images without any")
    packed = pack(by_image, masks=masks)
    return Split(
        AnnotatedImages.of(root, files, sizes, packed, max_pixels=max_pixels),
        names,
        notes.lines(),
        frozenset({str(root.resolve())}),
    )


class AnnotationsError(ValueError):
    """Annotations that do not fit; the message is the first one's.

    Attributes:
        faults: what is wrong, a line for each.
    """

    def __init__(self, faults: Sequence[str]) -> None:
        more = f" ({len(faults) - 1} more such faults: see `unloaf check-data`)" if len(faults) > 1 else ""
        super().__init__(faults[0] + more)
        self.faults = tuple(faults)


class _Object(NamedTuple):
    """An object: box, class, whether it is crowd, area, mask as JSON."""

    box: tuple[float, float, float, float]
    label: int
    crowd: bool
    area: float
    mask: bytes = b""


def pack(by_image: Sequence[Sequence[_Object]], *, masks: bool) -> Objects:
    """The objects of images side by side."""
    counts = torch.tensor([0, *map(len, by_image)], dtype=torch.int64)
    every = [one for objects in by_image for one in objects]
    return Objects(
        starts=counts.cumsum(0),
        boxes=torch.tensor([one.box for one in every], dtype=torch.float32).view(-1, 4),
        classes=torch.tensor([one.label for one in every], dtype=torch.int64),
        crowd=torch.tensor([one.crowd for one in every], dtype=torch.bool),
        areas=torch.tensor([one.area for one in every], dtype=torch.float32),
        masks=tuple(one.mask for one in every) if masks else (),
    )


def box_object(
    box: tuple[float, float, float, float],
    *,
    label: int,
    crowd: bool,
    area: float | None,
    size: tuple[int, int],
    name: str,
    notes: Notes,
    mask: bytes = b"",
) -> _Object | None:
    """An object whose box lies in its image, (height, width); None for a box of no area, which is noted.

    Raises:
        ValueError: the box lies outside, or is not four finite numbers.
    """
    left, top, right, bottom = box
    if not all(map(math.isfinite, box)):
        raise ValueError(f"{name}: box {brief(box)}; give finite numbers")
    height, width = size
    if right <= left or bottom <= top:
        notes.no_area.append(name)
        return None
    if right <= 0 or bottom <= 0 or left >= width or top >= height:
        raise ValueError(
            f"{name}: box from ({left:g}, {top:g}) to ({right:g}, {bottom:g}) lies outside its image of {width} x "
            f"{height} pixels; correct or remove it"
        )
    inside = (max(left, 0.0), max(top, 0.0), min(right, float(width)), min(bottom, float(height)))
    if min(inside[2] - inside[0], inside[3] - inside[1]) < _THINNEST:
        notes.no_area.append(name)
        return None
    if max(abs(a - b) for a, b in zip(box, inside, strict=True)) > 1:
        notes.cut.append(name)
    whole = (inside[2] - inside[0]) * (inside[3] - inside[1])
    return _Object(inside, label, crowd, whole if area is None else area, mask)


class Notes:
    """What is left out or changed, counted."""

    def __init__(self) -> None:
        self.no_area: list[str] = []
        self.cut: list[str] = []
        self._more: list[str] = []

    def add(self, count: int, line: str) -> None:
        """A line, where there is something to say."""
        if count:
            self._more.append(line)

    def lines(self) -> tuple[str, ...]:
        """All of them."""
        found = []
        if self.no_area:
            found.append(f"{len(self.no_area)} box(es) of no area are left out: {some(self.no_area, 3)}")
        if self.cut:
            found.append(f"{len(self.cut)} box(es) are cut at the edge of their image: {some(self.cut, 3)}")
        return (*found, *self._more)


class Parsed(NamedTuple):
    """What a file of COCO's says, images and categories by their ids."""

    images: list[dict[str, Any]]
    annotations: list[dict[str, Any]]
    categories: list[dict[str, Any]]
    classes: tuple[str, ...]
    numbers: dict[int, int]  # from the set's number of a class to ours


def json_of(folder: Path, split: str, kind: str) -> Path | None:
    """The file of a split with annotations of a kind, such as instances; None where there is none."""
    places = [f"{place}{kind}_{split}{year}.json" for place in ("annotations/", "") for year in ("", _YEAR)]
    return next((folder / place for place in places if (folder / place).is_file()), None)


def parsed(file: Path) -> Parsed:
    """The file, its images and categories looked at, its annotations not yet.

    Raises:
        ValueError: it is no JSON of COCO's, or they are not told apart.
    """
    try:
        found: Any = json.loads(read_text(file, limit=_LARGEST))
    except (ValueError, RecursionError, OSError) as error:
        raise ValueError(f"{printable(file)} cannot be read as JSON: {error}; give a file in COCO's layout") from error
    parts: list[Any] = [
        found.get(key) if isinstance(found, dict) else None for key in ("images", "annotations", "categories")
    ]
    if not all(isinstance(part, list) and all(isinstance(one, dict) for one in part) for part in parts):
        raise ValueError(f"{printable(file)} is not COCO's: it needs lists images, annotations and categories")
    images, annotations, categories = parts
    _unique(images, "image", file)
    _unique(categories, "category", file)
    images = sorted((_image(image, file) for image in images), key=lambda image: image["id"])
    twice = first_twice([image["file_name"] for image in images])
    if twice is not None:
        raise ValueError(f"{printable(file)}: file_name {printable(twice)} is that of two images; give each its own")
    ordered = sorted(categories, key=lambda category: category["id"])
    names = tuple(category.get("name", str(category["id"])) for category in ordered)
    wrong = [name for name in names if not isinstance(name, str) or not name.strip()]
    if wrong:
        raise ValueError(f"{printable(file)}: category name {brief(wrong[0])}; give a text")
    if not names or len(set(names)) != len(names):
        raise ValueError(f"{printable(file)}: {len(names)} categories, {len(set(names))} names; name each once")
    numbers = {category["id"]: at for at, category in enumerate(ordered)}
    return Parsed(images, annotations, ordered, names, numbers)


def _image(image: Mapping[str, Any], file: Path) -> dict[str, Any]:
    name, height, width = image.get("file_name"), image.get("height"), image.get("width")
    sides = [side for side in (height, width) if is_whole(side) and 0 < side <= LONGEST_SIDE]
    if not isinstance(name, str) or not name or len(sides) != 2:
        raise ValueError(
            f"{printable(file)}: image {brief(image.get('id'))} needs a file_name, height and width; it has "
            f"{brief(name)}, {brief(height)} and {brief(width)}"
        )
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"{printable(file)}: file_name {printable(name)} leads out of the folder; give a path in it")
    return {"id": image.get("id"), "file_name": name, "height": height, "width": width}


def _unique(entries: Sequence[Mapping[str, Any]], what: str, file: Path) -> None:
    numbers = [entry.get("id") for entry in entries]
    wrong = [number for number in numbers if not is_whole(number)]
    if wrong:
        raise ValueError(f"{printable(file)}: {what} id {brief(wrong[0])}; give integers")
    twice = first_twice(numbers)
    if twice is not None:
        raise ValueError(f"{printable(file)}: {what} id {brief(twice)} is there twice; give each its own")


def first_twice(values: Sequence[Any]) -> Any:
    """The first value that is there a second time; None where there is none."""
    seen: set[Any] = set()
    return next((value for value in values if value in seen or seen.add(value)), None)


def root_of(folder: Path, split: str, files: Sequence[str], file: Path) -> Path:
    """The folder from which the file names lead to images."""
    names = (split, split + _YEAR, f"images/{split}", f"images/{split}{_YEAR}", f"{split}/images", "images")
    places = [folder / name for name in names]
    tried = [place for place in (*places, folder) if place.is_dir()]
    missing = {}
    for place in tried:
        missing[place] = [name for name in files if not _is_there(place / name)]
        if not missing[place]:
            return place
    place, absent = min(missing.items(), key=lambda pair: len(pair[1]))
    raise ValueError(
        f"{len(absent)} of the {len(files)} images of {printable(file)} are not in {printable(place)}: "
        f"{printable(some(absent, 3))}; add them, or remove them from the file"
    )


def position_of(annotation: Mapping[str, Any], positions: Mapping[int, int], file: Path) -> int:
    """Which image an annotation is about.

    Raises:
        ValueError: none.
    """
    number = annotation.get("image_id")
    at = positions.get(number) if is_whole(number) else None
    if at is None:
        raise ValueError(
            f"{named(file, annotation)}: there is no image {brief(number)}; remove the annotation or add the image"
        )
    return at


def _is_there(file: Path) -> bool:
    try:
        return file.is_file()
    except OSError:  # a name longer than names may be
        return False


def named(file: Path, annotation: Mapping[str, Any]) -> str:
    """What errors call an annotation."""
    return f"{printable(file.name)}, annotation {brief(annotation.get('id'))}"


def _object(
    annotation: Mapping[str, Any],
    image: Mapping[str, Any],
    numbers: Mapping[int, int],
    file: Path,
    notes: Notes,
    *,
    masks: bool,
) -> _Object | None:
    name, number, box = named(file, annotation), annotation.get("category_id"), annotation.get("bbox")
    label = numbers.get(number) if is_whole(number) else None
    if label is None:
        raise ValueError(f"{name}: category_id {brief(number)} is none of the {len(numbers)} categories; correct it")
    if not (isinstance(box, list) and len(box) == 4 and all(is_number(value) for value in box)):
        raise ValueError(f"{name}: bbox {brief(box)}; give [left, top, width, height] in pixels")
    left, top, width, height = map(float, box)
    area, crowd = annotation.get("area"), annotation.get("iscrowd", 0)
    if area is not None and not (is_number(area) and 0 <= area <= _LARGEST_AREA):
        raise ValueError(f"{name}: area {brief(area)}; give one from 0 to 1e10 square pixels, or leave it out")
    if crowd not in (0, 1):
        raise ValueError(f"{name}: iscrowd {brief(crowd)}; give 0 or 1")
    segmentation = annotation.get("segmentation")
    mask = segmentation_text(segmentation, (image["height"], image["width"]), name) if masks else b""
    return box_object(
        (left, top, left + width, top + height),
        label=label,
        crowd=bool(crowd),
        area=None if area is None else float(area),
        size=(image["height"], image["width"]),
        name=name,
        notes=notes,
        mask=mask,
    )


def is_whole(value: Any) -> TypeGuard[int]:
    """Whether it is an integer, as ids are."""
    return isinstance(value, int) and not isinstance(value, bool)
