"""Image sets held in memory, and their batches as pure functions of (seed, epoch, index).

Order, crops and flips come from a generator that is seeded anew for every epoch, never
from hidden state: a resumed run, another number of processes or a second method at the
same seed sees exactly the images that the first run saw.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# Part of every published figure: another seed is another task.
SPLIT_SEED = 0


@dataclass(frozen=True)
class ImageSet:
    """Images, uint8 (N, C, H, W), and their labels, int64 (N,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index: Tensor) -> ImageSet:
        """The images at these positions."""
        return ImageSet(self.images[index], self.labels[index])


@dataclass(frozen=True)
class Data:
    """An image set with its three disjoint splits and the way its images are fed.

    `val` is empty when no images were held out. `mean` and `std` are per channel, of the
    training split, in units of the pixel range [0, 255]. `pad` is in pixels.
    """

    name: str
    num_classes: int
    train: ImageSet
    val: ImageSet
    test: ImageSet
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pad: int
    flip: bool
    img_size: int

    @property
    def in_chans(self) -> int:
        """Channels of an image."""
        return self.train.images.shape[1]

    def normalise(self, images: Tensor) -> Tensor:
        """uint8 (N, C, H, W) to float32 (N, C, img_size, img_size), mean 0 and spread 1 per channel."""
        mean = torch.tensor(self.mean, device=images.device).view(-1, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(-1, 1, 1)
        x = (images.float() - mean) / std
        if self.img_size != x.shape[-1]:
            x = F.interpolate(x, size=self.img_size, mode="bilinear", antialias=True, align_corners=False)
        return x


def load_data(
    name: str,
    *,
    data_dir: str | None = None,
    val_fraction: float = 0.1,
    augment: str = "auto",
    img_size: int | None = None,
) -> Data:
    """Loads an image set into memory.

    Args:
        name: digits, cifar10, cifar100 or fashion_mnist.
        data_dir: folder of the torchvision files; digits needs none.
        val_fraction: share of the training images held out, per class; digits has its own fixed split.
        augment: "auto" or "none".
        img_size: side in pixels to which images are resized; default: their own.

    Raises:
        ValueError: the files are missing; the message says which are expected where.
    """
    train, val, test, num_classes = _digits() if name == "digits" else _torchvision(name, data_dir, val_fraction)
    pixels = train.images.float()
    # A mirrored 2 is no 2, and 8x8 digits fill their frame: one pixel of shift is what they bear.
    pad, flip = {"digits": (1, False), "fashion_mnist": (2, True)}.get(name, (4, True))
    return Data(
        name=name,
        num_classes=num_classes,
        train=train,
        val=val,
        test=test,
        mean=tuple(pixels.mean(dim=(0, 2, 3)).tolist()),
        std=tuple(pixels.std(dim=(0, 2, 3)).tolist()),
        pad=pad if augment == "auto" else 0,
        flip=flip and augment == "auto",
        img_size=img_size or int(train.images.shape[-1]),
    )


def _digits() -> tuple[ImageSet, ImageSet, ImageSet, int]:
    """1,797 handwritten digits, 8x8: 897 to train, 300 to validate, 600 to test, stratified."""
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    # Stored as 0..16; 255/16 steps keep every level apart and the pixel range that of the other sets.
    images = torch.from_numpy(bunch.images).mul(255 / 16).round().to(torch.uint8)[:, None]
    everything = ImageSet(images.contiguous(), torch.from_numpy(bunch.target).long())
    rest, test = _stratified_split(everything, held_out=600)
    train, val = _stratified_split(rest, held_out=300)
    return train, val, test, 10


def _stratified_split(images: ImageSet, *, held_out: int) -> tuple[ImageSet, ImageSet]:
    if held_out == 0:
        return images, images.subset(torch.arange(0))
    from sklearn.model_selection import train_test_split

    try:
        kept, held = train_test_split(
            range(len(images)), test_size=held_out, stratify=images.labels.numpy(), random_state=SPLIT_SEED
        )
    except ValueError as error:
        raise ValueError(f"cannot hold out {held_out} of {len(images)} images, every class in both: {error}") from error
    return images.subset(torch.tensor(kept)), images.subset(torch.tensor(held))


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


def _torchvision(name: str, data_dir: str | None, val_fraction: float) -> tuple[ImageSet, ImageSet, ImageSet, int]:
    if name not in _FILES:
        raise ValueError(f"dataset {name!r}: known are digits, {', '.join(_FILES)}")
    from torchvision import datasets

    reader = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100, "fashion_mnist": datasets.FashionMNIST}[name]
    folder, files, remedy = _FILES[name]
    try:
        train, test = (_as_image_set(reader(str(data_dir), train=part, download=False)) for part in (True, False))
    except (RuntimeError, OSError) as error:
        raise ValueError(
            f"{name} is not complete in {data_dir}: expected {Path(str(data_dir)) / folder} with {files}; {remedy}"
        ) from error
    train, val = _stratified_split(train, held_out=round(val_fraction * len(train)))
    return train, val, test, 100 if name == "cifar100" else 10


def _as_image_set(dataset: Any) -> ImageSet:
    pixels = torch.as_tensor(dataset.data)
    images = pixels[:, None] if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
    return ImageSet(images.contiguous(), torch.as_tensor(dataset.targets).long())


def generator_for(purpose: str, *numbers: int) -> torch.Generator:
    """A generator whose stream depends on these values alone.

    Hashed rather than added: seed 1, epoch 0 and seed 0, epoch 1 must not share a stream.

    >>> torch.rand(1, generator=generator_for("order", 0, 3)) == torch.rand(1, generator=generator_for("order", 0, 3))
    tensor([True])
    """
    text = "/".join([purpose, *map(str, numbers)])
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def epoch_order(count: int, *, seed: int, epoch: int) -> Tensor:
    """The order in which an epoch visits its images: a permutation of range(count), int64 (count,)."""
    return torch.randperm(count, generator=generator_for("order", seed, epoch))


def augmentation(count: int, *, pad: int, flip: bool, seed: int, epoch: int) -> Tensor:
    """What happens to each image in an epoch: rows (top, left, mirrored), int64 (count, 3).

    Row i belongs to image i of the split, wherever the order puts it.
    """
    generator = generator_for("augment", seed, epoch)
    corners = torch.randint(0, 2 * pad + 1, (count, 2), generator=generator)
    mirrored = torch.randint(0, 2, (count, 1), generator=generator) * int(flip)
    return torch.cat([corners, mirrored], dim=1)


def crop_and_flip(images: Tensor, draws: Tensor, *, pad: int) -> Tensor:
    """Cuts a window of the old size out of the zero-padded images and mirrors some.

    Args:
        images: (N, C, H, W).
        draws: rows (top, left, mirrored), int64 (N, 3).
        pad: pixels added on each side.

    Returns:
        images of the same shape and type.
    """
    count, channels, height, width = images.shape
    top, left, mirrored = draws.to(images.device).unbind(1)
    columns = torch.arange(width, device=images.device).expand(count, width)
    columns = torch.where(mirrored[:, None].bool(), columns.flip(1), columns) + left[:, None]
    rows = torch.arange(height, device=images.device) + top[:, None]
    padded = F.pad(images, (pad, pad, pad, pad))
    sample = torch.arange(count, device=images.device).view(-1, 1, 1, 1)
    channel = torch.arange(channels, device=images.device).view(1, -1, 1, 1)
    return padded[sample, channel, rows[:, None, :, None], columns[:, None, None, :]]


def train_batches(
    data: Data, *, batch_size: int, seed: int, epoch: int, device: torch.device | str = "cpu"
) -> Iterator[tuple[Tensor, Tensor]]:
    """The augmented batches of an epoch: images float32 (B, C, S, S), labels int64 (B,).

    The images left over after the last full batch are not visited in this epoch.

    Raises:
        ValueError: there are fewer images than one batch takes.
    """
    count = len(data.train)
    if batch_size > count:
        raise ValueError(
            f"batch_size {batch_size} exceeds the {count} training images of {data.name}; give at most {count}"
        )
    draws = augmentation(count, pad=data.pad, flip=data.flip, seed=seed, epoch=epoch)
    for index in epoch_order(count, seed=seed, epoch=epoch).split(batch_size):
        if len(index) == batch_size:
            images = data.train.images[index].to(device)
            x = data.normalise(crop_and_flip(images, draws[index], pad=data.pad))
            yield x, data.train.labels[index].to(device)


@dataclass(frozen=True)
class EvalBatches:
    """The images of a split, in order and not augmented, as often as one iterates over it."""

    images: ImageSet
    normalise: Callable[[Tensor], Tensor]
    batch_size: int
    device: torch.device | str = "cpu"

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(self.images), self.batch_size):
            part = slice(start, start + self.batch_size)
            yield self.normalise(self.images.images[part].to(self.device)), self.images.labels[part].to(self.device)

    def __len__(self) -> int:
        return -(-len(self.images) // self.batch_size)
