"""Which part of an image a network looks at for one place of its last features (Luo et al. 2016)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import ceil, isqrt
from typing import Any

import torch
from torch import Tensor, nn

from unloaf.analysis.runs import label_of, names_of, split_of
from unloaf.evaluation import choose_subnets
from unloaf.inputs import resize, to_device
from unloaf.runs.opened import OpenedRun
from unloaf.stages import Stage, call_model, evaluating
from unloaf.subnet import Subnet, active_subnet

SHARES = (20, 30, 50, 99)  # percent of all contributions, as Ding et al. 2022 have them


@dataclass(frozen=True)
class ReceptiveField:
    """The effective receptive field of a network for inputs of one side.

    Attributes:
        run: name of the run.
        method: how it was trained.
        depths: the subnet.
        side: shorter side of the input, in pixels.
        areas: for each of `SHARES` the area of the smallest square around the centre that holds that share of the
            contributions, in percent of the image.
        contributions: of each pixel, rows of the image from the top, their sum 1.
    """

    run: str
    method: str
    depths: str
    side: int
    areas: tuple[float, ...]
    contributions: tuple[tuple[float, ...], ...]


def contributions(model: nn.Module, block: nn.Module, images: Iterable[Tensor]) -> Tensor:
    """How much each pixel contributes to the centre of a block's output, (height, width), in float64; their sum is 1.

    The gradient of the sum of the centre's channels by the pixels; negative ones count as 0, channels and images are
    summed.

    Args:
        model: takes images, (batch, channels, height, width); it runs in evaluation mode and is left as it was.
        block: a module of it that is called once, whose output is (batch, C, H, W), (batch, H, W, C), or tokens,
            (batch, N, C), the last square number of which are places of the image.
        images: batches, all of one size.

    Raises:
        ValueError: the output has another shape, is not reached, or nothing contributes.

    Source: Luo et al. 2016, section 3; negative values as in Ding et al. 2022, section 5.1.

    >>> convolution = nn.Conv2d(1, 1, 3, padding=1, bias=False)
    >>> _ = nn.init.ones_(convolution.weight)
    >>> contributions(convolution, convolution, [torch.zeros(1, 1, 5, 5)])[2]
    tensor([0.0000, 0.1111, 0.1111, 0.1111, 0.0000], dtype=torch.float64)
    """
    total = None
    for batch in images:
        found = _contributions(model, block, to_device(batch, next(model.parameters()).device))
        total = found if total is None else total + found
    if total is None:
        raise ValueError("there are no images; give at least one batch")
    if not total.sum() > 0:
        raise ValueError("no pixel contributes to the centre of the last features; look at the weights of the network")
    return total / total.sum()


def _contributions(model: nn.Module, block: nn.Module, batch: Tensor) -> Tensor:
    seen: list[Any] = []

    def record(module: nn.Module, args: Any, output: Any) -> None:
        seen.append(output)

    handle = block.register_forward_hook(record)
    try:
        with evaluating(model), torch.enable_grad():
            x = batch.detach().clone().requires_grad_()
            call_model(model, x)
            if not seen or not isinstance(seen[-1], Tensor):
                raise ValueError(f"the last block, a {type(block).__name__}, gives no tensor; its field is not known")
            [gradient] = torch.autograd.grad(_centre(seen[-1]).sum(), [x])
    finally:
        handle.remove()
    return gradient.clamp(min=0).double().sum((0, 1)).cpu()


def _centre(features: Tensor) -> Tensor:
    """The channels at the centre of feature maps, (batch, C)."""
    shape = features.shape
    if features.ndim == 4 and shape[1] == shape[2] != shape[3]:  # channels last
        return features[:, shape[1] // 2, shape[2] // 2]
    if features.ndim == 4:
        return features[:, :, shape[2] // 2, shape[3] // 2]
    if features.ndim == 3:
        side = isqrt(shape[1])
        return features[:, shape[1] - side * side + side * (side // 2) + side // 2]
    raise ValueError(
        f"the last block gives a tensor of {features.ndim} axes; feature maps have 4, tokens of an image have 3"
    )


def area_of(field: Tensor, share: float) -> float:
    """Area of the smallest square around the centre with that share of the contributions, in percent of the image.

    Args:
        field: contributions, (height, width).
        share: of their sum, in percent.

    >>> area_of(torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.9, 0.1], [0.0, 0.0, 0.0]]), 50)
    11.11111111111111
    """
    height, width = field.shape
    needed = field.sum() * share / 100
    middle = (height // 2, width // 2)
    for reach in range(max(height, width)):
        square = field[
            max(middle[0] - reach, 0) : middle[0] + reach + 1, max(middle[1] - reach, 0) : middle[1] + reach + 1
        ]
        if square.sum() >= needed * (1 - 1e-12):  # sums of floats
            return 100 * square.numel() / field.numel()
    return 100.0


def receptive_fields(
    opened: Sequence[OpenedRun],
    *,
    subnets: Sequence[str] = (),
    count: int = 3,
    sides: Sequence[int] = (),
    images: int = 16,
    split: str | None = None,
    seed: int = 0,
    on_row: Callable[[ReceptiveField], None] | None = None,
) -> list[ReceptiveField]:
    """Effective receptive fields of main networks and their subnets, for inputs of several sizes.

    Args:
        opened: from `unloaf.analysis.runs.open_alike`, of classification.
        subnets: depths, as in "3-3-1"; default: the main network and ``count`` others, drawn.
        count: subnets beside the main network, where none are given.
        sides: shorter sides to which images are resized, in pixels; default: that of the run.
        images: how many, from the beginning of the split.
        split: "val" or "test"; default: val if there is one.
        seed: of the draw of subnets.
        on_row: is called with each row as soon as it is known.

    Raises:
        ValueError: a run is of another task, has no such subnet, or cannot take images of such a side.
    """
    rows = []
    for name, run in zip(names_of(opened), opened, strict=True):
        run.check_classifier("receptive-field")
        stages, model = run.training.stages, run.network
        pixels = _first(run.training.eval_batches(split_of(run, split)), images)
        for subnet in _chosen(stages, subnets, count, seed):
            for side in sides or (min(pixels.shape[-2:]),):
                field = _field(model, stages, subnet, resize(pixels, side), side)
                areas = tuple(area_of(field, share) for share in SHARES)
                shades = tuple(tuple(row) for row in field.tolist())
                rows.append(ReceptiveField(name, label_of(run), str(subnet), side, areas, shades))
                if on_row is not None:
                    on_row(rows[-1])
    return rows


def _first(batches: Iterable[tuple[Tensor, Tensor]], count: int) -> Tensor:
    found: list[Tensor] = []
    for x, _ in batches:
        found.append(x)
        if sum(map(len, found)) >= count:
            break
    return torch.cat(found)[:count]


def _chosen(stages: Sequence[Stage], depths: Sequence[str], count: int, seed: int) -> list[Subnet]:
    if not depths:
        return choose_subnets(stages, count + 1, seed=seed)
    return [Subnet.from_depths(stages, [int(depth) for depth in text.replace(",", "-").split("-")]) for text in depths]


def _field(model: nn.Module, stages: Sequence[Stage], subnet: Subnet, pixels: Tensor, side: int) -> Tensor:
    last = list(subnet.modes(stages))[-1]
    batches = pixels.split(max(1, ceil(len(pixels) / 4)))
    try:
        with active_subnet(model, stages, subnet):
            return contributions(model, model.get_submodule(last), batches)
    except (RuntimeError, AssertionError) as error:  # models refuse a side as they like
        raise ValueError(f"the network cannot take images of {side} pixels ({error}); give other --sides") from error


def field_table(rows: Sequence[ReceptiveField]) -> tuple[list[str], list[list[str]]]:
    """Heads and cells, a line for each network and side."""
    heads = ["run", "method", "depths", "side", *(f"{share} % in" for share in SHARES)]
    return heads, [
        [row.run, row.method, row.depths, str(row.side), *(f"{area:.1f} %" for area in row.areas)] for row in rows
    ]
