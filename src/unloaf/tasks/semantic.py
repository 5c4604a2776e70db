"""Semantic segmentation: a class for each pixel, by semantic FPN; evaluated by the mean intersection over union."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unloaf.config import Config
from unloaf.config.figures import FIGURES
from unloaf.data import Batch, Data
from unloaf.data.masks.batches import MaskEvalBatches, MaskTrainBatches
from unloaf.data.masks.images import VOID
from unloaf.data.masks.sets import load_masked
from unloaf.evaluation import Reduction
from unloaf.inputs import SmallerInputs, resize
from unloaf.methods.ground_truth import GroundTruthTraining
from unloaf.methods.step import TrainingMethod
from unloaf.methods.table import METHODS
from unloaf.methods.terms import Distance
from unloaf.models.backbones import start_of
from unloaf.models.preprocessing import describe, with_colours_of_backbone
from unloaf.models.segmenters import build_segmenter
from unloaf.stages import Stage, evaluating, inner_module
from unloaf.tasks.methods import check_classes, drawn_weight, method_options, sampler_of, stages_for, subnet_distance
from unloaf.tasks.on_backbone import OnBackbone
from unloaf.tasks.task import Where

_UNKNOWN = float("nan")


@dataclass(frozen=True)
class PixelScores:
    """How well the classes of pixels are told, void left out; NaN throughout where a network gives NaN.

    Attributes:
        loss: mean cross-entropy of the pixels, in nats.
        miou: mean over classes of intersection over union, in percent; a class that is neither in the masks nor
            predicted is left out.
        macc: mean over the classes in the masks of the share of their pixels that is found, in percent.
        pixel: share of all pixels whose class is found, in percent.
    """

    loss: float
    miou: float
    macc: float
    pixel: float


class Semantic(OnBackbone):
    """A class for each pixel: semantic FPN on images with masks."""

    figures = FIGURES["semantic"]
    builder = "segmenter"

    def load(self, config: Config, *, resumed: bool) -> tuple[Config, Data, str]:
        """See `Task.load`."""
        config, source = (config, "") if resumed else with_colours_of_backbone(config)
        data = load_masked(config)
        return config, data, describe(data, source)

    def check(self, config: Config, data: Data) -> None:
        """See `Task.check`."""
        check_classes(config, data.num_classes)

    def network(self, config: Config, data: Data, *, resumed: bool) -> tuple[nn.Module, tuple[str, ...]]:
        """A segmenter of the data's classes."""
        return build_segmenter(**self._settings(config, data), **start_of(config, resumed=resumed))

    def usage(self, data: Data) -> tuple[str, ...]:
        """What goes in and out, for the model card."""
        mean, std = (", ".join(f"{value / 255:.4g}" for value in values) for values in (data.mean, data.std))
        return (
            "The model takes RGB images, (batch, 3, height, width) of any size: pixels in [0, 1], less the mean "
            f"({mean}), divided by the standard deviation ({std}). It returns logits, (batch, {data.num_classes}, "
            "height, width); the class of a pixel is their argmax(1).",
        )

    def example(self, data: Data, count: int) -> Tensor:
        """Images of zeros, (count, 3, S, S), of the side of the crops."""
        return torch.zeros(count, data.in_chans, data.train_img_size, data.train_img_size)

    def noise(self, data: Data, count: int, seed: int) -> Tensor:
        """Normally distributed, (count, 3, S, S)."""
        return torch.randn(self.example(data, count).shape, generator=torch.Generator().manual_seed(seed))

    def inputs_of(self, batch: Batch) -> list[Tensor]:
        """Images of the same size together."""
        return [x for x, _ in _by_size((image, None) for image in batch.x)]

    def find_stages(self, config: Config, model: nn.Module, data: Data) -> tuple[Stage, ...]:
        """Those of the backbone."""
        return stages_for(config, model, self.example(data, 1), within="backbone.body")

    def train_batches(self, data: Data, config: Config, where: Where) -> MaskTrainBatches:
        """See `Task.train_batches`."""
        return MaskTrainBatches(data, config, **where._asdict())

    def eval_batches(self, images: Any, data: Data, config: Config, where: Where) -> MaskEvalBatches:
        """See `Task.eval_batches`."""
        return MaskEvalBatches(images, data, config, **where._asdict())

    def method(
        self,
        config: Config,
        model: nn.Module,
        stages: tuple[Stage, ...],
        *,
        steps_per_epoch: int | None = None,
        batches_per_step: int = 1,
    ) -> TrainingMethod:
        """ST*: subnets of the backbone learn from the masks, on smaller images. The other methods are those of
        classification, pixel by pixel.
        """
        if config.method == "st-star":
            return GroundTruthTraining(
                model,
                stages,
                pixel_loss,
                sampler=sampler_of(config, stages),
                num_subnets=config.num_subnets_or_default,
                subnet_weight=drawn_weight(config, steps_per_epoch, batches_per_step),
                shrink=SmallerMasks.of(config),
                seed=config.seed,
                check_finite=False,  # the engine has a rule for it, which all processes must come to
            )
        criterion = nn.CrossEntropyLoss(ignore_index=VOID)
        options = method_options(
            config, model, stages, criterion, steps_per_epoch=steps_per_epoch, batches_per_step=batches_per_step
        )
        if options.get("subnet_inputs") is not None:
            options["subnet_loss"] = AtTeachersSize(subnet_distance(config))
        return METHODS[config.method].factory(model, stages, readout=classes_last, **options)

    def evaluate(
        self, model: nn.Module, batches: Iterable[Batch], data: Data, *, reduce: Reduction | None
    ) -> PixelScores:
        """See `pixel_scores`."""
        return pixel_scores(model, batches, data.num_classes, reduce=reduce)


def classes_last(logits: Tensor) -> Tensor:
    """(B, classes, H, W) as (B, H, W, classes).

    >>> classes_last(torch.zeros(2, 11, 4, 6)).shape
    torch.Size([2, 4, 6, 11])
    """
    return logits.movedim(1, -1)


def pixel_loss(model: nn.Module, batch: Any) -> Tensor:
    """Mean cross-entropy of the pixels that are not void, in nats; 0 where all are.

    >>> masks = torch.tensor([[[0, 255], [1, 1]]])
    >>> pixel_loss(torch.nn.Conv2d(3, 2, 1), (torch.zeros(1, 3, 2, 2), masks)).shape
    torch.Size([])
    """
    x, y = batch
    total, count = _summed(model(x), y)
    return total / count.clamp(min=1)


def _summed(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    return F.cross_entropy(logits, y, ignore_index=VOID, reduction="sum"), (y != VOID).sum()


@dataclass(frozen=True)
class AtTeachersSize:
    """A distance of the logits of pixels, (B, H, W, classes), where the student's are of a smaller image.

    They are resized to the teacher's height and width, bilinearly, as the network does with its own at the end: the
    subnet answers for the pixels that the main network saw.

    >>> import unloaf
    >>> distance = AtTeachersSize(unloaf.kl_loss)
    >>> distance(torch.zeros(1, 2, 3, 5), torch.zeros(1, 4, 6, 5))
    tensor(0.)
    """

    distance: Distance

    def __call__(self, student: Tensor, teacher: Tensor, *, counted: Tensor | None = None) -> Tensor:
        """The distance at the size of the teacher."""
        if student.shape[1:3] != teacher.shape[1:3]:
            resized = F.interpolate(student.movedim(-1, 1), size=teacher.shape[1:3], mode="bilinear")
            student = resized.movedim(1, -1)
        return self.distance(student, teacher, counted=counted)


@dataclass(frozen=True)
class SmallerMasks:
    """Images at a randomly drawn smaller side, and their masks with them: what subnets see in ST*.

    Attributes:
        inputs: the sides.

    Source: Ye et al. 2023 (ST++), random smaller inputs in fine-tuning.

    >>> smaller = SmallerMasks(SmallerInputs(sides=(2,)))
    >>> masks = torch.tensor([[[0, 0, 7, 7], [0, 0, 7, 7], [1, 1, 2, 2], [1, 1, 2, 2]]])
    >>> images, masks = smaller((torch.zeros(1, 3, 4, 4), masks), torch.Generator())
    >>> images.shape, masks.tolist()
    (torch.Size([1, 3, 2, 2]), [[[0, 7], [1, 2]]])
    """

    inputs: SmallerInputs

    @classmethod
    def of(cls, config: Config) -> SmallerMasks | None:
        """As the configuration says; None for the main network's images."""
        if config.subnet_inputs == "same":
            return None
        return cls(SmallerInputs(config.min_ratio, per=config.per, sides=config.sides or None))

    @property
    def per(self) -> str:
        """Whether each subnet or each step has a side of its own."""
        return self.inputs.per

    def __call__(self, batch: Any, generator: torch.Generator) -> Any:
        """The batch at one smaller side."""
        images, masks = batch
        images = resize(images, self.inputs.draw(min(images.shape[-2:]), generator))
        # As floats, which hold every id: there is no such interpolation of integers.
        smaller = F.interpolate(masks[:, None].float(), size=images.shape[-2:], mode="nearest-exact")[:, 0]
        return images, smaller.to(masks.dtype)


def pixel_scores(
    model: nn.Module, batches: Iterable[Batch], classes: int, *, reduce: Reduction | None = None
) -> PixelScores:
    """The figures of a segmenter on whole images, of one matrix over all pixels; the modes of the modules are put back.

    Args:
        model: from images, (B, 3, H, W), to logits, (B, classes, H, W).
        batches: of `MaskEvalBatches`; images of the same size are evaluated together.
        classes: how many there are.
        reduce: adds a tensor over processes.

    Raises:
        ValueError: all pixels are void.
    """
    network = inner_module(model)
    device = next(network.parameters()).device
    sums = torch.zeros(classes * classes + 1, dtype=torch.float64, device=device if device.type != "mps" else "cpu")
    with evaluating(network):
        for batch in batches:
            counted = [(x, y) for x, y in zip(*batch, strict=True) if y is not None]
            for x, y in _by_size(counted):
                logits = network(x)
                loss, _ = _summed(logits, y)
                found = confusion(logits.argmax(1), y, classes)
                sums += torch.cat([found.flatten(), loss[None]]).to(sums)
    matrix, loss = (reduce(sums) if reduce else sums).cpu().split([classes * classes, 1])
    return scores_of(matrix.view(classes, classes), float(loss))


def confusion(predicted: Tensor, truth: Tensor, classes: int) -> Tensor:
    """How many pixels of each class, a row each, are taken for which, void left out; (classes, classes), int64.

    >>> confusion(torch.tensor([0, 1, 1, 1]), torch.tensor([0, 0, 1, 255]), 2).tolist()
    [[1, 1], [0, 1]]
    """
    counted = truth != VOID
    pairs = truth[counted] * classes + predicted[counted]
    return torch.bincount(pairs, minlength=classes * classes).view(classes, classes)


def scores_of(matrix: Tensor, loss: float) -> PixelScores:
    """The figures of a confusion matrix and the summed loss of its pixels.

    Raises:
        ValueError: there is no pixel.

    >>> scores_of(torch.tensor([[3.0, 1.0, 0.0], [0.0, 4.0, 0.0], [0.0, 0.0, 0.0]]), loss=4.0)
    PixelScores(loss=0.5, miou=77.5, macc=87.5, pixel=87.5)
    """
    total = float(matrix.sum())
    if not total:
        raise ValueError("there is no pixel to evaluate on: all of them are void; give masks with classes")
    if loss != loss:
        return PixelScores(_UNKNOWN, _UNKNOWN, _UNKNOWN, _UNKNOWN)
    hits, truth, predicted = matrix.diagonal().double(), matrix.sum(1).double(), matrix.sum(0).double()
    union = truth + predicted - hits
    shares = {"miou": (hits / union)[union > 0], "macc": (hits / truth)[truth > 0]}
    return PixelScores(
        loss=loss / total,
        pixel=100 * float(hits.sum()) / total,
        **{name: 100 * float(share.mean()) for name, share in shares.items()},
    )


def _by_size(pairs: Iterable[tuple[Tensor, Any]]) -> Iterator[tuple[Tensor, Any]]:
    """Images of the same height and width as one batch, and their masks, if they have any."""
    groups: dict[torch.Size, list[tuple[Tensor, Any]]] = {}
    for x, y in pairs:
        groups.setdefault(x.shape, []).append((x, y))
    for group in groups.values():
        masks = [y for _, y in group if y is not None]
        yield torch.stack([x for x, _ in group]), torch.stack(masks) if len(masks) == len(group) else None
