"""Image sets that are held in memory, and the fixed draw that holds images out."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from unloaf.data.images import Images, ImageSet, check_regular

# Part of every published figure: another seed is another task.
SPLIT_SEED = 0
_I = TypeVar("_I", bound=Images)


class MemorySplits(NamedTuple):
    """Three disjoint splits; `val` is empty when nothing was held out."""

    train: ImageSet
    val: ImageSet
    test: ImageSet
    class_names: tuple[str, ...]


def load_digits() -> MemorySplits:
    """1,797 handwritten digits, 8x8: 897 to train, 300 to validate, 600 to test, stratified."""
    from sklearn import datasets

    bunch: Any = datasets.load_digits()
    # Stored as 0..16; 255/16 steps keep every level apart and the pixel range that of the other sets.
    images = torch.from_numpy(bunch.images).mul(255 / 16).round().to(torch.uint8)[:, None]
    everything = ImageSet(images.contiguous(), torch.from_numpy(bunch.target).long())
    rest, test = hold_out(everything, 600)
    train, val = hold_out(rest, 300)
    return MemorySplits(train, val, test, tuple("0123456789"))


def hold_out(images: _I, count: int) -> tuple[_I, _I]:
    """Splits off so many images, in each class the same share; the same ones in every run.

    Raises:
        ValueError: a class would be missing on one side.
    """
    if count == 0:
        return images, images.subset(torch.arange(0))
    from sklearn.model_selection import train_test_split

    try:
        kept, held = train_test_split(
            range(len(images)), test_size=count, stratify=images.labels.numpy(), random_state=SPLIT_SEED
        )
    except ValueError as error:
        raise ValueError(
            f"cannot hold out {count} of {len(images)} images, every class in both: {error}; change --val-fraction"
        ) from error
    return images.subset(torch.tensor(kept)), images.subset(torch.tensor(held))


def take_share(images: _I, count: int) -> _I:
    """So many images, of each class the same share and at least one; the same ones in every run, in their old order.

    Raises:
        ValueError: there are fewer images, or more classes.
    """
    classes, labels = images.labels.unique(return_inverse=True)
    if not len(classes) <= count <= len(images):
        raise ValueError(
            f"train_images {count}: give from {len(classes)}, one for each class, to {len(images)}, "
            "what is left to train on"
        )
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SPLIT_SEED))
    shuffled = labels[order]
    place = torch.empty(len(images), dtype=torch.float64)
    for label in range(len(classes)):
        members = order[shuffled == label]
        place[members] = (torch.arange(len(members), dtype=torch.float64) + 0.5) / len(members)
        place[members[0]] = -1
    return images.subset(place.argsort(stable=True)[:count].sort().values)


# Folder and files that torchvision reads below data_dir, and where they come from.
_FILES = {
    "cifar10": ("cifar-10-batches-py", "data_batch_1 ... data_batch_5, test_batch, batches.meta",
                "unpack https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz there"),
    "cifar100": ("cifar-100-python", "train, test, meta",
                 "unpack https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz there"),
    "fashion_mnist": ("FashionMNIST/raw", "train-images-idx3-ubyte, train-labels-idx1-ubyte, "
                      "t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte",
                      "run torchvision.datasets.FashionMNIST(DATA_DIR, download=True) once"),
}  # fmt: skip


def load_torchvision(name: str, data_dir: str, *, val_fraction: float) -> MemorySplits:
    """Reads cifar10, cifar100 or fashion_mnist; validation images are held out of the training images.

    Raises:
        ValueError: files are missing; the message says which are expected where.
    """
    from torchvision import datasets

    reader = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100, "fashion_mnist": datasets.FashionMNIST}[name]
    folder, files, remedy = _FILES[name]
    check_regular((Path(data_dir) / folder).glob("*"))
    try:
        parts = [reader(data_dir, train=part, download=False) for part in (True, False)]
    except Exception as error:  # damaged files: torchvision raises RuntimeError, AssertionError, ValueError and more
        raise ValueError(
            f"{name} is not complete in {data_dir}: expected {Path(data_dir) / folder} with {files}; {remedy}"
        ) from error
    everything, test = map(_as_image_set, parts)
    train, val = hold_out(everything, round(val_fraction * len(everything)))
    return MemorySplits(train, val, test, tuple(parts[0].classes))


def _as_image_set(dataset: Any) -> ImageSet:
    pixels = torch.as_tensor(dataset.data)
    images = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
    return ImageSet(images.contiguous(), torch.as_tensor(dataset.targets).long())


def hold_out_some(images: _I, count: int) -> tuple[_I, _I]:
    """So many images held out, the same ones in every run, whatever is in them."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SPLIT_SEED))
    return images.subset(order[count:].sort().values), images.subset(order[:count].sort().values)


def share_of(images: _I, count: int) -> _I:
    """So many of the images, the same ones in every run.

    Raises:
        ValueError: there are fewer.
    """
    if not 1 <= count <= len(images):
        raise ValueError(f"train_images {count}: give from 1 to {len(images)}, what there is to train on")
    return hold_out_some(images, count)[1]
