"""The image set of a run: its splits, its classes, and how its images are fed; everything checked before training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unloaf.config import Config
from unloaf.data.consistency import EXPECTED, FoundSplits, class_names_of, disagreements, some, wrong_count
from unloaf.data.folders import open_flat_folder, open_folder_split
from unloaf.data.images import NO_IMAGES, Images, ImageSet, Split
from unloaf.data.in_memory import MemorySplits, hold_out, load_digits, load_torchvision, take_share
from unloaf.data.rows import open_row_split
from unloaf.data.tars import open_tar_split
from unloaf.own_code import is_own
from unloaf.printable import printable

# Of the ImageNet training images, in shares of the pixel range; many published networks expect them.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_FILE_SIDE = 224


@dataclass(frozen=True)
class Data:
    """An image set with its three splits and the way its images are fed.

    `val` is empty when no images were held out. `test` is empty when there is none; where there
    are only test images, it is `val` itself. `mean` and `std` are per channel,
    in units of the pixel range [0, 255]: those of the settings, else of the training split
    for sets in memory, ImageNet's for files. `augment` is none, pad-crop or resized-crop; `pad` is in
    pixels, `hflip` a probability; both sides are in pixels. `interpolation` is bilinear, bicubic or, in training
    alone, random; `crop_pct` is the share of an evaluated file that is cut out. `notes` say what
    was decided because nobody said it.
    """

    name: str
    num_classes: int
    class_names: tuple[str, ...]
    train: Images
    val: Images
    test: Images
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: str
    pad: int
    hflip: float
    img_size: int
    train_img_size: int
    interpolation: str = "bilinear"
    crop_pct: float = 0.875
    notes: tuple[str, ...] = ()
    unit: str = "images"  # what its examples are called

    @property
    def resize_mode(self) -> str:
        """How images that are not augmented are resized: random chooses for training images alone."""
        return "bicubic" if self.interpolation == "bicubic" else "bilinear"

    @property
    def cuts_out(self) -> bool:
        """Whether evaluated images are resized and cut out of the centre, as files of any size are."""
        return self.name in (*FILE_SETS, "csv") or (is_own(self.name) and not isinstance(self.train, ImageSet))

    @property
    def in_chans(self) -> int:
        """Channels of an image."""
        return len(self.mean)

    def normalise(self, images: Tensor, *, size: int | None = None) -> Tensor:
        """uint8 (N, C, H, W) to float32 (N, C, size, size), mean 0 and spread 1 per channel; default size: img_size."""
        mean, std = (_per_channel(values, images.device) for values in (self.mean, self.std))
        x = images.float().sub_(mean).div_(std)
        size = size or self.img_size
        if size != x.shape[-1]:
            x = F.interpolate(x, size=size, mode=self.resize_mode, antialias=True, align_corners=False)
        return x


@cache
def _per_channel(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Kept: made again for each batch, they would be copied to the device each time."""
    return torch.tensor(values, device=device).view(-1, 1, 1)


def load_data(config: Config) -> Data:
    """Opens the image set that a configuration names.

    Raises:
        ValueError: files are missing or do not fit each other or the configuration; one line
            that says what to do.

    >>> data = load_data(Config(dataset="digits"))
    >>> len(data.train), len(data.val), len(data.test), data.num_classes
    (897, 300, 600, 10)
    """
    if config.dataset in FILE_SETS:
        return _files(config)
    return _memory(config)


def _memory(config: Config) -> Data:
    if config.dataset == "digits":
        splits = load_digits()
    else:
        splits = load_torchvision(config.dataset, str(config.data_dir), val_fraction=config.val_fraction)
    if config.num_classes not in (None, len(splits.class_names)):
        raise ValueError(wrong_count(config, len(splits.class_names)))
    train = splits.train if config.train_images is None else take_share(splits.train, config.train_images)
    return memory_data(config, splits._replace(train=train))


def memory_data(config: Config, splits: MemorySplits, *, notes: tuple[str, ...] = ()) -> Data:
    """Images in memory, at their own side, and how the configuration feeds them."""
    train, pixels = splits.train, splits.train.images.float()
    side = int(pixels.shape[-1])
    img_size = config.img_size or side
    train_img_size = config.train_img_size or img_size
    augment = "pad-crop" if config.augment == "auto" else config.augment
    if config.interpolation == "random" and augment != "resized-crop" and {img_size, train_img_size} != {side}:
        raise ValueError(
            f"interpolation 'random' chooses for each image, but {config.dataset} is resized in batches; "
            "give bilinear or bicubic"
        )
    # A mirrored 2 is no 2, and 8x8 digits fill their frame: one pixel of shift is what they bear.
    pad, flips = {"digits": (1, False), "fashion_mnist": (2, True)}.get(config.dataset, (max(1, side // 8), True))
    return Data(
        name=config.dataset,
        num_classes=len(splits.class_names),
        class_names=splits.class_names,
        train=train,
        val=splits.val,
        test=splits.test,
        mean=tuple(255 * value for value in config.mean) or tuple(pixels.mean(dim=(0, 2, 3)).tolist()),
        std=tuple(255 * value for value in config.std) or tuple(pixels.std(dim=(0, 2, 3)).tolist()),
        augment=augment,
        pad=pad if augment == "pad-crop" else 0,
        hflip=config.hflip if flips and augment != "none" else 0.0,
        img_size=img_size,
        train_img_size=train_img_size,
        **_resizing(config),
        notes=notes,
    )


def _files(config: Config) -> Data:
    found = find_splits(config)
    train, val, test = found.train, found.val, found.test
    fault = next(chain(found.faults, disagreements(config, found)), None)
    if fault is not None or train is None:
        raise ValueError(fault)
    class_names, images = class_names_of(config, train), train.images
    notes = list(found.notes)
    if val is None:
        images, held = hold_out(images, round(config.val_fraction * len(images)))
        whole = len(images) + len(held)
        notes.append(
            f"{len(held)} of {whole} images are held out for validation (--val-fraction {config.val_fraction:g})"
        )
    else:
        held = val.images
    if config.train_images is not None:
        images = take_share(images, config.train_images)
    tested = NO_IMAGES if test is None else held if test is val else test.images
    return files_data(config, images, held, tested, class_names, notes=tuple(notes))


def files_data(
    config: Config, train: Images, val: Images, test: Images, class_names: tuple[str, ...], *, notes: tuple[str, ...]
) -> Data:
    """Images that are decoded when they are needed, and how the configuration feeds them."""
    augment = "resized-crop" if config.augment == "auto" else config.augment
    img_size = config.img_size or _FILE_SIDE
    train_img_size = config.train_img_size or img_size
    return Data(
        name=config.dataset,
        num_classes=len(class_names),
        class_names=class_names,
        train=train,
        val=val,
        test=test,
        mean=tuple(255 * value for value in config.mean or IMAGENET_MEAN),
        std=tuple(255 * value for value in config.std or IMAGENET_STD),
        augment=augment,
        # The share of a CIFAR image that is padded by custom: 4 of 32 pixels.
        pad=train_img_size // 8 if augment == "pad-crop" else 0,
        hflip=config.hflip if augment != "none" else 0.0,
        img_size=img_size,
        train_img_size=train_img_size,
        **_resizing(config),
        notes=notes,
    )


def _resizing(config: Config) -> dict[str, Any]:
    """What was not filled in, as for a network that starts from random weights."""
    return {
        "interpolation": "bilinear" if config.interpolation == "auto" else config.interpolation,
        "crop_pct": config.crop_pct or 0.875,
    }


_OPENERS: dict[str, Callable[[Path, str, Config], Split | None]] = {
    "imagefolder": lambda folder, split, config: open_folder_split(folder, split, max_pixels=config.max_pixels),
    "hf": lambda folder, split, config: open_row_split(
        folder, split, input_key=config.input_key, target_key=config.target_key, max_pixels=config.max_pixels
    ),
    "webdataset": lambda folder, split, config: open_tar_split(folder, split, max_pixels=config.max_pixels),
}
FILE_SETS = tuple(_OPENERS)


def find_splits(config: Config) -> FoundSplits:
    """Opens whatever splits of a set on disk there are; what is wrong with one keeps no other from being opened."""
    folder, faults, notes = Path(str(config.data_dir)), list[str](), list[str]()

    def opened(split: str, *, needed: bool = False) -> Split | None:
        try:
            found = _OPENERS[config.dataset](folder, split, config) if folder.is_dir() else None
        except ValueError as error:
            if str(error) not in faults:  # of what all splits share
                faults.append(str(error))
            return None
        except OSError as error:
            faults.append(f"{split} in {folder} cannot be read: {error.strerror or error}; give another --data-dir")
            return None
        if found is None and needed:
            faults.append(_missing(config, folder, split))
        if found is None and (folder / split).is_dir() and config.dataset == "imagefolder":
            notes.append(f"{printable(folder / split)} has no class folders but hidden ones, if any; it is left alone")
        notes.extend(f"{split}: {note}" for note in (found.notes if found else ()))
        return found

    flat = _flat(config, folder)
    if flat is not None:
        notes.append(f"no train/ in {folder}: its {len(flat.class_names or ())} folders are taken as the classes")
        notes += flat.notes
        return FoundSplits(flat, None, None, (), tuple(notes))
    train = opened(config.train_split, needed=True)
    if config.val_split is not None:
        val = opened(config.val_split, needed=True)
    else:
        val = opened("val") or opened("validation")
    # A test split whose labels are withheld, as in the published ImageNet (-1 for every image), is none.
    test = val if config.val_split == "test" else opened("test") if config.train_split != "test" else None
    if test is not None and test is not val and bool((test.images.labels == -1).all()):
        if not len(test.images):
            notes.append(f"no image in {folder / 'test'}; it is left alone")
        test = None
    validating = test if val is None and config.val_split is None else val
    notes += _shared(train, validating, "validation")
    notes += _shared(train, None if test is validating else test, "test")
    return FoundSplits(train, validating, test, tuple(faults), tuple(notes))


def _shared(train: Split | None, other: Split | None, name: str) -> list[str]:
    both = sorted(train.places & other.places) if train and other else []
    said = f"{name} images are training images too: {printable(some(both, 3))} is read for both"
    return [said] if both else []


def _flat(config: Config, folder: Path) -> Split | None:
    """Class folders without a split above them, unless a split is asked for by its name."""
    if config.dataset != "imagefolder" or (config.train_split, config.val_split) != ("train", None):
        return None
    return open_flat_folder(folder, max_pixels=config.max_pixels)


def _missing(config: Config, folder: Path, split: str) -> str:
    expected = EXPECTED[config.dataset].format(split=split)
    if not folder.is_dir():
        return f"data_dir {folder} is no folder; for {config.dataset} it must hold {expected}"
    there = sorted(path.name for path in folder.iterdir())
    return f"{config.dataset} in {folder}: expected {expected}; there is {some(there) or 'nothing'}"
