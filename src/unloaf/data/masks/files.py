"""Which image has which mask, and what can be known of both before training."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from unloaf.config import Config
from unloaf.data.consistency import some
from unloaf.data.images import BadImageError, read_image_file
from unloaf.data.masks.images import MaskedImages, decode_mask, image_size, mask_size, sizes_differ
from unloaf.data.walk import is_image
from unloaf.printable import printable

_READERS = 4  # threads that look at the files


class _Look(NamedTuple):
    checksum: int  # of the mask's file
    ids: np.ndarray  # which ids are in the mask, bool (256,); none where it was not decoded


class MaskSplit(NamedTuple):
    """The images of a split, looked at: `images` makes the collection of them, once the classes are known."""

    root: Path
    files: list[str]
    masks: list[str]
    looks: list[_Look]

    @property
    def ids(self) -> np.ndarray:
        """Which ids are in each mask, bool (N, 256); none where masks were not decoded."""
        return np.stack([look.ids for look in self.looks])

    def images(self, classes: int, config: Config) -> MaskedImages:
        """The images, with ids below `classes`."""
        return MaskedImages(
            root=self.root,
            files=self.files,
            masks=self.masks,
            num_classes=classes,
            others_void=config.num_classes is not None,
            positions=torch.arange(len(self.files)),
            labels=torch.tensor([look.checksum for look in self.looks], dtype=torch.int64),
            max_pixels=config.max_pixels,
        )


def open_mask_split(folder: Path, split: str, config: Config, notes: list[str]) -> MaskSplit | None:
    """The images of SPLIT/images or images/SPLIT and the masks beside; None where there is no such folder.

    Masks are decoded where the configuration does not say how many classes there are; of images the size is read.

    Raises:
        ValueError: an image has no mask, a mask no image, or they do not fit or cannot be read.
    """
    layouts = ((f"{split}/images", f"{split}/masks"), (f"images/{split}", f"masks/{split}"))
    found = next(((images, masks) for images, masks in layouts if (folder / images).is_dir()), None)
    if found is None:
        return None
    images, masks = found
    files, others = _listed(folder / images, ())
    drawn, unread = _listed(folder / masks, (".png",))
    if not files:
        raise ValueError(f"no image in {printable(folder / images)}; expected {split}/images/NAME.jpg")
    if others or unread:
        left = [f"{images}/{name}" for name in others] + [f"{masks}/{name}" for name in unread]
        notes.append(f"{split}: {len(left)} file(s) left out that are no images or masks: {printable(some(left, 3))}")
    absent = [name for name in files if name not in drawn]
    if absent:
        raise ValueError(
            f"{len(absent)} of the {len(files)} images of {printable(folder / images)} have no mask: "
            f"{printable(some([f'{masks}/{name}.png' for name in absent], 3))}; add them, or remove the images"
        )
    alone = [name for name in drawn if name not in files]
    if alone:
        raise ValueError(
            f"{len(alone)} of the {len(drawn)} masks of {printable(folder / masks)} have no image: "
            f"{printable(some([drawn[name] for name in alone], 3))}; add the images, or remove the masks"
        )
    pairs = [(f"{images}/{file}", f"{masks}/{drawn[name]}") for name, file in files.items()]
    with ThreadPoolExecutor(_READERS) as pool:
        looks = list(pool.map(lambda pair: _look(folder, pair[0], pair[1], config), pairs))
    return MaskSplit(folder, [file for file, _ in pairs], [mask for _, mask in pairs], looks)


def _listed(folder: Path, endings: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """Images of a folder by their name without ending, sorted, and other files in it."""
    if not folder.is_dir():
        return {}, []
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if entry.is_file())
    images: dict[str, str] = {}
    others = []
    for name in names:
        if not is_image(name) or (endings and not name.lower().endswith(tuple(endings))):
            others.append(name)
            continue
        stem = os.path.splitext(name)[0]
        if stem in images:
            raise ValueError(
                f"{printable(folder)}: {printable(images[stem])} and {printable(name)} would have the same mask or "
                "image; rename one"
            )
        images[stem] = name
    return images, others


def _look(folder: Path, image: str, mask: str, config: Config) -> _Look:
    checksum, ids = 0, np.zeros(256, bool)
    try:
        encoded = read_image_file(str(folder / mask), name=mask)
        checksum = int.from_bytes(hashlib.sha256(encoded).digest()[:8], "big") >> 4
        size, other = image_size(folder / image, name=image), mask_size(encoded, name=mask)
        if size != other:
            raise ValueError(f"{printable(image)}: {sizes_differ(size, other)}; give both the same size")
        if config.num_classes is None:
            ids[decode_mask(encoded, name=mask, max_pixels=config.max_pixels)] = True
    except BadImageError as error:
        if config.bad_images == "stop":
            raise ValueError(f"{error}; remove or replace it, or give --bad-images skip") from error
    return _Look(checksum, ids)
