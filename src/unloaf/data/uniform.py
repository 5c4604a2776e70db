"""UniformAugment, as the published runs of ST++ had it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from PIL.Image import Image

_LEVELS = 31


def uniform_augment(image: Image) -> Image:
    """Two operations drawn from all 14, each applied with probability 1/2 at a level that is drawn uniformly.

    Draws from torch's global generator.

    Args:
        image: in RGB; translations are by up to 10 pixels whatever its size.

    Source: LingChen et al. 2020, UniformAugment, in the form of `UniAugment` of TrivialAugment's code (Mueller and
        Hutter 2021, its "fixed" space), which the script of ST++ calls: without the paper's Invert and Cutout.

    >>> from PIL import Image
    >>> uniform_augment(Image.new("RGB", (8, 8))).size
    (8, 8)
    """
    every = list(operations().values())
    for drawn, applied, level in zip(_draw(len(every)), _draw(2), _draw(_LEVELS), strict=True):
        if applied:
            image = every[drawn](image, level)
    return image


def _draw(count: int) -> list[int]:
    return torch.randint(count, (2,)).tolist()


@cache
def operations() -> dict[str, Callable[[Image, int], Image]]:
    """The operations by name: functions of an image and a level from 0 to 30.

    The strength rises with the level, but for the four that blend with a plainer image: there the middle changes
    nothing. What comes into the image is black, and pixels are taken from their nearest.

    >>> list(operations())[:3]
    ['Identity', 'AutoContrast', 'Equalize']
    """
    from PIL.Image import Resampling
    from timm.data import auto_augment as timm

    def part(level: int, most: float) -> float:
        return level * most / (_LEVELS - 1)

    def signed(value: float) -> float:
        return value if torch.rand(()) < 0.5 else -value

    def moved(move: Callable[..., Image], most: float, *, whole: bool) -> Callable[[Image, int], Image]:
        def apply(image: Image, level: int) -> Image:
            by = int(part(level, most)) if whole else part(level, most)
            return move(image, signed(by), resample=Resampling.NEAREST)  # black is Pillow's default

        return apply

    def blended(blend: Callable[..., Image]) -> Callable[[Image, int], Image]:
        return lambda image, level: blend(image, 0.1 + part(level, 1.8))

    return {
        "Identity": lambda image, level: image,
        "AutoContrast": lambda image, level: timm.auto_contrast(image),
        "Equalize": lambda image, level: timm.equalize(image),
        "Rotate": moved(timm.rotate, 30, whole=True),
        "Solarize": lambda image, level: timm.solarize(image, 256 - int(part(level, 256))),
        "Color": blended(timm.color),
        "Posterize": lambda image, level: timm.posterize(image, 8 - int(part(level, 4))),
        "Contrast": blended(timm.contrast),
        "Brightness": blended(timm.brightness),
        "Sharpness": blended(timm.sharpness),
        "ShearX": moved(timm.shear_x, 0.3, whole=False),
        "ShearY": moved(timm.shear_y, 0.3, whole=False),
        "TranslateX": moved(timm.translate_x_abs, 10, whole=True),
        "TranslateY": moved(timm.translate_y_abs, 10, whole=True),
    }
