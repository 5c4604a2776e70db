"""What subnets see of the main network's batch: all of it or a part, at its own side or a smaller one."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unloaf.stages import call_model, evaluating, inner_module


@dataclass(frozen=True)
class SmallerInputs:
    """Draws the side at which subnets see the batch: uniform over the integers from ``min_ratio`` of the full side up.

    Args:
        min_ratio: in (0, 1]; the smallest side is ``int(min_ratio * side)``.
        per: "subnet", a side for each subnet, as in the paper; "step", one side for all subnets of a step, so that they
            share their prefixes.
        sides: draw from these sides only (pixels), for models that take some sizes and not others.

    Raises:
        ValueError: a ratio outside (0, 1], an unknown ``per``, a side that is not positive.

    Source: Ye et al. 2023 (ST++), random smaller inputs. The resize always starts from the main network's input.

    >>> from unloaf import SmallerInputs
    >>> sides = SmallerInputs().candidates(224)
    >>> sides[0], sides[-1], len(sides)
    (96, 224, 129)
    """

    min_ratio: float = 0.43
    per: Literal["subnet", "step"] = "subnet"
    sides: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not 0 < self.min_ratio <= 1:
            raise ValueError(f"min_ratio is {self.min_ratio}; give a ratio above 0 and up to 1")
        if self.per not in ("subnet", "step"):
            raise ValueError(f"per is {self.per!r}; give 'subnet' (a side for each) or 'step' (one side for all)")
        if self.sides is not None and (not self.sides or min(self.sides) < 1):
            raise ValueError(f"sides is {self.sides}; give one or more positive numbers of pixels")

    def candidates(self, side: int) -> Sequence[int]:
        """The sides that are drawn from for a batch of this (full) side, in pixels."""
        if self.sides is None:
            return range(max(1, int(self.min_ratio * side)), side + 1)
        if max(self.sides) > side:
            raise ValueError(f"sides names {max(self.sides)}, but the batch has side {side}; give sides up to {side}")
        return self.sides

    def draw(self, side: int, generator: torch.Generator) -> int:
        """A side in pixels; all randomness comes from the generator."""
        candidates = self.candidates(side)
        return candidates[int(torch.randint(len(candidates), (1,), generator=generator))]


def resize(images: Tensor, side: int) -> Tensor:
    """The images, bilinearly resized so that the shorter side is ``side`` pixels; as they are if it is that already.

    >>> import torch
    >>> from unloaf.inputs import resize
    >>> resize(torch.zeros(2, 3, 32, 64), 16).shape
    torch.Size([2, 3, 16, 32])
    """
    height, width = images.shape[-2:]
    full = min(height, width)
    if side == full:
        return images
    return F.interpolate(images, size=(round(height * side / full), round(width * side / full)), mode="bilinear")


def first_examples(inputs: Any, count: int) -> Any:
    """The first examples of a batch; in a mapping, of each tensor that has a row for each example, nothing else.

    Raises:
        ValueError: of a mapping it is not known which tensors have.

    >>> first_examples({"pixels": torch.zeros(4, 3), "scale": 2.0}, 2)["pixels"].shape
    torch.Size([2, 3])
    """
    if isinstance(inputs, Mapping):
        size = batch_size(inputs)
        rows = {name: isinstance(v, Tensor) and v.ndim > 0 and len(v) == size for name, v in inputs.items()}
        return {name: value[:count] if rows[name] else value for name, value in inputs.items()}
    return inputs[:count]


def batch_size(inputs: Any) -> int:
    """How many examples a batch has: rows of the tensor, or of most tensors in a mapping, whatever their order.

    Raises:
        ValueError: as many tensors of a mapping have another number of rows.

    >>> batch_size({"table": torch.zeros(9, 2), "pixels": torch.zeros(4, 3), "mask": torch.zeros(4)})
    4
    """
    if not isinstance(inputs, Mapping):
        return len(first_tensor(inputs))
    first_tensor(inputs)
    rows = {name: len(v) for name, v in inputs.items() if isinstance(v, Tensor) and v.ndim}
    (size, most), *others = Counter(rows.values()).most_common(2)
    if others and others[0][1] == most:
        listed = ", ".join(f"{name} {count}" for name, count in rows.items())
        raise ValueError(
            f"the tensors of x have these rows: {listed}; it is not known which have one for each example, "
            "so no part of the batch can be taken: give subnet_batch_fraction=1"
        )
    return size


def first_tensor(inputs: Any) -> Tensor:
    """A batch, or the first tensor with rows in a mapping.

    Raises:
        ValueError: there is none.

    >>> first_tensor({"scale": 2.0, "pixels": torch.zeros(4, 3)}).shape
    torch.Size([4, 3])
    """
    batch = inputs
    if isinstance(inputs, Mapping):
        tensors = [value for value in inputs.values() if isinstance(value, Tensor)]
        batch = next((tensor for tensor in tensors if tensor.ndim), tensors[0] if tensors else None)
    if not isinstance(batch, Tensor):
        raise ValueError(f"x is {type(batch).__name__}; give a tensor, or a mapping with tensors")
    if not batch.ndim:
        raise ValueError("x is a tensor of one number; give a batch, with a row for each example")
    return batch


def rows_of(inputs: Any) -> int | None:
    """How many rows all tensors of a batch have; None where they differ, or where the batch is anything else.

    >>> rows_of(torch.zeros(4, 3)), rows_of({"pixels": torch.zeros(4, 3), "edges": torch.zeros(2, 9)}), rows_of([1, 2])
    (4, None, None)
    """
    held = inputs.values() if isinstance(inputs, Mapping) else [inputs]
    rows = {len(value) for value in held if isinstance(value, Tensor) and value.ndim}
    return rows.pop() if len(rows) == 1 else None


def side_of(inputs: Any) -> int | None:
    """The shorter side of a batch of images, in pixels; None for any other batch.

    >>> side_of(torch.zeros(2, 3, 32, 64)), side_of(torch.zeros(2, 3))
    (32, None)
    """
    return min(inputs.shape[-2:]) if isinstance(inputs, Tensor) and inputs.ndim == 4 else None


class View(NamedTuple):
    """What a pass sees of a batch.

    Attributes:
        side: the images' shorter side in pixels; None for their own.
        examples: how many, the first ones of the batch; None for all.
        change: makes another batch of it; None to leave it as it is.

    >>> View(side=16, examples=2).of(torch.zeros(4, 3, 32, 32)).shape
    torch.Size([2, 3, 16, 16])
    """

    side: int | None = None
    examples: int | None = None
    change: Callable[[Any], Any] | None = None

    def of(self, inputs: Any) -> Any:
        """This view of a batch; the batch itself if nothing is left out."""
        some = inputs if self.examples is None else first_examples(inputs, self.examples)
        some = some if self.side is None else resize(some, self.side)
        return some if self.change is None else self.change(some)


def legal_sides(model: nn.Module, images: Tensor, sides: Sequence[int]) -> list[int]:
    """Those of the sides at which the model runs in eval mode, on these images resized; on meta nothing is computed.

    Of a range, which ends at the side of the images, three sides decide for a network that takes any size: models that
    do not (patches, windows, position tables) reject one of two neighbouring sides.

    >>> from torch import nn
    >>> images = torch.zeros(1, 3, 8, 8)
    >>> legal_sides(nn.Conv2d(3, 4, 3), images, range(3, 9))
    [3, 4, 5, 6, 7, 8]
    >>> legal_sides(nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 2)), images, range(3, 9))
    [8]
    """
    inner = inner_module(model)

    def runs(side: int) -> bool:
        try:
            call_model(inner, resize(images, side))
        except Exception:  # whatever a model raises at a size it was not built for
            return False
        return True

    with evaluating(model):
        if isinstance(sides, range) and all(map(runs, {sides[0], sides[min(1, len(sides) - 1)], sides[-2:][0]})):
            return list(sides)
        return [side for side in sides if runs(side)]


def check_sides(model: nn.Module, inputs: SmallerInputs, input_shape: Sequence[int]) -> None:
    """Raise ValueError unless the model runs at all sides that would be drawn; the message lists the legal ones.

    It runs in eval mode on noise, one image of the shape (channels, height, width).
    """
    if len(input_shape) != 3:
        raise ValueError(
            f"smaller inputs need images (channels, height, width), but an example has shape {tuple(input_shape)}"
        )
    side, image = min(input_shape[1:]), _noise(model, input_shape)
    sides = inputs.candidates(side)
    legal = legal_sides(model, image, sides)
    if len(legal) == len(sides):
        return
    if inputs.sides is not None:
        legal = legal_sides(model, image, list(range(1, side + 1)))
    listed = ", ".join(map(str, legal)) or "none"
    raise ValueError(
        f"{type(inner_module(model)).__name__} cannot take all inputs of sides {min(sides)} to {max(sides)}; "
        f"legal sides up to {side}: {listed}. Give SmallerInputs(sides=(...)) out of these, "
        'subnet_inputs="auto", which draws from them, or subnet_inputs=None for the inputs of the main network'
    )


def fitting_inputs(model: nn.Module, inputs: SmallerInputs, input_shape: Sequence[int] | None) -> SmallerInputs | None:
    """The rule, with the sides that the model takes; None, with a warning, where it takes the full one alone.

    It runs in eval mode on noise, one image of the shape (channels, height, width), None where an example is no tensor.

    >>> from torch import nn
    >>> fitting_inputs(nn.Conv2d(3, 4, 3), SmallerInputs(), (3, 8, 8))
    SmallerInputs(min_ratio=0.43, per='subnet', sides=None)
    >>> fitting_inputs(nn.Conv2d(3, 4, 6), SmallerInputs(), (3, 8, 8)).sides
    (6, 7, 8)
    """
    name = type(inner_module(model)).__name__
    if input_shape is None or len(input_shape) != 3:
        found = "are no images in a tensor of their own"
    else:
        side = min(input_shape[1:])
        sides = inputs.candidates(side)
        legal = legal_sides(model, _noise(model, input_shape), sides)
        if len(legal) == len(sides):
            return inputs
        if any(smaller < side for smaller in legal):
            return replace(inputs, sides=tuple(legal))
        found = f"cannot have a side of {min(sides)} to {side - 1} pixels"
    warnings.warn(
        f"inputs of {name} {found}, so subnets are not shown smaller ones but those of the main network "
        "(subnet_inputs=None says so without this warning)",
        stacklevel=4,
    )
    return None


def _noise(model: nn.Module, input_shape: Sequence[int]) -> Tensor:
    """One image, where and of what the model's parameters are."""
    image = torch.randn(1, *input_shape, generator=torch.Generator().manual_seed(0))
    return image.to(next(model.parameters()))


def _is_image(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 3


def batch_of(example: Any, size: int) -> Any:
    """A batch that repeats the first example; of a list of images or mappings, as detectors take them, the first one.

    >>> batch_of(torch.zeros(2, 3, 8, 8), 4).shape
    torch.Size([4, 3, 8, 8])
    >>> [image.shape[-1] for image in batch_of([torch.zeros(3, 8, 9), torch.zeros(3, 8, 8)], 2)]
    [9, 9]
    """
    if isinstance(example, Mapping):
        return {name: batch_of(value, size) for name, value in example.items()}
    if type(example) is list and all(isinstance(one, Mapping) or _is_image(one) for one in example):
        return example[:1] * size
    if type(example) in (list, tuple):
        return type(example)(batch_of(one, size) for one in example)
    if not isinstance(example, Tensor):
        return example
    return example[:1].repeat(size, *(1 for _ in example.shape[1:]))


def to_device(inputs: Any, device: torch.device | str) -> Any:
    """A tensor, or the tensors of mappings and lists, on that device.

    >>> to_device({"pixels": torch.zeros(2, 3), "scale": 2.0}, "meta")
    {'pixels': tensor(..., device='meta', size=(2, 3)), 'scale': 2.0}
    """
    if isinstance(inputs, Mapping):
        return {name: to_device(value, device) for name, value in inputs.items()}
    if type(inputs) in (list, tuple):
        return type(inputs)(to_device(value, device) for value in inputs)
    return inputs.to(device) if isinstance(inputs, Tensor) else inputs
