"""Networks that find the joints of a person, on any backbone of timm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from unloaf.models.backbones import STRIDES, build_body, freeze_norms

POSES = ("simple-baseline",)
_CHANNELS, _LAYERS = 256, 3  # of the deconvolutions
STRIDE = STRIDES[-1] // 2**_LAYERS  # of the heatmaps
# Of the classifier's first weights: heatmaps begin near 0, as most of their targets are. The authors' script has it for
# the deconvolutions too; the norms take that scale out of what they compute, but not out of how far a step turns them.
_STD = 1e-3


class SimpleBaseline(nn.Module):
    """The last features of a backbone, three deconvolutions and a 1x1 convolution to a heatmap for each joint.

    Attributes:
        body: timm's network, in whose blocks the subnets are.
        head: 4x4 deconvolutions of stride 2 with batch norm and ReLU.
        classifier: 1x1 convolution.

    Source: Xiao et al. 2018, simple baselines for human pose estimation, section 2.
    """

    def __init__(self, body: nn.Module, joints: int) -> None:
        super().__init__()
        information: Any = body.feature_info
        self._place = information.reduction().index(STRIDES[-1])
        self._in_channels = information.channels()[self._place]
        self.body = body
        layers: list[nn.Module] = []
        for at in range(_LAYERS):
            width = self._in_channels if at == 0 else _CHANNELS
            layers += [
                nn.ConvTranspose2d(width, _CHANNELS, 4, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(_CHANNELS),
                nn.ReLU(),
            ]
        self.head, self.classifier = nn.Sequential(*layers), nn.Conv2d(_CHANNELS, joints, 1)
        for weight in self.head.parameters():
            if weight.ndim == 4:
                nn.init.kaiming_normal_(weight, nonlinearity="relu")
        for weight in self.classifier.parameters():
            nn.init.normal_(weight, std=_STD)

    def forward(self, x: Tensor) -> Tensor:
        """Images, (B, 3, H, W), to heatmaps, (B, joints, H / 4, W / 4), rounded up.

        Where a side is no multiple of 32, zeros, the mean colour, are added to the right and below, and what comes out
        there is cut off, so that a cell of a heatmap is always 4 x 4 pixels.
        """
        height, width = x.shape[-2:]
        features = self.body(F.pad(x, (0, -width % STRIDES[-1], 0, -height % STRIDES[-1])))[self._place]
        if features.shape[1] != self._in_channels:  # Swin: channels last
            features = features.permute(0, 3, 1, 2)
        heatmaps = self.classifier(self.head(features))
        return heatmaps[..., : -(-height // STRIDE), : -(-width // STRIDE)]


def build_pose(
    name: str,
    *,
    backbone: str,
    num_classes: int,
    weights: str | None = None,
    pretrained: bool = False,
    frozen_norms: bool = False,
    backbone_kwargs: Mapping[str, Any] | None = None,
) -> tuple[nn.Module, tuple[str, ...]]:
    """A network from normalised images, (B, 3, H, W), to heatmaps, (B, joints, H / 4, W / 4), and what is to be said of
    it.

    Args:
        name: simple-baseline.
        backbone: a network of timm.
        num_classes: joints.
        weights: where the backbone's weights come from; see `build_body`.
        pretrained: take the published ones.
        frozen_norms: keep the backbone's batch norms as they are.
        backbone_kwargs: further arguments of the backbone's network.

    Raises:
        ValueError: no such network or backbone, or weights that do not fit.
    """
    if name not in POSES:
        raise ValueError(f"model {name}: give {', '.join(POSES)}")
    body, lines = build_body(backbone, weights=weights, pretrained=pretrained, arguments=backbone_kwargs)
    if frozen_norms:
        count = freeze_norms(body)
        lines += (f"{count} batch norms of the backbone keep their statistics and weights",) if count else ()
    return SimpleBaseline(body, num_classes), lines
