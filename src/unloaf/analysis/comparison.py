"""Trained runs in, rows of a comparison out."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from unloaf.analysis.equal_cost import value_at

if TYPE_CHECKING:
    from unloaf.evaluation import Accuracy, SubnetRow


@dataclass(frozen=True)
class MethodRun:
    """One method at one seed.

    `subnets`, the main network among them, are evaluated on the same images for every method, with re-estimated
    batch-norm statistics; the main network's row has its figures with running statistics too.
    `cost` is the measured time of a step, `flops` its least possible arithmetic, both
    relative to common training. `curve` is the accuracy of the main network on the validation images over the cost so
    far, relative to a whole common training.
    """

    label: str
    seed: int
    subnets: tuple[SubnetRow, ...]
    cost: float
    flops: float
    curve: tuple[tuple[float, float], ...] = ()

    @property
    def main(self) -> SubnetRow:
        """The main network."""
        return max(self.subnets, key=lambda row: sum(row.depths))

    @property
    def proper_subnets(self) -> tuple[SubnetRow, ...]:
        """All subnets but the main network."""
        return tuple(row for row in self.subnets if row != self.main)


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation (n - 1) over n seeds; the deviation of a single seed is None.

    >>> str(Spread.of([97.0, 98.0, 99.0])), str(Spread.of([98.0]))
    ('98.0 ± 1.0', '98.0')
    """

    mean: float
    sd: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of these values, at least one."""
        sd = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), sd, len(values))

    def __str__(self) -> str:
        return self.text(digits=1)

    def text(self, *, digits: int) -> str:
        """The mean, and the deviation where there is one."""
        mean = f"{self.mean:.{digits}f}"
        return mean if self.sd is None else f"{mean} ± {self.sd:.{digits}f}"


@dataclass(frozen=True)
class MethodRow:
    """A line of the table: accuracies in percent, costs relative to common training.

    `main_top1` is the main network with its running batch-norm statistics; `main_reestimated` the same
    network with statistics re-estimated as those of its subnets are, to be compared with them, or None. `equal_cost` is
    the main network on the validation images when its training had cost as much as the cheapest of all runs, or None.
    """

    label: str
    main_top1: Spread
    main_reestimated: Spread | None
    mean_top1: Spread
    worst_top1: Spread
    cost: Spread
    flops: Spread
    equal_cost: Spread | None = None


@dataclass(frozen=True)
class SizeRow:
    """Accuracy in percent of the subnets that keep the same number of blocks, over all seeds, evaluated alike."""

    blocks: int
    mean_top1: float
    lowest_top1: float
    highest_top1: float


def method_rows(runs: Sequence[MethodRun]) -> list[MethodRow]:
    """One row for each method, over its seeds, in the order in which the methods first appear."""
    budget = min((run.curve[-1][0] for run in runs if run.curve), default=0.0)
    return [_method_row(label, group, budget) for label, group in _by_label(runs).items()]


def _method_row(label: str, group: Sequence[MethodRun], budget: float) -> MethodRow:
    tops = [_tops(run.proper_subnets) for run in group]
    mains = [run.main for run in group]
    both = [row for row in mains if row.running is not None]
    then = [point.value for point in (value_at(run.curve, budget) for run in group) if point is not None]
    return MethodRow(
        label=label,
        main_top1=Spread.of(_tops([row.running or row for row in mains])),
        main_reestimated=Spread.of(_tops(both)) if both else None,
        mean_top1=Spread.of([statistics.fmean(top) for top in tops]),
        worst_top1=Spread.of([min(top) for top in tops]),
        cost=Spread.of([run.cost for run in group]),
        flops=Spread.of([run.flops for run in group]),
        equal_cost=Spread.of(then) if len(then) == len(group) else None,
    )


def _tops(rows: Iterable[SubnetRow | Accuracy]) -> list[float]:
    return [row.top1 for row in rows if row.top1 is not None]


def size_rows(runs: Sequence[MethodRun]) -> dict[str, list[SizeRow]]:
    """Per method, one row for each number of blocks kept, smallest first."""
    return {label: _size_rows(group) for label, group in _by_label(runs).items()}


def _size_rows(group: Sequence[MethodRun]) -> list[SizeRow]:
    tops: dict[int, list[float]] = {}
    for run in group:
        for row in run.subnets:
            tops.setdefault(sum(row.depths), []).extend(_tops([row]))
    return [SizeRow(blocks, statistics.fmean(top), min(top), max(top)) for blocks, top in sorted(tops.items())]


def _by_label(runs: Sequence[MethodRun]) -> dict[str, list[MethodRun]]:
    groups: dict[str, list[MethodRun]] = {}
    for run in runs:
        groups.setdefault(run.label, []).append(run)
    return groups
