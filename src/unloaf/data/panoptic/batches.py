"""Batches of images with segments: lists of images, each of its own size, and of the segments in them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from unloaf.config import Config
from unloaf.data.annotated.batches import LONGEST, placed
from unloaf.data.annotated.targets import Target, mirrored, resized, side_size
from unloaf.data.batches import Batch, EvalBatches, TrainBatches
from unloaf.data.images import as_pixels
from unloaf.data.masks.batches import Pairs
from unloaf.data.reading import BadImagesError, Chunk, Failure, Keys, readable
from unloaf.data.sets import Data
from unloaf.seeds import seed_host


class PanopticReader:
    """Images and segments by key; what comes out depends on the keys alone."""

    def __init__(self, data: Data, config: Config, images: Any, *, augmented: bool) -> None:
        self._data, self._config, self._images, self._augmented = data, config, images, augmented

    def __getitems__(self, keys: Keys) -> Chunk | Failure:
        """The images of these keys."""
        pairs: Any = Pairs(self._images)
        try:
            found = [readable(pairs, image, self._config) for image in keys.images]
        except BadImagesError as error:
            return Failure(str(error))
        made = []
        for one, image, repeat in zip(found, keys.images, keys.repeats, strict=True):
            seed_host("augment-image", self._config.seed, keys.epoch, image, repeat)
            picture, target = one.image
            made.append(self._changed(as_pixels(picture, channels=3).float().div_(255), target))
        replaced = torch.tensor([one.at != image for one, image in zip(found, keys.images, strict=True)])
        bad = tuple(name for one in found for name in one.bad)
        return Chunk([image for image, _ in made], [target for _, target in made], replaced, bad)

    def _changed(self, image: Tensor, target: Target) -> tuple[Tensor, Target]:
        if not self._augmented:
            return image, target
        side = self._data.train_img_size
        image, target = resized(image, target, side_size(*image.shape[-2:], side=side, longest=LONGEST * side))
        return mirrored(image, target) if torch.rand(()) < self._data.hflip else (image, target)


class PanopticTrainBatches(TrainBatches):
    """The augmented training batches of one process: x is a list of images, float32 (3, H, W) from 0 to 1; y a list of
    segments: `segments`, int64 (H, W), -1 for none, `classes`, int64 (n,), and `crowd`, bool (n,).
    """

    def _reader(self, images: Any) -> PanopticReader:
        return PanopticReader(self._data, self._config, images, augmented=True)

    def _placed(self, chunk: Chunk) -> Batch:
        return Batch(*placed(self._device, chunk))


class PanopticEvalBatches(EvalBatches):
    """Images of one process as they lie there, and their segments; y is None for an image that does not count, as
    another process has it or it stands for one that cannot be read.
    """

    def _reader(self, images: Any) -> PanopticReader:
        return PanopticReader(self._data, self._config, images, augmented=False)

    def _placed(self, chunk: Chunk, left_out: Tensor) -> Batch:
        images, targets = placed(self._device, chunk)
        return Batch(images, [None if out else y for y, out in zip(targets, left_out.tolist(), strict=True)])
