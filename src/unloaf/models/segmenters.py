"""Networks that give the class of each pixel, on any backbone of timm."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from unloaf.models.backbones import STRIDES, FeaturePyramid, build_body, freeze_norms

SEGMENTERS = ("semantic-fpn",)
_PYRAMID, _BRANCH, _GROUPS = 256, 128, 32  # channels, and groups of the norms


class SemanticFPN(nn.Module):
    """Semantic FPN: each level of a feature pyramid is brought to stride 4, and their sum is classified.

    Attributes:
        backbone: the pyramid, of stride 4 to 32.
        branches: for each level 3x3 convolution, group norm, ReLU and upsampling by 2, as often as it takes.
        classifier: 1x1 convolution.

    Source: Kirillov et al. 2019, panoptic feature pyramid networks, section 3.
    """

    def __init__(self, backbone: FeaturePyramid, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.branches = upsampled_levels(backbone.out_channels)
        self.classifier = nn.Conv2d(_BRANCH, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Images, (B, 3, H, W), to logits, (B, classes, H, W).

        Levels only fit each other where the sides are multiples of 32: to the right and below zeros, the mean colour,
        are added, and what comes out there is cut off.
        """
        height, width = x.shape[-2:]
        levels = self.backbone(F.pad(x, (0, -width % STRIDES[-1], 0, -height % STRIDES[-1]))).values()
        return classified(self.branches, self.classifier, levels)[..., :height, :width]


def upsampled_levels(channels: int) -> nn.ModuleList:
    """For each level of a pyramid of so many channels what brings it to stride 4."""
    return nn.ModuleList(_branch(channels, upsamplings) for upsamplings in range(len(STRIDES)))


def classified(branches: nn.ModuleList, classifier: nn.Module, levels: Iterable[Tensor]) -> Tensor:
    """The logits of the sum of all levels, at four times its side, which is that of the image."""
    first, *others = (branch(level) for branch, level in zip(branches, levels, strict=True))
    return F.interpolate(classifier(sum(others, start=first)), scale_factor=STRIDES[0], mode="bilinear")


def _branch(channels: int, upsamplings: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for at in range(max(1, upsamplings)):
        layers += [
            nn.Conv2d(channels if at == 0 else _BRANCH, _BRANCH, 3, padding=1, bias=False),
            nn.GroupNorm(_GROUPS, _BRANCH),
            nn.ReLU(),
        ]
        if upsamplings:
            layers.append(nn.Upsample(scale_factor=2, mode="bilinear"))
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    return nn.Sequential(*layers)


def build_segmenter(
    name: str,
    *,
    backbone: str,
    num_classes: int,
    weights: str | None = None,
    pretrained: bool = False,
    frozen_norms: bool = False,
    backbone_kwargs: Mapping[str, Any] | None = None,
) -> tuple[nn.Module, tuple[str, ...]]:
    """A network from normalised images, (B, 3, H, W), to logits, (B, classes, H, W), and what is to be said of it.

    Args:
        name: semantic-fpn.
        backbone: a network of timm.
        num_classes: without void.
        weights: where the backbone's weights come from; see `build_body`.
        pretrained: take the published ones.
        frozen_norms: keep the backbone's batch norms as they are.
        backbone_kwargs: further arguments of the backbone's network.

    Raises:
        ValueError: no such network or backbone, or weights that do not fit.
    """
    if name not in SEGMENTERS:
        raise ValueError(f"model {name}: give {', '.join(SEGMENTERS)}")
    body, lines = build_body(backbone, weights=weights, pretrained=pretrained, arguments=backbone_kwargs)
    if frozen_norms:
        count = freeze_norms(body)
        lines += (f"{count} batch norms of the backbone keep their statistics and weights",) if count else ()
    return SemanticFPN(FeaturePyramid(body, levels=STRIDES, out_channels=_PYRAMID, extra=None), num_classes), lines
