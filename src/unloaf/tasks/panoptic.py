"""Panoptic segmentation: a thing or stuff for each pixel, by Panoptic FPN; evaluated by panoptic quality."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from unloaf.config import Config
from unloaf.config.figures import FIGURES
from unloaf.data import Batch, Data
from unloaf.data.annotated_sets import load_annotated
from unloaf.data.panoptic.batches import PanopticEvalBatches, PanopticTrainBatches
from unloaf.evaluation import Reduction
from unloaf.models.backbones import start_of
from unloaf.models.panoptic import build_panoptic
from unloaf.models.preprocessing import describe, with_colours_of_backbone
from unloaf.stages import evaluating, inner_module
from unloaf.tasks.detection import Detection
from unloaf.tasks.panoptic_quality import Quality, matches, quality_of
from unloaf.tasks.task import Where


class Panoptic(Detection):
    """Things and stuff: Panoptic FPN on COCO's panoptic layout; images, stages and methods are those of detection."""

    figures = FIGURES["panoptic"]
    builder = "panoptic"

    def load(self, config: Config, *, resumed: bool) -> tuple[Config, Data, str]:
        """See `Task.load`."""
        config, source = (config, "") if resumed else with_colours_of_backbone(config)
        data = load_annotated(config, masks=False)
        return config, data, describe(data, source)

    def network(self, config: Config, data: Data, *, resumed: bool) -> tuple[nn.Module, tuple[str, ...]]:
        """A network of the data's things and stuff."""
        return build_panoptic(**self._settings(config, data), **start_of(config, resumed=resumed))

    def _settings(self, config: Config, data: Data) -> dict[str, Any]:
        images: Any = data.train
        return super()._settings(config, data) | {"things": list(images.things), "stuff_area": config.stuff_area}

    def usage(self, data: Data) -> tuple[str, ...]:
        """How the network is called."""
        return (
            "The model takes a list of images, tensors of 3 x height x width in [0, 1], RGB, each of its own size; it "
            f"normalises and resizes them itself, to a shorter side of {data.img_size}. Of each it returns segments, "
            "(height, width), the number of each pixel's segment, -1 for none, and of the segments labels, which count "
            "from 0, and scores, NaN of stuff.",
        )

    def train_batches(self, data: Data, config: Config, where: Where) -> Any:
        """See `Task.train_batches`."""
        return PanopticTrainBatches(data, config, **where._asdict())

    def eval_batches(self, images: Any, data: Data, config: Config, where: Where) -> Any:
        """See `Task.eval_batches`."""
        return PanopticEvalBatches(images, data, config, **where._asdict())

    def evaluate(self, model: nn.Module, batches: Iterable[Batch], data: Data, *, reduce: Reduction | None) -> Quality:
        """Panoptic quality, of counts that are summed over processes."""
        images: Any = data.train
        return panoptic_quality(model, batches, images.things, reduce=reduce)


def panoptic_quality(
    model: nn.Module, batches: Iterable[Batch], things: tuple[bool, ...], *, reduce: Reduction | None = None
) -> Quality:
    """The figures of a network; the modes of the modules are put back.

    Args:
        model: from a list of images to their segments; see `PanopticFPN`.
        batches: of `PanopticEvalBatches`.
        things: of each class whether it is countable.
        reduce: adds a tensor over processes.
    """
    network = inner_module(model)
    device = next(network.parameters()).device
    place = device if device.type != "mps" else torch.device("cpu")  # which has no float64
    counts = torch.zeros(len(things), 4, dtype=torch.float64, device=place)
    with evaluating(network):
        for images, targets in batches:
            for found, truth in zip(network(images), targets, strict=True):
                if truth is not None:
                    own, true = ({name: value.to(place) for name, value in part.items()} for part in (found, truth))
                    counts += matches(own, true, len(things))
    return quality_of((reduce(counts) if reduce else counts).cpu(), things)
