"""ATSS: a one-stage detector whose positive anchors are chosen by the statistics of their overlap with an object."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.fcos import FCOS, FCOSClassificationHead, FCOSRegressionHead
from torchvision.ops import box_iou, generalized_box_iou_loss, sigmoid_focal_loss

STRIDES = (8, 16, 32, 64, 128)
_SIDE = 8  # of the one anchor at each place, in strides
_CANDIDATES = 9  # on each level, for each object
_BOXES = 2.0  # weight of the loss of boxes


def assigned(anchors: Tensor, levels: Sequence[int], boxes: Tensor, *, candidates: int = _CANDIDATES) -> Tensor:
    """Of each anchor which object it stands for, -1 for none; int64 (A,).

    On each level, the anchors whose centres are nearest to the object's are its candidates. Those are positive whose
    IoU with it is at least the mean of all its candidates plus their standard deviation, and whose centre lies inside
    of it. An anchor of several objects goes to that of the highest IoU.

    Args:
        anchors: left, top, right, bottom, (A, 4), level by level.
        levels: how many anchors each level has.
        boxes: of the objects, (G, 4).
        candidates: of each level, as far as it has so many.

    Source: Zhang et al. 2020, algorithm 1. The standard deviation is that of a sample, with N - 1, as in the authors'
        code.

    >>> anchors = torch.tensor([[0.0, 0, 8, 8], [8, 0, 16, 8], [16, 0, 24, 8], [0, 0, 16, 16]])
    >>> assigned(anchors, [3, 1], torch.tensor([[7.0, 0, 16, 8]]), candidates=2).tolist()
    [-1, 0, -1, -1]
    """
    if not len(boxes):
        return anchors.new_full((len(anchors),), -1, dtype=torch.int64)
    overlap = box_iou(anchors, boxes)
    middles, centres = ((part[:, :2] + part[:, 2:]) / 2 for part in (anchors, boxes))
    distance = torch.cdist(middles, centres)
    chosen, start = [], 0
    for count in levels:
        level = distance[start : start + count]
        chosen.append(start + level.topk(min(candidates, count), dim=0, largest=False).indices)
        start += count
    near = torch.cat(chosen)  # (candidates, G)
    values = overlap.gather(0, near)
    threshold = values.mean(0) + values.std(0, correction=min(1, len(near) - 1))
    inside = torch.cat([middles[:, None] - boxes[:, :2], boxes[:, 2:] - middles[:, None]], 2).amin(2) > 0
    positive = (values >= threshold) & inside.gather(0, near)
    quality = torch.full_like(overlap, -1.0).scatter(0, near, values.where(positive, -1.0))
    best, objects = quality.max(1)
    return objects.where(best >= 0, -1)


def centerness(anchors: Tensor, boxes: Tensor) -> Tensor:
    """How near the centres of anchors are to the middle of their objects, from 0 at an edge to 1; (N,).

    Source: Tian et al. 2019 (FCOS), equation 3.

    >>> box = torch.tensor([[0.0, 0.0, 10.0, 10.0]])
    >>> centerness(torch.tensor([[1.0, 4.0, 3.0, 6.0]]), box)
    tensor([0.5000])
    """
    middles = (anchors[:, :2] + anchors[:, 2:]) / 2
    before, behind = middles - boxes[:, :2], boxes[:, 2:] - middles
    return (torch.minimum(before, behind) / torch.maximum(before, behind)).clamp(min=0).prod(1).sqrt()


class _Boxes(FCOSRegressionHead):
    """Four numbers of a box in relation to its anchor, scaled on each level by a number that is learned, and the
    centerness.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, num_anchors=1)
        self.scales = nn.Parameter(torch.ones(len(STRIDES)))

    def forward(self, x: list[Tensor]) -> tuple[Tensor, Tensor]:
        towers = [self.conv(level) for level in x]
        boxes = [scale * self.bbox_reg(tower) for scale, tower in zip(self.scales, towers, strict=True)]
        centred = [self.bbox_ctrness(tower) for tower in towers]
        # Of each level (B, C, H, W), together (B, places, C).
        first, second = (torch.cat([part.flatten(2) for part in parts], 2).movedim(1, 2) for parts in (boxes, centred))
        return first, second


class _Head(nn.Module):
    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.classification_head = FCOSClassificationHead(channels, 1, num_classes)
        self.regression_head = _Boxes(channels)

    def forward(self, x: list[Tensor]) -> dict[str, Tensor]:
        boxes, centred = self.regression_head(x)
        return {"cls_logits": self.classification_head(x), "bbox_regression": boxes, "bbox_ctrness": centred}


class _Coder:
    """Boxes in relation to their anchors, coded as those of R-CNN; in the place of the coder of FCOS."""

    def __init__(self) -> None:
        self._coder = BoxCoder((10.0, 10.0, 5.0, 5.0))

    def decode(self, codes: Tensor, anchors: Tensor) -> Tensor:
        return self._coder.decode_single(codes.to(anchors.dtype), anchors)


class ATSS(FCOS):
    """torchvision's FCOS with one anchor of 8 strides at each place, boxes in relation to it, and `assigned`.

    The losses are those of the paper: focal loss of the classes, GIoU loss of the positive boxes, weighted by their
    centerness, times 2, and binary cross-entropy of the centerness. The score of a detection is, as in FCOS and in the
    authors' code, the root of the class's probability times the centerness.

    Args:
        backbone: gives a pyramid of five levels, of stride 8 to 128, and has the attribute `out_channels`.
        num_classes: with the background, whose output is never trained to be high, as in torchvision's FCOS.
        settings: of torchvision's FCOS, such as `min_size`.

    Source: Zhang et al. 2020.
    """

    def __init__(self, backbone: nn.Module, num_classes: int, **settings: Any) -> None:
        anchors = AnchorGenerator(tuple((_SIDE * stride,) for stride in STRIDES), ((1.0,),) * len(STRIDES))
        channels: Any = backbone.out_channels
        head = _Head(channels, num_classes)
        super().__init__(backbone, num_classes, anchor_generator=anchors, head=head, **settings)
        self.box_coder: Any = _Coder()

    def compute_loss(
        self,
        targets: list[dict[str, Tensor]],
        head_outputs: dict[str, Tensor],
        anchors: list[Tensor],
        num_anchors_per_level: list[int],
    ) -> dict[str, Tensor]:
        """The three losses; torchvision's `FCOS.forward` calls this in training."""
        pairs = list(zip(anchors, targets, strict=True))
        matched = torch.stack([assigned(one, num_anchors_per_level, target["boxes"]) for one, target in pairs])
        positive = matched >= 0
        place, objects = positive.nonzero(), matched[positive]
        logits = head_outputs["cls_logits"]
        classes, own = torch.zeros_like(logits), [target["boxes"][:0] for target in targets]
        for at, target in enumerate(targets):
            found = objects[place[:, 0] == at]
            own[at] = target["boxes"][found]
            classes[at, positive[at].nonzero()[:, 0], target["labels"][found]] = 1.0
        boxes, mine = torch.cat(own), torch.stack(anchors)[positive]
        weights = centerness(mine, boxes)
        predicted = self.box_coder.decode(head_outputs["bbox_regression"][positive], mine)
        overlap = generalized_box_iou_loss(predicted, boxes, reduction="none")
        centred = head_outputs["bbox_ctrness"][positive][:, 0].to(weights.dtype)
        count = max(1, len(objects))
        return {
            "classification": sigmoid_focal_loss(logits, classes, reduction="sum") / count,
            "bbox_regression": _BOXES * (overlap * weights).sum() / weights.sum().clamp(min=1e-6),
            "bbox_ctrness": F.binary_cross_entropy_with_logits(centred, weights, reduction="sum") / count,
        }
