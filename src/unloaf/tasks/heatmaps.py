"""Heatmaps of joints: what is learned, how far off they are, and where a joint is by them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unloaf.losses import at_least_float32
from unloaf.models.pose import STRIDE

SPREAD = 2 / 64  # of the Gaussian, in heights of the heatmap: 2 cells of 64 (Xiao et al. 2018, section 4)
_LEAST_SPREAD = 1.0  # in cells; a narrower one is a single cell, on which next to no gradient falls


def gaussian_heatmaps(joints: Tensor, size: tuple[int, int]) -> Tensor:
    """A Gaussian of height 1 around each joint, in cells of 4 x 4 pixels.

    Its standard deviation is 2 cells at 64 cells of height and in proportion at others, so that heatmaps of smaller
    images are these at a smaller size; one cell at least.

    Args:
        joints: x and y in pixels of the image, float (B, K, 2 or more).
        size: height and width in cells.

    Returns:
        (B, K, height, width).

    Source: Xiao et al. 2018, section 2: centred on the joint itself, not on the middle of its cell.

    >>> gaussian_heatmaps(torch.tensor([[[6.0, 2.0]]]), (1, 3))  # the middle of the second cell
    tensor([[[[0.6065, 1.0000, 0.6065]]]])
    """
    spread = max(_LEAST_SPREAD, SPREAD * size[0])
    down, across = (_bell(joints[..., axis] / STRIDE, cells, spread) for axis, cells in zip((1, 0), size, strict=True))
    return down[..., :, None] * across[..., None, :]


def _bell(middle: Tensor, cells: int, spread: float) -> Tensor:
    distance = torch.arange(cells, dtype=middle.dtype, device=middle.device) + 0.5 - middle[..., None]
    return torch.exp(-distance.square() / (2 * spread**2))


def heatmap_loss(heatmaps: Tensor, joints: Tensor) -> Tensor:
    """Mean squared error of the heatmaps, (B, K, h, w), that of joints whose mark is 0 taken for 0; shape ().

    Args:
        heatmaps: of the network.
        joints: x, y and mark, 1 or 0, (B, K, 3).

    >>> heatmap_loss(torch.ones(1, 2, 4, 3), torch.tensor([[[900.0, 900.0, 1.0], [2.0, 2.0, 0.0]]]))
    tensor(0.5000)
    """
    return errors_of(heatmaps, joints).mean()


def errors_of(heatmaps: Tensor, joints: Tensor) -> Tensor:
    """The same for each joint, (B, K)."""
    found = at_least_float32(heatmaps)
    height, width = found.shape[-2:]
    wanted = gaussian_heatmaps(joints.to(found.dtype), (height, width))
    return (found - wanted).square().mean((-2, -1)) * joints[..., 2].to(found.dtype)


def joint_loss(model: nn.Module, batch: Any) -> Tensor:
    """The loss of a network on images and joints, as `GroundTruthTraining` takes it.

    >>> joint_loss(torch.nn.Conv2d(3, 2, 4, stride=4), (torch.zeros(1, 3, 16, 12), torch.zeros(1, 2, 3))).shape
    torch.Size([])
    """
    x, y = batch
    return heatmap_loss(model(x), y)


def heatmap_distance(student: Tensor, teacher: Tensor, *, counted: Tensor | None = None) -> Tensor:
    """Mean squared error from a subnet's heatmaps to its teacher's, of all joints, (B, K, h, w).

    Those of smaller images are resized to the teacher's, bilinearly. There is no `counted`: every joint counts.

    >>> heatmap_distance(torch.zeros(1, 2, 4, 3), torch.full((1, 2, 8, 6), 0.5))
    tensor(0.2500)
    """
    student, teacher = at_least_float32(student), at_least_float32(teacher.detach())
    if student.shape != teacher.shape:
        student = F.interpolate(student, size=teacher.shape[-2:], mode="bilinear")
    return F.mse_loss(student, teacher)


def points_of(heatmaps: Tensor) -> tuple[Tensor, Tensor]:
    """Where the joints are, (B, K, 2) of x and y in pixels of the image, and the heatmaps' highest values, (B, K).

    The middle of the highest cell, moved by a quarter of a cell towards the higher one of its two neighbours in x and
    in y; not where they are equal, or at an edge.

    Source: Xiao et al. 2018, section 4.

    >>> points, _ = points_of(torch.tensor([[[[0.0, 0.2, 1.0, 0.5], [0.0, 0.0, 0.1, 0.0]]]]))
    >>> points.tolist()  # 2.5 + 0.25 cells from the left; at the upper edge
    [[[11.0, 2.0]]]
    """
    heatmaps = at_least_float32(heatmaps)
    width = heatmaps.shape[-1]
    highest, place = heatmaps.flatten(2).max(2)
    row, column = place // width, place % width
    moved = [0.25 * _slope(heatmaps, row, column, along=axis) for axis in (3, 2)]
    x, y = column + 0.5 + moved[0], row + 0.5 + moved[1]
    return STRIDE * torch.stack([x, y], -1), highest


def _slope(heatmaps: Tensor, row: Tensor, column: Tensor, *, along: int) -> Tensor:
    """The sign of the difference of the two neighbours of a cell along x or y, 0 at an edge, (B, K)."""
    height, width = heatmaps.shape[-2:]
    place, last = (column, width - 1) if along == 3 else (row, height - 1)
    before, after = (place - 1).clamp(min=0), (place + 1).clamp(max=last)
    cells = [row * width + at if along == 3 else at * width + column for at in (before, after)]
    left, right = (heatmaps.flatten(2).gather(2, cell[..., None])[..., 0] for cell in cells)
    inner = (place > 0) & (place < last)
    return torch.sign(right - left) * inner
