"""Judged and measured subnets as tables and records: rows in, text out."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import TYPE_CHECKING, Any

from unloaf.config.figures import FIGURES, Figures

if TYPE_CHECKING:
    from unloaf.evaluation import SubnetRow
    from unloaf.measure.costs import Timing
    from unloaf.subnet import Subnet

_AS_IT_STANDS = "(running)"  # the main network with its running statistics


def cost_records(rows: Sequence[SubnetRow], times: Sequence[Sequence[Timing]] = ()) -> list[dict[str, Any]]:
    """A flat record of each row, with its timings, for a CSV or JSON file; columns that no row has are left out.

    >>> from unloaf import Subnet, SubnetRow
    >>> from unloaf.measure.costs import Timing
    >>> row, timing = SubnetRow(Subnet(((True, False),)), params=10, gmacs=0.5), Timing(1, 2.0, 2.5, 30, "cpu", 1)
    >>> cost_records([row], [[timing]])[0]["b1_median_ms"]
    2.0
    """
    records = [
        _record(row) | _timing_record(timings) for row, timings in zip(rows, times or [()] * len(rows), strict=True)
    ]
    known = {name for record in records for name, value in record.items() if value is not None}
    return [{name: value for name, value in record.items() if name in known} for record in records]


def _record(row: SubnetRow) -> dict[str, Any]:
    main = row.running
    return {
        "subnet": str(row.subnet),
        "top1": row.top1,
        "top5": row.top5,
        "loss": row.loss,
        "params": row.params,
        "gmacs": row.gmacs,
        "statistics": row.statistics,
        "running_top1": main.top1 if main else None,
        "running_top5": main.top5 if main else None,
        "running_loss": main.loss if main else None,
        "metric": row.metric,
        "running_metric": main.metric if main else None,
    }


def _timing_record(timings: Sequence[Timing]) -> dict[str, Any]:
    record: dict[str, Any] = {}
    for timing in timings:
        for name in ("median_ms", "p95_ms", "images_per_second"):
            record[f"b{timing.batch_size}_{name}"] = getattr(timing, name)
    for timing in timings[:1]:
        record |= {"repeats": timing.repeats, "device": timing.device, "threads": timing.threads}
    return record


def cost_table(
    rows: Sequence[SubnetRow],
    times: Sequence[Sequence[Timing]] = (),
    front: Set[Subnet] | None = None,
    figures: Figures = FIGURES["classification"],
) -> tuple[list[str], list[list[str]]]:
    """Heads and cells of the rows, with their timings, for a table of text.

    The main network has a line more where it was evaluated both ways, with its running statistics. With a front, whose
    subnets get a star, the rows have an accuracy, which is shown.

    >>> from unloaf import Subnet, SubnetRow
    >>> row = SubnetRow(Subnet(((True, False),)), top1=91.5, params=1_234, gmacs=0.5)
    >>> cost_table([row], front={row.subnet})
    (['depths', '', 'top-1 %', 'parameters', 'GMACs'], [['1', '*', '91.50', '1,234', '0.5']])
    """
    judged, best = front is not None, front or set()
    heads = ["depths", *(["", figures.head] if judged else []), "parameters", "GMACs"]
    heads += [f"{name}, batch of {t.batch_size}" for t in (times or [()])[0] for name in ("ms (p95)", "images/s")]
    lines = []
    for row, timings in zip(rows, times or [()] * len(rows), strict=True):
        costs = [f"{row.params:,}", f"{row.gmacs:.4g}"]
        for t in timings:
            costs += [f"{t.median_ms:.4g} ({t.p95_ms:.4g})", f"{t.images_per_second:,.0f}"]
        if judged and row.running is not None:
            lines.append([f"{row.subnet} {_AS_IT_STANDS}", "", figures.cell(figures.decide(row.running)), *costs])
        own = ["*" * (row.subnet in best), figures.cell(figures.decide(row))] if judged else []
        lines.append([str(row.subnet), *own, *costs])
    return heads, lines


def accuracy_table(
    rows: Sequence[SubnetRow], figures: Figures = FIGURES["classification"]
) -> tuple[list[str], list[list[str]]]:
    """Heads and cells of evaluated subnets; the main network has two lines where it was evaluated both ways.

    >>> from unloaf import Subnet, SubnetRow
    >>> accuracy_table([SubnetRow(Subnet(((True,),)), 91.5, 99.0, 0.25, 1_234, 0.5)])[1]
    [['1', '91.50', '99.00', '0.2500', '1,234', '0.5']]
    """
    lines = []
    for row in rows:
        costs = [f"{row.params:,}", f"{row.gmacs:.4g}"]
        for name, found in ((f"{row.subnet} {_AS_IT_STANDS}", row.running), (str(row.subnet), row)):
            if found is None:
                continue
            if figures.of_rows != "top1":
                lines.append([name, figures.cell(figures.decide(found)), *costs])
            else:
                lines.append([name, f"{found.top1:.2f}", f"{found.top5:.2f}", f"{found.loss:.4f}", *costs])
    shown = ["top-1 %", "top-5 %", "loss"] if figures.of_rows == "top1" else [figures.head]
    return ["depths", *shown, "parameters", "GMACs"], lines
