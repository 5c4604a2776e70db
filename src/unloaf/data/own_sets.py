"""Image sets of the user's own, and sets whose targets are numbers: splits, columns and checks, before training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from unloaf.config import Config
from unloaf.data.consistency import some
from unloaf.data.images import NO_IMAGES, Images, ImageSet
from unloaf.data.in_memory import MemorySplits, hold_out, hold_out_some, share_of, take_share
from unloaf.data.listed import open_list
from unloaf.data.own import OwnSplits, load_own
from unloaf.data.sets import Data, files_data, memory_data
from unloaf.printable import printable


class _Splits(NamedTuple):
    train: Images
    val: Images
    test: Images
    names: tuple[str, ...]
    notes: tuple[str, ...]


def load_own_classes(config: Config) -> Data:
    """An image set of the user's own with a class for each image.

    Raises:
        ValueError: see `load_own`; or labels, names and settings do not fit each other.
    """
    own = load_own(config, columns=False)
    present = [split for split in (own.train, own.val, own.test) if split is not None]
    highest = max(int(split.labels.max()) for split in present)
    count = len(own.names) if own.names is not None else config.num_classes or highest + 1
    if config.num_classes not in (None, count):
        raise ValueError(
            f"num_classes {config.num_classes}, but dataset {config.dataset} names {count}; give one of the two"
        )
    lowest = min(int(split.labels.min()) for split in present)
    if lowest < 0 or highest >= count or count < 2:
        raise ValueError(
            f"dataset {config.dataset}: labels from {lowest} to {highest}, {count} class(es); give labels from 0 up, "
            "and at least 2 classes"
        )
    there = set(own.train.labels.tolist())
    empty = [own.names[at] if own.names else str(at) for at in range(count) if at not in there]
    if empty:
        raise ValueError(
            f"dataset {config.dataset}: no training image of {len(empty)} of {count} classes, {printable(some(empty))}"
            "; add some, or remove the class everywhere"
        )
    held = hold_out(own.train, round(config.val_fraction * len(own.train))) if own.val is None else (own.train, own.val)
    train = held[0] if config.train_images is None else take_share(held[0], config.train_images)
    names = own.names or tuple(map(str, range(count)))
    return _data(config, _Splits(train, held[1], own.test or NO_IMAGES, names, _notes(own, held[1], config)))


def load_columns(config: Config) -> Data:
    """An image set with a row of numbers for each image: of task multilabel 0 or 1 for each label, of regression any.

    Raises:
        ValueError: files are missing, or do not fit each other, the task or the configuration.
    """
    splits = _listed(config) if config.dataset == "csv" else _own_columns(config)
    notes = list(splits.notes)
    if config.task == "multilabel":
        for split in (splits.train, splits.val, splits.test):
            _check_binary(split)
        notes += _rare(splits)
    return _data(config, splits._replace(notes=tuple(notes)))


def _listed(config: Config) -> _Splits:
    folder = Path(str(config.data_dir))
    if not folder.is_dir():
        raise ValueError(f"data_dir {printable(folder)} is no folder; give the one of the set")

    def opened(split: str, *, needed: bool = False) -> Any:
        found = open_list(folder, split, max_pixels=config.max_pixels)
        if found is None and needed:
            raise ValueError(f"no list {split}.csv in {printable(folder)}: expected lines of the form file,NAME,NAME")
        return found

    train, names = opened(config.train_split, needed=True)
    val = opened(config.val_split, needed=True) if config.val_split else opened("val") or opened("validation")
    test = val if config.val_split == "test" else opened("test") if config.train_split != "test" else None
    for split, found in (("validation", val), ("test", test)):
        if found is not None and found[1] != names:
            raise ValueError(
                f"the columns of {split} are {printable(some(found[1]))}, those of training {printable(some(names))}; "
                "give both the same, in the same order"
            )
    val = test if val is None else val
    both = sorted(set(train.files) & {file for found in (val, test) if found for file in found[0].files})
    shared = (
        (f"{len(both)} training images are validation or test images too: {printable(some(both, 3))}",) if both else ()
    )
    tested = None if test is None else test[0]
    return _held_out(config, train, None if val is None else val[0], tested, names, shared)


def _own_columns(config: Config) -> _Splits:
    own = load_own(config, columns=True)
    widths = {split.labels.shape[1] for split in (own.train, own.val, own.test) if split is not None}
    names = own.names or tuple(map(str, range(own.train.labels.shape[1])))
    if widths != {len(names)}:
        raise ValueError(
            f"dataset {config.dataset}: targets of {' and '.join(map(str, sorted(widths)))} numbers, {len(names)} "
            "class_names; give every image of every split a number for each name"
        )
    return _held_out(config, own.train, own.val, own.test, names, own.notes)


def _held_out(
    config: Config, train: Any, val: Any, test: Any, names: tuple[str, ...], notes: tuple[str, ...]
) -> _Splits:
    """With validation images, held out of the training images where there are none."""
    if val is None:
        train, val = hold_out_some(train, round(config.val_fraction * len(train)))
        notes += (f"{len(val)} of {len(train) + len(val)} images are held out for validation (--val-fraction)",)
    train = train if config.train_images is None else share_of(train, config.train_images)
    return _Splits(train, val, NO_IMAGES if test is None else test, names, notes)


def _check_binary(images: Images) -> None:
    wrong = ((images.labels != 0) & (images.labels != 1)).nonzero()
    if images.labels.ndim == 2 and len(wrong):
        row, column = wrong[0].tolist()
        raise ValueError(
            f"image {printable(images.name(row))}: column {column + 1} is {float(images.labels[row, column]):g}, but a "
            "label of task multilabel is 0 or 1; correct it, or give --task regression"
        )


def _rare(splits: _Splits) -> list[str]:
    """What the figures will not say, and labels that nothing can learn."""
    notes = []
    for split, images in (("training", splits.train), ("validation", splits.val), ("test", splits.test)):
        if len(images) == 0 or (split == "test" and images is splits.val):
            continue
        empty = [splits.names[at] for at in (images.labels.sum(0) == 0).nonzero().flatten().tolist()]
        if split != "training" and len(empty) == len(splits.names):
            raise ValueError(
                f"no {split} image has any of the {len(empty)} labels, so it has no mAP; add some that have"
            )
        if empty:
            left = "" if split == "training" else ", which its mAP leaves out"
            notes.append(
                f"{len(empty)} of {len(splits.names)} labels are in no {split} image: {printable(some(empty))}{left}"
            )
    return notes


def _data(config: Config, splits: _Splits) -> Data:
    train, val, test, names, notes = splits
    images: Sequence[Images] = [split for split in (train, val, test) if len(split)]
    if isinstance(train, ImageSet):
        sizes = {tuple(split.images.shape[1:]) if isinstance(split, ImageSet) else None for split in images}
        if len(sizes) > 1:
            raise ValueError(f"dataset {config.dataset}: splits of images in memory must all be so, of one size")
        _check_channels(config, train.images.shape[1])
        return memory_data(config, MemorySplits(train, _as_set(val), _as_set(test), names), notes=notes)
    if any(isinstance(split, ImageSet) for split in images):
        raise ValueError(f"dataset {config.dataset}: splits of images in memory must all be so, of one size")
    _check_channels(config, 3)
    if config.device_data:
        raise ValueError(
            f"device_data holds images in memory; dataset {config.dataset} gives them one by one; leave it out"
        )
    return files_data(config, train, val, test, names, notes=notes)


def _as_set(images: Images) -> ImageSet:
    assert isinstance(images, ImageSet)
    return images


def _check_channels(config: Config, channels: int) -> None:
    for setting in ("mean", "std"):
        values = getattr(config, setting)
        if len(values) not in (0, channels):
            raise ValueError(f"{setting} {' '.join(map(str, values))}: give {channels} number(s), one for each channel")


def _notes(own: OwnSplits, val: Images, config: Config) -> tuple[str, ...]:
    if own.val is not None:
        return own.notes
    return (*own.notes, f"{len(val)} of {len(own.train)} images are held out for validation (--val-fraction)")


def columns_of(images: Images) -> Tensor:
    """The numbers of all images of a split, float64 (n, columns)."""
    return images.labels.to(torch.float64)
