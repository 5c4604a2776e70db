"""What the subnets of a model cost that nobody has trained yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod

import torch

from unloaf.analysis.costs import CostRow, count_costs, measure_subnets
from unloaf.evaluation import choose_subnets
from unloaf.inspection.load import load_model, without_data
from unloaf.sampling import draw_generator
from unloaf.stages import Stage, find_stages
from unloaf.subnet import Subnet

_MOST_LISTED = 4096  # ordered subnets; of more some are drawn


def cost_of_model(
    name: str,
    *,
    number: str,
    timed: Sequence[int] = (),
    repeats: int = 30,
    device: str = "auto",
    img_size: int | None = None,
    num_classes: int | None = None,
) -> list[CostRow]:
    """Costs of a model's ordered subnets, the main network first; nothing is judged.

    Args:
        name: as for `unloaf train`.
        number: "all", or how many are drawn beside the main network.
        timed: batch sizes at which time is measured.
        repeats: passes that are timed.
        device: "auto" or "cpu".
        img_size: side of the images in pixels; default: the model's own.
        num_classes: classes of the head.

    Raises:
        ValueError: an unknown model, or one without residual blocks.

    >>> rows = cost_of_model("cifar/resnet20", number="2", device="cpu")
    >>> rows[0].subnet, rows[0].params, len(rows)
    ('3-3-3', 269722, 3)
    """
    model, example = load_model(name, img_size=img_size, num_classes=num_classes)
    stages = find_stages(model, example)
    chosen = _chosen(stages, number)
    if not timed:
        empty, inputs = without_data(model, example)
        return count_costs(empty, stages, inputs, chosen)
    where = torch.accelerator.current_accelerator(check_available=True) if device == "auto" else None
    where = where or torch.device("cpu")
    placed = {key: x.to(where) for key, x in example.items()} if isinstance(example, Mapping) else example.to(where)
    return measure_subnets(model.to(where), stages, placed, chosen, batch_sizes=timed, repeats=repeats)


def _chosen(stages: Sequence[Stage], number: str) -> list[Subnet]:
    count = prod(len(stage.legal_depths) for stage in stages)
    if number == "all":
        return choose_subnets(stages)
    wanted = min(int(number) + 1, count)
    if count <= _MOST_LISTED:
        return choose_subnets(stages, wanted)
    drawn, step = {Subnet.full(stages): None}, 0
    while len(drawn) < wanted:
        generator = draw_generator(0, step, 0, purpose="evaluation")
        picked = [int(torch.randint(len(s.legal_depths), (1,), generator=generator)) for s in stages]
        drawn[Subnet.from_depths(stages, [s.legal_depths[i] for s, i in zip(stages, picked, strict=True)])] = None
        step += 1
    return list(drawn)
