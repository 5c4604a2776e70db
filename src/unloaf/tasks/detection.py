"""Object detection and instance segmentation: boxes, and masks, by torchvision's detectors; evaluated by COCO's mAP."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from unloaf.config import Config
from unloaf.config.figures import FIGURES
from unloaf.data import Batch, Data
from unloaf.data.annotated.batches import LONGEST, AnnotatedEvalBatches, AnnotatedTrainBatches
from unloaf.data.annotated.targets import resized
from unloaf.data.annotated_sets import DEFAULT_SIDE, load_annotated
from unloaf.evaluation import Reduction
from unloaf.inputs import SmallerInputs
from unloaf.methods.ground_truth import GroundTruthTraining
from unloaf.methods.step import TrainingMethod
from unloaf.models.backbones import start_of
from unloaf.models.detectors import build_detector
from unloaf.models.preprocessing import describe, with_colours_of_backbone
from unloaf.stages import Stage, evaluating, find_stages, inner_module
from unloaf.tasks.methods import drawn_weight, sampler_of
from unloaf.tasks.on_backbone import OnBackbone
from unloaf.tasks.task import Where


@dataclass(frozen=True)
class Precision:
    """COCO's mean average precision of boxes, in percent.

    Attributes:
        map: over the IoU thresholds 0.50, 0.55 ... 0.95.
        map50: at 0.50.
        map75: at 0.75.
    """

    map: float
    map50: float
    map75: float


@dataclass(frozen=True)
class MaskPrecision:
    """The same of masks, and beside it `box_map`, of their boxes."""

    mask_map: float
    mask_map50: float
    mask_map75: float
    box_map: float


class Detection(OnBackbone):
    """Boxes: torchvision's Faster R-CNN, FCOS and RetinaNet on COCO's and VOC's layouts."""

    figures = FIGURES["detection"]
    builder = "detector"
    masks = False

    def load(self, config: Config, *, resumed: bool) -> tuple[Config, Data, str]:
        """See `Task.load`."""
        missing = [name for name in ("faster_coco_eval", "torchmetrics") if find_spec(name) is None]
        if missing:
            raise ValueError(f"task {config.task} needs {', '.join(missing)}: pip install 'unloaf[detection]'")
        config, source = (config, "") if resumed else with_colours_of_backbone(config)
        data = load_annotated(config, masks=self.masks)
        return config, data, describe(data, source)

    def check(self, config: Config, data: Data) -> None:
        """See `Task.check`; the configuration is looked at when it is made."""

    def network(self, config: Config, data: Data, *, resumed: bool) -> tuple[nn.Module, tuple[str, ...]]:
        """A detector of the data's classes."""
        return build_detector(**self._settings(config, data), **start_of(config, resumed=resumed))

    def _settings(self, config: Config, data: Data) -> dict[str, Any]:
        return super()._settings(config, data) | {
            "img_size": data.img_size,
            "longest": round(LONGEST * data.img_size),
            "mean": tuple(value / 255 for value in data.mean),
            "std": tuple(value / 255 for value in data.std),
        }

    def example(self, data: Data, count: int) -> list[Tensor]:
        """Images of zeros, (3, S, S) each; what a second stage costs depends on what the first finds in an image."""
        return [torch.zeros(3, data.img_size, data.img_size)] * count

    def noise(self, data: Data, count: int, seed: int) -> list[Tensor]:
        """Images of random pixels, (3, S, S) each."""
        generator = torch.Generator().manual_seed(seed)
        return list(torch.rand(count, 3, data.img_size, data.img_size, generator=generator))

    def usage(self, data: Data) -> tuple[str, ...]:
        """How torchvision's detectors are called."""
        masks = ", masks (n, 1, height, width) of probabilities" if self.masks else ""
        return (
            "The model takes a list of images, tensors of 3 x height x width in [0, 1], RGB, each of its own size; it "
            f"normalises and resizes them itself, to a shorter side of {data.img_size}. Of each it returns boxes, "
            f"(left, top, right, bottom) in pixels of the image, scores{masks} and labels, which count from 1.",
        )

    def find_stages(self, config: Config, model: nn.Module, data: Data) -> tuple[Stage, ...]:
        """Those of the backbone; looked for at a small side, for which the blocks are the same."""
        return find_stages(model, [torch.zeros(3, 64, 64)], within="backbone.body")

    def train_batches(self, data: Data, config: Config, where: Where) -> AnnotatedTrainBatches:
        """See `Task.train_batches`."""
        return AnnotatedTrainBatches(data, config, masks=self.masks, **where._asdict())

    def eval_batches(self, images: Any, data: Data, config: Config, where: Where) -> AnnotatedEvalBatches:
        """See `Task.eval_batches`."""
        return AnnotatedEvalBatches(images, data, config, masks=self.masks, **where._asdict())

    def method(
        self,
        config: Config,
        model: nn.Module,
        stages: tuple[Stage, ...],
        *,
        steps_per_epoch: int | None = None,
        batches_per_step: int = 1,
    ) -> TrainingMethod:
        """ST*: subnets of the backbone learn from the objects, on smaller images; common training is the same without
        subnets.
        """
        if config.method == "common":
            return GroundTruthTraining(model, stages, losses, subnet_weight=0.0, seed=config.seed, check_finite=False)
        return GroundTruthTraining(
            model,
            stages,
            losses,
            sampler=sampler_of(config, stages),
            num_subnets=config.num_subnets_or_default,
            subnet_weight=drawn_weight(config, steps_per_epoch, batches_per_step),
            shrink=SmallerImages.of(config),
            seed=config.seed,
            check_finite=False,  # the engine has a rule for it, which all processes must come to
        )

    def evaluate(self, model: nn.Module, batches: Iterable[Batch], data: Data, *, reduce: Reduction | None) -> Any:
        """Mean average precision; processes exchange their predictions through torchmetrics."""
        return precision(model, batches, masks=self.masks)


class InstanceSegmentation(Detection):
    """Boxes and masks: torchvision's Mask R-CNN on COCO's layout."""

    figures = FIGURES["instance"]
    masks = True


def losses(model: nn.Module, batch: Any) -> Mapping[str, Tensor]:
    """The losses of one of torchvision's detectors in training."""
    images, targets = batch
    return model(images, targets)


@dataclass(frozen=True)
class SmallerImages:
    """Images at a randomly drawn smaller side, and the objects that go with them: what subnets see in ST*.

    Attributes:
        inputs: the sides, of images whose shorter side is `side`; each image is resized by the drawn share of it.
        side: of the main network's images, in pixels.

    Source: Ye et al. 2023 (ST++), random smaller inputs in fine-tuning.

    >>> from unloaf.inputs import SmallerInputs
    >>> smaller, drawn = SmallerImages(SmallerInputs(sides=(4,)), side=8), torch.Generator()
    >>> images, targets = smaller(([torch.zeros(3, 8, 12)], [{"boxes": torch.tensor([[2.0, 0.0, 6.0, 8.0]])}]), drawn)
    >>> images[0].shape, targets[0]["boxes"].tolist()
    (torch.Size([3, 4, 6]), [[1.0, 0.0, 3.0, 4.0]])
    """

    inputs: SmallerInputs
    side: int

    @classmethod
    def of(cls, config: Config) -> SmallerImages | None:
        """As the configuration says; None for the main network's images."""
        if config.subnet_inputs == "same":
            return None
        side = config.train_img_size or config.img_size or DEFAULT_SIDE
        return cls(SmallerInputs(config.min_ratio, per=config.per, sides=config.sides or None), side)

    @property
    def per(self) -> str:
        """Whether each subnet or each step has a side of its own."""
        return self.inputs.per

    def __call__(self, batch: Any, generator: torch.Generator) -> Any:
        """The batch at one smaller side."""
        share = self.inputs.draw(self.side, generator) / self.side
        pairs = [
            resized(image, target, (max(1, round(image.shape[-2] * share)), max(1, round(image.shape[-1] * share))))
            for image, target in zip(*batch, strict=True)
        ]
        return [image for image, _ in pairs], [target for _, target in pairs]


def precision(model: nn.Module, batches: Iterable[Batch], *, masks: bool) -> Any:
    """COCO's mean average precision of a detector, in percent, over the batches of all processes; the modes of the
    modules are put back.
    """
    from torchmetrics.detection import MeanAveragePrecision

    kinds = ("bbox", "segm") if masks else ("bbox",)
    network = inner_module(model)
    metric = MeanAveragePrecision(iou_type=kinds, backend="faster_coco_eval", sync_on_compute=False)
    metric.warn_on_many_detections = False
    with evaluating(network):
        for images, targets in batches:
            found = network(images)
            pairs = [(one, target) for one, target in zip(found, targets, strict=True) if target is not None]
            metric.update([_prediction(one, masks) for one, _ in pairs], [_truth(target, masks) for _, target in pairs])
    _gather(metric)
    values = {name: 100 * float(value) for name, value in metric.compute().items() if value.numel() == 1}
    if not masks:
        return Precision(values["map"], values["map_50"], values["map_75"])
    return MaskPrecision(values["segm_map"], values["segm_map_50"], values["segm_map_75"], box_map=values["bbox_map"])


def _gather(metric: Any) -> None:
    """Gives the metric what those of the other processes saw, in the order in which one process would have seen it.

    torchmetrics itself takes for granted that all saw equally many images, which they do not where one is left out.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    states: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(states, metric.metric_state)
    for name in metric.metric_state:
        turns = zip_longest(*(state[name] for state in states))  # image by image; process r has r, r + world, ...
        setattr(metric, name, [value for turn in turns for value in turn if value is not None])


def _prediction(found: Mapping[str, Tensor], masks: bool) -> dict[str, Tensor]:
    kept = {name: found[name].cpu() for name in ("boxes", "scores", "labels")}
    return kept | {"masks": (found["masks"][:, 0] > 0.5).cpu()} if masks else kept


def _truth(target: Mapping[str, Tensor], masks: bool) -> dict[str, Tensor]:
    names = ("boxes", "labels", "area", *["masks"] * masks)
    kept = {name: target[name].cpu() for name in names} | {"iscrowd": target["crowd"].long().cpu()}
    return kept | {"masks": kept["masks"].bool()} if masks else kept
