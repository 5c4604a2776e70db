"""Sets in PASCAL VOC's layout: JPEGImages, Annotations/NAME.xml, and ImageSets/Main/SPLIT.txt that lists names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

import torch

from unloaf.config.checks import brief
from unloaf.data.annotated.coco import LONGEST_SIDE, AnnotationsError, Notes, box_object, first_twice, pack
from unloaf.data.annotated.images import AnnotatedImages
from unloaf.data.consistency import some
from unloaf.data.images import Split
from unloaf.files.writing import read_text
from unloaf.printable import printable

_LARGEST = 64 << 20  # bytes of an XML file


class _Entry(NamedTuple):
    name: str
    size: tuple[int, int]
    boxes: list[tuple[str, bool, tuple[float, float, float, float]]]  # class, difficult, box


def open_voc_split(folder: Path, split: str, *, classes: Sequence[str] | None, max_pixels: int) -> Split | None:
    """The images of a split and the objects in them; None where there is no list of that name.

    Boxes of VOC count pixels from 1 and include their last one. Objects that it calls difficult are no targets, and no
    prediction is blamed for them, as its evaluation has it. `classes` are those of the training images; default: all
    that these images have, by name.

    Raises:
        ValueError: an image or its XML file is missing or does not fit, or there are other classes.
    """
    listing = folder / "ImageSets" / "Main" / f"{split}.txt"
    if not listing.is_file():
        return None
    names = [line.split()[0] for line in read_text(listing, limit=_LARGEST).splitlines() if line.strip()]
    files = _files(folder, names, listing)
    entries = _entries(folder, names)
    found = sorted({kind for entry in entries for kind, _, _ in entry.boxes})
    known = tuple(classes) if classes is not None else tuple(found)
    other = sorted(set(found) - set(known))
    if other:
        raise ValueError(
            f"{printable(listing)}: classes that the training images do not have: {printable(some(other))}"
        )
    notes = Notes()
    by_image = _objects(entries, known, notes)
    difficult = sum(one.crowd for objects in by_image for one in objects)
    notes.add(difficult, f"{difficult} difficult object(s) are no targets")
    empty = sum(not objects for objects in by_image)
    notes.add(empty, f"{empty} of {len(files)} images have no object; they are trained on as images without any")
    sizes = torch.tensor([entry.size for entry in entries], dtype=torch.int64).view(-1, 2)
    root = folder / "JPEGImages"
    images = AnnotatedImages.of(root, files, sizes, pack(by_image, masks=False), max_pixels=max_pixels)
    return Split(images, known, notes.lines(), frozenset({str(listing.resolve())}))


def _entries(folder: Path, names: Sequence[str]) -> list[_Entry]:
    entries, faults = [], []
    for name in names:
        try:
            entries.append(_entry(folder / "Annotations" / f"{name}.xml", name))
        except ValueError as error:
            faults.append(str(error))
    if faults:
        raise AnnotationsError(faults)
    return entries


def _objects(entries: Sequence[_Entry], known: Sequence[str], notes: Notes) -> list[list[Any]]:
    """Of each image."""
    by_image, faults = [], []
    for entry in entries:
        made = []
        for kind, difficult, box in entry.boxes:
            about: dict[str, Any] = {"size": entry.size, "name": f"{entry.name}.xml, a {kind}", "notes": notes}
            try:
                made.append(box_object(box, label=known.index(kind), crowd=difficult, area=None, **about))
            except ValueError as error:
                faults.append(str(error))
        by_image.append([one for one in made if one is not None])
    if faults:
        raise AnnotationsError(faults)
    return by_image


def _files(folder: Path, names: Sequence[str], listing: Path) -> list[str]:
    paths = [path for path in sorted((folder / "JPEGImages").glob("*")) if path.is_file()]
    there = {path.stem: path.name for path in paths}
    absent = [name for name in names if name not in there]
    if absent:
        raise ValueError(
            f"{len(absent)} of the {len(names)} images of {printable(listing)} are not in JPEGImages: "
            f"{printable(some(absent, 3))}; add them, or remove them from the list"
        )
    twice = first_twice(names)
    if twice is not None:
        raise ValueError(f"{printable(listing)}: {printable(twice)} is there twice; list each image once")
    wanted = set(names)
    double = first_twice([path.stem for path in paths if path.stem in wanted])
    if double is not None:
        found = [path.name for path in paths if path.stem == double]
        raise ValueError(f"JPEGImages has {printable(some(found))}; it is not known which one is {printable(double)}")
    return [there[name] for name in names]


def _entry(file: Path, name: str) -> _Entry:
    try:
        text = read_text(file, limit=_LARGEST)
        if "<!DOCTYPE" in text or "<!ENTITY" in text:  # whose expansion can fill any memory
            raise ValueError("it has a document type, which no annotation needs")
        tree = ElementTree.fromstring(text)  # noqa: S314
        height, width = (int(float(_text(tree, f"size/{side}"))) for side in ("height", "width"))
        boxes = [(_text(one, "name"), _is_difficult(one), _box(one)) for one in tree.findall("object")]
        if not (min(height, width) >= 1 and max(height, width) <= LONGEST_SIDE):
            raise ValueError(f"size {brief(width)} x {brief(height)}")
        if not all(kind for kind, _, _ in boxes):
            raise ValueError("an object has an empty <name>")
    except (ElementTree.ParseError, ValueError, OverflowError, OSError) as error:
        raise ValueError(
            f"{printable(file)} is no annotation of VOC: {error}; correct it, or leave {name} out"
        ) from error
    return _Entry(name, (height, width), boxes)


def _text(tree: ElementTree.Element, path: str, default: str | None = None) -> str:
    found = tree.findtext(path, default)
    if found is None:
        raise ValueError(f"<{path}> is missing")
    return found.strip()


def _is_difficult(one: ElementTree.Element) -> bool:
    found = _text(one, "difficult", "0")
    if found not in ("0", "1"):
        raise ValueError(f"<difficult> {brief(found)}, which is 0 or 1")
    return found == "1"


def _box(one: ElementTree.Element) -> tuple[float, float, float, float]:
    left, top, right, bottom = (float(_text(one, f"bndbox/{side}")) for side in ("xmin", "ymin", "xmax", "ymax"))
    return left - 1, top - 1, right, bottom
