"""What the subnets of a model cost that nobody has trained yet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console

from unloaf.display import show_progress
from unloaf.engine.devices import usable_device
from unloaf.evaluation import SubnetRow, choose_subnets
from unloaf.measure.costs import Timing, measure_subnets, measured_rounds, time_subnets, with_latency
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
    """Costs of a model's ordered subnets, the main network first, and their time if asked for; nothing is judged.

    Args:
        name: as for `unloaf train`.
        subnets: "all", or how many are drawn beside the main network.
        timed: batch sizes at which time is measured.
        repeats: passes that are timed.
        device: "auto", "cpu", "cuda", "cuda:1", "mps" and their kind.
        img_size: side of the images in pixels; default: the model's own.
        num_classes: classes of the head.
        console: shows a progress bar where it is a terminal, now and then a line elsewhere.

    Raises:
        ValueError: an unknown model, or one without residual blocks.

    >>> rows, times = cost_of_model("cifar/resnet20", subnets="2", device="cpu")
    >>> str(rows[0].subnet), rows[0].params, len(rows), times
    ('3-3-3', 269722, 3, [])
    """
    model, example = load_model(name, img_size=img_size, num_classes=num_classes)
    stages = find_stages(model, example)
    chosen = choose_subnets(stages, None if subnets == "all" else int(subnets) + 1)
    empty, inputs = without_data(model, example)
    console = console or Console(quiet=True)
    with show_progress(console, total=len(chosen), label="GMACs", lines=True) as display:
        rows = [SubnetRow(subnet) for subnet in chosen]
        rows = measure_subnets(empty, stages, inputs, rows, on_row=lambda row: display.advance(str(row.subnet)))
    if not timed:
        return rows, []
    where = usable_device(device)
    placed = {key: x.to(where) for key, x in example.items()} if isinstance(example, Mapping) else example.to(where)
    with show_progress(console, total=measured_rounds(repeats), label="time", lines=True) as display:
        times = time_subnets(
            model.to(where),
            stages,
            placed,
            chosen,
            batch_sizes=timed,
            repeats=repeats,
            on_pass=lambda: display.advance(""),
        )
    return with_latency(rows, times), times
