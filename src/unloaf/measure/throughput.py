"""How many images a cascade answers in a second, beside subnets that run alone."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from unloaf.anytime import Anytime
from unloaf.measure.costs import milliseconds
from unloaf.stages import call_model, evaluating
from unloaf.subnet import Subnet, active_subnet

_WARM_UP = 1


def images_per_second(
    anytime: Anytime,
    subnets: Sequence[Subnet],
    images: Tensor,
    *,
    batch_sizes: Sequence[int],
    repeats: int,
    on_round: Callable[[], None] | None = None,
) -> list[dict[int, float]]:
    """Of the cascade, then of each subnet alone: images answered in a second, by batch size.

    All see the same images, on which it depends who leaves early; they take turns, in another order in each round, so
    that other load on the machine hits all alike. The median over the rounds.

    Args:
        anytime: with its threshold, on the device to measure.
        subnets: of the same model.
        images: (images, ...), of the kind that it will see.
        batch_sizes: images in a call.
        repeats: rounds that are timed.
        on_round: is called after each.

    >>> import torch, unloaf
    >>> from torchvision.models import resnet18
    >>> model, x = resnet18(num_classes=10).eval(), torch.randn(4, 3, 32, 32)
    >>> stages = unloaf.find_stages(model, x)
    >>> chain = [unloaf.Subnet.from_depths(stages, depths) for depths in [(2, 2, 2, 1), (2, 2, 2, 2)]]
    >>> found = images_per_second(unloaf.Anytime(model, stages, chain), chain, x, batch_sizes=[1, 4], repeats=1)
    >>> [list(one) for one in found]
    [[1, 4], [1, 4], [1, 4]]
    """
    model = anytime.model
    sizes = list(dict.fromkeys(batch_sizes))
    taken: dict[tuple[int, int], list[float]] = {(i, size): [] for i in range(len(subnets) + 1) for size in sizes}
    generator = torch.Generator().manual_seed(0)

    def answer(call: Callable[[Any], Any], size: int) -> None:
        for batch in images.split(size):
            call(batch)

    with evaluating(model):
        for _ in range(_WARM_UP + repeats):
            for index in torch.randperm(len(subnets) + 1, generator=generator).tolist():
                for size in sizes:
                    if index == 0:
                        work = partial(answer, anytime, size)
                        taken[index, size].append(milliseconds(work, images.device))
                        continue
                    with active_subnet(model, anytime.stages, subnets[index - 1]):
                        work = partial(answer, partial(call_model, model), size)
                        taken[index, size].append(milliseconds(work, images.device))
            if on_round is not None:
                on_round()
    return [
        {size: 1000 * len(images) / statistics.median(taken[i, size][_WARM_UP:]) for size in sizes}
        for i in range(len(subnets) + 1)
    ]
