"""What is left of a network whose blocks are deleted when it is tested (Veit et al. 2016, section 4)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from unloaf.analysis.comparison import Spread
from unloaf.analysis.runs import label_of, names_of, split_of
from unloaf.runs.opened import OpenedRun
from unloaf.sampling import draw_generator
from unloaf.stages import Stage
from unloaf.subnet import Subnet, active_subnet


@dataclass(frozen=True)
class DamageRow:
    """A network without some of its blocks.

    Attributes:
        run: name of the run.
        method: how it was trained.
        deleted: number of blocks that are deleted.
        blocks: which, by their names in the network.
        value: the figure that decides in the task, in its unit: percent of accuracy, nats of a language model.
    """

    run: str
    method: str
    deleted: int
    blocks: tuple[str, ...]
    value: float


def damaged(stages: Sequence[Stage], *, most: int | None = None, draws: int = 8, seed: int = 0) -> list[Subnet]:
    """The main network, each network that lacks one block, and ``draws`` random ones for each larger number of blocks.

    Only blocks that can be skipped are deleted, and each stage keeps one. No network is drawn twice: where there are
    fewer of a number than ``draws``, it has as many as came up.

    Args:
        stages: from `unloaf.find_stages`.
        most: blocks that are deleted at most; default: as many as can be.
        draws: networks for each number of blocks from 2 on.
        seed: of the draws; the same stages have the same ones.

    Raises:
        ValueError: ``most`` or ``draws`` is below 1.

    >>> stages = (Stage("a", ("a.0", "a.1", "a.2"), (False, True, True)),)
    >>> [str(subnet) for subnet in damaged(stages)]
    ['3', '2:101', '2', '1']
    """
    for name, value in (("most", most), ("draws", draws)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}; give at least 1")
    full = Subnet.full(stages)
    able = [(i, j) for i, stage in enumerate(stages) for j, skippable in enumerate(stage.skippable) if skippable]
    found = {full: None}
    last = max(sum(full.depths) - sum(stage.legal_depths[0] for stage in stages), 0)
    for count in range(1, min(last, most or last) + 1):
        orders = [_turned(able, at) for at in range(len(able))] if count == 1 else _orders(able, count, draws, seed)
        for order in orders:
            found[_without(full, order, count)] = None
    return list(found)


def _turned(able: list[Any], at: int) -> list[Any]:
    return able[at:] + able[:at]


def _orders(able: list[Any], count: int, draws: int, seed: int) -> list[list[Any]]:
    orders = []
    for draw in range(draws):
        generator = draw_generator(seed, count, draw, purpose="damage")
        orders.append([able[at] for at in torch.randperm(len(able), generator=generator).tolist()])
    return orders


def _without(full: Subnet, order: list[tuple[int, int]], count: int) -> Subnet:
    """The network without the first ``count`` blocks of an order that leave something of their stage."""
    keep = [list(stage) for stage in full.keep]
    for i, j in order:
        if count and sum(keep[i]) > 1:
            keep[i][j] = False
            count -= 1
    return Subnet(tuple(map(tuple, keep)))


def damage_rows(
    opened: Sequence[OpenedRun],
    *,
    split: str | None = None,
    most: int | None = None,
    draws: int = 8,
    seed: int = 0,
    recalibrate: bool = False,
    on_row: Callable[[DamageRow], None] | None = None,
) -> list[DamageRow]:
    """How good trained networks are without some of their blocks.

    Args:
        opened: from `unloaf.analysis.runs.open_alike`.
        split: "val" or "test"; default: val if there is one.
        most: see `damaged`, as draws and seed.
        draws: networks for each number of blocks from 2 on.
        seed: of the draws.
        recalibrate: re-estimate batch-norm statistics of each damaged network; without, as in the source, the network
            keeps those of its training.
        on_row: is called with each row as soon as it is known.

    Source: Veit et al. 2016 (Residual networks behave like ensembles of relatively shallow networks), section 4.
    """
    rows = []
    for name, run in zip(names_of(opened), opened, strict=True):
        for subnet in damaged(run.training.stages, most=most, draws=draws, seed=seed):
            blocks = _missing(run.training.stages, subnet)
            value = _figure(run, subnet, split=split_of(run, split), recalibrate=recalibrate)
            rows.append(DamageRow(name, label_of(run), len(blocks), blocks, value))
            if on_row is not None:
                on_row(rows[-1])
    return rows


def _missing(stages: Sequence[Stage], subnet: Subnet) -> tuple[str, ...]:
    kept = subnet.modes(stages)
    return tuple(path for stage in stages for path in stage.blocks if path not in kept)


def _figure(run: OpenedRun, subnet: Subnet, *, split: str, recalibrate: bool) -> float:
    training, model, batches = run.training, run.network, run.training.eval_batches(split)
    task = training.task
    if recalibrate and subnet != Subnet.full(training.stages):
        calibration = training.calibration_batches()
        [row] = task.evaluate_subnets(
            model, training.stages, batches, training.data, subnets=[subnet], calibration=calibration
        )
        return task.figures.decide(row)
    with active_subnet(model, training.stages, subnet):
        return task.figures.decide(task.evaluate(model, batches, training.data, reduce=None))


def damage_table(rows: Sequence[DamageRow], *, figure: str = "", digits: int = 1) -> tuple[list[str], list[list[str]]]:
    """Heads and cells: mean and standard deviation for each number of deleted blocks, a column for each run.

    The figure is named by what stands beside the table; its values have so many digits.

    >>> row = DamageRow("a", "ST", 1, ("layer1.1",), 90.25)
    >>> damage_table([DamageRow("a", "ST", 0, (), 92.0), row])
    (['deleted', 'networks', 'a'], [['0', '1', '92.0'], ['1', '1', '90.2']])
    """
    runs = list(dict.fromkeys(row.run for row in rows))
    lines = []
    for count in sorted({row.deleted for row in rows}):
        values = {run: [row.value for row in rows if (row.run, row.deleted) == (run, count)] for run in runs}
        sizes = {len(found) for found in values.values() if found}
        cells = [_spread(found).text(digits=digits) if found else "" for found in values.values()]
        lines.append([str(count), "/".join(map(str, sorted(sizes))), *cells])
    return ["deleted", "networks", *runs], lines


def _spread(values: Sequence[float]) -> Spread:
    return Spread.of([value for value in values if not math.isnan(value)] or [math.nan])
