"""What a run's network, or a subnet of it, sees in images: classes and their probabilities."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Unpack

import torch
from rich.console import Console
from torch import Tensor, nn

from unloaf.batchnorm import tracking_norms
from unloaf.data.augment import evaluation_transform
from unloaf.data.images import BadImageError, ImageSet, as_pixels, decode, read_image_file
from unloaf.data.walk import is_hidden, is_image
from unloaf.display import show_progress
from unloaf.export import parse_subnet
from unloaf.passes import logits_of
from unloaf.runs.opened import OpenedRun, Opening, open_trained
from unloaf.stages import evaluating
from unloaf.subnet import Subnet
from unloaf.tasks.methods import class_probabilities

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of an image, most probable first, with their probabilities in [0, 1]."""

    image: str
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]


@dataclass(frozen=True)
class Predictions:
    """Images that were looked at by one network."""

    run: Path  # the run's folder
    checkpoint: str  # name of the checkpoint's folder
    epoch: int  # whole epochs that were trained by then
    weights: str  # "model", or "model_ema" for the moving average
    subnet: str  # depths of the network, "3-3-3"
    main: bool  # whether that is the main network
    images: tuple[Prediction, ...]  # those that could be read, in the order given
    bad: tuple[tuple[str, str], ...]  # (name, reason) of each that could not
    notes: tuple[str, ...]  # what a reader has to know of the checkpoint, the statistics and the images


def predict_run(
    run: str | Path,
    images: Sequence[str | Path],
    *,
    depths: str | None = None,
    top_k: int = 5,
    batch_size: int | None = None,
    console: Console | None = None,
    **opening: Unpack[Opening],
) -> Predictions:
    """Classes of images, prepared as the run prepares the images that it is validated with; writes nothing.

    Args:
        run: a folder that `unloaf train` made.
        images: files, or folders of which every image file below is taken.
        depths: of a subnet, "3,3,5,3", as for `export_run`; default: the main network.
        top_k: how many classes of each image.
        batch_size: images in a pass; default: as in the run.
        console: shows a progress bar where it is a terminal.
        opening: see `open_trained`.

    Raises:
        ValueError: no run, no such subnet, or the image set of the run cannot be opened.
        CheckpointError: no checkpoint is intact.
    """
    opened = open_trained(Path(run), need_subnets=depths is not None, **opening)
    opened.check_classifier("unloaf predict", "multilabel")
    stages = opened.training.stages
    full = Subnet.full(stages)
    chosen = full if depths is None else parse_subnet(stages, depths)
    network = opened.subnet(chosen) if stages else opened.network
    names, notes = _files(images), list(opened.notes)
    if chosen != full and tracking_norms(network):
        done = f"re-estimated on {opened.training.calibration_images:,} training images"
        notes.append(
            f"the subnet's batch-norm statistics are {done if opened.recalibrate else 'those of the main network'}"
        )
    seen, bad = list[Prediction](), list[tuple[str, str]]()
    with show_progress(console, total=len(names), label="images") as display:
        for batch in _batches(opened, names, batch_size or opened.config.batch_size, bad, display.advance):
            seen += _predict(opened, network, batch, top_k)
    return Predictions(
        run=Path(run),
        checkpoint=opened.checkpoint,
        epoch=opened.epoch,
        weights=opened.weights,
        subnet=str(chosen),
        main=chosen == full,
        images=tuple(seen),
        bad=tuple(bad),
        notes=tuple(notes),
    )


def _files(given: Sequence[str | Path]) -> list[str]:
    """The files, and of folders the image files below them in alphabetical order; a folder without one stands alone."""
    files: list[str] = []
    for path in map(Path, given):
        if not path.is_dir():
            files.append(str(path))
            continue
        below = []
        for folder, folders, names in os.walk(path):
            folders[:] = [name for name in folders if not is_hidden(name)]
            below += [os.path.join(folder, name) for name in names if is_image(name)]
        files += sorted(below) or [str(path)]
    return files


def _batches(
    opened: OpenedRun,
    names: Sequence[str],
    size: int,
    bad: list[tuple[str, str]],
    advance: Callable[[str], None],
) -> Iterator[list[tuple[str, Tensor]]]:
    """Images that can be read as normalised inputs (C, S, S), in batches; the others are added to `bad`."""
    prepare, batch = _preparation(opened), list[tuple[str, Tensor]]()
    for name in names:
        try:
            batch.append((name, prepare(name)))
        except BadImageError as error:
            reason = "there is no image in this folder" if Path(name).is_dir() else error.reason
            bad.append((name, reason))
        advance(Path(name).name)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _preparation(opened: OpenedRun) -> Callable[[str], Tensor]:
    """From a file to an input: what the run does to an image that it is validated with."""
    data, config = opened.training.data, opened.training.config
    # A set in memory has a side of its own, at which its images are normalised and then resized.
    side = data.train.images.shape[-1] if isinstance(data.train, ImageSet) else None
    transform = evaluation_transform(data, config)

    def prepare(name: str) -> Tensor:
        picture = decode(read_image_file(name, name=name), name=name, max_pixels=config.max_pixels)
        pixels = as_pixels(_fitted(picture, side), channels=data.in_chans) if side else transform(picture)
        return data.normalise(pixels[None])[0]

    return prepare


def _fitted(picture: Image, side: int) -> Image:
    from torchvision.transforms import v2

    if picture.size == (side, side):
        return picture
    return v2.CenterCrop(side)(v2.Resize(side)(picture))


def _predict(
    opened: OpenedRun, network: nn.Module, batch: Sequence[tuple[str, Tensor]], top_k: int
) -> list[Prediction]:
    inputs = torch.stack([pixels for _, pixels in batch]).to(opened.training.device)
    with evaluating(network):
        shares = class_probabilities(opened.training.config, logits_of(network(inputs)))
    best = shares.topk(min(top_k, shares.shape[-1]))
    names = opened.training.data.class_names
    return [
        Prediction(name, tuple(names[label] for label in labels), tuple(values))
        for (name, _), labels, values in zip(batch, best.indices.tolist(), best.values.tolist(), strict=True)
    ]
