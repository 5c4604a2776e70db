"""What the subnets of a model cost that nobody has trained yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from unloaf.analysis.costs import CostRow, count_costs, measure_subnets
from unloaf.engine.devices import usable_device
from unloaf.evaluation import choose_subnets
from unloaf.inspection.load import load_model, without_data
from unloaf.stages import find_stages


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
        device: "auto", "cpu", "cuda", "cuda:1", "mps" and their kind.
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
    chosen = choose_subnets(stages, None if number == "all" else int(number) + 1)
    if not timed:
        empty, inputs = without_data(model, example)
        return count_costs(empty, stages, inputs, chosen)
    where = usable_device(device)
    placed = {key: x.to(where) for key, x in example.items()} if isinstance(example, Mapping) else example.to(where)
    return measure_subnets(model.to(where), stages, placed, chosen, batch_sizes=timed, repeats=repeats)
