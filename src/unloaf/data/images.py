"""What an image collection is, and how one encoded image becomes pixels."""

from __future__ import annotations

import io
import stat
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol, Self

import numpy as np
import torch
from torch import Tensor

from unloaf.config import Config
from unloaf.config.checks import brief
from unloaf.printable import printable

if TYPE_CHECKING:
    from PIL.Image import Image


class BadImageError(Exception):
    """An image cannot be decoded.

    Attributes:
        name: its path, shard!member or row.
        reason: what the decoder said, on one line.
    """

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"image {printable(name)} cannot be read: {printable(reason)}")
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


class Encoded(ABC):
    """Images that are decoded when they are opened."""

    labels: Tensor
    max_pixels: int

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def name(self, index: int) -> str:
        """Where the image lies, for messages."""

    @abstractmethod
    def read(self, index: int) -> bytes:
        """The image as it is stored.

        Raises:
            BadImageError: it cannot be read.
        """

    def open(self, index: int) -> Image:
        """The decoded image, in RGB.

        Raises:
            BadImageError: it cannot be read or decoded.
        """
        return decode(self.read(index), name=self.name(index), max_pixels=self.max_pixels)


class Split(NamedTuple):
    """A part of an image set; `class_names` is None where labels are bare numbers, `notes` say what is not read.

    `places` are the real paths of the folders or files that hold its images.
    """

    images: Images
    class_names: tuple[str, ...] | None
    notes: tuple[str, ...] = ()
    places: frozenset[str] = frozenset()


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


# An image of 10 x 80,000 pixels is small, and 2 GB once its shorter side has 256.
_MOST_ELONGATED = 1000
MOST_CLASSES = 1_000_000  # of those that are numbers: one wrong label must not make a network of a billion outputs

# Those of the file names that are read, and GIF. Pillow knows some 40 more, and runs other programs for a few: whatever
# the name of a PostScript file, Ghostscript would be started.
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")
# What Pillow converts to RGB without losing more than alpha.
_CONVERTED = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB")


def read_image_file(path: str, *, name: str) -> bytes:
    """The bytes of a regular file; reading a pipe or a device might never end.

    Raises:
        BadImageError: there is none, or it cannot be read.
    """
    try:
        if not stat.S_ISREG(Path(path).stat().st_mode):
            raise BadImageError(name, "it is not a regular file but a folder, pipe, socket or device")
        return Path(path).read_bytes()
    except OSError as error:
        raise BadImageError(name, str(error.strerror or error)) from error


def check_regular(paths: Iterable[Path]) -> None:
    """Raises ValueError if one is a pipe, socket or device: reading it might never end."""
    for path in paths:
        if not (path.is_file() or path.is_dir()) and path.exists():
            raise ValueError(f"{printable(path)} is a pipe, socket or device, not a regular file; remove it")


def as_labels(values: Sequence[int], name: Callable[[int], str]) -> Tensor:
    """Labels, int64 (N,); `name` is that of the image at a position.

    Raises:
        ValueError: a label is too large to be one of a class.
    """
    wrong = next((at for at, value in enumerate(values) if abs(value) >= MOST_CLASSES), None)
    if wrong is not None:
        raise ValueError(
            f"label {brief(values[wrong])} of image {printable(name(wrong))}: numbers of classes are below "
            f"{MOST_CLASSES:,}; correct the label"
        )
    return torch.tensor(values, dtype=torch.int64)


def decode(encoded: bytes, *, name: str, max_pixels: int = Config.max_pixels) -> Image:
    """The pixels of an image in one of FORMATS, in RGB with 8 bits a channel.

    Turned upright where EXIF says so. Of 16 bits the high byte is kept, which is what Pillow does to
    colour with 16 bits. Alpha is left out, as torchvision and timm do. Of several frames the first is
    taken. Modes without a fixed range, such as float, are refused, and more than `max_pixels` pixels.

    Raises:
        BadImageError: the bytes are cut off, corrupt, no image, or one that is refused.
    """
    from PIL import Image

    _own_limit()
    try:
        with Image.open(io.BytesIO(encoded), formats=FORMATS) as picture:
            _check_size(*picture.size, name=name, max_pixels=max_pixels)
            picture.load()
            _turn_upright(picture)
            return _as_rgb(picture, name=name)
    except BadImageError:
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more
        # Its text names a BytesIO at an address that differs in every run.
        known = not isinstance(error, Image.UnidentifiedImageError)
        text = f"{type(error).__name__}: {error}" if known else f"no image format that is read: {', '.join(FORMATS)}"
        raise BadImageError(name, " ".join(text.split())) from error


@cache
def _own_limit() -> None:
    """Ends Pillow's warning of large images: whether one is too large, max_pixels says."""
    from PIL import Image

    warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def _check_size(width: int, height: int, *, name: str, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise BadImageError(name, f"{width} x {height} pixels are more than {max_pixels:,}, see --max-pixels")
    if max(width, height) > _MOST_ELONGATED * min(width, height):
        raise BadImageError(
            name, f"{width} x {height} pixels: one side is more than {_MOST_ELONGATED:,} times the other; cut it up"
        )


def traits(encoded: bytes) -> tuple[str, tuple[str, ...]]:
    """The mode of an image that decode accepts, in Pillow's words, and what is done to it beside converting that."""
    from PIL import Image

    with Image.open(io.BytesIO(encoded), formats=FORMATS) as picture:
        alpha, orientation, frames = picture.has_transparency_data, 1, 1
        deep = picture.mode.startswith("I")
        with suppress(Exception):  # EXIF may be unreadable
            orientation = picture.getexif().get(0x0112, 1)
        with suppress(Exception):  # what comes after the first may be damaged
            frames = getattr(picture, "n_frames", 1)
        done = {
            "16 bits, of which the high byte is kept": deep,
            "of 16 bits 12 or fewer are used, so that little is left in the high byte: scale them before": deep
            and _bits(picture) == 16
            and int(np.asarray(picture).max()) < 1 << 12,
            "alpha, which is left out": alpha,
            "turned upright as EXIF says": orientation != 1,
            "several frames, of which the first is taken": frames > 1,
        }
        return picture.mode, tuple(what for what, applies in done.items() if applies)


def _turn_upright(picture: Image) -> None:
    from PIL import ImageOps

    with suppress(Exception):  # EXIF that cannot be read says nothing of the pixels
        ImageOps.exif_transpose(picture, in_place=True)


def _as_rgb(picture: Image, *, name: str) -> Image:
    if (bits := _bits(picture)) is not None:
        return _high_byte(picture, bits=bits)
    if picture.mode == "La":
        return picture.convert("LA").convert("RGB")
    if picture.mode not in _CONVERTED:
        raise BadImageError(
            name, f"mode {picture.mode} ({picture.format}) has no fixed range of values; save it with 8 or 16 bits"
        )
    picture.info.pop("transparency", None)  # Pillow would warn of leaving it out
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _bits(picture: Image) -> int | None:
    """How many bits are used of a grey image with more than 8; None of others, and of those without a fixed range."""
    if picture.mode.startswith("I;16"):
        tags = getattr(picture, "tag_v2", {})
        return tags.get(258, (16,))[0]  # BitsPerSample: TIFF knows 12, too
    # PPM is scaled to 16 bits by Pillow; for PNG older versions have this mode.
    return 16 if picture.mode == "I" and picture.format in ("PNG", "PPM") else None


def _high_byte(picture: Image, *, bits: int) -> Image:
    from PIL import Image

    grey = (np.asarray(picture) >> (bits - 8)).astype(np.uint8)
    if getattr(picture, "tag_v2", {}).get(262) == 0:  # PhotometricInterpretation: 0 is white, which Pillow leaves
        grey = 255 - grey
    return Image.fromarray(grey).convert("RGB")
