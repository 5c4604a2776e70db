"""From keys to arrays, in the training process or in workers, and what is said when that fails."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterable, Iterator
from multiprocessing.connection import wait
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from unloaf.config import Config
from unloaf.data.augment import (
    augmentation,
    changes_pixels,
    crop_and_flip,
    cuts_batches,
    evaluation_transform,
    training_transform,
    windows_of,
)
from unloaf.data.images import BadImageError, Images, ImageSet, as_picture
from unloaf.data.sets import Data
from unloaf.seeds import seed_host

if TYPE_CHECKING:
    from PIL.Image import Image


class Keys(NamedTuple):
    """The images of a batch, in which epoch, and how often each came before in it; decides all of their randomness.

    Lists, because they may travel to a worker.
    """

    epoch: int
    images: list[int]
    repeats: list[int]


class Chunk(NamedTuple):
    """A batch as it leaves a reader.

    `images` is uint8, or float32 where augmentation already normalised them, (B, C, S, S);
    `labels` int64 (B,); of annotated images both are lists with an entry for each. `bad` names images in whose place
    others stand, whose labels are `replaced` (bool (B,)).
    """

    images: Any
    labels: Any
    replaced: Tensor
    bad: tuple[str, ...]


class Failure(NamedTuple):
    """What a worker sends instead of raising: torch would wrap an error's one line in a traceback."""

    message: str


class TrainReader:
    """Augmented training images by key; what comes out depends on the keys alone."""

    def __init__(self, data: Data, config: Config, images: Images) -> None:
        self._data, self._config, self._images = data, config, images
        self._transform = training_transform(data, config)
        self._tables: dict[tuple[int, int], Tensor] = {}
        self._windows: Tensor | None = None
        if isinstance(images, ImageSet) and cuts_batches(data, config):
            self._windows = windows_of(images.images, pad=data.pad)

    def __reduce__(self) -> tuple[Any, ...]:
        # The libraries' transforms are built again in a worker: not all of them can be sent to one.
        return TrainReader, (self._data, self._config, self._images)

    def __getitems__(self, keys: Keys) -> Chunk | Failure:
        """The images of these keys."""
        if self._windows is not None:
            return self._cut(self._windows, keys)
        try:
            found = [readable(self._images, image, self._config) for image in keys.images]
        except BadImagesError as error:
            return Failure(str(error))
        return _stacked(self._images, self._augment([one.image for one in found], keys), found, keys)

    def _cut(self, windows: Tensor, keys: Keys) -> Chunk:
        index = torch.tensor(keys.images)
        pixels = crop_and_flip(windows, index, self._draws(keys, index))
        if changes_pixels(self._config):
            pixels = torch.stack(self._augment(map(as_picture, pixels.cpu()), keys))
        labels = self._images.labels
        return Chunk(pixels, labels[index.to(labels.device)], torch.zeros(len(index), dtype=torch.bool), ())

    def _draws(self, keys: Keys, index: Tensor) -> Tensor:
        tables = set(keys.repeats)
        if len(tables) == 1:
            return self._table(keys.epoch, tables.pop())[index]
        draws, repeats = torch.empty(len(index), 3, dtype=torch.int64), torch.tensor(keys.repeats)
        for repeat in tables:
            mine = repeats == repeat
            draws[mine] = self._table(keys.epoch, repeat)[index[mine]]
        return draws

    def _augment(self, images: Iterable[Image], keys: Keys) -> list[Tensor]:
        pixels = []
        for picture, image, repeat in zip(images, keys.images, keys.repeats, strict=True):
            seed_host("augment-image", self._config.seed, keys.epoch, image, repeat)
            pixels.append(self._transform(picture))
        return pixels

    def _table(self, epoch: int, repeat: int) -> Tensor:
        if (epoch, repeat) not in self._tables:
            self._tables = {at: table for at, table in self._tables.items() if at[0] == epoch}
            self._tables[epoch, repeat] = augmentation(
                len(self._images),
                pad=self._data.pad,
                hflip=self._data.hflip,
                seed=self._config.seed,
                epoch=epoch,
                repeat=repeat,
            )
        return self._tables[epoch, repeat]


class EvalReader:
    """Images by key, resized and cropped to the validation side and not augmented."""

    def __init__(self, data: Data, config: Config, images: Images) -> None:
        self._data, self._config, self._images = data, config, images
        self._transform = evaluation_transform(data, config)

    def __reduce__(self) -> tuple[Any, ...]:
        return EvalReader, (self._data, self._config, self._images)

    def __getitems__(self, keys: Keys) -> Chunk | Failure:
        """The images of these keys."""
        if isinstance(self._images, ImageSet):
            index = torch.tensor(keys.images)
            replaced = torch.zeros(len(index), dtype=torch.bool)
            return Chunk(self._images.images[index], self._images.labels[index], replaced, ())
        try:
            found = [readable(self._images, image, self._config) for image in keys.images]
        except BadImagesError as error:
            return Failure(str(error))
        return _stacked(self._images, [self._transform(one.image) for one in found], found, keys)


class BadImagesError(ValueError):
    """An image that cannot be read, or too many of them."""


class _Found(NamedTuple):
    image: Any
    at: int
    bad: tuple[str, ...]


def readable(images: Images, index: int, config: Config) -> _Found:
    """The image, or, with bad_images skip, the next one that can be read."""
    bad: list[str] = []
    for offset in range(len(images)):
        at = (index + offset) % len(images)
        try:
            return _Found(images.open(at), at, tuple(bad))
        except BadImageError as error:
            if config.bad_images == "stop":
                raise BadImagesError(f"{error}; remove or replace it, or give --bad-images skip") from error
            bad.append(error.name)
            refuse_many(bad, len(images))
    raise AssertionError("1 % of the images was exceeded before")


def refuse_many(bad: Iterable[str], count: int) -> None:
    """Raises BadImagesError if more than 1 % of so many images are bad."""
    names = sorted(bad)
    if 100 * len(names) > count:
        some = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise BadImagesError(
            f"{len(names)} of {count} images cannot be read, more than 1 %: {some}; "
            "list all of them with `unloaf check-data` and replace them"
        )


def _stacked(images: Images, pixels: list[Tensor], found: list[_Found], keys: Keys) -> Chunk:
    labels = images.labels[torch.tensor([one.at for one in found])]
    replaced = torch.tensor([one.at != image for one, image in zip(found, keys.images, strict=True)])
    return Chunk(torch.stack(pixels), labels, replaced, tuple(name for one in found for name in one.bad))


def _as_read(chunk: Any) -> Any:
    return chunk


_LAST_SECONDS = 20  # for what the run still does once it is told to end


def _outlive_signals(worker: int) -> None:
    # A terminal's Ctrl-C goes to the whole group, and some batch systems send SIGTERM to every process; the run wants
    # its workers until its last step is saved. Not forever: a stuck one must still end.
    os.setpgrp()
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(_LAST_SECONDS))


def chunk_loader(reader: Any, plan: Iterable[Keys], *, workers: int, pin: bool) -> DataLoader[Any]:
    """A DataLoader that hands the keys of the plan to the reader; its workers live on between passes.

    It has a generator of its own: torch would draw from the global one, which belongs to the step.
    """
    batches: Any = plan  # torch asks for lists of indices; what it gets it passes on as it is
    return DataLoader(
        reader,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_as_read,
        pin_memory=pin,
        persistent_workers=workers > 0,
        worker_init_fn=_outlive_signals,
        generator=torch.Generator().manual_seed(0),
    )


def read_chunks(loader: DataLoader[Any]) -> Iterator[Chunk]:
    """One pass over a loader; an error ends its workers.

    Raises:
        ValueError: images that cannot be read.
        RuntimeError: a worker died.
    """
    try:
        reader: Any = loader.dataset
        plan: Any = loader.batch_sampler
        # In this process torch's iterator would only add to the time of small batches, 0.1 ms each.
        chunks = iter(loader) if loader.num_workers or loader.pin_memory else map(reader.__getitems__, plan)
        while (chunk := next(chunks, None)) is not None:
            if isinstance(chunk, Failure):
                close_workers(loader)
                raise ValueError(chunk.message)
            yield chunk
    except (RuntimeError, OSError, EOFError) as error:
        death = explain_worker_death(error, loader)
        close_workers(loader)
        if death is None:
            raise
        raise RuntimeError(death) from None


def close_workers(loader: DataLoader[Any]) -> None:
    """Ends the workers of a loader, if it has any; another pass would start new ones.

    Left to the garbage collector this takes 5 seconds for each worker: where the loader is part of a reference
    cycle, as an error's traceback makes one, the queue is gone before its workers are told to end.
    """
    iterator = loader._iterator
    if iterator is not None:
        loader._iterator = None
        iterator._shutdown_workers()  # type: ignore[attr-defined]


def explain_worker_death(error: BaseException, loader: DataLoader[Any] | None = None) -> str | None:
    """One line on the data worker that died, if that is what this error means; None otherwise.

    torch raises such an error from a signal handler, so it can surface anywhere in the training
    process, also between two batches.
    """
    workers = list(getattr(getattr(loader, "_iterator", None), "_workers", []))
    if isinstance(error, (ConnectionError, EOFError)):
        error = _await_death(error, workers)
    told = re.search(r"DataLoader worker \(pid(?:\(s\))? (\d+)", str(error))
    for number, worker in enumerate(workers):
        if (told and worker.pid == int(told[1])) or (told is None and not worker.is_alive()):
            worker.join(timeout=1)
            return _obituary(f"data worker {number} (pid {worker.pid})", worker.exitcode)
    if told is None:
        return None
    by = re.search(r"killed by signal: (.*?)\.? *$", str(error).splitlines()[0])
    return _obituary(f"data worker (pid {told[1]})", None, by[1] if by else None)


def _await_death(error: BaseException, workers: list[Any]) -> BaseException:
    """A broken connection shows before the process is gone, and torch's signal handler may speak up meanwhile."""
    try:
        closed = wait([worker.sentinel for worker in workers], timeout=5)
        for worker in workers:
            if worker.sentinel in closed:  # its files are closed a moment before its exit code is there
                worker.join(timeout=1)
    except RuntimeError as told:
        return told
    return error


def _obituary(who: str, code: int | None, signal_text: str | None = None) -> str:
    if code is not None and code < 0:
        signal_text = signal.Signals(-code).name
    how = f"was killed by {signal_text}" if signal_text else f"ended with exit code {code}"
    return f"{who} {how}; the usual reason is that memory ran out: give fewer --workers or a smaller --batch-size"
