"""Image files with a segment for each pixel: a PNG whose colours are the ids of things and stuff."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from unloaf.data.images import BadImageError, Encoded, read_image_file
from unloaf.data.masks.images import mask_size, sizes_differ

if TYPE_CHECKING:
    from PIL.Image import Image

_COLOUR = 2  # colour type of PNG: red, green and blue
Target = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Segments:
    """The segments of N images, those of an image side by side: image i has those from ``starts[i]`` to
    ``starts[i+1]``.

    Attributes:
        starts: int64 (N + 1,).
        ids: by which the PNG names them, int64 (M,).
        classes: from 0, int64 (M,).
        crowd: regions of several objects, which are no targets and for which no prediction is blamed; bool (M,).
    """

    starts: Tensor
    ids: Tensor
    classes: Tensor
    crowd: Tensor

    def of(self, index: int) -> Segments:
        """Those of one image."""
        part = slice(int(self.starts[index]), int(self.starts[index + 1]))
        count = part.stop - part.start
        return Segments(torch.tensor([0, count]), self.ids[part], self.classes[part], self.crowd[part])


@dataclass(frozen=True, eq=False)
class PanopticImages(Encoded):
    """Image files with segments.

    Attributes:
        root: the folder of the files.
        files: paths in it, of all images that `segments` knows.
        drawn: the PNG of each.
        sizes: height and width that the annotations say, int64 (N, 2).
        segments: of all these images.
        things: of each class whether it is countable; the others are stuff.
        positions: which of them these are, int64 (n,).
        labels: a checksum of the segments of each, by which a resumed run notices that they are others, int64 (n,).
        max_pixels: width x height above which an image is not decoded but bad.
    """

    root: Path
    files: Sequence[str]
    drawn: Sequence[Path]
    sizes: Tensor
    segments: Segments
    things: tuple[bool, ...]
    positions: Tensor
    labels: Tensor
    max_pixels: int

    @property
    def place(self) -> str:
        """What tells one split from another."""
        return hashlib.sha256("\0".join(self.files).encode(errors="surrogateescape")).hexdigest()

    @property
    def counts(self) -> Tensor:
        """Segments that are targets, of each of these images, int64 (n,)."""
        summed = torch.cat([torch.zeros(1, dtype=torch.int64), (~self.segments.crowd).long().cumsum(0)])
        return summed[self.segments.starts[self.positions + 1]] - summed[self.segments.starts[self.positions]]

    def subset(self, index: Tensor) -> PanopticImages:
        """The images at these positions."""
        return replace(self, positions=self.positions[index], labels=self.labels[index])

    def name(self, index: int) -> str:
        """The path in the folder."""
        return self.files[int(self.positions[index])]

    def read(self, index: int) -> bytes:
        """The image as it is stored."""
        name = self.name(index)
        return read_image_file(str(self.root / name), name=name)

    def target(self, index: int) -> Target:
        """The segments of an image: `segments`, int64 (H, W), has for each pixel which of them it belongs to, -1 for
        none; `classes`, int64 (n,), and `crowd`, bool (n,), are theirs.

        Raises:
            BadImageError: the PNG cannot be read, or it does not have the segments of the annotation.
        """
        at = int(self.positions[index])
        own = self.segments.of(at)
        encoded = read_image_file(str(self.drawn[at]), name=self.drawn[at].name)
        height, width = self.sizes[at].tolist()
        ids = decode_ids(encoded, name=self.drawn[at].name, size=(height, width), max_pixels=self.max_pixels)
        return {
            "segments": torch.from_numpy(numbered(ids, own.ids.numpy(), name=self.drawn[at].name)),
            "classes": own.classes,
            "crowd": own.crowd,
        }

    def pair(self, index: int) -> tuple[Image, Target]:
        """The image in RGB, and its segments.

        Raises:
            BadImageError: one of them cannot be read, or they do not fit.
        """
        picture, size = self.open(index), tuple(self.sizes[self.positions[index]].tolist())
        if (picture.height, picture.width) != size:
            raise BadImageError(
                self.name(index),
                f"it has {picture.width} x {picture.height} pixels, its annotation is about {size[1]} x {size[0]}",
            )
        return picture, self.target(index)


def check_drawn(path: Path, size: tuple[int, int]) -> int:
    """A checksum of a PNG of segments, of which the first bytes are looked at.

    Raises:
        BadImageError: it is no colour PNG of 8 bits, or of another height and width.
    """
    encoded = read_image_file(str(path), name=path.name)
    _check_head(encoded, name=path.name, size=size)
    return int.from_bytes(hashlib.sha256(encoded).digest()[:8], "big") >> 4


def _check_head(encoded: bytes, *, name: str, size: tuple[int, int]) -> None:
    height, width = mask_size(encoded, name=name)
    bits, colour = encoded[24:26]
    if (bits, colour) != (8, _COLOUR):
        raise BadImageError(
            name,
            f"colour type {colour}, {bits} bits; segments are a PNG in RGB of 8 bits: red + 256 green + 65536 blue is "
            "the id",
        )
    if (height, width) != size:
        raise BadImageError(name, sizes_differ(size, (height, width)).replace("it has", "its image has"))


def decode_ids(encoded: bytes, *, name: str, size: tuple[int, int], max_pixels: int) -> np.ndarray:
    """The ids of the pixels, red + 256 green + 65536 blue, int64 (H, W).

    Raises:
        BadImageError: it is no colour PNG of 8 bits and of this height and width, or is damaged.
    """
    from PIL import Image

    _check_head(encoded, name=name, size=size)
    if size[0] * size[1] > max_pixels:
        raise BadImageError(name, f"{size[1]} x {size[0]} pixels are more than {max_pixels:,}, see --max-pixels")
    try:
        with Image.open(io.BytesIO(encoded), formats=["PNG"]) as picture:
            colours = np.asarray(picture.convert("RGB")).astype(np.int64)
    except Exception as error:  # as `decode`
        raise BadImageError(name, " ".join(f"{type(error).__name__}: {error}".split())) from error
    return colours @ np.array([1, 256, 65536])


def numbered(ids: np.ndarray, known: np.ndarray, *, name: str) -> np.ndarray:
    """Positions of the pixels' ids among the known ones, -1 for the id 0, which is void.

    Raises:
        BadImageError: an id is not known, or none of the pixels has one that is.

    >>> numbered(np.array([[7, 0], [300, 7]]), np.array([300, 7]), name="x").tolist()
    [[1, -1], [0, 1]]
    """
    order = np.argsort(known)
    at = np.searchsorted(known[order], ids).clip(max=max(0, len(known) - 1))
    there = known[order][at] == ids if len(known) else np.zeros(ids.shape, bool)
    foreign = ids[~there & (ids != 0)]
    if len(foreign):
        raise BadImageError(name, f"its id {int(foreign[0])} is no segment of its annotation")
    found = np.where(there, order[at] if len(known) else -1, -1)
    absent = np.flatnonzero(np.bincount(found[found >= 0], minlength=len(known)) == 0)
    if len(absent):
        raise BadImageError(name, f"it has no pixel of segment {int(known[absent[0]])}, which its annotation has")
    return found
