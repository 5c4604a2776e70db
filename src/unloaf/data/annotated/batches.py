"""Batches of annotated images: lists of images, each of its own size, and of the objects in them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from unloaf.config import Config
from unloaf.data.annotated.images import AnnotatedImages
from unloaf.data.annotated.targets import Target, masks_of, mirrored, resized, side_size
from unloaf.data.batches import Batch, EvalBatches, TrainBatches
from unloaf.data.images import as_pixels
from unloaf.data.reading import BadImagesError, Chunk, Failure, Keys, readable
from unloaf.data.sets import Data
from unloaf.seeds import seed_host

LONGEST = 1333 / 800  # of the shorter side: how long an image may become, in the usual settings for COCO


class Reading(NamedTuple):
    """How an annotated image is read: whether with masks, and whether as it lies there or augmented."""

    masks: bool
    augmented: bool


class AnnotatedReader:
    """Images and their objects by key; what comes out depends on the keys alone."""

    def __init__(self, data: Data, config: Config, images: AnnotatedImages, how: Reading) -> None:
        self._data, self._config, self._images, self._how = data, config, images, how

    def __getitems__(self, keys: Keys) -> Chunk | Failure:
        """The images of these keys."""
        try:
            found = [readable(self._images, image, self._config) for image in keys.images]
        except BadImagesError as error:
            return Failure(str(error))
        pairs = []
        for one, image, repeat in zip(found, keys.images, keys.repeats, strict=True):
            seed_host("augment-image", self._config.seed, keys.epoch, image, repeat)
            pairs.append(self._pair(as_pixels(one.image, channels=3), one.at))
        replaced = torch.tensor([one.at != image for one, image in zip(found, keys.images, strict=True)])
        bad = tuple(name for one in found for name in one.bad)
        return Chunk([image for image, _ in pairs], [target for _, target in pairs], replaced, bad)

    def _pair(self, pixels: Tensor, at: int) -> tuple[Tensor, Target]:
        image, target = pixels.float().div_(255), self._target(at, *pixels.shape[-2:])
        if not self._how.augmented:
            return image, target
        del target["crowd"]
        size = side_size(
            *pixels.shape[-2:], side=self._data.train_img_size, longest=LONGEST * self._data.train_img_size
        )
        image, target = resized(image, target, size)
        return mirrored(image, target) if torch.rand(()) < self._data.hflip else (image, target)

    def _target(self, at: int, height: int, width: int) -> Target:
        """As torchvision's detectors take it: classes count from 1, 0 is the background."""
        objects = self._images.target(at)
        kept = ~objects["crowd"] if self._how.augmented else torch.ones_like(objects["crowd"])
        target = {
            "boxes": objects["boxes"][kept],
            "labels": objects["classes"][kept] + 1,
            "area": objects["areas"][kept],
            "crowd": objects["crowd"][kept],
        }
        if self._how.masks:
            from faster_coco_eval.core import mask as utilities

            encoded = [mask for mask, keep in zip(objects["masks"], kept.tolist(), strict=True) if keep]
            target["masks"] = masks_of(encoded, height, width, utilities=utilities)
        return target


def placed(device: torch.device, chunk: Chunk) -> tuple[list[Tensor], list[Target]]:
    """Images and targets of a chunk, on the device."""
    images = [image.to(device, non_blocking=True) for image in chunk.images]
    move = [{name: value.to(device, non_blocking=True) for name, value in target.items()} for target in chunk.labels]
    return images, move


class AnnotatedTrainBatches(TrainBatches):
    """The augmented training batches of one process: x is a list of images, float32 (3, H, W) from 0 to 1; y a list of
    boxes, float32 (n, 4), labels from 1, int64 (n,), area (n,) and, with masks, those, uint8 (n, H, W).
    """

    def __init__(self, data: Data, config: Config, *, masks: bool, device: torch.device, rank: int, world: int) -> None:
        self._masks = masks
        super().__init__(data, config, device=device, rank=rank, world=world)

    def _reader(self, images: Any) -> AnnotatedReader:
        return AnnotatedReader(self._data, self._config, images, Reading(self._masks, augmented=True))

    def _placed(self, chunk: Chunk) -> Batch:
        return Batch(*placed(self._device, chunk))


class AnnotatedEvalBatches(EvalBatches):
    """Images of one process as they lie there, and their objects, crowds too; y is None for an image that does not
    count, as another process has it or it stands for one that cannot be read.
    """

    def __init__(
        self,
        images: AnnotatedImages,
        data: Data,
        config: Config,
        *,
        masks: bool,
        device: torch.device,
        rank: int,
        world: int,
    ) -> None:
        self._masks = masks
        super().__init__(images, data, config, device=device, rank=rank, world=world)

    def _reader(self, images: Any) -> AnnotatedReader:
        return AnnotatedReader(self._data, self._config, images, Reading(self._masks, augmented=False))

    def _placed(self, chunk: Chunk, left_out: Tensor) -> Batch:
        images, targets = placed(self._device, chunk)
        return Batch(images, [None if out else y for y, out in zip(targets, left_out.tolist(), strict=True)])
