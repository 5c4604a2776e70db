"""Image sets in tar shards (webdataset): key.jpg beside key.cls, or key.json with a label.

The members are indexed once, so that any image can be read at any time: the order of an
epoch stays a pure function, which streaming through shuffle buffers would not allow.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from torch import Tensor

from unloaf.config import Config
from unloaf.data.consistency import some
from unloaf.data.images import BadImageError, Encoded, Split, as_labels, check_regular
from unloaf.data.walk import EXTENSIONS, is_hidden
from unloaf.printable import printable


@dataclass(frozen=True, eq=False)
class ShardMembers(Encoded):
    """Images inside tar files. Rows of `places` are (shard, offset, size), both in bytes, int64."""

    shards: tuple[str, ...]
    places: np.ndarray
    members: np.ndarray
    labels: Tensor
    max_pixels: int = Config.max_pixels

    def subset(self, index: Tensor) -> ShardMembers:
        """The images at these positions."""
        rows = index.numpy()
        return replace(self, places=self.places[rows], members=self.members[rows], labels=self.labels[index])

    def name(self, index: int) -> str:
        """shard!member."""
        return f"{self.shards[self.places[index, 0]]}!{os.fsdecode(self.members[index])}"

    def read(self, index: int) -> bytes:
        """The member's bytes."""
        shard, offset, size = self.places[index].tolist()
        try:
            with open(self.shards[shard], "rb") as file:
                file.seek(offset)
                return file.read(size)
        except OSError as error:
            raise BadImageError(self.name(index), str(error.strerror or error)) from error


_LONGEST_LABEL = 1 << 24  # bytes


class _Place(NamedTuple):
    offset: int
    size: int
    member: str


def open_tar_split(data_dir: Path, split: str, *, max_pixels: int = Config.max_pixels) -> Split | None:
    """The images of data_dir/split*.tar, in the order of shards and members; None without such a file.

    An image and its label belong together if their names are equal up to the first dot, as in webdataset,
    or up to the last one: 1.jpg and 1.cls, 0.5.jpg and 0.5.cls. What is left out is counted in the notes.

    Raises:
        ValueError: a shard is damaged or compressed, or an image has no label.
    """
    shards = sorted(path for path in data_dir.glob("*.tar") if path.name.startswith(split))
    if not shards:
        return None
    check_regular(shards)
    left_out: dict[str, list[str]] = {}
    found = [(number, *entry) for number, path in enumerate(shards) for entry in _entries(path, left_out)]
    packed = sorted(path.name for path in data_dir.glob("*.tar.*") if path.name.startswith(split))
    left_out |= {"compressed shard(s) left out": packed} if packed else {}
    places = np.array([(number, place.offset, place.size) for number, place, _ in found], dtype=np.int64)
    members = np.array([os.fsencode(place.member) for _, place, _ in found], dtype=np.bytes_)
    labels = as_labels([label for _, _, label in found], lambda at: f"{shards[found[at][0]]}!{found[at][1].member}")
    images = ShardMembers(tuple(map(str, shards)), places.reshape(-1, 3), members, labels, max_pixels)
    notes = tuple(f"{len(them)} {what}: {printable(some(them, 3))}" for what, them in left_out.items())
    return Split(images, None, notes, frozenset(map(os.path.realpath, shards)))


def _entries(shard: Path, left_out: dict[str, list[str]]) -> Iterator[tuple[_Place, int]]:
    """The images of a shard with their labels; what is not read is added to `left_out`, by reason."""
    members = _members(shard, left_out)
    labels = _label_places(members)
    images: dict[str, _Place] = {}
    for name, place in members.items():
        stem, ending = os.path.splitext(name)
        folder, slash, base = name.rpartition("/")
        if ending.lower() not in EXTENSIONS:
            continue
        if stem in labels and stem not in images:
            images[stem] = place
        elif stem in labels or folder + slash + base.partition(".")[0] in labels:
            # Such as 1.mask.png beside 1.jpg: what it is, only the user knows.
            left_out.setdefault("image(s) without a label of their own left out", []).append(f"{shard.name}!{name}")
        else:
            raise ValueError(
                f"image {printable(shard)}!{printable(name)} has no label: put a .cls or .json of the same name into "
                "the shard"
            )
    lonely = [f"{shard.name}!{place.member}" for stem, place in labels.items() if stem not in images]
    if lonely:
        left_out.setdefault(f"label(s) without an image that is read ({' '.join(EXTENSIONS)})", []).extend(lonely)
    with shard.open("rb") as file:
        yield from ((place, _label(file, labels[stem], shard)) for stem, place in images.items())


def _label_places(members: dict[str, _Place]) -> dict[str, _Place]:
    """Where the label of a name lies; of .cls and .json it is .cls."""
    found: dict[str, _Place] = {}
    for kind in (".json", ".cls"):
        for name, place in members.items():
            stem, ending = os.path.splitext(name)
            if ending.lower() == kind:
                found[stem] = place
    return found


def _members(shard: Path, left_out: dict[str, list[str]]) -> dict[str, _Place]:
    """The regular files of a shard by name, in their order."""
    size, fault, found = shard.stat().st_size, None, dict[str, _Place]()
    try:
        with tarfile.open(shard, "r:") as archive:
            for member in archive:
                fault = _fault(member, size)
                if fault is not None:
                    break
                why = _left_out(member, found)
                if why is not None:
                    left_out.setdefault(why, []).append(f"{shard.name}!{member.name}")
                if member.isfile() and not _hidden(member.name):
                    found[member.name] = _Place(member.offset_data, member.size, member.name)
            end = archive.offset
    except Exception as error:  # headers that are no headers raise ValueError, OverflowError, RecursionError and more
        raise ValueError(
            f"shard {printable(shard)} cannot be read: {printable(error)}; it must be a whole, uncompressed tar file"
        ) from error
    if fault is not None:
        raise ValueError(f"shard {printable(shard)} {fault}")
    if end >= size:
        left_out.setdefault("shard(s) without the mark of the end, which may be cut off", []).append(shard.name)
    elif _goes_on(shard, end):
        raise ValueError(
            f"shard {printable(shard)} continues after its end at byte {end}: it is damaged, or was joined by cat; "
            "write it again, or join shards with tar --concatenate"
        )
    return found


def _fault(member: tarfile.TarInfo, size: int) -> str | None:
    name = printable(member.name)
    if member.size < 0:
        return f"has a negative size for {name}; write it again"
    if member.offset_data + member.size > size:
        return f"is cut off inside {name}; copy it again"
    if member.issparse():
        return f"holds {name} as a sparse file; write it again without --sparse"
    return None


def _left_out(member: tarfile.TarInfo, found: dict[str, _Place]) -> str | None:
    """Why a member is not read, where that is worth a word."""
    if os.path.splitext(member.name)[1].lower() not in EXTENSIONS or member.isdir():
        return None
    if _hidden(member.name):
        return "hidden image(s) left out"
    if not member.isfile():
        return "image(s) that are but links left out"
    return "image(s) left out because another of that name follows" if member.name in found else None


def _hidden(name: str) -> bool:
    return any(is_hidden(part) for part in name.split("/") if part not in (".", ".."))


def _goes_on(shard: Path, end: int) -> bool:
    """Whether there is anything but zeros after the end."""
    with shard.open("rb") as file:
        file.seek(end)
        return any(any(chunk) for chunk in iter(lambda: file.read(1 << 20), b""))


def _label(file: IO[bytes], place: _Place, shard: Path) -> int:
    in_json = place.member.lower().endswith(".json")
    file.seek(place.offset)
    text = file.read(min(place.size, _LONGEST_LABEL))
    try:
        label = json.loads(text)["label"] if in_json else _number(text)
        if type(label) is not int:  # true is a number to Python
            raise TypeError(label)
        return label
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        expected = 'an object with a number as "label"' if in_json else "a number as text"
        raise ValueError(
            f"label {printable(shard)}!{printable(place.member)} holds {text[:40]!r}; expected {expected}"
        ) from error


def _number(text: bytes) -> int:
    if re.fullmatch(rb"\s*[+-]?[0-9]+\s*", text) is None:  # Python takes 1_0 for 10
        raise ValueError(text)
    return int(text)
