"""Detectors of torchvision, and of their parts, on any backbone of timm."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

from unloaf.models.backbones import FeaturePyramid, build_body, freeze_norms

BOXES = ("faster-rcnn", "cascade-rcnn", "fcos", "atss", "retinanet")
MASKS = ("mask-rcnn",)
_TWO_STAGES = ("faster-rcnn", "cascade-rcnn", "mask-rcnn")
_OUT_CHANNELS = 256
_LEAST_SCORE = 0.05  # of a detection, as everywhere else; torchvision's FCOS alone has 0.2, which costs mAP


def build_detector(
    name: str,
    *,
    backbone: str,
    num_classes: int,
    img_size: int,
    longest: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    weights: str | None = None,
    pretrained: bool = False,
    frozen_norms: bool = False,
    backbone_kwargs: Mapping[str, Any] | None = None,
) -> tuple[nn.Module, tuple[str, ...]]:
    """A detector that takes a list of images, (3, H, W) from 0 to 1 each, as torchvision's do.

    In training it takes them at the size that they have; evaluated it resizes them itself, to a shorter side of
    `img_size`, and its boxes are those of the images as they came.

    Args:
        name: faster-rcnn, cascade-rcnn, mask-rcnn, fcos, atss or retinanet.
        backbone: a network of timm.
        num_classes: without the background.
        img_size: shorter side in pixels.
        longest: of the longer side.
        mean: of each channel, as a share of the pixel range.
        std: likewise.
        weights: where the backbone's weights come from; see `build_body`.
        pretrained: take the published ones.
        frozen_norms: keep the backbone's batch norms as they are.
        backbone_kwargs: further arguments of the backbone's network.

    Raises:
        ValueError: no such detector or backbone, or weights that do not fit.

    Source: torchvision's models for Ren et al. 2015, He et al. 2017, Tian et al. 2019, Lin et al. 2017; here, Cai and
        Vasconcelos 2018 and Zhang et al. 2020.
    """
    from torchvision.ops.feature_pyramid_network import LastLevelMaxPool, LastLevelP6P7

    if name not in BOXES + MASKS:
        raise ValueError(f"model {name}: give a detector, {', '.join(BOXES + MASKS)}")
    body, lines = build_body(backbone, weights=weights, pretrained=pretrained, arguments=backbone_kwargs)
    if frozen_norms:
        count = freeze_norms(body)
        lines += (f"{count} batch norms of the backbone keep their statistics and weights",) if count else ()
    two_stages = name in _TWO_STAGES
    levels = (4, 8, 16, 32) if two_stages else (8, 16, 32)
    extra = LastLevelMaxPool() if two_stages else LastLevelP6P7(_OUT_CHANNELS, _OUT_CHANNELS)
    pyramid = FeaturePyramid(body, levels=levels, out_channels=_OUT_CHANNELS, extra=extra)
    settings: dict[str, Any] = {
        "min_size": img_size,
        "max_size": longest,
        "image_mean": list(mean),
        "image_std": list(std),
        "_skip_resize": True,  # in training, where images come at their size, and those of subnets are smaller
    }
    return _kind(name)(pyramid, num_classes + 1, **settings), lines


def _kind(name: str) -> Callable[..., nn.Module]:
    """From a pyramid, a number of classes and torchvision's settings to the detector."""
    from torchvision.models import detection

    from unloaf.models.atss import ATSS
    from unloaf.models.cascade_rcnn import cascade_rcnn

    return {
        "faster-rcnn": detection.FasterRCNN,
        "cascade-rcnn": partial(cascade_rcnn, least_score=_LEAST_SCORE),
        "mask-rcnn": detection.MaskRCNN,
        "fcos": partial(detection.FCOS, score_thresh=_LEAST_SCORE),
        "atss": partial(ATSS, score_thresh=_LEAST_SCORE),
        "retinanet": partial(detection.RetinaNet, score_thresh=_LEAST_SCORE),
    }[name]
