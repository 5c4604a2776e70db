"""Sets of images with masks: their splits and classes, checked before training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from unloaf.config import Config
from unloaf.data.consistency import some
from unloaf.data.in_memory import hold_out_some, share_of
from unloaf.data.masks.files import MaskSplit, open_mask_split
from unloaf.data.masks.images import VOID
from unloaf.data.sets import IMAGENET_MEAN, IMAGENET_STD, Data
from unloaf.files.writing import read_text
from unloaf.printable import printable

DEFAULT_CROP = 512
_NAMES = "classes.txt"
_LARGEST = 1 << 20  # bytes of it


def load_masked(config: Config) -> Data:
    """Opens the set that a configuration names.

    Classes are the ids from 0 to the highest one of the training masks, or the lines of classes.txt, and other ids are
    refused; with ``num_classes`` ids from there on are void, and masks are not decoded before they are needed.

    Raises:
        ValueError: files are missing, or do not fit each other or the configuration.
    """
    folder, notes = Path(str(config.data_dir)), list[str]()
    if not folder.is_dir():
        raise ValueError(f"data_dir {printable(folder)} is no folder; give the one of the set")
    names = _class_names(folder, config)
    train, val, test = _splits(folder, config, notes)
    count = config.num_classes or _count(train, names, notes)
    if config.num_classes is None:
        for split in (train, val, test):
            if split is not None:
                _check_ids(split, count)
    else:
        notes.append(f"ids from {count} on are void, as {VOID} is (--num-classes {count})")
    images = train.images(count, config)
    if val is None:
        images, held = hold_out_some(images, round(config.val_fraction * len(images)))
        notes.append(f"{len(held)} of {len(images) + len(held)} images are held out for validation (--val-fraction)")
    else:
        held = val.images(count, config)
    tested = images.subset(torch.arange(0)) if test is None else held if test is val else test.images(count, config)
    side = config.img_size or DEFAULT_CROP
    return Data(
        name=config.dataset,
        num_classes=count,
        class_names=names or tuple(map(str, range(count))),
        train=images if config.train_images is None else share_of(images, config.train_images),
        val=held,
        test=tested,
        mean=_of_channels("mean", config.mean or IMAGENET_MEAN),
        std=_of_channels("std", config.std or IMAGENET_STD),
        augment="scale-crop",
        pad=0,
        hflip=config.hflip,
        img_size=side,
        train_img_size=config.train_img_size or side,
        notes=tuple(notes),
    )


def _splits(folder: Path, config: Config, notes: list[str]) -> tuple[MaskSplit, MaskSplit | None, MaskSplit | None]:
    """Training, validation and test images; the last are the second where there are only test images."""

    def opened(split: str) -> MaskSplit | None:
        return open_mask_split(folder, split, config, notes)

    def needed(split: str) -> MaskSplit:
        found = opened(split)
        if found is None:
            raise ValueError(
                f"no masks split {split} in {printable(folder)}: expected {split}/images/NAME.jpg and "
                f"{split}/masks/NAME.png, or the same in images/{split} and masks/{split}"
            )
        return found

    train = needed(config.train_split)
    val = needed(config.val_split) if config.val_split else opened("val") or opened("validation")
    test = None if config.train_split == "test" else val if config.val_split == "test" else opened("test")
    return train, test if val is None else val, test


def _class_names(folder: Path, config: Config) -> tuple[str, ...]:
    """Those of classes.txt, a line each; () where there is none."""
    file = folder / _NAMES
    if not file.is_file():
        return ()
    names = tuple(line.strip() for line in read_text(file, limit=_LARGEST).rstrip().splitlines())
    if "" in names or len(set(names)) != len(names) or not 2 <= len(names) <= VOID:
        raise ValueError(
            f"{printable(file)}: give 2 to {VOID} names, one a line, all of them different, that of id 0 first"
        )
    if config.num_classes not in (None, len(names)):
        raise ValueError(f"num_classes {config.num_classes}: {printable(file)} has {len(names)} names; correct one")
    return names


def _count(train: MaskSplit, names: tuple[str, ...], notes: list[str]) -> int:
    """Classes, of the names or the training masks."""
    ids = np.any(train.ids[:, :VOID], axis=0)
    count = len(names) or int(np.flatnonzero(ids).max(initial=-1)) + 1
    if count < 2:
        raise ValueError(
            f"the training masks have {'no class at all' if count == 0 else 'the id 0 alone'} beside {VOID}, which is "
            "void; give masks of ids from 0 up, two at least (a mask of 0 and 255 must be one of 0 and 1)"
        )
    empty = [names[at] if names else str(at) for at in range(count) if not ids[at]]
    if empty:
        notes.append(f"{len(empty)} of the {count} classes are in no training mask: {printable(some(empty))}")
    return count


def _check_ids(split: MaskSplit, count: int) -> None:
    wrong = split.ids[:, count:VOID]
    files = np.flatnonzero(np.any(wrong, axis=1))
    if len(files):
        first = int(files[0])
        wrong_id = count + int(np.flatnonzero(wrong[first])[0])
        raise ValueError(
            f"{printable(split.masks[first])}: id {wrong_id} is none of the {count} classes, "
            f"0 to {count - 1} ({len(files)} such masks); correct them, or give --num-classes {count}, with "
            f"which ids from {count} on are void"
        )


def _of_channels(name: str, values: tuple[float, ...]) -> tuple[float, ...]:
    if len(values) not in (1, 3):
        raise ValueError(f"{name} {' '.join(map(str, values))}: give one number, or 3, one for each channel")
    return tuple(255 * value for value in (values if len(values) == 3 else values * 3))
