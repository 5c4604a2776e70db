"""Image files with a mask each: a PNG that has the class of every pixel."""

from __future__ import annotations

import hashlib
import io
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from unloaf.data.images import FORMATS, BadImageError, Encoded, read_image_file

if TYPE_CHECKING:
    from PIL.Image import Image

VOID = 255  # the id of pixels that belong to no class: not learned, not counted
_GREY, _PALETTE = 0, 3  # colour types of PNG
_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True, eq=False)
class MaskedImages(Encoded):
    """Image files with masks of class ids.

    Attributes:
        root: the folder of the set.
        files: paths in it of all images of the split.
        masks: likewise, of their masks.
        num_classes: ids from here on, beside void, are no classes.
        others_void: they are void too; else they are refused.
        positions: which of them these are, int64 (n,).
        labels: a checksum of the mask file of each, by which a resumed run notices that it is another, int64 (n,).
        max_pixels: width x height above which an image is not decoded but bad.
    """

    root: Path
    files: Sequence[str]
    masks: Sequence[str]
    num_classes: int
    others_void: bool
    positions: Tensor
    labels: Tensor
    max_pixels: int

    @property
    def place(self) -> str:
        """What tells one split from another."""
        return hashlib.sha256("\0".join(self.files).encode(errors="surrogateescape")).hexdigest()

    def subset(self, index: Tensor) -> MaskedImages:
        """The images at these positions."""
        return replace(self, positions=self.positions[index], labels=self.labels[index])

    def name(self, index: int) -> str:
        """The path in the folder of the set."""
        return self.files[int(self.positions[index])]

    def read(self, index: int) -> bytes:
        """The image as it is stored."""
        name = self.name(index)
        return read_image_file(str(self.root / name), name=name)

    def mask(self, index: int) -> Tensor:
        """The classes of the pixels, uint8 (H, W), 255 where there is none.

        Raises:
            BadImageError: it cannot be read, or has ids that are no classes.
        """
        name = self.masks[int(self.positions[index])]
        encoded = read_image_file(str(self.root / name), name=name)
        ids = torch.from_numpy(decode_mask(encoded, name=name, max_pixels=self.max_pixels))
        wrong = (ids >= self.num_classes) & (ids != VOID)
        if not self.others_void and bool(wrong.any()):
            raise BadImageError(name, f"its id {int(ids[wrong][0])} is none of the {self.num_classes} classes")
        return ids.masked_fill_(wrong, VOID)

    def pair(self, index: int) -> tuple[Image, Tensor]:
        """The image in RGB, and its mask of the same size.

        Raises:
            BadImageError: one of them cannot be read, or they do not fit.
        """
        picture, mask = self.open(index), self.mask(index)
        if (picture.height, picture.width) != tuple(mask.shape):
            raise BadImageError(self.name(index), sizes_differ((picture.height, picture.width), tuple(mask.shape)))
        return picture, mask


def sizes_differ(image: tuple[int, ...], mask: tuple[int, ...]) -> str:
    """What is wrong with an image and a mask of these heights and widths.

    >>> sizes_differ((64, 80), (64, 81))
    'it has 80 x 64 pixels, its mask 81 x 64'
    """
    return f"it has {image[1]} x {image[0]} pixels, its mask {mask[1]} x {mask[0]}"


def decode_mask(encoded: bytes, *, name: str, max_pixels: int) -> np.ndarray:
    """The values of a grey PNG, or the numbers of the colours of one with a palette, uint8 (H, W).

    Raises:
        BadImageError: it is neither, has 16 bits, or is damaged.
    """
    from PIL import Image

    height, width = mask_size(encoded, name=name)
    bits, colour = encoded[24:26]
    if bits > 8 or colour not in (_GREY, _PALETTE):
        raise BadImageError(
            name, f"colour type {colour}, {bits} bits; a mask is a grey or palette PNG of up to 8 bits: class ids"
        )
    if width * height > max_pixels:
        raise BadImageError(name, f"{width} x {height} pixels are more than {max_pixels:,}, see --max-pixels")
    try:
        with Image.open(io.BytesIO(encoded), formats=["PNG"]) as picture:
            values = np.array(picture, np.uint8)
    except Exception as error:  # as `decode`
        raise BadImageError(name, " ".join(f"{type(error).__name__}: {error}".split())) from error
    # Grey of 2 and 4 bits is spread by Pillow over 0 to 255; the ids are what the file has.
    return values // (255 // (2**bits - 1)) if colour == _GREY and bits in (2, 4) else values


def mask_size(encoded: bytes, *, name: str) -> tuple[int, int]:
    """Height and width of a PNG, from its first bytes.

    Raises:
        BadImageError: it is none.
    """
    if len(encoded) < 26 or not encoded.startswith(_SIGNATURE):
        raise BadImageError(name, "it is no PNG")
    width, height = struct.unpack(">II", encoded[16:24])
    return height, width


def image_size(path: Path, *, name: str) -> tuple[int, int]:
    """Height and width of an image file as it is read, upright, without decoding it.

    Raises:
        BadImageError: it is no image.
    """
    from PIL import Image

    try:
        with Image.open(path, formats=FORMATS) as picture:
            turned = picture.getexif().get(0x0112, 1) in (5, 6, 7, 8)
            return picture.size if turned else (picture.height, picture.width)
    except Exception as error:  # as `decode`
        raise BadImageError(name, f"it is no image that can be read ({type(error).__name__})") from error
