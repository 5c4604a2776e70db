"""Panoptic sets in COCO's layout: images in folders, their segments in panoptic_SPLIT.json and PNGs beside."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from unloaf.config.checks import brief
from unloaf.data.annotated.coco import AnnotationsError, Parsed, is_whole, json_of, named, parsed, position_of, root_of
from unloaf.data.consistency import some
from unloaf.data.images import BadImageError, Split
from unloaf.data.panoptic.images import PanopticImages, Segments, check_drawn
from unloaf.printable import printable

_READERS = 4  # threads that look at the files
_MOST_DECODED = 5000  # PNGs that are decoded before the first step, at some 10 ms each
_LARGEST_ID = (1 << 24) - 1


def open_panoptic_split(folder: Path, split: str, *, max_pixels: int, stop: bool = True) -> Split | None:
    """The images of a split and their segments; None where there is no JSON file of that name.

    The file is panoptic_SPLIT.json or panoptic_SPLIT2017.json, in the folder or in annotations/; PNGs are in
    SPLIT/panoptic/, or in a folder beside the file that is called as it is; images where those of instances are.

    Args:
        folder: of the set.
        split: train, val or the like.
        max_pixels: of an image.
        stop: refuse PNGs that do not fit; else they are found to be so when they are read.

    Raises:
        ValueError: the file is no such JSON, an annotation does not fit its image, its PNG or its classes, or files are
            not there.
    """
    file = json_of(folder, split, "panoptic")
    if file is None:
        return None
    found = parsed(file)
    things = _kinds(found, file)
    files = [image["file_name"] for image in found.images]
    root = root_of(folder, split, files, file)
    names, packed = _packed(found, file)
    drawn = _drawn(folder, split, file, names)
    sizes = torch.tensor([[image["height"], image["width"]] for image in found.images], dtype=torch.int64).view(-1, 2)
    nothing = torch.zeros(len(files), dtype=torch.int64)
    images = PanopticImages(root, files, drawn, sizes, packed, things, torch.arange(len(files)), nothing, max_pixels)
    labels, notes = _looked_at(images, stop=stop)
    whole = PanopticImages(root, files, drawn, sizes, packed, things, torch.arange(len(files)), labels, max_pixels)
    return Split(whole, found.classes, tuple(notes), frozenset({str(root.resolve())}))


def _kinds(found: Parsed, file: Path) -> tuple[bool, ...]:
    """Of each class whether it is countable."""
    kinds = [category.get("isthing") for category in found.categories]
    wrong = [name for name, kind in zip(found.classes, kinds, strict=True) if kind not in (0, 1)]
    if wrong:
        raise ValueError(f"{printable(file)}: category {printable(wrong[0])} has no isthing; give 1 for things, or 0")
    if len(set(kinds)) < 2:
        kind, task = ("things", "instance") if kinds[0] else ("stuff", "semantic")
        raise ValueError(
            f"{printable(file)} has categories of {kind} alone, by their isthing; panoptic sets have both: correct "
            f"it, or give --task {task}"
        )
    return tuple(map(bool, kinds))


def _packed(found: Parsed, file: Path) -> tuple[list[str], Segments]:
    """The PNG's name of each image, and the segments of all."""
    positions = {image["id"]: at for at, image in enumerate(found.images)}
    names: list[str] = [""] * len(found.images)
    every: list[list[tuple[int, int, bool]]] = [[] for _ in found.images]
    faults = []
    for annotation in found.annotations:
        try:
            at = position_of(annotation, positions, file)
            if names[at]:
                raise ValueError(f"{_of(annotation, file)}: the image has two annotations; remove one")
            names[at] = _name(annotation, file)
            every[at] = _segments(annotation, found.numbers, file)
        except ValueError as error:
            faults.append(str(error))
    bare = [image["file_name"] for image, name in zip(found.images, names, strict=True) if not name]
    if bare and not faults:
        faults.append(
            f"{len(bare)} of the {len(names)} images of {printable(file)} have no annotation: "
            f"{printable(some(bare, 3))}; add them with their PNGs, or remove the images"
        )
    if faults:
        raise AnnotationsError(faults)
    flat = [one for segments in every for one in segments]
    return names, Segments(
        torch.tensor([0, *map(len, every)], dtype=torch.int64).cumsum(0),
        torch.tensor([one[0] for one in flat], dtype=torch.int64),
        torch.tensor([one[1] for one in flat], dtype=torch.int64),
        torch.tensor([one[2] for one in flat], dtype=torch.bool),
    )


def _of(annotation: Mapping[str, Any], file: Path) -> str:
    return f"{named(file, {'id': annotation.get('image_id')})} (by image_id)"


def _name(annotation: Mapping[str, Any], file: Path) -> str:
    name = annotation.get("file_name")
    if not isinstance(name, str) or not name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError(f"{_of(annotation, file)}: file_name {brief(name)}; give the name of a PNG")
    return name


def _segments(annotation: Mapping[str, Any], numbers: Mapping[int, int], file: Path) -> list[tuple[int, int, bool]]:
    """Id, class and whether it is crowd, of each segment of an image."""
    given, where = annotation.get("segments_info"), _of(annotation, file)
    if not isinstance(given, list) or not all(isinstance(one, dict) for one in given):
        raise ValueError(f"{where}: segments_info {brief(given)}; give a list of segments")
    made: dict[int, tuple[int, int, bool]] = {}
    for segment in given:
        number, category, crowd = segment.get("id"), segment.get("category_id"), segment.get("iscrowd", 0)
        if not is_whole(number) or not 1 <= number <= _LARGEST_ID:
            raise ValueError(f"{where}: segment id {brief(number)}; give an integer from 1 to {_LARGEST_ID}")
        if number in made:
            raise ValueError(f"{where}: segment id {number} is there twice; give each its own")
        if not is_whole(category) or category not in numbers:
            raise ValueError(
                f"{where}: category_id {brief(category)} of segment {number} is none of the {len(numbers)} categories; "
                "correct it"
            )
        if crowd not in (0, 1):
            raise ValueError(f"{where}: iscrowd {brief(crowd)} of segment {number}; give 0 or 1")
        made[number] = (number, numbers[category], bool(crowd))
    return list(made.values())


def _drawn(folder: Path, split: str, file: Path, names: Sequence[str]) -> list[Path]:
    """The PNGs, which must be there."""
    places = (folder / split / "panoptic", file.with_suffix(""), folder / "panoptic" / split)
    place = next((one for one in places if one.is_dir()), None)
    if place is None:
        raise ValueError(
            f"no folder with the PNGs of {printable(file)}: expected {split}/panoptic or {printable(places[1])}"
        )
    absent = [name for name in names if not (place / name).is_file()]
    if absent:
        raise ValueError(
            f"{len(absent)} of the {len(names)} PNGs of {printable(file)} are not in {printable(place)}: "
            f"{printable(some(absent, 3))}; add them, or remove them from the file"
        )
    return [place / name for name in names]


def _looked_at(images: PanopticImages, *, stop: bool) -> tuple[torch.Tensor, list[str]]:
    """A checksum of each image's segments, and notes; PNGs are decoded where they are not too many."""
    decoded = len(images) <= _MOST_DECODED
    with ThreadPoolExecutor(_READERS) as pool:
        looks = list(pool.map(lambda at: _look(images, at, decoded=decoded), range(len(images))))
    wrong = [fault for _, fault in looks if fault]
    if wrong and stop:
        more = f" ({len(wrong) - 1} more such PNGs: see `unloaf check-data --panoptic`)" if len(wrong) > 1 else ""
        raise ValueError(f"{wrong[0]}; correct it, or give --bad-images skip{more}")
    notes = [] if decoded else [f"the ids of {len(images)} PNGs are compared with the annotations when they are read"]
    return torch.tensor([checksum for checksum, _ in looks], dtype=torch.int64), notes


def _look(images: PanopticImages, at: int, *, decoded: bool) -> tuple[int, str]:
    own = images.segments.of(at)
    digest = hashlib.sha256(repr(images.things).encode())
    for values in (own.ids, own.classes, own.crowd):
        digest.update(values.contiguous().numpy().tobytes())
    try:
        height, width = images.sizes[at].tolist()
        digest.update(str(check_drawn(images.drawn[at], (height, width))).encode())
        if decoded:
            images.target(at)
    except BadImageError as error:
        return 0, str(error)
    return int.from_bytes(digest.digest()[:8], "big") >> 4, ""
