"""What an image collection is, and how one encoded image becomes pixels."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol, Self

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image


class BadImageError(Exception):
    """An image cannot be decoded.

    Attributes:
        name: its path, shard!member or row.
        reason: what the decoder said, on one line.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"image {name} cannot be read: {reason}")
        self.name = name
        self.reason = reason


class Images(Protocol):
    """Images and their labels, in a fixed order."""

    @property
    def labels(self) -> Tensor:
        """Class of each image, int64 (N,)."""
        ...

    def __len__(self) -> int: ...

    def subset(self, index: Tensor) -> Self:
        """The images at these positions."""
        ...

    def name(self, index: int) -> str:
        """Where the image lies, for messages."""
        ...

    def open(self, index: int) -> Image:
        """The decoded image, in RGB.

        Raises:
            BadImageError: it cannot be decoded.
        """
        ...


class Split(NamedTuple):
    """A part of an image set; `class_names` is None where labels are bare numbers."""

    images: Images
    class_names: tuple[str, ...] | None


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images in memory, uint8 (N, C, H, W), and their labels, int64 (N,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index: Tensor) -> ImageSet:
        """The images at these positions."""
        return ImageSet(self.images[index], self.labels[index])

    def name(self, index: int) -> str:
        """The image's position."""
        return f"number {index}"

    def open(self, index: int) -> Image:
        """The image in RGB; grey ones have three equal channels."""
        return as_picture(self.images[index])


NO_IMAGES = ImageSet(torch.empty(0, 3, 1, 1, dtype=torch.uint8), torch.empty(0, dtype=torch.int64))


def as_picture(pixels: Tensor) -> Image:
    """uint8 (C, H, W) with one or three channels as a PIL image in RGB."""
    from PIL import Image

    return Image.fromarray(pixels.expand(3, -1, -1).permute(1, 2, 0).contiguous().numpy())


def as_pixels(picture: Image, *, channels: int) -> Tensor:
    """A PIL image in RGB as uint8 (channels, H, W); one channel is the luma."""
    array = np.array(picture if channels == 3 else picture.convert("L"))
    return torch.from_numpy(array.reshape(*array.shape[:2], channels)).permute(2, 0, 1).contiguous()


def decode(encoded: bytes, *, name: str) -> Image:
    """The pixels of a JPEG, PNG or other file that Pillow knows, in RGB.

    Raises:
        BadImageError: the bytes are cut off, corrupt or no image.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(encoded)) as picture:
            return picture.convert("RGB")
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more
        # Its text names a BytesIO at an address that differs in every run.
        known = not isinstance(error, Image.UnidentifiedImageError)
        text = f"{type(error).__name__}: {error}" if known else "no image format that Pillow knows"
        raise BadImageError(name, " ".join(text.split())) from error
