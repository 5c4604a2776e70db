"""What subnets see in place of smaller images, to be compared with them: larger, cropped, mirrored, jittered ones.

Each is a function of (batch, generator), as `subnet_inputs` of a method takes it; a batch is (batch, channels, height,
width), and so is what it returns. Source: Ye et al. 2023 (ST++), table I, which compares them on ImageNet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from unloaf.inputs import resize

Per = Literal["subnet", "step"]


def _uniform(low: float, high: float, shape: tuple[int, ...], generator: torch.Generator, like: Tensor) -> Tensor:
    return (low + (high - low) * torch.rand(shape, generator=generator)).to(like)


@dataclass(frozen=True)
class LargerInputs:
    """The batch, resized to a side drawn uniformly from the full side up to ``int(max_ratio * side)``.

    Args:
        max_ratio: at least 1.
        per: "subnet", a draw for each subnet; "step", one for all subnets of a step.

    >>> LargerInputs(2.0)(torch.zeros(1, 3, 8, 8), torch.Generator().manual_seed(0)).shape
    torch.Size([1, 3, 16, 16])
    """

    max_ratio: float = 1.5
    per: Per = "subnet"

    def __post_init__(self) -> None:
        if not self.max_ratio >= 1:
            raise ValueError(f"max_ratio is {self.max_ratio}; give a multiple of at least 1")

    def __call__(self, batch: Tensor, generator: torch.Generator) -> Tensor:
        """(batch, C, larger, larger)."""
        side = min(batch.shape[-2:])
        count = max(int(self.max_ratio * side), side) - side + 1
        return resize(batch, side + int(torch.randint(count, (1,), generator=generator)))


@dataclass(frozen=True)
class CroppedInputs:
    """A part of each image, of a side and at a place of its own, resized to the full side.

    Args:
        min_ratio: in (0, 1]; the smallest part's side, as a share of the full side.
        per: "subnet", draws for each subnet; "step", the same for all subnets of a step.

    >>> image = torch.arange(16.0).view(1, 1, 4, 4)
    >>> torch.allclose(CroppedInputs(1.0)(image, torch.Generator()), image)
    True
    """

    min_ratio: float = 0.43
    per: Per = "subnet"

    def __post_init__(self) -> None:
        if not 0 < self.min_ratio <= 1:
            raise ValueError(f"min_ratio is {self.min_ratio}; give a ratio above 0 and up to 1")

    def __call__(self, batch: Tensor, generator: torch.Generator) -> Tensor:
        """Of the batch's shape."""
        count = len(batch)
        ratio = _uniform(self.min_ratio, 1.0, (count, 1), generator, batch)
        # Centres in coordinates from -1 to 1, so that the part lies inside.
        centres = _uniform(-1.0, 1.0, (count, 2), generator, batch) * (1 - ratio)
        theta = torch.zeros(count, 2, 3, dtype=batch.dtype, device=batch.device)
        theta[:, 0, 0] = theta[:, 1, 1] = ratio[:, 0]
        theta[:, :, 2] = centres
        grid = F.affine_grid(theta, list(batch.shape), align_corners=False)
        return F.grid_sample(batch, grid, mode="bilinear", padding_mode="border", align_corners=False)


@dataclass(frozen=True)
class FlippedInputs:
    """Each image mirrored with probability ``p``.

    >>> FlippedInputs(1.0)(torch.arange(3.0).view(1, 1, 1, 3), torch.Generator()).flatten().tolist()
    [2.0, 1.0, 0.0]
    """

    p: float = 0.5
    per: Per = "subnet"

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1:
            raise ValueError(f"p is {self.p}; give a probability from 0 to 1")

    def __call__(self, batch: Tensor, generator: torch.Generator) -> Tensor:
        """Of the batch's shape."""
        flipped = _uniform(0.0, 1.0, (len(batch), 1, 1, 1), generator, batch) < self.p
        return torch.where(flipped, batch.flip(-1), batch)


@dataclass(frozen=True)
class JitteredInputs:
    """Contrast of each image, and brightness of each of its channels, changed at random.

    An image's distance from its channels' means is multiplied by a factor from ``1 - strength`` to ``1 + strength``;
    each channel is shifted by up to ``strength``, in units of the network's input, standard deviations as a rule.

    Args:
        strength: from 0 to 1.
        per: "subnet", draws for each subnet; "step", the same for all subnets of a step.

    >>> batch = torch.rand(2, 3, 4, 4)
    >>> torch.allclose(JitteredInputs(0.0)(batch, torch.Generator()), batch)
    True
    """

    strength: float = 0.4
    per: Per = "subnet"

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1:
            raise ValueError(f"strength is {self.strength}; give a number from 0 to 1")

    def __call__(self, batch: Tensor, generator: torch.Generator) -> Tensor:
        """Of the batch's shape."""
        count, channels = batch.shape[:2]
        factor = _uniform(1 - self.strength, 1 + self.strength, (count, 1, 1, 1), generator, batch)
        shift = _uniform(-self.strength, self.strength, (count, channels, 1, 1), generator, batch)
        mean = batch.mean((2, 3), keepdim=True)
        return (batch - mean) * factor + mean + shift
