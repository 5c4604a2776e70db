"""The image set of a run: its splits, its classes, and how its images are fed; everything checked before training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from unloaf.engine.config import Config
from unloaf.engine.data.folders import open_folder_split
from unloaf.engine.data.images import NO_IMAGES, Images, Split
from unloaf.engine.data.memory import hold_out, load_digits, load_torchvision, take_share
from unloaf.engine.data.rows import open_row_split
from unloaf.engine.data.tars import open_tar_split

# Of the ImageNet training images, in shares of the pixel range; every published network expects them.
_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)
_FILE_SIDE = 224


@dataclass(frozen=True)
class Data:
    """An image set with its three splits and the way its images are fed.

    `val` is empty when no images were held out. `test` is empty when there is none; where only
    test images lie ready to validate with, it is `val` itself. `mean` and `std` are per channel,
    in units of the pixel range [0, 255]: of the training split for sets in memory, ImageNet's
    for files. `augment` is none, pad-crop or resized-crop; `pad` is in pixels, `hflip` a
    probability; both sides are in pixels.
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
    resize_mode: str = "bilinear"

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
    """Kept: made anew for each batch, they would be copied to the device each time."""
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
    if config.dataset in _OPENERS:
        return _files(config)
    return _memory(config)


def _memory(config: Config) -> Data:
    if config.dataset == "digits":
        splits = load_digits()
    else:
        splits = load_torchvision(config.dataset, str(config.data_dir), val_fraction=config.val_fraction)
    _check_count(config, len(splits.class_names))
    train = splits.train if config.train_images is None else take_share(splits.train, config.train_images)
    pixels = train.images.float()
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
    pad, flips = {"digits": (1, False), "fashion_mnist": (2, True)}.get(config.dataset, (4, True))
    return Data(
        name=config.dataset,
        num_classes=len(splits.class_names),
        class_names=splits.class_names,
        train=train,
        val=splits.val,
        test=splits.test,
        mean=tuple(pixels.mean(dim=(0, 2, 3)).tolist()),
        std=tuple(pixels.std(dim=(0, 2, 3)).tolist()),
        augment=augment,
        pad=pad if augment == "pad-crop" else 0,
        hflip=config.hflip if flips and augment != "none" else 0.0,
        img_size=img_size,
        train_img_size=train_img_size,
        resize_mode=_resize_mode(config),
    )


def _files(config: Config) -> Data:
    train, val, test = _find_splits(config)
    class_names = _checked_classes(config, train, val, test)
    images = train.images
    if val is None:
        images, held = hold_out(images, round(config.val_fraction * len(images)))
    else:
        held = val.images
    if config.train_images is not None:
        images = take_share(images, config.train_images)
    augment = "resized-crop" if config.augment == "auto" else config.augment
    img_size = config.img_size or _FILE_SIDE
    train_img_size = config.train_img_size or img_size
    return Data(
        name=config.dataset,
        num_classes=len(class_names),
        class_names=class_names,
        train=images,
        val=held,
        test=NO_IMAGES if test is None else held if test is val else test.images,
        mean=tuple(255 * value for value in _IMAGENET_MEAN),
        std=tuple(255 * value for value in _IMAGENET_STD),
        augment=augment,
        # The share of a CIFAR image that is padded by custom: 4 of 32 pixels.
        pad=train_img_size // 8 if augment == "pad-crop" else 0,
        hflip=config.hflip if augment != "none" else 0.0,
        img_size=img_size,
        train_img_size=train_img_size,
        resize_mode=_resize_mode(config),
    )


def _resize_mode(config: Config) -> str:
    """How images that are not augmented are resized: random chooses for training images alone."""
    return "bicubic" if config.interpolation == "bicubic" else "bilinear"


def _checked_classes(config: Config, train: Split, val: Split | None, test: Split | None) -> tuple[str, ...]:
    """The names of the classes, once every split is found to fit them."""
    _check_not_empty(config, train, config.train_split)
    class_names = train.class_names or _numbered(train.images, config, config.train_split)
    _check_count(config, len(class_names))
    _check_labels(train.images, len(class_names), split=config.train_split)
    _check_classes(train.images, class_names, split=config.train_split)
    for split, name in ((val, config.val_split or "validation"), (test, "test")):
        if split is not None:
            _check_not_empty(config, split, name)
            _check_same_names(train, split, name=name)
            _check_labels(split.images, len(class_names), split=name)
    return class_names


_OPENERS: dict[str, Callable[[Path, str, Config], Split | None]] = {
    "imagefolder": lambda folder, split, _: open_folder_split(folder, split),
    "hf": lambda folder, split, config: open_row_split(
        folder, split, input_key=config.input_key, target_key=config.target_key
    ),
    "webdataset": lambda folder, split, _: open_tar_split(folder, split),
}
_EXPECTED = {
    "imagefolder": "{split}/CLASS/*.jpg (one folder for each class)",
    "hf": "what datasets' save_to_disk wrote, with a split {split}, or {split}*.parquet",
    "webdataset": "{split}*.tar with KEY.jpg and KEY.cls inside",
}


def _find_splits(config: Config) -> tuple[Split, Split | None, Split | None]:
    folder = Path(str(config.data_dir))
    train = _open(config, folder, config.train_split)
    if train is None:
        raise _missing(config, folder, config.train_split)
    if config.val_split is not None:
        val = _open(config, folder, config.val_split)
        if val is None:
            raise _missing(config, folder, config.val_split)
        return train, val, val if config.val_split == "test" else _labelled_test(config, folder)
    val = _open(config, folder, "val") or _open(config, folder, "validation")
    test = _labelled_test(config, folder)
    return train, val or test, test


def _open(config: Config, folder: Path, split: str) -> Split | None:
    return _OPENERS[config.dataset](folder, split, config) if folder.is_dir() else None


def _labelled_test(config: Config, folder: Path) -> Split | None:
    """The test split, unless its labels are withheld, as in the published ImageNet (-1 for every image)."""
    if config.train_split == "test":
        return None
    test = _open(config, folder, "test")
    return None if test is None or bool((test.images.labels == -1).all()) else test


def _missing(config: Config, folder: Path, split: str) -> ValueError:
    expected = _EXPECTED[config.dataset].format(split=split)
    if not folder.is_dir():
        return ValueError(f"data_dir {folder} is no folder; for {config.dataset} it must hold {expected}")
    there = sorted(path.name for path in folder.iterdir())
    return ValueError(f"{config.dataset} in {folder}: expected {expected}; there is {_some(there) or 'nothing'}")


def _some(names: list[str], limit: int = 5) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _numbered(images: Images, config: Config, split: str) -> tuple[str, ...]:
    """Classes that are numbers: as many as the configuration says, or up to the largest label."""
    low, high = int(images.labels.min()), int(images.labels.max())
    if low == high and config.num_classes is None:
        raise ValueError(f"all images of {split} have label {low}; give --num-classes or at least 2 classes")
    return tuple(str(number) for number in range(config.num_classes or max(high, 1) + 1))


def _check_count(config: Config, found: int) -> None:
    if config.num_classes is not None and config.num_classes != found:
        raise ValueError(
            f"num_classes {config.num_classes}, but {config.dataset} has {found} classes; "
            f"give --num-classes {found} or leave it out"
        )


def _check_not_empty(config: Config, split: Split, where: str) -> None:
    if len(split.images) == 0:
        expected = _EXPECTED[config.dataset].format(split=where)
        raise ValueError(f"{config.dataset} in {config.data_dir}: no image in {where}; expected {expected}")


def _check_same_names(train: Split, other: Split, *, name: str) -> None:
    if train.class_names == other.class_names:
        return
    ours, theirs = set(train.class_names or ()), set(other.class_names or ())
    missing, extra = sorted(ours - theirs), sorted(theirs - ours)
    parts = [f"missing there: {_some(missing)}"] * bool(missing) + [f"only there: {_some(extra)}"] * bool(extra)
    raise ValueError(
        f"the classes of {name} differ from the {len(ours)} classes of the training images; "
        f"{'; '.join(parts) or 'their order differs'}; give both the same class names"
    )


def _check_labels(images: Images, count: int, *, split: str) -> None:
    wrong = ((images.labels < 0) | (images.labels >= count)).nonzero()
    if len(wrong):
        first = int(wrong[0])
        raise ValueError(
            f"label {int(images.labels[first])} of image {images.name(first)} is not from 0 to {count - 1} "
            f"({len(wrong)} such labels in {split}); correct the labels or --num-classes"
        )


def _check_classes(images: Images, class_names: tuple[str, ...], *, split: str) -> None:
    counts = images.labels.bincount(minlength=len(class_names))
    empty = [class_names[number] for number in (counts == 0).nonzero().flatten().tolist()]
    if empty:
        raise ValueError(
            f"{len(empty)} of {len(class_names)} classes have no image in {split}: {_some(empty)}; "
            "add images, or remove the class everywhere"
        )
