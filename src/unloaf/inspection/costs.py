"""What the subnets of a model cost that nobody has trained yet."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from unloaf.engine.devices import usable_device
from unloaf.evaluation import SubnetRow, choose_subnets
from unloaf.inputs import to_device
from unloaf.measure.costs import Timing, measure_in_sight
from unloaf.models.load import load_model, without_data
from unloaf.stages import find_stages


def cost_of_model(
    name: str,
    *,
    subnets: str,
    timed: Sequence[int] = (),
    repeats: int = 30,
    device: str = "auto",
    img_size: int | None = None,
    num_classes: int | None = None,
    console: Console | None = None,
) -> tuple[list[SubnetRow], list[tuple[Timing, ...]]]:
    """Costs of a model's ordered subnets, the main network first, and their time if asked for; nothing is evaluated.

    Options are those of `unloaf subnets`; ``timed`` are the batch sizes at which time is measured, and ``subnets`` is
    "all", or how many are drawn beside the main network.

    Raises:
        ValueError: an unknown model, or one without residual blocks.

    >>> rows, times = cost_of_model("cifar/resnet20", subnets="2", device="cpu")
    >>> str(rows[0].subnet), rows[0].params, len(rows), times
    ('3-3-3', 269722, 3, [])
    """
    model, example = load_model(name, img_size=img_size, num_classes=num_classes)
    stages = find_stages(model, example)
    chosen = choose_subnets(stages, None if subnets == "all" else int(subnets) + 1)
    empty = without_data(model, example)
    if timed:
        where = usable_device(device)
        model, example = model.to(where), to_device(example, where)
    rows = [SubnetRow(subnet) for subnet in chosen]
    return measure_in_sight(model, stages, example, rows, timed=timed, repeats=repeats, console=console, counted=empty)
