"""Image files with people in them, whose joints are marked: an entry for each person."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from unloaf.data.annotated.images import check_size
from unloaf.data.images import Encoded, decode, read_image_file

if TYPE_CHECKING:
    from PIL.Image import Image


class Marked(NamedTuple):
    """People with a box, and with joints where those are marked; M of them.

    Attributes:
        images: which image each is in, int64 (M,).
        ids: of their annotations, int64 (M,).
        boxes: left, top, right, bottom in pixels, float64 (M, 4).
        areas: in square pixels, float64 (M,).
        joints: x, y and 0, 1 or 2, not marked, hidden or visible, float64 (M, K, 3).
        crowd: groups, bool (M,).
    """

    images: Tensor
    ids: Tensor
    boxes: Tensor
    areas: Tensor
    joints: Tensor
    crowd: Tensor

    def of(self, index: Tensor) -> Marked:
        """Those at these positions, or where a mask is true."""
        return Marked(*(values[index] for values in self))


class Person(NamedTuple):
    """One person of an image.

    Attributes:
        number: which of the people of the split it is.
        image: which image of the split.
        box: float64 (4,).
        area: in square pixels.
        joints: float64 (K, 3), as of `Marked`.
    """

    number: int
    image: int
    box: Tensor
    area: float
    joints: Tensor


@dataclass(frozen=True, eq=False)
class PeopleImages(Encoded):
    """People in image files; each is an image of its own to batches.

    Attributes:
        root: the folder of the files.
        files: paths in it.
        sizes: height and width of the files, as the annotations say, int64 (N, 2).
        people: targets, in all these files.
        others: who else is in them: groups, and people without a marked joint, for whom no prediction is blamed.
        positions: which of the people these are, int64 (n,).
        labels: a checksum of box and joints of each, by which a resumed run notices that they are others, int64 (n,).
        max_pixels: width x height above which an image is not decoded but bad.
    """

    root: Path
    files: Sequence[str]
    sizes: Tensor
    people: Marked
    others: Marked
    positions: Tensor
    labels: Tensor
    max_pixels: int

    @classmethod
    def of(cls, root: Path, files: Sequence[str], sizes: Tensor, people: Marked, *, max_pixels: int) -> PeopleImages:
        """All people who are targets, which groups are not, nor people without a marked joint."""
        learned = (people.joints[..., 2] > 0).any(1) & ~people.crowd
        targets, others = people.of(learned), people.of(~learned)
        positions = torch.arange(len(targets.ids))
        labels = torch.tensor([_checksum(targets, at) for at in range(len(positions))], dtype=torch.int64)
        return cls(root, files, sizes, targets, others, positions, labels, max_pixels)

    @property
    def place(self) -> str:
        """What tells one split from another."""
        return hashlib.sha256("\0".join(self.files).encode(errors="surrogateescape")).hexdigest()

    @property
    def counts(self) -> Tensor:
        """Targets of each entry, which is one person, int64 (n,)."""
        return torch.ones_like(self.positions)

    def subset(self, index: Tensor) -> PeopleImages:
        """The people at these positions."""
        return replace(self, positions=self.positions[index], labels=self.labels[index])

    def in_images(self, images: Tensor) -> PeopleImages:
        """The people in these images."""
        return self.subset(torch.isin(self.people.images[self.positions], images).nonzero()[:, 0])

    def first_of_each_image(self) -> PeopleImages:
        """As many people as there are images with people."""
        images = self.people.images[self.positions].tolist()
        first = {image: at for at, image in reversed(list(enumerate(images)))}
        return self.subset(torch.tensor(sorted(first.values()), dtype=torch.int64))

    def name(self, index: int) -> str:
        """The path in the folder, and the id of the annotation."""
        return f"{self._file(index)}#{int(self.people.ids[self.positions[index]])}"

    def _file(self, index: int) -> str:
        return self.files[int(self.people.images[self.positions[index]])]

    def read(self, index: int) -> bytes:
        """The image as it is stored."""
        name = self._file(index)
        return read_image_file(str(self.root / name), name=name)

    def open(self, index: int) -> Image:
        """The decoded image, whole, in RGB, of the size that its annotations are about."""
        name = self._file(index)
        picture = decode(self.read(index), name=name, max_pixels=self.max_pixels)
        check_size(picture, self.sizes[self.people.images[self.positions[index]]], name=name)
        return picture

    def person(self, index: int) -> Person:
        """Who is at a position."""
        at, people = int(self.positions[index]), self.people
        return Person(at, int(people.images[at]), people.boxes[at], float(people.areas[at]), people.joints[at])

    def others_in(self, image: int) -> Marked:
        """Who is in an image and is no target."""
        return self.others.of(self.others.images == image)


def _checksum(people: Marked, at: int) -> int:
    digest = hashlib.sha256()
    for values in (people.boxes, people.areas, people.joints):
        digest.update(values[at].contiguous().numpy().tobytes())
    return int.from_bytes(digest.digest()[:8], "big") >> 4
