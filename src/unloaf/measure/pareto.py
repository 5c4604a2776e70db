"""Which subnet to take: the Pareto front, and the best within limits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

from unloaf.evaluation import SubnetRow

Cost = Literal["gmacs", "params", "latency_ms"]


def pareto_front(
    rows: Sequence[SubnetRow], *, cost: Cost = "gmacs", by: Literal["top1", "metric", "loss"] = "top1"
) -> list[SubnetRow]:
    """The Pareto front: no other is as cheap and as accurate, and better in one of the two; cheapest first.

    Rows whose accuracy is NaN, of networks that predict nothing, are left out. With `by` metric that counts instead,
    higher is better; with loss, lower is.

    Raises:
        ValueError: a row has no accuracy, or not this cost.

    >>> from unloaf import Subnet
    >>> figures = {(True, True): (90.0, 3.0), (True, False): (80.0, 2.0), (False, True): (70.0, 2.0)}
    >>> rows = [SubnetRow(Subnet((keep,)), top1=top1, gmacs=gmacs) for keep, (top1, gmacs) in figures.items()]
    >>> [str(row.subnet) for row in pareto_front(rows)]
    ['1', '2']
    """
    sign = -1 if by == "loss" else 1
    ordered = sorted(_predicting(rows, by), key=lambda row: (_figure(row, cost), -sign * _figure(row, by)))
    front: list[SubnetRow] = []
    for row in ordered:
        last = front[-1] if front else None
        equal = last is not None and all(_figure(row, name) == _figure(last, name) for name in (cost, by))
        if last is None or equal or sign * _figure(row, by) > sign * _figure(last, by):
            front.append(row)
    return front


_MISSING = {
    "top1": "has no accuracy; evaluate it first (evaluate_subnets, or `unloaf subnets RUN`)",
    "loss": "has no loss; evaluate it first (evaluate_subnets, or `unloaf subnets RUN`)",
    "metric": "has no metric; give evaluate_subnets one",
    "gmacs": "has no GMACs; fill them in first: rows = unloaf.measure_subnets(model, stages, example, rows)",
    "params": "has no parameters; fill them in first: rows = unloaf.measure_subnets(model, stages, example, rows)",
    "latency_ms": "was not timed; measure it first: rows = unloaf.measure_subnets(model, stages, example, rows, "
    "latency=True), or `unloaf subnets RUN --latency`",
}


def _figure(row: SubnetRow, name: str) -> float:
    value = getattr(row, name)
    if value is None:
        raise ValueError(f"subnet {row.subnet} {_MISSING[name]}")
    return value


def _predicting(rows: Sequence[SubnetRow], by: str = "top1") -> list[SubnetRow]:
    return [row for row in rows if not math.isnan(_figure(row, by))]


def pick_subnet(
    rows: Sequence[SubnetRow],
    *,
    max_latency: float | None = None,
    max_gmacs: float | None = None,
    max_params: float | None = None,
    min_top1: float | None = None,
) -> SubnetRow:
    """The most accurate subnet within the limits or, with ``min_top1``, the cheapest within them that reaches it.

    Cheapest is by latency where all rows were timed, else by GMACs, else by parameters. Of two that are equal the
    cheaper, or the more accurate, is taken. A network has the accuracy of its row with the row's statistics: where they
    were re-estimated, re-estimate them too in the network that you use (`recalibrate_bn`).

    Args:
        rows: from `evaluate_subnets`; limits on GMACs or latency need them filled in by `measure_subnets`. Those whose
            accuracy is NaN are left out.
        max_latency: milliseconds, compared with ``latency_ms``.
        max_gmacs: billions of multiply-adds.
        max_params: parameters.
        min_top1: percent.

    Raises:
        ValueError: none fits (the message names the nearest ones), there is no row, or a figure that counts
            is missing.

    >>> import unloaf
    >>> from unloaf import Subnet, SubnetRow
    >>> figures = {(True, True, True): (0.9, 92.0), (True, True, False): (0.7, 91.0), (True, False, False): (0.3, 80.0)}
    >>> rows = [SubnetRow(Subnet((keep,)), top1=top1, gmacs=gmacs) for keep, (gmacs, top1) in figures.items()]
    >>> str(unloaf.pick_subnet(rows, max_gmacs=0.8).subnet)
    '2'
    >>> str(unloaf.pick_subnet(rows, min_top1=79).subnet)
    '1'
    """
    if not rows:
        raise ValueError("there are no rows to pick from; evaluate some subnets first")
    rows = _predicting(rows)
    if not rows:
        raise ValueError("the accuracy of all subnets is NaN: the network gives NaN, or a metric does")
    given = {"latency_ms": max_latency, "gmacs": max_gmacs, "params": max_params}
    limits = {name: limit for name, limit in given.items() if limit is not None}
    within = [row for row in rows if all(_figure(row, name) <= limit for name, limit in limits.items())]
    if not within:
        nearest = _named(sorted(rows, key=lambda row: _excess(row, limits)), limits)
        raise ValueError(f"no subnet has {_wanted(limits)}; the nearest: {nearest}")
    cost = next(
        (name for name in ("latency_ms", "gmacs") if all(getattr(row, name) is not None for row in within)), "params"
    )
    if min_top1 is None:
        return min(within, key=lambda row: (-_figure(row, "top1"), _figure(row, cost)))
    good = [row for row in within if _figure(row, "top1") >= min_top1]
    if not good:
        asked = f"top-1 of at least {min_top1} %" + (f" with {_wanted(limits)}" if limits else "")
        nearest = _named(sorted(within, key=lambda row: -_figure(row, "top1")), {cost: 0.0})
        raise ValueError(f"no subnet has {asked}; the nearest: {nearest}")
    return min(good, key=lambda row: (_figure(row, cost), -_figure(row, "top1")))


_UNITS = {"latency_ms": "latency {:.4g} ms", "gmacs": "{:.4g} GMACs", "params": "{:,.0f} parameters"}


def _wanted(limits: Mapping[str, float]) -> str:
    return "at most " + " and ".join(_UNITS[name].format(limit) for name, limit in limits.items())


def _excess(row: SubnetRow, limits: Mapping[str, float]) -> float:
    """How far the row is beyond the limit that it misses most."""
    return max(_figure(row, name) / limit if limit > 0 else math.inf for name, limit in limits.items())


def _named(rows: Sequence[SubnetRow], costs: Iterable[str]) -> str:
    described = []
    for row in rows[:3]:
        figures = [] if row.top1 is None else [f"top-1 {row.top1:.2f} %"]
        described.append(f"{row.subnet} ({', '.join([*figures, *(_UNITS[c].format(_figure(row, c)) for c in costs)])})")
    return "; ".join(described)
