"""Panoptic FPN: Mask R-CNN for things and a semantic branch for stuff, on one feature pyramid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.ops import masks_to_boxes
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from unloaf.models.backbones import STRIDES, FeaturePyramid, build_body, freeze_norms
from unloaf.models.segmenters import classified, upsampled_levels

PANOPTIC = ("panoptic-fpn",)
_CHANNELS, _BRANCH = 256, 128  # of the pyramid, and of the semantic branch
VOID = 255  # of the semantic target: pixels of no segment
LAMBDA_SEMANTIC = 0.5  # weight of the semantic loss beside those of Mask R-CNN
LEAST_SCORE = 0.5  # of an instance that comes into the merge
MOST_HIDDEN = 0.5  # share of an instance that others of a higher score may cover


class PanopticFPN(MaskRCNN):
    """torchvision's Mask R-CNN and a semantic branch, whose first class is *other*: all pixels of things.

    In training it takes images and segments, as `unloaf.data.panoptic.batches` gives them, and returns losses;
    evaluated, for each image `segments`, int64 (H, W), with the number of each pixel's segment, -1 for none, and of the
    segments `labels`, classes from 0 on, and `scores`, NaN of stuff.

    Args:
        backbone: gives a pyramid of stride 4 to 32 and one level more, and has the attribute `out_channels`.
        things: of each class whether it is countable.
        stuff_area: pixels that a region of stuff must have in the image as it came.
        settings: of torchvision's Mask R-CNN, such as `min_size`.

    Source: Kirillov et al. 2019, panoptic feature pyramid networks, section 3; the merge is that of Kirillov et al.
        2019, panoptic segmentation, with the thresholds that panopticapi has: scores from 0.5 on, an overlap up to 0.5,
        stuff from 64 x 64 pixels on.
    """

    def __init__(self, backbone: nn.Module, things: Sequence[bool], *, stuff_area: int, **settings: Any) -> None:
        super().__init__(backbone, 1 + sum(things), **settings)
        self.stuff_area = stuff_area
        self.branches = upsampled_levels(_CHANNELS)
        self.classifier = nn.Conv2d(_BRANCH, 1 + len(things) - sum(things), 1)
        kinds = torch.tensor(list(things))
        # From a class to what Mask R-CNN calls it, from 1 on, and the semantic branch, where things are 0.
        self.register_buffer("thing_labels", torch.where(kinds, kinds.cumsum(0), 0), persistent=False)
        self.register_buffer("stuff_labels", torch.where(kinds, 0, (~kinds).cumsum(0)), persistent=False)
        self.thing_classes = [at for at, kind in enumerate(things) if kind]
        self.stuff_classes = [at for at, kind in enumerate(things) if not kind]

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        """Losses in training, segments in evaluation."""
        sizes = [(image.shape[-2], image.shape[-1]) for image in images]
        network: Any = self
        batch, _ = network.transform(images, None)
        objects = None if targets is None or not self.training else [self.objects(target) for target in targets]
        features = network.backbone(batch.tensors)
        proposals, losses = network.rpn(batch, features, objects)
        found, more = network.roi_heads(features, proposals, batch.image_sizes, objects)
        levels = [features[str(at)] for at in range(len(STRIDES))]
        logits = classified(self.branches, self.classifier, levels)
        if self.training and targets is not None:
            return {**losses, **more, "loss_semantic": LAMBDA_SEMANTIC * self._semantic_loss(logits, targets)}
        found = network.transform.postprocess(found, batch.image_sizes, sizes)
        return [
            self._merged(one, _as_the_image(part[:, : inner[0], : inner[1]], size))
            for one, part, inner, size in zip(found, logits, batch.image_sizes, sizes, strict=True)
        ]

    def objects(self, target: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The things of an image, crowds left out, as torchvision's detectors take them."""
        labels: Any = self.thing_labels
        kept = ((labels[target["classes"]] > 0) & ~target["crowd"]).nonzero()[:, 0]
        masks = target["segments"] == kept[:, None, None]
        boxes = masks_to_boxes(masks).float() + torch.tensor([0.0, 0, 1, 1], device=masks.device)  # behind the last
        return {
            "boxes": boxes.reshape(-1, 4),
            "labels": labels[target["classes"][kept]],
            "masks": masks.to(torch.uint8),
        }

    def _semantic_loss(self, logits: Tensor, targets: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """Mean cross-entropy of the pixels of a segment; 0 where there is none."""
        table: Any = self.stuff_labels
        truth = torch.full((len(targets), *logits.shape[-2:]), VOID, dtype=torch.int64, device=logits.device)
        for part, target in zip(truth, targets, strict=True):
            named = torch.cat([table[target["classes"]], table.new_full((1,), VOID)])  # -1 is the last
            height, width = target["segments"].shape
            part[:height, :width] = named[target["segments"]]
        full = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
        summed = F.cross_entropy(full, truth, ignore_index=VOID, reduction="sum")
        return summed / (truth != VOID).sum().clamp(min=1)

    def _merged(self, found: Mapping[str, Tensor], logits: Tensor) -> dict[str, Tensor]:
        things = [self.thing_classes[label - 1] for label in found["labels"].tolist()]
        return merged(
            found["masks"][:, 0] > 0.5,
            found["scores"],
            things,
            logits.argmax(0),
            self.stuff_classes,
            stuff_area=self.stuff_area,
        )


def _as_the_image(logits: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(logits[None], size=size, mode="bilinear")[0]


def merged(
    masks: Tensor,
    scores: Tensor,
    things: Sequence[int],
    semantic: Tensor,
    stuff: Sequence[int],
    *,
    stuff_area: int,
    least_score: float = LEAST_SCORE,
    most_hidden: float = MOST_HIDDEN,
) -> dict[str, Tensor]:
    """One segment for each pixel: instances from the highest score on, each on what is left free by those before it,
    then stuff on what no instance has.

    Args:
        masks: of the instances, bool (n, H, W).
        scores: of the instances, (n,).
        things: class of each instance.
        semantic: what the semantic branch says, int64 (H, W): 0 for things, from 1 on for stuff.
        stuff: class of each of its labels from 1 on.
        stuff_area: pixels; a smaller region of stuff is left out.
        least_score: an instance of less is left out.
        most_hidden: an instance of which a larger share is taken is left out.

    Returns:
        `segments`, int64 (H, W), -1 for none; `labels` and `scores` of each.

    >>> masks = torch.tensor([[[1, 1, 0, 0]], [[0, 1, 1, 0]]]).bool()
    >>> found = merged(masks, torch.tensor([0.6, 0.9]), [4, 4], torch.tensor([[1, 1, 1, 1]]), [7], stuff_area=1)
    >>> found["segments"].tolist(), found["labels"].tolist()
    ([[1, 0, 0, 2]], [4, 4, 7])
    """
    segments = torch.full_like(semantic, -1)
    labels: list[int] = []
    kept: list[float] = []
    for at in scores.argsort(descending=True, stable=True).tolist():
        area = int(masks[at].sum())
        free = masks[at] & (segments < 0)
        if float(scores[at]) < least_score or area == 0 or 1 - int(free.sum()) / area > most_hidden:
            continue
        segments[free] = len(labels)
        labels.append(things[at])
        kept.append(float(scores[at]))
    rest = segments < 0  # stuff is not hidden by stuff
    for number, label in enumerate(stuff, start=1):
        region = (semantic == number) & rest
        if int(region.sum()) >= max(1, stuff_area):
            segments[region] = len(labels)
            labels.append(label)
            kept.append(float("nan"))
    device = semantic.device
    return {
        "segments": segments,
        "labels": torch.tensor(labels, dtype=torch.int64, device=device),
        "scores": torch.tensor(kept, device=device),
    }


def build_panoptic(
    name: str,
    *,
    backbone: str,
    num_classes: int,
    things: Sequence[bool],
    stuff_area: int,
    img_size: int,
    longest: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    weights: str | None = None,
    pretrained: bool = False,
    frozen_norms: bool = False,
    backbone_kwargs: Mapping[str, Any] | None = None,
) -> tuple[nn.Module, tuple[str, ...]]:
    """A network from a list of images, (3, H, W) from 0 to 1 each, to their segments, and what is to be said of it.

    Args:
        name: panoptic-fpn.
        backbone: a network of timm.
        num_classes: of things and stuff together.
        things: of each class whether it is countable.
        stuff_area: pixels of the smallest region of stuff, in the image as it came.
        img_size: shorter side in pixels, to which it resizes images itself where it is evaluated.
        longest: of the longer side.
        mean: of each channel, as a share of the pixel range.
        std: likewise.
        weights: where the backbone's weights come from; see `build_body`.
        pretrained: take the published ones.
        frozen_norms: keep the backbone's batch norms as they are.
        backbone_kwargs: further arguments of the backbone's network.

    Raises:
        ValueError: no such network or backbone, or weights that do not fit.
    """
    if name not in PANOPTIC:
        raise ValueError(f"model {name}: give {', '.join(PANOPTIC)}")
    if len(things) != num_classes:
        raise ValueError(f"things of {len(things)} classes, of {num_classes} there are; say of each what it is")
    body, lines = build_body(backbone, weights=weights, pretrained=pretrained, arguments=backbone_kwargs)
    if frozen_norms:
        count = freeze_norms(body)
        lines += (f"{count} batch norms of the backbone keep their statistics and weights",) if count else ()
    pyramid = FeaturePyramid(body, levels=STRIDES, out_channels=_CHANNELS, extra=LastLevelMaxPool())
    settings: dict[str, Any] = {"image_mean": list(mean), "image_std": list(std), "_skip_resize": True}
    model = PanopticFPN(pyramid, tuple(things), stuff_area=stuff_area, min_size=img_size, max_size=longest, **settings)
    return model, lines
