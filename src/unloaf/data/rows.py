"""Image sets written by Hugging Face's `datasets`, or as parquet files; read from disk, never from the network."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from unloaf.config import Config
from unloaf.data.images import BadImageError, Encoded, Split, as_labels, check_regular, read_image_file


@dataclass(frozen=True, eq=False)
class ImageRows(Encoded):
    """Rows of a table with an image column; `rows` are row numbers, int64 (N,)."""

    table: Any
    column: str
    split: str
    rows: Tensor
    labels: Tensor
    max_pixels: int = Config.max_pixels

    def subset(self, index: Tensor) -> ImageRows:
        """The images at these positions."""
        return replace(self, rows=self.rows[index], labels=self.labels[index])

    def name(self, index: int) -> str:
        """Split and row number, counted from 0."""
        return f"row {int(self.rows[index])} of {self.split}"

    def read(self, index: int) -> bytes:
        """What the row holds, or the file that it names."""
        value = self.table[int(self.rows[index])][self.column]
        if isinstance(value, dict):
            value = value.get("bytes") or value.get("path")
        if not value:
            raise BadImageError(self.name(index), "the row holds no image")
        try:
            return read_image_file(value, name=value) if isinstance(value, str) else value
        except BadImageError as error:
            raise BadImageError(self.name(index), f"{value}: {error.reason}") from error


def open_row_split(
    data_dir: Path, split: str, *, input_key: str, target_key: str, max_pixels: int = Config.max_pixels
) -> Split | None:
    """The images of a split; None if there is no such split.

    Raises:
        ValueError: `datasets` is not installed, the files are no data set, or a column is missing
            or of another kind.
    """
    table = _open_table(data_dir, split)
    if table is None:
        return None
    for flag, key in (("input-key", input_key), ("target-key", target_key)):
        if key not in table.column_names:
            raise ValueError(
                f"--{flag} {key!r} is not a column of split {split} in {data_dir}; "
                f"give one of {', '.join(table.column_names)}"
            )
    labels, names = _labels(table, target_key, split=split)
    images = _undecoded(table.select_columns([input_key]), input_key)
    return Split(ImageRows(images, input_key, split, torch.arange(len(labels)), labels, max_pixels), names)


def _open_table(data_dir: Path, split: str) -> Any:
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError as error:
        raise ValueError("dataset 'hf' needs a package: pip install 'unloaf[hf]'") from error
    saved = any((data_dir / name).is_file() for name in ("dataset_dict.json", "state.json"))
    files = [] if saved else _parquet_files(data_dir, split)
    check_regular(data_dir.rglob("*") if saved else map(Path, files))
    try:
        if (data_dir / "dataset_dict.json").is_file():
            return datasets.DatasetDict.load_from_disk(str(data_dir)).get(split)
        if (data_dir / "state.json").is_file():
            # One data set without splits: all of it is there to train on.
            return datasets.Dataset.load_from_disk(str(data_dir)) if split == "train" else None
        return datasets.Dataset.from_parquet(files) if files else None
    except (OSError, ValueError, KeyError, DatasetsError) as error:
        text = " ".join(str(error).split())
        raise ValueError(f"split {split} in {data_dir} cannot be read: {text}; write it again") from error


def _parquet_files(data_dir: Path, split: str) -> list[Any]:
    """Files named split*.parquet, where the Hub and `to_parquet` put them."""
    patterns = (f"{split}*.parquet", f"data/{split}*.parquet", f"{split}/*.parquet")
    found = (sorted(map(str, data_dir.glob(pattern))) for pattern in patterns)
    return next((files for files in found if files), [])


def _undecoded(table: Any, column: str) -> Any:
    """The table with encoded images as bytes: Pillow's errors must carry the row's number."""
    import datasets

    feature = table.features[column]
    if isinstance(feature, datasets.Image):
        return table.cast_column(column, datasets.Image(decode=False))
    # Plain parquet has no image type, but the same layout.
    binary = isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary")
    if binary or (isinstance(feature, dict) and "bytes" in feature):
        return table
    raise ValueError(f"column {column!r} holds {feature}, not encoded images; give another --input-key")


def _labels(table: Any, column: str, *, split: str) -> tuple[Tensor, tuple[str, ...] | None]:
    """Labels, int64 (N,), and the names of the classes: given, or the texts in alphabetical order."""
    import datasets

    feature = table.features[column]
    values = table.select_columns([column]).with_format(None)[:][column]
    name = f"row {{}} of {split}".format
    if None in values:
        raise ValueError(f"row {values.index(None)} of {split} has no label in column {column!r}; remove or label it")
    if isinstance(feature, datasets.ClassLabel):
        return as_labels(values, name), tuple(feature.names)
    if all(isinstance(value, str) for value in values):
        blank = next((row for row, value in enumerate(values) if not value.strip()), None)
        if blank is not None:
            raise ValueError(f"row {blank} of {split} has an empty label in column {column!r}; remove or label it")
        names = sorted(set(values))
        numbers = {name: number for number, name in enumerate(names)}
        return torch.tensor([numbers[value] for value in values], dtype=torch.int64), tuple(names)
    if not all(isinstance(value, int) for value in values):
        raise ValueError(f"column {column!r} holds {feature}, not one class for each image; give another --target-key")
    return as_labels(values, name), None
