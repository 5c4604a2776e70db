"""An image and the objects or segments in it, changed together: mirrored, resized."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Target = dict[str, Tensor]


def resized(image: Tensor, target: Target, size: tuple[int, int]) -> tuple[Tensor, Target]:
    """The image, float (C, H, W), at this height and width, bilinearly and antialiased, and boxes, masks and segments.

    >>> image, target = resized(torch.zeros(3, 8, 4), {"boxes": torch.tensor([[0.0, 2.0, 4.0, 8.0]])}, (4, 4))
    >>> image.shape, target["boxes"].tolist()
    (torch.Size([3, 4, 4]), [[0.0, 1.0, 4.0, 4.0]])
    """
    height, width = image.shape[-2:]
    if size == (height, width):
        return image, target
    picture = F.interpolate(image[None], size=size, mode="bilinear", antialias=True)[0]
    changed, (down, across) = dict(target), (size[0] / height, size[1] / width)
    if "boxes" in target:
        changed["boxes"] = target["boxes"] * target["boxes"].new_tensor([across, down, across, down])
    if "area" in target:
        changed["area"] = target["area"] * (down * across)
    if "masks" in target:
        masks = target["masks"]
        small = F.interpolate(masks[None].float(), size=size, mode="nearest-exact")[0] if len(masks) else masks
        changed["masks"] = small.to(masks.dtype) if len(masks) else masks.new_zeros(0, *size)
    if "segments" in target:
        changed |= _segments(target, size)
    return picture, changed


def _segments(target: Target, size: tuple[int, int]) -> Target:
    """Each pixel has the segment of the nearest one; segments that have none left are dropped, the others numbered
    anew.
    """
    ids = F.interpolate(target["segments"][None, None].double(), size=size, mode="nearest-exact")[0, 0].long()
    count = len(target["classes"])
    left = torch.bincount(ids.flatten() + 1, minlength=count + 1)[1:] > 0
    number = torch.cat([left.long().cumsum(0) - 1, left.new_full((1,), -1, dtype=torch.int64)])  # -1 stays
    return {"segments": number[ids], "classes": target["classes"][left], "crowd": target["crowd"][left]}


def side_size(height: int, width: int, *, side: int, longest: float) -> tuple[int, int]:
    """Height and width of an image whose shorter side becomes `side`, or less where the longer one would exceed
    `longest`.

    >>> side_size(480, 640, side=240, longest=1000), side_size(100, 1000, side=100, longest=500)
    ((240, 320), (50, 500))
    """
    factor = min(side / min(height, width), longest / max(height, width))
    return max(1, round(height * factor)), max(1, round(width * factor))


def mirrored(image: Tensor, target: Target) -> tuple[Tensor, Target]:
    """Left and right exchanged.

    >>> image, target = mirrored(torch.zeros(3, 8, 10), {"boxes": torch.tensor([[1.0, 0.0, 4.0, 8.0]])})
    >>> target["boxes"].tolist()
    [[6.0, 0.0, 9.0, 8.0]]
    """
    changed, width = dict(target), image.shape[-1]
    if "boxes" in target:
        left, top, right, bottom = target["boxes"].unbind(1)
        changed["boxes"] = torch.stack([width - right, top, width - left, bottom], 1)
    if "masks" in target:
        changed["masks"] = target["masks"].flip(-1)
    if "segments" in target:
        changed["segments"] = target["segments"].flip(-1)
    return image.flip(-1), changed


def masks_of(encoded: Sequence[bytes], height: int, width: int, *, utilities: Any) -> Tensor:
    """Masks of COCO's segmentations, uint8 (n, height, width); `utilities` is a module with the API of pycocotools'."""
    masks = np.zeros((len(encoded), height, width), np.uint8)
    for at, text in enumerate(encoded):
        found = json.loads(text)
        if isinstance(found, list):
            found = utilities.merge(utilities.frPyObjects(found, height, width))
        elif isinstance(found["counts"], list):
            found = utilities.frPyObjects(found, height, width)
        masks[at] = utilities.decode(found)
    return torch.from_numpy(masks)
