"""Batches of images some of whose patches are hidden: the noise that says which is a pure function of seed and step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from unloaf.config import Config
from unloaf.data.batches import Batch, EvalBatches, TrainBatches
from unloaf.data.images import Images
from unloaf.data.reading import Chunk
from unloaf.data.sets import Data
from unloaf.seeds import generator_for


class PatchTrainBatches(TrainBatches):
    """The augmented training batches of one process: x is a mapping of images and noise, float32 (B, patches).

    The noise depends on seed, epoch, step and the image's place in the step: main network and subnets get the same, and
    processes together what a single one would.
    """

    def __init__(self, data: Data, config: Config, *, patches: int, **where: Any) -> None:
        super().__init__(data, config, **where)
        self._patches = patches

    def _batch(self, chunk: Chunk, epoch: int, step: int, part: int) -> Batch:
        x, y = super()._batch(chunk, epoch, step, part)
        generator = generator_for("patches", self._config.seed, epoch, step, part)
        noise = torch.rand(len(x) * self._world, self._patches, generator=generator)[self._rank :: self._world]
        return Batch({"pixel_values": x, "noise": noise.to(x.device)}, y)


class PatchEvalBatches(EvalBatches):
    """Images of one process, not augmented, with noise that is of each image, always the same."""

    def __init__(self, images: Images, data: Data, config: Config, *, patches: int, **where: Any) -> None:
        super().__init__(images, data, config, **where)
        self._noise = torch.rand(len(images), patches, generator=generator_for("patches", config.seed))

    def __iter__(self) -> Iterator[Batch]:
        for (x, y), part in zip(super().__iter__(), self._parts(), strict=True):
            yield Batch({"pixel_values": x, "noise": self._noise[part % len(self._noise)].to(x.device)}, y)
