"""Batches of images with masks: scaled, cropped and mirrored together in training, whole in evaluation."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unloaf.config import Config
from unloaf.data.annotated.targets import mirrored, resized
from unloaf.data.batches import Batch, EvalBatches, TrainBatches
from unloaf.data.images import as_pixels
from unloaf.data.masks.images import VOID, MaskedImages
from unloaf.data.reading import BadImagesError, Chunk, Failure, Keys, readable
from unloaf.data.sets import Data
from unloaf.seeds import seed_host

SCALES = (0.5, 2.0)  # between which a training image is resized, as in the usual settings for street scenes


class MaskReader:
    """Images and masks by key; what comes out depends on the keys alone."""

    def __init__(self, data: Data, config: Config, images: MaskedImages, *, augmented: bool) -> None:
        self._data, self._config, self._images, self._augmented = data, config, images, augmented

    def __getitems__(self, keys: Keys) -> Chunk | Failure:
        """The images of these keys."""
        pairs: Any = Pairs(self._images)
        try:
            found = [readable(pairs, image, self._config) for image in keys.images]
        except BadImagesError as error:
            return Failure(str(error))
        images, masks = [], []
        for one, image, repeat in zip(found, keys.images, keys.repeats, strict=True):
            picture, mask = one.image
            pixels = self._data.normalise(as_pixels(picture, channels=3)[None], size=picture.width)[0]
            if self._augmented:
                seed_host("augment-image", self._config.seed, keys.epoch, image, repeat)
                pixels, mask = augmented(pixels, mask, side=self._data.train_img_size, hflip=self._data.hflip)
            images.append(pixels)
            masks.append(mask)
        replaced = torch.tensor([one.at != image for one, image in zip(found, keys.images, strict=True)])
        bad = tuple(name for one in found for name in one.bad)
        if self._augmented:
            return Chunk(torch.stack(images), torch.stack(masks), replaced, bad)
        return Chunk(images, masks, replaced, bad)


class Pairs:
    """Images whose opening gives the mask or the segments too, so that what is wrong with either is treated alike."""

    def __init__(self, images: Any) -> None:
        self.open, self._count = images.pair, len(images)

    def __len__(self) -> int:
        return self._count


def augmented(image: Tensor, mask: Tensor, *, side: int, hflip: float) -> tuple[Tensor, Tensor]:
    """Resized by a factor drawn from 0.5 to 2, a window of side x side pixels at a drawn place, and perhaps mirrored.

    Args:
        image: normalised, float (3, H, W); outside of it there are zeros, the mean colour.
        mask: uint8 (H, W); outside of it there is void.
        side: in pixels. An image that is smaller lies at a drawn place in the window.
        hflip: probability of a mirrored image.

    >>> image, mask = augmented(torch.zeros(3, 8, 12), torch.zeros(8, 12, dtype=torch.uint8), side=32, hflip=0.5)
    >>> image.shape, mask.shape, int(mask[mask != 255].numel()) >= 4 * 6
    (torch.Size([3, 32, 32]), torch.Size([32, 32]), True)
    """
    factor = SCALES[0] + (SCALES[1] - SCALES[0]) * float(torch.rand(()))
    height, width = (max(1, round(length * factor)) for length in mask.shape)
    image, target = resized(image, {"masks": mask[None]}, (height, width))
    top, left = (_place(length, side) for length in (height, width))
    image, mask = window(image, target["masks"][0], top=top, left=left, side=side)
    if torch.rand(()) < hflip:
        image, target = mirrored(image, {"masks": mask[None]})
        mask = target["masks"][0]
    return image, mask


def _place(length: int, side: int) -> int:
    """Where a window begins: inside of the image, or the image inside of it."""
    low, high = min(0, length - side), max(0, length - side)
    return int(torch.randint(low, high + 1, ()))


def window(image: Tensor, mask: Tensor, *, top: int, left: int, side: int) -> tuple[Tensor, Tensor]:
    """The pixels of a square from there on, which may lie beyond the edge: zeros, and void in the mask.

    >>> image, mask = window(torch.ones(1, 2, 2), torch.ones(2, 2, dtype=torch.uint8), top=1, left=-1, side=3)
    >>> mask.tolist()
    [[255, 1, 1], [255, 255, 255], [255, 255, 255]]
    """
    height, width = mask.shape
    edges = (-left, left + side - width, -top, top + side - height)  # negative where pixels are cut off
    return F.pad(image, edges), F.pad(mask, edges, value=VOID)


class MaskTrainBatches(TrainBatches):
    """The augmented training batches of one process: x is normalised, float32 (B, 3, S, S); y has the classes of the
    pixels, int64 (B, S, S), 255 where there is none.
    """

    def _reader(self, images: Any) -> MaskReader:
        return MaskReader(self._data, self._config, images, augmented=True)

    def _placed(self, chunk: Chunk) -> Batch:
        images, masks = (part.to(self._device, non_blocking=True) for part in (chunk.images, chunk.labels))
        return Batch(images, masks.long())


class MaskEvalBatches(EvalBatches):
    """Whole images of one process, each of its own size, and their masks: x is a list of normalised images, float32
    (3, H, W), y one of classes, int64 (H, W); None for an image that does not count, as another process has it or it
    stands for one that cannot be read.
    """

    def _reader(self, images: Any) -> MaskReader:
        return MaskReader(self._data, self._config, images, augmented=False)

    def _placed(self, chunk: Chunk, left_out: Tensor) -> Batch:
        images = [image.to(self._device, non_blocking=True) for image in chunk.images]
        masks = [mask.to(self._device, non_blocking=True).long() for mask in chunk.labels]
        return Batch(images, [None if out else y for y, out in zip(masks, left_out.tolist(), strict=True)])
