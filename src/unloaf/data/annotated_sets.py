"""Sets of annotated images, of objects, of segments or of people: their splits and classes, checked before training."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from unloaf.config import Config
from unloaf.data.annotated.coco import AnnotationsError, open_coco_split
from unloaf.data.annotated.voc import open_voc_split
from unloaf.data.consistency import some
from unloaf.data.images import Split
from unloaf.data.in_memory import hold_out_some, share_of
from unloaf.data.panoptic.files import open_panoptic_split
from unloaf.data.people.images import PeopleImages
from unloaf.data.people.joints import mirrored_order
from unloaf.data.people.keypoints import open_people_split
from unloaf.data.sets import IMAGENET_MEAN, IMAGENET_STD, Data
from unloaf.printable import printable

DEFAULT_SIDE = 800
DEFAULT_HEIGHT = 256
_EXPECTED = {
    "coco": "annotations/instances_{split}.json (or instances_{split}.json) and the images in {split}/",
    "panoptic": "panoptic_{split}.json (or annotations/panoptic_{split}.json), its PNGs in {split}/panoptic/ and the "
    "images in {split}/ or {split}/images/",
    "voc": "ImageSets/Main/{split}.txt, JPEGImages and Annotations",
    "people": "annotations/person_keypoints_{split}.json (or person_keypoints_{split}.json) and the images in {split}/",
}


def load_annotated(config: Config, *, masks: bool) -> Data:
    """Opens the set that a configuration names.

    Raises:
        ValueError: files are missing, or do not fit each other or the configuration.
    """
    train, val, test, notes = _splits(config, masks=masks)
    names = train.class_names or ()
    if config.num_classes not in (None, len(names)):
        raise ValueError(f"num_classes {config.num_classes}: the set has {len(names)}; leave it out")
    images: Any = train.images
    if val is None:
        images, held = _hold_out(images, config.val_fraction)
        what = "people" if isinstance(images, PeopleImages) else "images"
        notes.append(f"{len(held)} of {len(images) + len(held)} {what} are held out for validation (--val-fraction)")
    else:
        held = val.images
    if config.train_images is not None:
        images = share_of(images, config.train_images)
    for split, found in {"training": images, "validation": held}.items():
        if not len(found) and config.task == "pose" and (split == "training" or val is not None):
            raise ValueError(f"the {split} images have nobody with a marked joint; give a set with people in them")
        if len(found) and not int(found.counts.sum()):
            raise ValueError(f"the {split} images have no object at all; give a set with objects in them")
    tested: Any = None if test is None or test is val else test.images
    if tested is not None and not int(tested.counts.sum()):
        notes.append("test: no image has an object to find, so nothing is tested on them")
        test = None
    side = config.img_size or DEFAULT_SIDE
    return Data(
        name=config.dataset,
        num_classes=len(names),
        class_names=tuple(names),
        train=images,
        val=held,
        test=held
        if test is val and val is not None
        else images.subset(torch.arange(0))
        if test is None
        else test.images,
        mean=tuple(255 * value for value in config.mean or IMAGENET_MEAN),
        std=tuple(255 * value for value in config.std or IMAGENET_STD),
        augment="flip",
        pad=0,
        hflip=config.hflip,
        img_size=side,
        train_img_size=config.train_img_size or side,
        notes=tuple(notes),
    )


def load_people(config: Config) -> Data:
    """Opens the set that a configuration names; its classes are the joints.

    Raises:
        ValueError: files are missing, or do not fit each other or the configuration; images are to be mirrored, and it
            is not known which joints then change places.
    """
    data = load_annotated(config, masks=False)
    if config.hflip:
        mirrored_order(data.class_names)
    height = config.img_size or DEFAULT_HEIGHT
    return replace(data, augment="scale-turn-flip", img_size=height, train_img_size=config.train_img_size or height)


def _splits(config: Config, *, masks: bool) -> tuple[Split, Split | None, Split | None, list[str]]:
    def opened(split: str, *, like: Split | None = None, needed: bool = False) -> Split | None:
        found = _opened(config, split, masks=masks, like=like, needed=needed)
        if found is not None:
            notes.extend(f"{split}: {note}" for note in found.notes)
        return found

    notes: list[str] = []
    train = opened(config.train_split, needed=True)
    if train is None:
        raise AssertionError("a needed split is there")
    if config.val_split is not None:
        val = opened(config.val_split, like=train, needed=True)
    else:
        val = opened("val", like=train) or opened("validation", like=train)
    test = None if config.train_split == "test" else val if config.val_split == "test" else opened("test", like=train)
    if val is None and test is not None and config.val_split is None:
        val = test
    return train, val, test, notes


def _hold_out(images: Any, share: float) -> tuple[Any, Any]:
    """A share of the images held out; people go with their image, so that nobody is on both sides of it."""
    if not isinstance(images, PeopleImages):
        return hold_out_some(images, round(share * len(images)))
    firsts = images.first_of_each_image()
    kept, held = hold_out_some(firsts, round(share * len(firsts)))
    first, second = (images.in_images(part.people.images[part.positions]) for part in (kept, held))
    return first, second


def _opened(config: Config, split: str, *, masks: bool, like: Split | None, needed: bool) -> Split | None:
    """A split, whose notes say too what of it is in the training images; None where it is neither there nor needed."""
    folder = Path(str(config.data_dir))
    if not folder.is_dir():
        raise ValueError(f"data_dir {printable(folder)} is no folder; give the one of the set")
    if config.task == "pose":
        found = open_people_split(folder, split, max_pixels=config.max_pixels)
    elif config.task == "panoptic":
        stop = config.bad_images == "stop"
        found = open_panoptic_split(folder, split, max_pixels=config.max_pixels, stop=stop)
    elif config.dataset == "coco":
        found = open_coco_split(folder, split, masks=masks, max_pixels=config.max_pixels)
    else:
        names = None if like is None else like.class_names
        found = open_voc_split(folder, split, classes=names, max_pixels=config.max_pixels)
    if found is None and needed:
        kind = {"pose": "people", "panoptic": "panoptic"}.get(config.task, config.dataset)
        expected = _EXPECTED[kind].format(split=split)
        raise ValueError(f"no {config.dataset} split {split} in {printable(folder)}: expected {expected}")
    if found is not None and like is not None and _classes(found) != _classes(like):
        other = sorted({name for name, _ in {*_classes(found)} ^ {*_classes(like)}})
        what = "joints" if config.task == "pose" else "classes"
        if not other:
            raise ValueError(f"{split} has the {what} of the training images in another order; give both the same")
        raise ValueError(f"{split} has other {what} than the training images: {printable(some(other))}")
    return None if found is None else found._replace(notes=(*found.notes, *_shared(like, found)))


def _classes(split: Split) -> list[tuple[str, Any]]:
    """Names of the classes, with what of a panoptic set tells whether they are things."""
    names, images = split.class_names or (), split.images
    return list(zip(names, getattr(images, "things", [None] * len(names)), strict=True))


def open_each(config: Config, *, masks: bool) -> tuple[dict[str, Split], list[str], list[str]]:
    """All splits that can be opened, by name, all that is wrong with the others, and notes."""
    given = config.val_split
    names = [config.train_split, *([given] if given else ["val", "validation"]), "test"]
    found: dict[str, Split] = {}
    faults: list[str] = []
    notes: list[str] = []
    for name in dict.fromkeys(names):
        needed = name in (config.train_split, given)
        try:
            split = _opened(config, name, masks=masks, like=found.get(config.train_split), needed=needed)
        except ValueError as error:
            faults.extend(error.faults if isinstance(error, AnnotationsError) else [str(error)])
            continue
        if split is None:
            continue
        images: Any = split.images
        if not int(images.counts.sum()):
            (faults if needed or name != "test" else notes).append(f"the {name} images have no object at all")
        found[name] = split
        notes.extend(f"{name}: {note}" for note in split.notes)
    return found, faults, notes


def _shared(train: Split | None, other: Split) -> list[str]:
    """Says which images are in both."""
    ours: Any = train.images if train is not None else None
    theirs: Any = other.images
    if ours is None or ours.root.resolve() != theirs.root.resolve():
        return []
    known = set(ours.files)
    both = [name for name in theirs.files if name in known]
    return [f"{len(both)} of these images are training images too: {printable(some(both, 3))}"] if both else []
