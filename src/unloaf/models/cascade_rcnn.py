"""Cascade R-CNN: three box heads in a row, each of which sees the boxes that the one before has refined."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FasterRCNN, TwoMLPHead
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss
from torchvision.ops import MultiScaleRoIAlign, clip_boxes_to_image


class CascadeStage(NamedTuple):
    """What one head is trained for.

    Attributes:
        iou: with an object, from which on a box is one of it; below it is background.
        weights: by which the four numbers of a box are scaled: the later the stage, the smaller its corrections.
        loss: by which the stage's losses count.
    """

    iou: float
    weights: tuple[float, float, float, float]
    loss: float


STAGES = (
    CascadeStage(0.5, (10.0, 10.0, 5.0, 5.0), 1.0),
    CascadeStage(0.6, (20.0, 20.0, 10.0, 10.0), 0.5),
    CascadeStage(0.7, (30.0, 30.0, 15.0, 15.0), 0.25),
)
_POOLED, _HIDDEN = 7, 1024  # side of a box's features, and what they become


class CascadeHeads(nn.Module):
    """The second stage of an R-CNN, in place of torchvision's `RoIHeads`.

    A head regresses one box, whatever the class. In training, each head matches and samples anew among the boxes that
    the head before made of those it was trained on, the objects' own boxes beside them. Evaluated, the boxes are the
    last head's, and the score of a class is the mean of what the three heads say of the boxes that the last one is
    given.

    Attributes:
        stages: a `RoIHeads` of torchvision each, for its matching, sampling and coding.

    Source: Cai and Vasconcelos 2018, sections 4 and 5. Their loss has no weights of stages; these are those of
        mmdetection, by which Ye et al. 2023 trained. It scores each head on the boxes that this head is given.
    """

    def __init__(self, channels: int, num_classes: int, *, least_score: float) -> None:
        super().__init__()
        pool = MultiScaleRoIAlign(featmap_names=["0", "1", "2", "3"], output_size=_POOLED, sampling_ratio=2)
        self.num_classes = num_classes
        self.stages = nn.ModuleList(
            RoIHeads(
                box_roi_pool=pool,
                box_head=TwoMLPHead(channels * _POOLED**2, _HIDDEN),
                box_predictor=_Predictor(_HIDDEN, num_classes),
                fg_iou_thresh=stage.iou,
                bg_iou_thresh=stage.iou,
                batch_size_per_image=512,
                positive_fraction=0.25,
                bbox_reg_weights=stage.weights,
                score_thresh=least_score,
                nms_thresh=0.5,
                detections_per_img=100,
            )
            for stage in STAGES
        )

    def forward(
        self,
        features: Mapping[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Detections, () in training, and losses, {} in evaluation; arguments as of torchvision's `RoIHeads`."""
        if self.training:
            return [], self._losses(features, proposals, image_shapes, targets)
        for stage in self._heads[:-1]:
            regression = _head(stage, features, proposals, image_shapes)[1]
            proposals = refined(stage, regression, proposals, image_shapes)
        pooled = self._heads[0].box_roi_pool(features, proposals, image_shapes)
        found = [stage.box_predictor(stage.box_head(pooled)) for stage in self._heads]
        scores = torch.stack([logits.float().softmax(-1) for logits, _ in found]).mean(0)
        regression = found[-1][1].to(scores.dtype).repeat(1, self.num_classes)
        # Of logarithms of probabilities the softmax, which it takes there, is the probabilities.
        last = self._heads[-1].postprocess_detections(scores.log(), regression, proposals, image_shapes)
        return [dict(zip(("boxes", "scores", "labels"), one, strict=True)) for one in zip(*last, strict=True)], {}

    def _losses(self, features: Any, proposals: list[Tensor], shapes: Any, targets: Any) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        for at, (stage, how) in enumerate(zip(self._heads, STAGES, strict=True), start=1):
            proposals, _, labels, coded = stage.select_training_samples(list(proposals), targets)
            logits, regression = _head(stage, features, proposals, shapes)
            terms = fastrcnn_loss(logits, regression.repeat(1, self.num_classes), labels, coded)
            losses |= {f"loss_{name}_{at}": how.loss * term for name, term in zip(("class", "box"), terms, strict=True)}
            proposals = refined(stage, regression, proposals, shapes)
        return losses

    @property
    def _heads(self) -> Sequence[Any]:
        return list(self.stages)


class _Predictor(nn.Module):
    """Logits of the classes, and one box for all of them."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.cls_score = nn.Linear(channels, num_classes)
        self.bbox_pred = nn.Linear(channels, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.cls_score(x), self.bbox_pred(x)


def _head(stage: Any, features: Any, proposals: list[Tensor], shapes: Any) -> tuple[Tensor, Tensor]:
    return stage.box_predictor(stage.box_head(stage.box_roi_pool(features, proposals, shapes)))


def refined(
    stage: RoIHeads, regression: Tensor, proposals: list[Tensor], image_shapes: Sequence[tuple[int, int]]
) -> list[Tensor]:
    """What a head makes of its boxes, inside their images; constants to the next head.

    Args:
        stage: whose coding is taken.
        regression: what it says, (all boxes, 4).
        proposals: its boxes, (n, 4) for each image.
        image_shapes: height and width of each.
    """
    counts = [len(boxes) for boxes in proposals]
    codes = regression.detach().to(proposals[0].dtype)
    boxes = stage.box_coder.decode(codes, proposals).reshape(-1, 4).split(counts)
    return [clip_boxes_to_image(part, shape) for part, shape in zip(boxes, image_shapes, strict=True)]


def cascade_rcnn(backbone: nn.Module, num_classes: int, *, least_score: float, **settings: Any) -> FasterRCNN:
    """Cascade R-CNN on a backbone that gives a feature pyramid; `settings` are those of torchvision's Faster R-CNN,
    whose first stage this is.

    Args:
        backbone: with the attribute `out_channels`.
        num_classes: with the background.
        least_score: of a detection.
        settings: such as `min_size`.
    """
    nothing = nn.Identity()  # in place of the head that torchvision would make
    model = FasterRCNN(backbone, None, box_head=nothing, box_predictor=nothing, **settings)
    channels: Any = backbone.out_channels
    model.roi_heads = CascadeHeads(channels, num_classes, least_score=least_score)
    return model
