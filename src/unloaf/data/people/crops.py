"""Where a person is cut out of an image, and where joints lie in the crop.

Points are (x, y) in pixels, from the left and the top edge, as those of boxes: the middle of the first pixel is at 0.5.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

ASPECT = (3, 4)  # width to height of a crop
PADDING = 1.25  # of the box: joints at its edge need surroundings


class Window(NamedTuple):
    """A part of an image, of the aspect of crops.

    Attributes:
        x: its middle.
        y: likewise.
        height: in pixels of the image.
        angle: by which it is turned clockwise about its middle, in radians.
        mirrored: left and right exchanged.
    """

    x: float
    y: float
    height: float
    angle: float = 0.0
    mirrored: bool = False

    def to_crop(self, height: int) -> Tensor:
        """The affine map from points of the image to those of a crop of this height, float64 (2, 3).

        >>> mapped(torch.tensor([[30.0, 40], [40, 50]]).double(), Window(x=30, y=40, height=40).to_crop(80)).tolist()
        [[30.0, 40.0], [50.0, 60.0]]
        """
        scale, width = height / self.height, width_of(height)
        cos, sin = scale * math.cos(self.angle), scale * math.sin(self.angle)
        turned = torch.tensor([[cos, sin], [-sin, cos]], dtype=torch.float64)
        middle = torch.tensor([width / 2, height / 2], dtype=torch.float64)
        shift = middle - turned @ torch.tensor([self.x, self.y], dtype=torch.float64)
        found = torch.cat([turned, shift[:, None]], 1)
        if self.mirrored:
            found[0] = torch.tensor([0, 0, width], dtype=torch.float64) - found[0]
        return found


def width_of(height: int) -> int:
    """The width of a crop of this height, both in pixels.

    >>> width_of(256)
    192
    """
    return height * ASPECT[0] // ASPECT[1]


def window_of(box: Sequence[float]) -> Window:
    """The window around a box, (left, top, right, bottom): made wider or higher to the aspect of crops, and 1.25 times
    as large.

    >>> window_of((10, 20, 40, 60))
    Window(x=25.0, y=40.0, height=50.0, angle=0.0, mirrored=False)
    """
    left, top, right, bottom = box
    height = max(bottom - top, (right - left) * ASPECT[1] / ASPECT[0])
    return Window((left + right) / 2, (top + bottom) / 2, PADDING * height)


def mapped(points: Tensor, affine: Tensor) -> Tensor:
    """Points, (..., 2), through an affine map, (2, 3).

    >>> mapped(torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 0.0, 1.0], [0.0, 3.0, 0.0]])).tolist()
    [[3.0, 6.0]]
    """
    return points @ affine[:, :2].T + affine[:, 2]


def inverse(affine: Tensor) -> Tensor:
    """The map back, (2, 3).

    >>> inverse(torch.tensor([[2.0, 0.0, 1.0], [0.0, 4.0, 2.0]])).tolist()
    [[0.5, 0.0, -0.5], [0.0, 0.25, -0.5]]
    """
    back = torch.linalg.inv(affine[:, :2])
    return torch.cat([back, -(back @ affine[:, 2:])], 1)


def cut_out(picture: Image, affine: Tensor, height: int, *, fill: tuple[int, int, int]) -> Image:
    """The crop of this height that an affine map from the image leads to, bilinearly; `fill` is beyond the edge."""
    from PIL import Image

    back = inverse(affine).flatten().tolist()
    size, how = (width_of(height), height), Image.Resampling.BILINEAR
    return picture.transform(size, Image.Transform.AFFINE, back, how, fillcolor=fill)
