"""What `unloaf bench step` leaves behind: tables for the terminal, JSON, CSV and a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from unloaf.analysis.costs import write_csv
from unloaf.analysis.plots import step_time_bars
from unloaf.analysis.step_time import StepTimeRow, by_setup
from unloaf.engine.environment import environment
from unloaf.engine.files import write_whole

_HEADS = ("ms/step", "time", "lowest-highest", "FLOPs limit", "time/limit", "separate", "its FLOPs", "memory")
_CAPTION = "relative to a step of common training in the same round; separate: a complete pass for each subnet"


def tables(rows: Sequence[StepTimeRow]) -> list[Table]:
    """A table for each network and mode; times and memory relative to common training.

    >>> [made] = tables([StepTimeRow("common", 0.1, 1.0, (1.0, 1.0), 1.0, 1.0, None, 1.0, 10, 1.0)])
    >>> made.row_count
    1
    """
    groups = by_setup(rows)
    made = [_table(group) for group in groups.values()]
    for table, setup in zip(made, groups, strict=True):
        table.title = setup.title
    if made:
        made[-1].caption = _CAPTION
    return made


def _table(rows: Sequence[StepTimeRow]) -> Table:
    table = Table(box=SIMPLE_HEAD, header_style="bold", title_style="bold", title_justify="left", pad_edge=False)
    table.add_column("method", no_wrap=True)
    for head in _HEADS:
        table.add_column(head, justify="right")
    for row in rows:
        one_pass = row.separate is None
        table.add_row(
            row.method,
            f"{1000 * row.seconds:.4g}",
            f"{row.relative:.2f}x",
            f"{row.spread[0]:.2f}-{row.spread[1]:.2f}",
            f"{row.limit:.2f}x",
            f"{row.over_limit:.2f}",
            "" if one_pass else f"{row.separate:.2f}x",
            "" if one_pass else f"{row.separate_limit:.2f}x",
            f"{row.relative_memory:.2f}x",
        )
    return table


def write_rows(
    folder: Path, rows: Sequence[StepTimeRow], settings: Mapping[str, Any], *, notes: Sequence[str] = ()
) -> None:
    """Writes step_time.json (command, hardware, versions, settings, notes, rows), step_time.csv and step_time.svg.

    Raises:
        ValueError: the folder cannot be written.
    """
    records = [row.record() for row in rows]
    document = {"settings": settings, "environment": environment(), "notes": list(notes), "rows": records}
    write_whole(folder / "step_time.json", json.dumps(document, indent=2) + "\n")
    if records:
        write_csv([_flat(record) for record in records], folder / "step_time.csv")
        write_plot(folder / "step_time.svg", rows)


def _flat(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with the two ends of the spread in columns of their own."""
    ends = dict(zip(("lowest", "highest"), record["spread"], strict=True))
    return {name: value for name, value in record.items() if name != "spread"} | ends


def write_plot(file: Path, rows: Sequence[StepTimeRow]) -> None:
    """Writes the bars of `unloaf.analysis.plots.step_time_bars` as SVG.

    Raises:
        ValueError: the file cannot be written.
    """
    write_whole(file, step_time_bars(by_setup(rows)), advice="give another file")
