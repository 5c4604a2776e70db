"""Batches of people cut out of their images: scaled, turned and mirrored in training, by their boxes in evaluation."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from unloaf.config import Config
from unloaf.data.batches import Batch, EvalBatches, TrainBatches
from unloaf.data.images import as_pixels
from unloaf.data.people.crops import Window, cut_out, inverse, mapped, width_of, window_of
from unloaf.data.people.images import Marked, PeopleImages, Person
from unloaf.data.people.joints import mirrored_order
from unloaf.data.reading import BadImagesError, Chunk, Failure, Keys, readable
from unloaf.data.sets import Data
from unloaf.seeds import seed_host

if TYPE_CHECKING:
    from PIL.Image import Image

SCALES = 0.3  # a crop is that share larger or smaller, and turned by that angle, at most (Xiao et al. 2018, section 2)
ANGLES = math.radians(40)


class Judged(NamedTuple):
    """A person of an evaluation.

    Attributes:
        person: box and joints in pixels of the image.
        others: who is in the same image and is no target.
        joints: x and y in pixels of the crop and 1, or 0 where the joint is not marked or lies outside, float32 (K, 3).
        to_image: the affine map from points of the crop to those of the image, float64 (2, 3).
    """

    person: Person
    others: Marked
    joints: Tensor
    to_image: Tensor


class PeopleReader:
    """Crops and joints by key; what comes out depends on the keys alone."""

    def __init__(self, data: Data, config: Config, images: PeopleImages, *, augmented: bool) -> None:
        self._data, self._config, self._images, self._augmented = data, config, images, augmented
        self._height = data.train_img_size if augmented else data.img_size
        self._order = mirrored_order(data.class_names) if augmented and data.hflip else []

    def __getitems__(self, keys: Keys) -> Chunk | Failure:
        """The people of these keys."""
        try:
            found = [readable(self._images, image, self._config) for image in keys.images]
        except BadImagesError as error:
            return Failure(str(error))
        crops, targets = [], []
        for one, image, repeat in zip(found, keys.images, keys.repeats, strict=True):
            person = self._images.person(one.at)
            window = window_of(person.box.tolist())
            if self._augmented:
                seed_host("augment-image", self._config.seed, keys.epoch, image, repeat)
                window = changed(window, hflip=self._data.hflip)
            affine = window.to_crop(self._height)
            crops.append(self._crop(one.image, affine))
            joints = joints_in(person.joints, affine, self._height, order=self._order if window.mirrored else None)
            others = self._images.others_in(person.image)
            targets.append(joints if self._augmented else Judged(person, others, joints, inverse(affine)))
        replaced = torch.tensor([one.at != image for one, image in zip(found, keys.images, strict=True)])
        bad = tuple(name for one in found for name in one.bad)
        return Chunk(torch.stack(crops), torch.stack(targets) if self._augmented else targets, replaced, bad)

    def _crop(self, picture: Image, affine: Tensor) -> Tensor:
        red, green, blue = (round(value) for value in self._data.mean)
        crop = cut_out(picture, affine, self._height, fill=(red, green, blue))
        return self._data.normalise(as_pixels(crop, channels=3)[None], size=crop.width)[0]


def changed(window: Window, *, hflip: float) -> Window:
    """The window up to 30 % larger or smaller, turned by up to 40 degrees, each drawn uniformly, and perhaps mirrored.

    Source: Xiao et al. 2018, section 2, which states the ranges and not how they are drawn from.

    >>> window = changed(Window(x=10, y=10, height=100), hflip=0.0)
    >>> 70 <= window.height <= 130, abs(window.angle) <= ANGLES, window.mirrored
    (True, True, False)
    """
    share, turn, mirror = torch.rand(3, dtype=torch.float64).tolist()
    return window._replace(
        height=window.height * (1 + SCALES * (2 * share - 1)), angle=ANGLES * (2 * turn - 1), mirrored=mirror < hflip
    )


def joints_in(joints: Tensor, affine: Tensor, height: int, *, order: list[int] | None) -> Tensor:
    """Joints of an image, (K, 3), as points of a crop and 1 for those that are marked and lie in it, float32 (K, 3).

    >>> affine = Window(x=30, y=40, height=40).to_crop(80)
    >>> joints_in(torch.tensor([[30.0, 40, 2], [16, 40, 1], [9, 9, 0]]).double(), affine, 80, order=None).tolist()
    [[30.0, 40.0, 1.0], [2.0, 40.0, 1.0], [0.0, 0.0, 0.0]]
    """
    points = mapped(joints[:, :2], affine)
    inside = (points >= 0).all(1) & (points[:, 0] < width_of(height)) & (points[:, 1] < height)
    counted = inside & (joints[:, 2] > 0)
    found = torch.where(counted[:, None], torch.cat([points, counted[:, None]], 1), 0.0).float()
    return found if order is None else found[order]


class PeopleTrainBatches(TrainBatches):
    """The augmented training batches of one process: x is normalised, float32 (B, 3, H, 3/4 H); y has the joints, x and
    y in pixels of the crop and 1, or 0 for those that are not marked or lie outside, float32 (B, K, 3).
    """

    def _reader(self, images: PeopleImages) -> PeopleReader:
        return PeopleReader(self._data, self._config, images, augmented=True)

    def _placed(self, chunk: Chunk) -> Batch:
        return Batch(*(part.to(self._device, non_blocking=True) for part in (chunk.images, chunk.labels)))


class PeopleEvalBatches(EvalBatches):
    """Crops of one process, float32 (B, 3, H, 3/4 H), and a `Judged` for each; None for a person who does not count, as
    another process has them or they stand for one whose image cannot be read.
    """

    def _reader(self, images: PeopleImages) -> PeopleReader:
        return PeopleReader(self._data, self._config, images, augmented=False)

    def _placed(self, chunk: Chunk, left_out: Tensor) -> Batch:
        images = chunk.images.to(self._device, non_blocking=True)
        return Batch(images, [None if out else y for y, out in zip(chunk.labels, left_out.tolist(), strict=True)])
