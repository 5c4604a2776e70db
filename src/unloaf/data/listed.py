"""Images that a CSV file lists, with numbers for each: labels that are 0 or 1, or values of a regression."""

from __future__ import annotations

import csv
import hashlib
import io
import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from unloaf.data.images import Encoded, read_image_file
from unloaf.files.writing import read_text
from unloaf.printable import printable

_LARGEST = 1 << 30  # bytes of a list


@dataclass(frozen=True, eq=False)
class ListedImages(Encoded):
    """Image files of a list.

    Attributes:
        root: the folder of the set.
        files: paths in it, of all images of the list.
        labels: the numbers of these images, float32 (n, columns).
        positions: which of the files these are, int64 (n,).
        max_pixels: width x height above which an image is not decoded but bad.
    """

    root: Path
    files: Sequence[str]
    labels: Tensor
    positions: Tensor
    max_pixels: int

    @property
    def place(self) -> str:
        """What tells one split from another."""
        return hashlib.sha256("\0".join(self.files).encode(errors="surrogateescape")).hexdigest()

    def subset(self, index: Tensor) -> ListedImages:
        """The images at these positions."""
        return replace(self, positions=self.positions[index], labels=self.labels[index])

    def name(self, index: int) -> str:
        """The path in the folder of the set."""
        return self.files[int(self.positions[index])]

    def read(self, index: int) -> bytes:
        """The image as it is stored."""
        name = self.name(index)
        return read_image_file(str(self.root / name), name=name)


def open_list(folder: Path, split: str, *, max_pixels: int) -> tuple[ListedImages, tuple[str, ...]] | None:
    """The images of SPLIT.csv and the names of its columns; None where there is no such file.

    The first column holds paths in the folder, the others numbers; the first line names them.

    Raises:
        ValueError: the file cannot be read, has no image, lists one twice or one that is missing, or has a cell that
            is no finite number.
    """
    file = folder / f"{split}.csv"
    if not file.is_file():
        return None
    where = printable(file)
    try:
        rows = list(csv.reader(io.StringIO(read_text(file, limit=_LARGEST).removeprefix("\ufeff"), newline="")))
    except (OSError, csv.Error) as error:
        raise ValueError(f"{where} cannot be read as CSV: {error}") from error
    heads, *lines = rows or [[]]
    names = tuple(name.strip() for name in heads[1:])
    if not names or "" in names or len(set(names)) != len(names):
        raise ValueError(
            f"{where}: its first line must name the columns, all of them different: file,NAME,NAME; it is "
            f"{printable(','.join(heads)[:200]) or 'empty'}"
        )
    files: list[str] = []
    values: list[list[float]] = []
    for number, cells in enumerate(lines, start=2):
        if not any(cell.strip() for cell in cells):
            continue
        if len(cells) != len(heads):
            raise ValueError(
                f"{where}, line {number}: {len(cells)} cells, but there are {len(heads)} columns; add the rest"
            )
        files.append(cells[0].strip())
        values.append(
            [_number(cell, f"{where}, line {number}", name) for name, cell in zip(names, cells[1:], strict=True)]
        )
    _check_files(folder, files, where)
    labels = torch.tensor(values, dtype=torch.float32).view(len(files), len(names))
    return ListedImages(folder, files, labels, torch.arange(len(files)), max_pixels), names


def _number(cell: str, where: str, name: str) -> float:
    try:
        value = float(cell)
    except ValueError:
        value = math.nan
    if not math.isfinite(value) or abs(value) > 3e38:
        raise ValueError(
            f"{where}: {printable(name)} is {printable(cell[:60]) or 'empty'}; give a finite number, or remove the line"
        )
    return value


def _check_files(folder: Path, files: Sequence[str], where: str) -> None:
    if not files:
        raise ValueError(f"{where} lists no image; add lines of the form images/NAME.jpg,1,0")
    seen = set[str]()
    for name in files:
        if name in seen:
            raise ValueError(f"{where} lists {printable(name)} twice; keep one line of it")
        seen.add(name)
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise ValueError(
            f"{where}: {len(missing)} of its {len(files)} images are not there, such as {printable(missing[0])}; paths "
            f"are those in {printable(folder)}; add the images or remove the lines"
        )


def checksums(labels: Tensor) -> list[int]:
    """A whole number for each row of numbers, which tells it from others.

    >>> first, second, other = checksums(torch.tensor([[0.0, 1.0], [0.0, 1.0], [1.0, 0.0]]))
    >>> first == second, first == other
    (True, False)
    """
    return [zlib.crc32(row.tobytes()) for row in labels.contiguous().numpy()]
