"""Random changes of training images: crops of whole batches, and the libraries' transforms image by image."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from unloaf.config import Config
from unloaf.data.images import ImageSet, as_pixels
from unloaf.data.sets import Data
from unloaf.data.uniform import uniform_augment
from unloaf.seeds import generator_for

if TYPE_CHECKING:
    from PIL.Image import Image


def epoch_order(count: int, *, seed: int, epoch: int) -> Tensor:
    """The order in which an epoch visits its images: a permutation of range(count), int64 (count,)."""
    return torch.randperm(count, generator=generator_for("order", seed, epoch))


def augmentation(count: int, *, pad: int, hflip: float, seed: int, epoch: int, repeat: int = 0) -> Tensor:
    """What happens to each image in an epoch: rows (top, left, mirrored), int64 (count, 3).

    Row i belongs to image i of the split, wherever the order puts it. `repeat` counts the
    times that the same image came before in this epoch.
    """
    # Without a repeat the numbers are those of the published figures.
    generator = generator_for("augment", seed, epoch, *([repeat] if repeat else []))
    corners = torch.randint(0, 2 * pad + 1, (count, 2), generator=generator)
    if hflip in (0.0, 0.5):  # the published draw: a fair coin, read or not
        mirrored = torch.randint(0, 2, (count, 1), generator=generator) * int(hflip > 0)
    else:
        mirrored = (torch.rand((count, 1), generator=generator) < hflip).long()
    return torch.cat([corners, mirrored], dim=1)


def windows_of(images: Tensor, *, pad: int) -> Tensor:
    """Every window of the old size in the zero-padded images (N, C, H, W), a view.

    (N, C, 2 * pad + 1, 2 * pad + 1, H, W), of the same type.
    """
    height, width = images.shape[-2:]
    return F.pad(images, (pad, pad, pad, pad)).unfold(2, height, 1).unfold(3, width, 1)


def crop_and_flip(windows: Tensor, index: Tensor, draws: Tensor) -> Tensor:
    """One window of each of these images, some mirrored: whole batches at once, on the device of the windows.

    From `windows_of`, positions of images, int64 (B,), and rows (top, left, mirrored), int64 (B, 3), to (B, C, H, W).
    """
    top, left, mirrored = draws.to(windows.device).unbind(1)
    cropped = windows[index.to(windows.device), :, top, left]
    return torch.where(mirrored.bool()[:, None, None, None], cropped.flip(3), cropped)


def lighting_shift(strength: float) -> Tensor:
    """PCA lighting: a random multiple of the principal colours of ImageNet, to be added to every pixel of an image.

    In shares of the pixel range, float (3, 1, 1); `strength` is the standard deviation of the multiples. Draws from
    torch's global generator, as the transforms around it do.

    Source: Krizhevsky et al. 2012, section 4.1; eigenvalues and vectors of fb.resnet.torch.
    """
    values = torch.tensor([0.2175, 0.0188, 0.0045])
    vectors = torch.tensor(  # a column for each principal colour
        [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
    )
    return (vectors @ (values * torch.randn(3) * strength)).view(3, 1, 1)


def lit(image: Image, *, strength: float, unit: str) -> Image:
    """PCA lighting of an RGB image whose pixels stay uint8.

    With unit "range" the shift is in shares of the pixel range, rounded; with "level" it is in grey levels and what is
    behind the point is cut off, as in the script of ST++, which so changes a pixel by one level at most.

    >>> from PIL import Image
    >>> black = Image.new("RGB", (1, 1))
    >>> lit(black, strength=0.1, unit="level").getpixel((0, 0))
    (0, 0, 0)
    """
    from PIL import Image

    shift = lighting_shift(strength).flatten().numpy()
    pixels = np.asarray(image, dtype=np.float32)
    pixels = (pixels + 255 * shift).round() if unit == "range" else pixels + shift
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _lights_floats(config: Config) -> bool:
    """Whether lighting is added to normalised pixels, at the end; else it is added to a picture."""
    return config.lighting > 0 and config.lighting_unit == "range" and config.aa != "uniform"


def cuts_batches(data: Data, config: Config) -> bool:
    """Whether crop_and_flip does the cropping: images of one size, in memory, not randomly resized."""
    return isinstance(data.train, ImageSet) and data.augment != "resized-crop"


def changes_pixels(config: Config) -> bool:
    """Whether images are changed one by one beyond cropping and mirroring."""
    return bool(config.aa or config.color_jitter or config.lighting or config.reprob)


def training_transform(data: Data, config: Config) -> Callable[[Image], Tensor]:
    """What is done to one image, drawing from the global generators of Python, NumPy and torch.

    In this order: crop and mirror (unless crop_and_flip does it), automatic augmentation, colour
    jitter, lighting, erasing; UniformAugment comes after lighting. The result is uint8 (C, H, W), or
    float32 and normalised, after erasing and where lighting need not be put back into 8 bits.

    Raises:
        ValueError: the settings ask for what the images or timm do not have.
    """
    from torchvision.transforms import v2

    steps: list[Any] = [] if cuts_batches(data, config) else _geometry(data, config)
    if config.aa not in (None, "uniform"):
        steps.append(_automatic(config.aa, data, config))
    if config.color_jitter:
        steps.append(v2.ColorJitter(config.color_jitter, config.color_jitter, config.color_jitter))
    if config.lighting and data.in_chans != 3:
        raise ValueError(f"lighting {config.lighting} shifts colours, but {data.name} is grey; leave --lighting out")
    if config.lighting and not _lights_floats(config):
        steps.append(partial(lit, strength=config.lighting, unit=config.lighting_unit))
    if config.aa == "uniform":
        steps.append(uniform_augment)
    finish = _finish(data, config)
    return lambda image: finish(as_pixels(_all(steps, image), channels=data.in_chans))


def evaluation_transform(data: Data, config: Config) -> Callable[[Image], Tensor]:
    """Resizes the short side to img_size / crop_pct and cuts out the centre: uint8 (C, img_size, img_size)."""
    steps = _centre(data.img_size, data)
    return lambda image: as_pixels(_all(steps, image), channels=data.in_chans)


def _all(steps: Iterable[Callable[[Image], Image]], image: Image) -> Image:
    for step in steps:
        image = step(image)
    return image


def _geometry(data: Data, config: Config) -> list[Any]:
    from timm.data.transforms import RandomResizedCropAndInterpolation
    from torchvision.transforms import v2

    size = data.train_img_size
    mirror = [v2.RandomHorizontalFlip(data.hflip)]
    if data.augment == "resized-crop":
        return [RandomResizedCropAndInterpolation(size, config.scale, interpolation=data.interpolation), *mirror]
    if data.augment == "pad-crop":
        resize = v2.Resize(size, interpolation=_mode(data))
        return [resize, v2.CenterCrop(size), v2.RandomCrop(size, padding=data.pad), *mirror]
    return _centre(size, data)


def _centre(size: int, data: Data) -> list[Any]:
    from torchvision.transforms import v2

    return [v2.Resize(int(size / data.crop_pct), interpolation=_mode(data)), v2.CenterCrop(size)]


def _mode(data: Data) -> Any:
    from torchvision.transforms import InterpolationMode

    return InterpolationMode(data.resize_mode)


def _automatic(aa: str, data: Data, config: Config) -> Callable[[Image], Image]:
    from timm.data import auto_augment
    from timm.data.transforms import str_to_pil_interp
    from torchvision.transforms import v2

    if aa == "trivial":
        return v2.TrivialAugmentWide()
    mean = data.mean if data.in_chans == 3 else data.mean * 3
    # As timm's create_transform sets them.
    hparams: dict[str, Any] = {
        "translate_const": int(data.train_img_size * 0.45),
        "img_mean": tuple(min(255, round(value)) for value in mean),
    }
    if data.interpolation != "random":
        hparams["interpolation"] = str_to_pil_interp(data.interpolation)
    kind = aa.partition("-")[0]
    build = {"rand": auto_augment.rand_augment_transform, "augmix": auto_augment.augment_and_mix_transform}
    if kind == "augmix":
        hparams["translate_pct"] = 0.3
    try:
        policy = build.get(kind, auto_augment.auto_augment_transform)(aa, hparams)
    except (AssertionError, ValueError, KeyError) as error:
        raise ValueError(f"aa {aa!r}: timm cannot read it ({error}); give one like rand-m9-mstd0.5-inc1") from error
    operations = policy.ops if hasattr(policy, "ops") else [op for branch in policy.policy for op in branch]
    for operation in operations:
        if operation.name.startswith("Posterize"):
            operation.aug_fn = _posterize
    return policy


def _posterize(image: Image, bits: int, **_: Any) -> Image:
    """Keeps so many bits of each channel; timm asks for 0 at full magnitude, which Pillow refuses since version 13."""
    from PIL import Image, ImageOps

    if bits == 0:
        return Image.new(image.mode, image.size)  # black, as before
    return image if bits >= 8 else ImageOps.posterize(image, bits)


def _finish(data: Data, config: Config) -> Callable[[Tensor], Tensor]:
    """From uint8 (C, H, W): lighting and erasing, on normalised pixels, if there are any."""
    lights = _lights_floats(config)
    if not (lights or config.reprob):
        return lambda pixels: pixels
    from timm.data.random_erasing import RandomErasing

    erase = RandomErasing(config.reprob, mode=config.remode, device="cpu")
    std = torch.tensor(data.std).view(-1, 1, 1) / 255

    def finish(pixels: Tensor) -> Tensor:
        x = data.normalise(pixels[None], size=data.train_img_size)[0]
        if lights:
            # Shifting and normalising change places: the shift is divided by the spread.
            x = x + lighting_shift(config.lighting) / std
        return erase(x)

    return finish
