"""Image files with the objects in them: boxes, classes and, where there are any, masks."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from unloaf.data.images import BadImageError, Encoded, read_image_file

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, eq=False)
class Objects:
    """The objects of N images, those of an image side by side: image i has those from ``starts[i]`` to ``starts[i+1]``.

    Attributes:
        starts: int64 (N + 1,).
        boxes: left, top, right, bottom in pixels, float32 (M, 4).
        classes: from 0, int64 (M,).
        crowd: objects that are no targets and that no prediction is blamed for: groups, or such as VOC calls difficult;
            bool (M,).
        areas: in square pixels, that of the mask where the set says so, float32 (M,).
        masks: a segmentation of COCO as JSON for each, () where there are none.
    """

    starts: Tensor
    boxes: Tensor
    classes: Tensor
    crowd: Tensor
    areas: Tensor
    masks: tuple[bytes, ...] = ()

    def checksum(self, index: int) -> int:
        """A number that changes with the objects of an image, below 2**60."""
        part = slice(int(self.starts[index]), int(self.starts[index + 1]))
        digest = hashlib.sha256()
        for values in (self.boxes, self.classes, self.crowd):
            digest.update(values[part].contiguous().numpy().tobytes())
        digest.update(b"\0".join(self.masks[part]))
        return int.from_bytes(digest.digest()[:8], "big") >> 4


@dataclass(frozen=True, eq=False)
class AnnotatedImages(Encoded):
    """Image files with objects.

    Attributes:
        root: the folder of the files.
        files: paths in it, of all images that `objects` knows.
        sizes: height and width that the annotations say, int64 (N, 2); 0 where they do not.
        objects: of all these images.
        positions: which of them these are, int64 (n,).
        labels: a checksum of the objects of each, by which a resumed run notices that they are others, int64 (n,).
        max_pixels: width x height above which an image is not decoded but bad.
    """

    root: Path
    files: Sequence[str]
    sizes: Tensor
    objects: Objects
    positions: Tensor
    labels: Tensor
    max_pixels: int

    @classmethod
    def of(
        cls, root: Path, files: Sequence[str], sizes: Tensor, objects: Objects, *, max_pixels: int
    ) -> AnnotatedImages:
        """All images that the objects know."""
        labels = torch.tensor([objects.checksum(index) for index in range(len(files))], dtype=torch.int64)
        return cls(root, files, sizes, objects, torch.arange(len(files)), labels, max_pixels)

    @property
    def place(self) -> str:
        """What tells one split from another."""
        return hashlib.sha256("\0".join(self.files).encode(errors="surrogateescape")).hexdigest()

    def subset(self, index: Tensor) -> AnnotatedImages:
        """The images at these positions."""
        return replace(self, positions=self.positions[index], labels=self.labels[index])

    def name(self, index: int) -> str:
        """The path in the folder."""
        return self.files[int(self.positions[index])]

    def read(self, index: int) -> bytes:
        """The image as it is stored."""
        name = self.name(index)
        return read_image_file(str(self.root / name), name=name)

    def open(self, index: int) -> Image:
        """The decoded image, in RGB, of the size that its annotations are about."""
        picture = super().open(index)
        check_size(picture, self.sizes[self.positions[index]], name=self.name(index))
        return picture

    def target(self, index: int) -> dict[str, Any]:
        """The objects of an image: boxes (n, 4), classes (n,), crowd (n,), areas (n,), and masks, a tuple of JSON."""
        at = int(self.positions[index])
        objects, part = self.objects, slice(int(self.objects.starts[at]), int(self.objects.starts[at + 1]))
        return {
            "boxes": objects.boxes[part],
            "classes": objects.classes[part],
            "crowd": objects.crowd[part],
            "areas": objects.areas[part],
            "masks": objects.masks[part],
        }

    @property
    def counts(self) -> Tensor:
        """Objects that are targets, of each of these images, int64 (n,)."""
        at, summed = self.objects.starts, torch.cat([torch.zeros(1), (~self.objects.crowd).double().cumsum(0)])
        return (summed[at[self.positions + 1]] - summed[at[self.positions]]).long()


def check_size(picture: Image, size: Tensor, *, name: str) -> None:
    """Raises BadImageError unless an image has the height and width that its annotations say, if they say any."""
    height, width = size.tolist()
    if height and (picture.height, picture.width) != (height, width):
        raise BadImageError(
            name, f"it has {picture.width} x {picture.height} pixels, its annotations are about {width} x {height}"
        )
