"""Which images a run learned from: their classes, and enough of names and labels to notice that they are others."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from unloaf.data.annotated.images import AnnotatedImages
from unloaf.data.folders import ImageFiles
from unloaf.data.images import Images, ImageSet
from unloaf.data.listed import ListedImages, checksums
from unloaf.data.masks.images import MaskedImages
from unloaf.data.own import OwnImages
from unloaf.data.people.images import PeopleImages
from unloaf.data.rows import ImageRows
from unloaf.data.sets import Data
from unloaf.data.tars import ShardMembers
from unloaf.data.text.sequences import TokenSequences
from unloaf.printable import printable

SPLITS = ("train", "val", "test")
_LISTED = ("train", "val")  # what is learned from and what chooses the best checkpoint
_HEADS = ("split", "label", "name")
_IN_MEMORY = (ImageSet, TokenSequences)  # without names
_LARGEST = 2**30  # bytes of a list: about twenty million images

Row = tuple[str, str, str]


def record_of(data: Data) -> dict[str, Any]:
    """The classes of an image set, and of each split the number of images and a checksum, as plain values.

    The checksum is over the sorted pairs of name and label. A name is relative to the split's folder, or that of a
    shard and its member, or the number of a row. Images in memory have none: there it is over pixels and labels.

    >>> from unloaf.config import Config
    >>> from unloaf.data import load_data
    >>> record = record_of(load_data(Config(dataset="digits")))
    >>> record["num_classes"], record["class_names"][:3], record["splits"]["val"]["images"]
    (10, ['0', '1', '2'], 300)
    """
    return {
        "dataset": data.name,
        "num_classes": data.num_classes,
        "class_names": class_names_of(data),
        "held_out": _held_out(data),
        "splits": {
            split: {"images": len(images), "sha256": _checksum(images)}
            for split, images in ((split, getattr(data, split)) for split in SPLITS)
        },
    }


def listing(data: Data) -> bytes | None:
    """Training and validation images as a compressed CSV file of split, label and name; None for images in memory.

    Names are as in `record_of`; bytes that are no UTF-8 are written as escapes.
    """
    if isinstance(data.train, _IN_MEMORY):
        return None
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_HEADS)
    writer.writerows(_rows(data))
    return gzip.compress(text.getvalue().encode(), compresslevel=5, mtime=0)


def read_listing(path: Path) -> list[Row] | None:
    """The rows of a `listing`; None where there is none, or what is there is something else."""
    if not path.is_file():
        return None
    try:
        with gzip.open(path) as file:
            text = file.read(_LARGEST + 1)
        heads, *rows = csv.reader(io.StringIO(text.decode(), newline=""))
        return None if len(text) > _LARGEST or tuple(heads) != _HEADS else [(row[0], row[1], row[2]) for row in rows]
    except (OSError, EOFError, ValueError, IndexError, zlib.error, csv.Error):
        return None


def trained_on(listed: list[Row] | None, data: Data) -> int | None:
    """How many validation images have the names of listed training images; None without a list."""
    if listed is None or isinstance(data.val, _IN_MEMORY):
        return None
    trained = {name for split, _, name in listed if split == "train"}
    return sum(name in trained for split, _, name in _rows(data) if split == "val")


def changes(listed: list[Row] | None, data: Data, kept: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What became of the images, in words: `kept` is the record of the run, `now` that of the data as they are."""
    counts = [
        f"{split}: {now['splits'][split]['images']} {data.unit} (was {kept['splits'][split]['images']})"
        for split in _LISTED
        if now["splits"][split] != kept["splits"][split]
    ]
    return "; ".join([*counts, *_compared(listed, data, apart=not (kept["held_out"] and now["held_out"]))])


def _compared(listed: list[Row] | None, data: Data, *, apart: bool) -> Iterator[str]:
    """How many images are gone, new, labelled otherwise or in the other split; `apart`: names are of one split each."""
    if listed is None or isinstance(data.train, _IN_MEMORY):
        return
    was, now = _by_name(listed, apart=apart), _by_name(_rows(data), apart=apart)
    both = was.keys() & now.keys()
    groups = {
        "gone": was.keys() - now.keys(),
        "new": now.keys() - was.keys(),
        "labelled otherwise": {name for name in both if was[name][1] != now[name][1]},
        "from training now in validation": {name for name in both if (was[name][0], now[name][0]) == _LISTED},
        "from validation now in training": {name for name in both if (now[name][0], was[name][0]) == _LISTED},
    }
    for what, names in groups.items():
        if names:
            yield f"{len(names)} {what} ({printable(min(names))}{', ...' if len(names) > 1 else ''})"


def _rows(data: Data) -> Iterator[Row]:
    for split in _LISTED:
        for name, label in _pairs(getattr(data, split)):
            yield split, str(label), name.decode(errors="backslashreplace")


def _by_name(rows: Iterable[Row], *, apart: bool) -> dict[str, tuple[str, str]]:
    """Split and label by name."""
    return {f"{split}/{name}" if apart else name: (split, label) for split, label, name in rows}


def class_names_of(data: Data) -> list[str] | None:
    """The names of the classes, as a line can show them; None where labels are bare numbers."""
    numbers = tuple(str(number) for number in range(data.num_classes))
    if data.name in ("hf", "webdataset") and data.class_names == numbers:
        return None
    return [printable(name) for name in data.class_names]


def _held_out(data: Data) -> bool:
    """Whether the validation images are drawn from the training images, so that one image more or less moves others."""
    return len(data.val) > 0 and _place(data.train) == _place(data.val)


def _place(images: Images) -> Any:
    if isinstance(images, ImageFiles):
        return images.root
    if isinstance(images, ShardMembers):
        return images.shards
    if isinstance(images, (AnnotatedImages, ListedImages, MaskedImages, OwnImages, PeopleImages, TokenSequences)):
        return images.place
    return images.split if isinstance(images, ImageRows) else type(images)


def _pairs(images: Images) -> list[tuple[bytes, int]]:
    labels = images.labels.tolist() if images.labels.ndim == 1 else checksums(images.labels)
    return sorted(zip(_names(images), labels, strict=True))


def _names(images: Images) -> list[bytes]:
    if isinstance(images, ImageFiles):
        return images.paths.tolist()
    if isinstance(images, ShardMembers):
        shards = [shard.encode(errors="surrogateescape").rpartition(b"/")[2] for shard in images.shards]
        return [
            shards[shard] + b"!" + member
            for shard, member in zip(images.places[:, 0].tolist(), images.members.tolist(), strict=True)
        ]
    if isinstance(images, ImageRows):
        return [b"row %d" % row for row in images.rows.tolist()]
    return [images.name(index).encode(errors="surrogateescape") for index in range(len(images))]


def _checksum(images: Images) -> str:
    digest = hashlib.sha256()
    if isinstance(images, ImageSet):
        digest.update(images.images.contiguous().numpy().data)
        digest.update(images.labels.contiguous().numpy().data)
        return digest.hexdigest()
    if isinstance(images, TokenSequences):
        digest.update(images.inputs.contiguous().numpy().data)
        digest.update(images.positions.contiguous().numpy().data)
        return digest.hexdigest()
    digest.update(b"".join(b"%s\0%d\0" % pair for pair in _pairs(images)))
    return digest.hexdigest()
