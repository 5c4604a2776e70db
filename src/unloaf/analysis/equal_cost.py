"""Trainings compared at the same cost. Imports no torch."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

from unloaf.config.figures import FIGURES
from unloaf.runs.histories import RunHistory


class Reached(NamedTuple):
    """A training at some cost."""

    cost: float
    value: float


def value_at(curve: Iterable[tuple[float, float]], budget: float) -> Reached | None:
    """The last value of a curve over cost that had been reached for so much; None where there is none.

    >>> value_at([(1.0, 80.0), (2.0, 85.0), (3.0, 86.0)], 2.5)
    Reached(cost=2.0, value=85.0)
    """
    found = [Reached(cost, value) for cost, value in curve if cost <= budget * (1 + 1e-9)]  # sums of floats
    return found[-1] if found else None


@dataclass(frozen=True)
class EqualCostRow:
    """A run at the training time of the cheapest run, of those that are finished if there are any.

    Attributes:
        run: its label.
        method: its flag.
        seed: of the run.
        seconds: of all its epochs so far, validation not included.
        relative: the same over the median of the runs by the baseline method, common training or else the first one.
        whole: its newest value on the validation images.
        epoch: the last epoch that was validated within the training time of the cheapest run.
        value: on the validation images after that epoch.
    """

    run: str
    method: str
    seed: int
    seconds: float
    relative: float
    whole: float
    epoch: int
    value: float


def equal_cost_rows(histories: Sequence[RunHistory]) -> tuple[list[EqualCostRow], list[str]]:
    """A row for each run of which that is known, and what a reader has to know.

    The training time is measured, so it compares methods only where the runs had the same machine to themselves; a run
    whose schedule is not over at that cost is behind what a shorter run would reach.
    """
    known = [history for history in histories if _curve(history)]
    notes = _notes(histories, known)
    if not known:
        return [], notes
    whole = [history for history in known if history.state == "finished"] or known
    budget = min(history.seconds[-1][1] for history in whole)
    methods = list(dict.fromkeys(history.config.method for history in known))
    base = "common" if "common" in methods else methods[0]
    each = [history.seconds[-1][1] for history in known if history.config.method == base]
    rows = []
    for history in known:
        then = value_at(_curve(history), budget)
        if then is None or history.seconds[-1][1] < budget * (1 - 1e-9):
            notes.append(f"{history.label} has no validation after {budget:.0f} s of training yet")
            continue
        epoch = next(epoch for epoch, seconds in history.seconds if seconds == then.cost)
        rows.append(
            EqualCostRow(
                run=history.label,
                method=history.config.method,
                seed=history.config.seed,
                seconds=history.seconds[-1][1],
                relative=history.seconds[-1][1] / statistics.median(each),
                whole=_curve(history)[-1][1],
                epoch=epoch,
                value=then.value,
            )
        )
    return rows, notes


def curve_over_seconds(history: RunHistory, column: str) -> list[tuple[float, float]]:
    """(seconds of training, value) of a column of summary.csv, as far as no epoch is missing."""
    seconds = dict(history.seconds)
    return [(seconds[int(epoch)], value) for epoch, value in history.curve(column) if int(epoch) in seconds]


def _curve(history: RunHistory) -> list[tuple[float, float]]:
    return curve_over_seconds(history, f"eval_{FIGURES[history.config.task].decisive}")


def _notes(histories: Sequence[RunHistory], known: Sequence[RunHistory]) -> list[str]:
    notes = [f"{history.label} has no validation with a measured time" for history in histories if history not in known]
    notes += [
        f"{history.label} has epochs after one that is missing: they do not count"
        for history in known
        if len(history.seconds) < len(history.epochs)
    ]
    places = {_machine(history): history.label for history in known}
    if len(places) > 1:
        listed = "; ".join(f"{label} on {machine}" for machine, label in places.items())
        notes.append(f"the times are of different machines and do not compare methods: {listed}")
    return notes


def _machine(history: RunHistory) -> str:
    resumed = history.environment.get("resumed")
    parts = [history.environment, *(resumed if isinstance(resumed, list) else [])]
    names = [str(part["hardware"]) for part in parts if isinstance(part, dict) and "hardware" in part]
    world = history.environment.get("processes", 1)
    listed = " and ".join(dict.fromkeys(names)) or "an unknown machine"
    return listed if world == 1 else f"{world} x {listed}"


def by_seed(histories: Sequence[RunHistory]) -> list[list[RunHistory]]:
    """Runs that differ in nothing but the seed, in groups, in the order of their first ones."""
    groups: dict[str, list[RunHistory]] = {}
    for history in histories:
        settings = {n: v for n, v in asdict(history.config).items() if n not in ("seed", "name", "output")}
        groups.setdefault(repr(settings), []).append(history)
    return list(groups.values())
