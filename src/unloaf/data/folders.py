"""Image sets in folders: split/class/image.jpg."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from unloaf.config import Config
from unloaf.data.images import Encoded, Split, read_image_file
from unloaf.data.walk import class_folders, find_files, holds_images


@dataclass(frozen=True, eq=False)
class ImageFiles(Encoded):
    """Image files below a folder.

    `paths` holds bytes in one array, not a list of texts: workers share it, whereas counting
    references to a million texts would copy their pages into every worker.
    """

    root: str
    paths: np.ndarray
    labels: Tensor
    max_pixels: int = Config.max_pixels

    def subset(self, index: Tensor) -> ImageFiles:
        """The images at these positions."""
        return replace(self, paths=self.paths[index.numpy()], labels=self.labels[index])

    def name(self, index: int) -> str:
        """The file's path."""
        return os.path.join(self.root, os.fsdecode(self.paths[index]))

    def read(self, index: int) -> bytes:
        """The file."""
        path = self.name(index)
        return read_image_file(path, name=path)


def open_folder_split(data_dir: Path, split: str, *, max_pixels: int = Config.max_pixels) -> Split | None:
    """The images of data_dir/split/class, classes in alphabetical order; None without class folders there."""
    root = data_dir / split
    if not class_folders(root):
        return None
    names, files, notes, folders = find_files(root)
    labels = torch.repeat_interleave(torch.arange(len(names)), torch.tensor([len(paths) for paths in files]))
    paths = np.array([path for paths in files for path in paths], dtype=np.bytes_)
    return Split(ImageFiles(str(root), paths, labels, max_pixels), names, notes, folders)


# A folder of one of these names beside others is a split, not a class.
_SPLITS = ("train", "training", "val", "valid", "validation", "test", "testing", "dev", "eval")


def open_flat_folder(data_dir: Path, *, max_pixels: int = Config.max_pixels) -> Split | None:
    """The images of data_dir/class; None where no folder there holds images itself, or one has the name of a split."""
    classes = class_folders(data_dir)
    if any(name.lower() in _SPLITS for name in classes):
        return None
    if not any(holds_images(data_dir / name) for name in classes):
        return None
    return open_folder_split(data_dir, ".", max_pixels=max_pixels)
