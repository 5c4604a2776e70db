"""Image sets that a function of the user's own returns: images in memory, or map-style data sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from unloaf.config import Config
from unloaf.data.images import BadImageError, Images, ImageSet, as_picture
from unloaf.own_code import call_function, fault

if TYPE_CHECKING:
    from PIL.Image import Image

_SPLITS = ("train", "val", "test")


@dataclass(frozen=True, eq=False)
class OwnImages:
    """Pairs (image, target) of a data set of the user's own.

    Attributes:
        dataset: has a length, and a pair at each position.
        labels: the targets of these images, int64 (n,) or float32 (n, columns).
        positions: which of the pairs these are, int64 (n,).
        place: the name of the split.
        module: of the function that made it, for messages.
    """

    dataset: Any
    labels: Tensor
    positions: Tensor
    place: str
    module: str

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index: Tensor) -> OwnImages:
        """The images at these positions."""
        return replace(self, positions=self.positions[index], labels=self.labels[index])

    def name(self, index: int) -> str:
        """Its number in the data set."""
        return f"number {int(self.positions[index])} of {self.place}"

    def open(self, index: int) -> Image:
        """The image in RGB.

        Raises:
            BadImageError: the data set raised an error, or returned something else.
        """
        try:
            picture = self.dataset[int(self.positions[index])][0]
        except Exception as error:  # whatever the user's code raises
            raise BadImageError(self.name(index), fault(error, self.module)) from error
        return _as_picture(picture, self.name(index))


def _as_picture(picture: Any, name: str) -> Image:
    from PIL import Image

    if isinstance(picture, np.ndarray) and picture.dtype == np.uint8 and picture.ndim == 3:
        picture = torch.from_numpy(picture).permute(2, 0, 1)
    if isinstance(picture, Image.Image):
        return picture if picture.mode == "RGB" else picture.convert("RGB")
    if isinstance(picture, Tensor) and picture.dtype == torch.uint8 and picture.ndim == 3 and len(picture) in (1, 3):
        return as_picture(picture)
    what = (
        f"{picture.dtype} {tuple(picture.shape)}"
        if isinstance(picture, (Tensor, np.ndarray))
        else type(picture).__name__
    )
    raise BadImageError(
        name, f"it is {what}; return a PIL image, a uint8 tensor (C, H, W) or a uint8 array (H, W, C), not normalised"
    )


class OwnSplits(NamedTuple):
    """What the function returned; val and test are None where it gave none, names where it named no classes."""

    train: Images
    val: Images | None
    test: Images | None
    names: tuple[str, ...] | None
    notes: tuple[str, ...]


def load_own(config: Config, *, columns: bool) -> OwnSplits:
    """The image set of ``config.dataset``, "module:function".

    The function may have an argument ``data_dir``. It returns a mapping with "train" and, if there are any, "val",
    "test" and "class_names". A split is a TensorDataset or pair (images, targets) of tensors, images uint8
    (N, C, H, W); or a map-style data set of pairs (image, target), whose targets are read from its attribute
    ``targets``, or else by going through it once.

    Args:
        config: names the function.
        columns: targets are rows of numbers; else class numbers.

    Raises:
        ValueError: see `call_function`; or what it returned is something else.
    """
    name = config.dataset
    given = call_function(name, setting="dataset", offered={"data_dir": config.data_dir})
    if not isinstance(given, Mapping) or "train" not in given:
        raise ValueError(
            f"dataset {name}: returned {type(given).__name__}{' without train' * isinstance(given, Mapping)}; return "
            '{"train": ..., "val": ..., "class_names": [...]}, see docs/own-data.md'
        )
    unknown = sorted(map(str, set(given) - {*_SPLITS, "class_names"}))
    if unknown:
        raise ValueError(
            f"dataset {name}: returned the keys {', '.join(unknown)}; known are train, val, test, class_names"
        )
    notes: list[str] = []
    splits = {
        split: _split(name, split, given[split], columns=columns, notes=notes)
        for split in _SPLITS
        if given.get(split) is not None
    }
    names = given.get("class_names")
    return OwnSplits(
        splits["train"],
        splits.get("val"),
        splits.get("test"),
        None if names is None else tuple(map(str, names)),
        tuple(notes),
    )


def _split(name: str, split: str, given: Any, *, columns: bool, notes: list[str]) -> Images:
    where = f"dataset {name}: {split}"
    if isinstance(given, TensorDataset):
        given = given.tensors
    if isinstance(given, (tuple, list)) and len(given) == 2 and all(isinstance(one, Tensor) for one in given):
        images, targets = given
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise ValueError(
                f"{where}: images are {images.dtype} {tuple(images.shape)}; give uint8 (N, C, H, W), 1 or 3 channels, "
                "not normalised: that is done here (--mean, --std)"
            )
        if images.shape[2] != images.shape[3]:
            raise ValueError(f"{where}: images of {images.shape[3]} x {images.shape[2]} pixels; give square ones")
        return ImageSet(images, _labels(where, targets, len(images), columns=columns))
    if not (hasattr(given, "__len__") and hasattr(given, "__getitem__")) or isinstance(given, (str, Mapping)):
        raise ValueError(
            f"{where} is {type(given).__name__}; give a pair of tensors (images, targets), or a data set with a length "
            "and pairs (image, target)"
        )
    targets = getattr(given, "targets", None)
    if targets is None:
        targets = _read_targets(where, given, name.partition(":")[0])
        notes.append(
            f"{split}: all {len(targets)} images were read once for their targets; give `targets` to save that"
        )
    labels = _labels(where, targets, len(given), columns=columns)
    return OwnImages(given, labels, torch.arange(len(labels)), split, name.partition(":")[0])


def _read_targets(where: str, given: Any, module: str) -> list[Any]:
    found = []
    for at in range(len(given)):
        try:
            _, target = given[at]
        except Exception as error:  # whatever the user's code raises, or no pair
            raise ValueError(f"{where}, number {at}: {fault(error, module)}") from error
        found.append(target)
    return found


def _labels(where: str, targets: Any, count: int, *, columns: bool) -> Tensor:
    """Class numbers, int64 (n,), or rows of numbers, float32 (n, columns)."""
    try:
        found = targets if isinstance(targets, Tensor) else torch.tensor(_plain(targets))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: its targets are no numbers ({error}); give one for each image") from error
    if columns and found.ndim == 1:
        found = found[:, None]
    if len(found) != count or count == 0:
        raise ValueError(f"{where} has {count} images and {len(found)} targets; give one target for each image")
    if columns:
        if found.ndim != 2:
            raise ValueError(f"{where}: targets have shape {tuple(found.shape)}; give (images, columns)")
        found = found.to(torch.float32)
        if not bool(found.isfinite().all()):
            raise ValueError(f"{where}: a target is not finite; leave such images out")
        return found.contiguous()
    if found.ndim != 1 or found.is_floating_point():
        raise ValueError(
            f"{where}: targets are {found.dtype} {tuple(found.shape)}; classification takes a class number for each "
            "image, --task multilabel rows of 0 and 1, --task regression numbers"
        )
    return found.to(torch.int64)


def _plain(targets: Sequence[Any]) -> list[Any]:
    return [target.tolist() if isinstance(target, (Tensor, np.ndarray)) else target for target in targets]
