"""Image sets in tar shards (webdataset): key.jpg beside key.cls, or key.json with a label.

The members are indexed once, so that any image can be read at any time: the order of an
epoch stays a pure function, which streaming through shuffle buffers would not allow.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from unloaf.engine.config import Config
from unloaf.engine.data.folders import EXTENSIONS
from unloaf.engine.data.images import BadImageError, Split, decode

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, eq=False)
class ShardMembers:
    """Images inside tar files. Rows of `places` are (shard, offset, size), both in bytes, int64."""

    shards: tuple[str, ...]
    places: np.ndarray
    members: np.ndarray
    labels: Tensor
    max_pixels: int = Config.max_pixels

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index: Tensor) -> ShardMembers:
        """The images at these positions."""
        rows = index.numpy()
        return replace(self, places=self.places[rows], members=self.members[rows], labels=self.labels[index])

    def name(self, index: int) -> str:
        """shard!member."""
        return f"{self.shards[self.places[index, 0]]}!{self.members[index].decode()}"

    def read(self, index: int) -> bytes:
        """The member's bytes.

        Raises:
            BadImageError: the shard cannot be read.
        """
        shard, offset, size = self.places[index].tolist()
        try:
            with open(self.shards[shard], "rb") as file:
                file.seek(offset)
                return file.read(size)
        except OSError as error:
            raise BadImageError(self.name(index), str(error.strerror or error)) from error

    def open(self, index: int) -> Image:
        """The decoded image, in RGB.

        Raises:
            BadImageError: it cannot be read or decoded.
        """
        return decode(self.read(index), name=self.name(index), max_pixels=self.max_pixels)


class _Place(NamedTuple):
    offset: int
    size: int
    member: str


def open_tar_split(data_dir: Path, split: str, *, max_pixels: int = Config.max_pixels) -> Split | None:
    """The images of data_dir/split*.tar, in the order of shards and members; None without such a file.

    Raises:
        ValueError: a shard is damaged or compressed, or an image has no label.
    """
    shards = sorted(path for path in data_dir.glob("*.tar") if path.name.startswith(split))
    if not shards:
        return None
    found = [(number, *entry) for number, path in enumerate(shards) for entry in _entries(path)]
    places = np.array([(number, place.offset, place.size) for number, place, _ in found], dtype=np.int64)
    members = np.array([place.member.encode() for _, place, _ in found], dtype=np.bytes_)
    labels = torch.tensor([label for _, _, label in found], dtype=torch.int64)
    return Split(ShardMembers(tuple(map(str, shards)), places.reshape(-1, 3), members, labels, max_pixels), None)


def _entries(shard: Path) -> Iterator[tuple[_Place, int]]:
    """The images of a shard with their labels; members with the same key belong together."""
    images: dict[str, _Place] = {}
    labels: dict[str, int] = {}
    with shard.open("rb") as file:
        for member in _members(shard):
            folder, slash, base = member.name.rpartition("/")
            stem, _, kind = base.partition(".")
            key = folder + slash + stem
            place = _Place(member.offset_data, member.size, member.name)
            if "." + kind.lower() in EXTENSIONS:
                images[key] = place
            elif kind == "cls" or (kind == "json" and key not in labels):
                labels[key] = _label(file, place, shard)
    lonely = next((place.member for key, place in images.items() if key not in labels), None)
    if lonely is not None:
        raise ValueError(f"image {shard}!{lonely} has no label: put a .cls or .json of the same name into the shard")
    return ((place, labels[key]) for key, place in images.items())


def _members(shard: Path) -> list[tarfile.TarInfo]:
    try:
        with tarfile.open(shard, "r:") as archive:
            members = archive.getmembers()
    except (tarfile.TarError, OSError) as error:
        raise ValueError(f"shard {shard} cannot be read: {error}; it must be a whole, uncompressed tar file") from error
    size = shard.stat().st_size
    cut = next((member.name for member in members if member.offset_data + member.size > size), None)
    if cut is not None:
        raise ValueError(f"shard {shard} is cut off inside {cut}; copy it again")
    return [member for member in members if member.isfile()]


def _label(file: IO[bytes], place: _Place, shard: Path) -> int:
    file.seek(place.offset)
    text = file.read(place.size)
    try:
        label = json.loads(text)["label"] if place.member.endswith(".json") else int(text)
        if not isinstance(label, int):
            raise TypeError(label)
        return label
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        expected = 'an object with a number as "label"' if place.member.endswith(".json") else "a number as text"
        raise ValueError(f"label {shard}!{place.member} holds {text[:40]!r}; expected {expected}") from error
