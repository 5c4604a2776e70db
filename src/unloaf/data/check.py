"""Opening every image of a set before a long run does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unloaf.config import Config
from unloaf.data.consistency import FoundSplits, disagreements, some
from unloaf.data.images import BadImageError, Encoded, Images, Split, traits
from unloaf.data.in_memory import hold_out
from unloaf.data.panoptic.images import PanopticImages
from unloaf.data.sets import FILE_SETS, Data, find_splits, load_data


@dataclass(frozen=True)
class CheckReport:
    """What is in an image set, and all that is wrong with it."""

    counts: dict[str, dict[str, int]]  # images per split and class
    bad: tuple[tuple[str, str], ...]  # (name, reason) of each image that cannot be read
    faults: tuple[str, ...]  # what else keeps a run from using the set, a line each
    notes: tuple[str, ...]  # what a run decides, or what may surprise
    modes: dict[str, int]  # how many of the files that can be read are stored in which mode, in Pillow's words
    # Of annotated images, per split and class, and of images with several labels; `counts` then has no classes.
    objects: dict[str, dict[str, int]] | None = None
    what: str = "objects"  # or labels, columns, marked joints
    entries: str = "images"  # what are counted


def check_images(config: Config) -> CheckReport:
    """Opens every split and decodes every image of it, with config.workers threads.

    Raises:
        ValueError: a set in memory cannot be loaded; see load_data.

    >>> report = check_images(Config(dataset="digits"))
    >>> report.counts["val"]["0"], report.bad
    (30, ())
    """
    if config.task == "pose":
        return _check_people(config)
    if config.task in ("detection", "instance", "panoptic"):
        return _check_annotated(config)
    if config.dataset == "masks":
        return _check_masked(config)
    if config.dataset == "csv":
        return _check_columns(config)
    found = find_splits(config) if config.dataset in FILE_SETS else _in_memory(config)
    splits = {
        name: split
        for name, split in (("train", found.train), ("val", found.val), ("test", found.test))
        if split is not None and (name == "val" or split is not found.val)
    }
    looks = _looks(splits, config.workers)
    faults = (*found.faults, *disagreements(config, found))
    treated = Counter(what for look in looks for what in look.treated)
    notes = [*found.notes, *(f"{count} image(s): {what}" for what, count in treated.most_common())]
    notes += [note for name, split in splits.items() if name != "train" for note in _empty(split, name)]
    if found.train is not None and found.val is None and not faults:
        notes += _cannot_hold_out(found.train)
    bad = tuple(problem for look in looks for problem in look.bad)
    modes = Counter(mode for look in looks for mode in look.modes)
    return CheckReport(_counts_of(found), bad, faults, tuple(notes), dict(modes.most_common()))


def _check_annotated(config: Config) -> CheckReport:
    """The same of a set of annotated images."""
    from unloaf.data.annotated_sets import open_each

    splits, faults, notes = open_each(config, masks=config.task == "instance")
    looks = _looks(splits, config.workers)
    bad = tuple(problem for look in looks for problem in look.bad)
    modes = Counter(mode for look in looks for mode in look.modes)
    objects = {}
    for name, split in splits.items():
        images: Any = split.images
        parts = images.segments if config.task == "panoptic" else images.objects
        counted = parts.classes[~parts.crowd].bincount(minlength=len(split.class_names or ()))
        objects[name] = dict(zip(split.class_names or (), counted.tolist(), strict=True))
    counts = {name: {"": len(split.images)} for name, split in splits.items()}
    return CheckReport(counts, bad, tuple(faults), tuple(notes), dict(modes.most_common()), objects)


def _check_masked(config: Config) -> CheckReport:
    """The same of images with masks, each of which is decoded too; counts the pixels of each class."""
    from unloaf.data.masks.sets import load_masked

    try:  # what cannot be read is listed below, not refused at the first
        data = load_masked(replace(config, bad_images="skip"))
    except ValueError as error:
        return CheckReport({}, (), (str(error),), (), {})
    splits = _splits_of(data)
    bad, modes, pixels = [], Counter(), {}
    for name, images in splits.items():
        counts = torch.zeros(len(data.class_names), dtype=torch.int64)
        with ThreadPoolExecutor(max(1, config.workers)) as pool:
            for look, found in pool.map(partial(_look_at_mask, images), range(len(images))):
                bad += look.bad
                modes.update(look.modes)
                counts += 0 if found is None else found[: len(counts)]
        pixels[name] = dict(zip(data.class_names, counts.tolist(), strict=True))
    entries = {name: {"": len(images)} for name, images in splits.items()}
    return CheckReport(entries, tuple(bad), (), data.notes, dict(modes.most_common()), pixels, "pixels")


def _splits_of(data: Data) -> dict[str, Images]:
    """By name; test images that are the validation images once."""
    parts = {"train": data.train, "val": data.val, "test": data.test}
    return {name: images for name, images in parts.items() if name != "test" or images is not data.val}


def _look_at_mask(images: Any, index: int) -> tuple[_Look, Tensor | None]:
    """The image as any other, and how many pixels of its mask have each id; None where it cannot be read."""
    look = _look(images, index)
    try:
        return look, images.mask(index).flatten().long().bincount(minlength=256)
    except BadImageError as error:
        return look._replace(bad=(*look.bad, (error.name, error.reason))), None


def _check_columns(config: Config) -> CheckReport:
    """The same of images with a row of numbers each."""
    from unloaf.data.own_sets import load_columns

    try:
        data = load_columns(config)
    except ValueError as error:
        return CheckReport({}, (), (str(error),), (), {})
    splits = {name: Split(images, None) for name, images in _splits_of(data).items()}
    looks = _looks({name: split for name, split in splits.items() if len(split.images)}, config.workers)
    bad = tuple(problem for look in looks for problem in look.bad)
    modes = Counter(mode for look in looks for mode in look.modes)
    labels = config.task == "multilabel"
    objects = {name: _times(data.class_names, split.images, labels=labels) for name, split in splits.items()}
    counts = {name: {"": len(split.images)} for name, split in splits.items()}
    treated = Counter(what for look in looks for what in look.treated)
    notes = (*data.notes, *(f"{count} image(s): {what}" for what, count in treated.most_common()))
    what = "labels" if labels else "columns"
    return CheckReport(counts, bad, (), notes, dict(modes.most_common()), objects, what)


def _times(names: tuple[str, ...], images: Images, *, labels: bool) -> dict[str, int]:
    """How many of these images have each label; of columns of numbers how many there are."""
    if not labels or not len(images):
        return dict.fromkeys(names, len(images))
    return dict(zip(names, images.labels.sum(0).int().tolist(), strict=True))


def _check_people(config: Config) -> CheckReport:
    """The same of people, each image opened once."""
    from unloaf.data.annotated_sets import open_each

    splits, faults, notes = open_each(config, masks=False)
    counts, joints, firsts = {}, {}, {}
    for name, split in splits.items():
        people: Any = split.images
        firsts[name] = split._replace(images=people.first_of_each_image())
        counts[name] = {"": len(people)}
        marked = (people.people.joints[..., 2] > 0).sum(0).tolist()
        joints[name] = dict(zip(split.class_names or (), marked, strict=True))
    looks = _looks(firsts, config.workers)
    bad = tuple(problem for look in looks for problem in look.bad)
    modes = dict(Counter(mode for look in looks for mode in look.modes).most_common())
    return CheckReport(counts, bad, tuple(faults), tuple(notes), modes, joints, "marked joints", "people")


def _looks(splits: Mapping[str, Split], workers: int) -> list[_Look]:
    """One for each image."""
    with ThreadPoolExecutor(max(1, workers)) as pool:
        return [
            look
            for split in splits.values()
            for look in pool.map(lambda at, images=split.images: _look(images, at), range(len(split.images)))
        ]


def _in_memory(config: Config) -> FoundSplits:
    data = load_data(config)
    splits = [Split(images, data.class_names) if len(images) else None for images in (data.train, data.val, data.test)]
    return FoundSplits(splits[0], splits[1], splits[2])


def _cannot_hold_out(train: Split) -> list[str]:
    """A note if a run with the default settings could not begin."""
    try:
        hold_out(train.images, round(Config.val_fraction * len(train.images)))
    except ValueError as error:
        return [f"by default, `unloaf train` {error}"]
    return []


def _empty(split: Split, name: str) -> list[str]:
    names = split.class_names or ()
    counts = split.images.labels.bincount(minlength=len(names)).tolist() if names else []
    empty = [label for label, count in zip(names, counts, strict=True) if count == 0]
    return [f"{len(empty)} of {len(names)} classes have no image in {name}: {some(empty)}"] if empty else []


class _Look(NamedTuple):
    bad: tuple[tuple[str, str], ...] = ()
    modes: tuple[str, ...] = ()
    treated: tuple[str, ...] = ()


def _look(images: Images, index: int) -> _Look:
    try:
        if isinstance(images, PanopticImages):
            images.pair(index)
        else:
            images.open(index)
        if not isinstance(images, Encoded):
            return _Look()
        mode, treated = traits(images.read(index))
        return _Look(modes=(mode,), treated=treated)
    except BadImageError as error:
        return _Look(bad=((error.name, error.reason),))


def _counts_of(found: FoundSplits) -> dict[str, dict[str, int]]:
    names = (found.train and found.train.class_names) or ()
    nothing = dict.fromkeys(names, 0)
    counts = {"train": found.train, "val": found.val} | ({} if found.test is found.val else {"test": found.test})
    return {name: _counts(split) if split else nothing for name, split in counts.items()}


def _counts(split: Split) -> dict[str, int]:
    if split.class_names is None:  # labels as they are found, also wrong ones
        labels, counts = split.images.labels.unique(return_counts=True)
        return {str(label): count for label, count in zip(labels.tolist(), counts.tolist(), strict=True)}
    counts = split.images.labels.bincount(minlength=len(split.class_names)).tolist()
    return dict(zip(split.class_names, counts, strict=True))
