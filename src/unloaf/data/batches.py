"""Batches on the device: order and augmentation as pure functions of (seed, epoch, index).

Nothing hangs on hidden state: a resumed run, another number of workers or processes, or a
second method at the same seed sees exactly the images that the first run saw.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from unloaf.config import Config
from unloaf.data.augment import epoch_order
from unloaf.data.images import Images, ImageSet
from unloaf.data.reading import (
    Chunk,
    EvalReader,
    Keys,
    TrainReader,
    chunk_loader,
    close_workers,
    read_chunks,
    refuse_many,
)
from unloaf.data.sets import Data
from unloaf.seeds import seed_host

# What torch's cross-entropy leaves out.
IGNORED = -100


class Batch(NamedTuple):
    """Inputs and targets: in classification normalised images, float32 (B, C, S, S), and labels, int64 (B,), or shares
    of classes, float (B, K).
    """

    x: Any
    y: Any


class TrainBatches:
    """The augmented training batches of one process among `world`.

    Image i of step s stands at position s * G + i of the epoch's order, G images to a step,
    and i = (part * batch_size + j) * world + rank: the processes take turns, so that together
    they see what a single one with the same G would.

    Attributes:
        steps_per_epoch: optimizer steps of an epoch; images left over are not visited in it.

    Raises:
        ValueError: there are fewer images than one step takes, or augmentation settings do not
            fit the images.
    """

    def __init__(
        self, data: Data, config: Config, *, device: torch.device | str, rank: int = 0, world: int = 1
    ) -> None:
        self._data, self._config, self._device = data, config, torch.device(device)
        self._rank, self._world = rank, world
        self._accumulation = config.accumulation(world)
        self._per_step = world * config.batch_size * self._accumulation
        self.steps_per_epoch = len(data.train) // self._per_step
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"a step takes {self._per_step} {data.unit} ({config.batch_size} x {world} devices x "
                f"{self._accumulation} batches), but {data.name} has {len(data.train)} to train on; give a smaller "
                "--batch-size"
            )
        self._bad: set[str] = set()
        self._mixup = _mixup(data, config) if config.mixes_images else None
        self._plan = _Plan(lambda: iter(()))
        images = data.train
        if config.device_data and isinstance(images, ImageSet):
            images = ImageSet(images.images.to(self._device), images.labels.to(self._device))
        pin = self._device.type == "cuda" and not config.device_data
        self._loader = chunk_loader(self._reader(images), self._plan, workers=config.workers, pin=pin)

    def _reader(self, images: Any) -> Any:
        """What reads the images of a batch, from keys to a chunk."""
        return TrainReader(self._data, self._config, images)

    def _placed(self, chunk: Chunk) -> Batch:
        """The batch of a chunk, on the device."""
        return _on_device(chunk, self._data, self._device, size=self._data.train_img_size)

    @property
    def bad_images(self) -> tuple[str, ...]:
        """Names of the images skipped so far, by this process."""
        return tuple(sorted(self._bad))

    def close(self) -> None:
        """Ends the workers; another epoch would start new ones."""
        close_workers(self._loader)

    def epoch(self, epoch: int, *, start: int = 0) -> Iterator[list[Batch]]:
        """The batches of each optimizer step of an epoch, counted from 1, but for the first ``start`` of them.

        A new epoch ends the one before, also if that was not read to its end.

        Raises:
            ValueError: an image cannot be read, or, with bad_images skip, more than 1 % of them.
            RuntimeError: a worker died.
        """
        if epoch < 1 or not 0 <= start <= self.steps_per_epoch:
            raise ValueError(
                f"epoch {epoch}, start {start}: epochs count from 1, start is from 0 to {self.steps_per_epoch}"
            )
        return self._steps(epoch, start)

    def _steps(self, epoch: int, start: int) -> Iterator[list[Batch]]:
        self._plan.keys = partial(
            _epoch_keys,
            len(self._data.train),
            self._config,
            epoch=epoch,
            steps=range(start, self.steps_per_epoch),
            rank=self._rank,
            world=self._world,
        )
        chunks = read_chunks(self._loader)
        for step in range(start, self.steps_per_epoch):
            yield [self._batch(next(chunks), epoch, step, part) for part in range(self._accumulation)]

    def _batch(self, chunk: Chunk, epoch: int, step: int, part: int) -> Batch:
        _note_bad(chunk, self._bad, self._loader, count=len(self._data.train))
        x, y = self._placed(chunk)
        if self._mixup is None:
            return Batch(x, y)
        # Called in any epoch: it is what smooths the labels.
        off = self._config.mixup_off_epoch
        self._mixup.mixup_enabled = not off or epoch < off
        seed_host("mixup", self._config.seed, epoch, step, part, self._rank)
        return Batch(*self._mixup(x, y))


def _epoch_keys(count: int, config: Config, *, epoch: int, steps: range, rank: int, world: int) -> Iterator[Keys]:
    """Keys of one process's batches in these steps; no method, so that no reference cycle keeps workers alive."""
    order = epoch_order(count, seed=config.seed, epoch=epoch)
    per_step = config.accumulation(world) * config.batch_size
    positions = torch.arange(steps.start * per_step, steps.stop * per_step) * world + rank
    images, repeats = order[positions // config.aug_repeats], positions % config.aug_repeats
    for some, repeat in zip(images.split(config.batch_size), repeats.split(config.batch_size), strict=True):
        yield Keys(epoch, some.tolist(), repeat.tolist())


class _Plan:
    """The keys of the next pass; the loader asks for them again in every pass."""

    def __init__(self, keys: Callable[[], Iterator[Keys]]) -> None:
        self.keys = keys

    def __iter__(self) -> Iterator[Keys]:
        return self.keys()


def _split_keys(count: int, parts: tuple[Tensor, ...]) -> Iterator[Keys]:
    for part in parts:
        yield Keys(0, (part % count).tolist(), [0] * len(part))


class EvalBatches:
    """Images of one process among `world`, not augmented, as often as one iterates over them.

    Process r has images r, r + world, ...; all have batches of the same sizes. Where that takes an
    image twice, or an image that cannot be read is skipped, the label is -100, which
    cross-entropy leaves out; a row of numbers is NaN throughout.

    Iterating raises ValueError and RuntimeError as TrainBatches does.
    """

    def __init__(
        self,
        images: Images,
        data: Data,
        config: Config,
        *,
        device: torch.device | str,
        rank: int = 0,
        world: int = 1,
        batch_size: int | None = None,
    ) -> None:
        self._images, self._data, self._config, self._device = images, data, config, torch.device(device)
        self._positions = torch.arange(-(-len(images) // world)) * world + rank
        self._batch_size = batch_size or config.batch_size
        self._bad: set[str] = set()
        plan = _Plan(partial(_split_keys, len(images), self._parts()))
        # Cutting a batch out of memory is faster than sending it between processes.
        workers = 0 if isinstance(images, ImageSet) else config.workers
        pin = self._device.type == "cuda"
        self._loader = chunk_loader(self._reader(images), plan, workers=workers, pin=pin)

    def _reader(self, images: Any) -> Any:
        """What reads the images of a batch, from keys to a chunk."""
        return EvalReader(self._data, self._config, images)

    def _placed(self, chunk: Chunk, left_out: Tensor) -> Batch:
        """The batch of a chunk, on the device; `left_out` are images that are not to be counted, bool (B,)."""
        nothing = IGNORED if chunk.labels.ndim == 1 else float("nan")  # rows of numbers have no value to spare
        rows = left_out if chunk.labels.ndim == 1 else left_out[:, None]
        chunk = chunk._replace(labels=chunk.labels.masked_fill(rows, nothing))
        return _on_device(chunk, self._data, self._device, size=self._data.img_size)

    @property
    def bad_images(self) -> tuple[str, ...]:
        """Names of the images left out so far, by this process."""
        return tuple(sorted(self._bad))

    def __len__(self) -> int:
        return -(-len(self._positions) // self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        for part, chunk in zip(self._parts(), read_chunks(self._loader), strict=True):
            _note_bad(chunk, self._bad, self._loader, count=len(self._images))
            yield self._placed(chunk, chunk.replaced | (part >= len(self._images)))

    def _parts(self) -> tuple[Tensor, ...]:
        return self._positions.split(self._batch_size) if len(self._positions) else ()


def _note_bad(chunk: Chunk, seen: set[str], loader: DataLoader[Any], *, count: int) -> None:
    seen.update(chunk.bad)
    try:
        refuse_many(seen, count)
    except ValueError:
        close_workers(loader)
        raise


def _on_device(chunk: Chunk, data: Data, device: torch.device, *, size: int) -> Batch:
    images = chunk.images.to(device, non_blocking=True)
    x = images if images.is_floating_point() else data.normalise(images, size=size)
    return Batch(x, chunk.labels.to(device, non_blocking=True))


def _mixup(data: Data, config: Config) -> Any:
    from timm.data.mixup import Mixup

    return Mixup(
        mixup_alpha=config.mixup,
        cutmix_alpha=config.cutmix,
        prob=config.mixup_prob,
        switch_prob=config.mixup_switch_prob,
        label_smoothing=config.smoothing,
        num_classes=data.num_classes,
    )
