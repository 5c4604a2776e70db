"""What the commands of analyses share: rows printed, as a table or JSON, and written to files."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console

from unloaf.commands.tables import show
from unloaf.files.writing import check_writable, write_whole
from unloaf.printable import printable
from unloaf.streams import say, standard_error

if TYPE_CHECKING:
    from unloaf.runs.opened import OpenedRun


class OfRuns(Protocol):
    """Options that all of these commands have."""

    runs: tuple[str, ...]
    split: Any
    checkpoint: Any
    ema: bool
    data_dir: str | None
    device: str
    run_own_code: bool
    json: bool
    output: str | None
    plot: str | None


def opened_runs(options: OfRuns, *, recalibrate: int | None = None) -> list[OpenedRun]:
    """The runs, checked to be of the same data; the files to be written are checked first."""
    from unloaf.analysis.runs import open_alike

    for path in (options.output, options.plot):
        if path is not None:
            check_writable(Path(path))
    opened = open_alike(
        [Path(run) for run in options.runs],
        split=options.split,
        checkpoint=options.checkpoint,
        ema=options.ema,
        data_dir=options.data_dir,
        device=options.device,
        run_own_code=options.run_own_code,
        recalibrate=recalibrate,
    )
    for run in opened:
        for note in run.notes:
            standard_error().write(f"{printable(f'{run.run}: {note}')}\n")
    return opened


def bar() -> Console:
    """Where progress is shown."""
    return Console(file=standard_error())


def give(
    options: OfRuns,
    rows: Sequence[Any],
    *,
    notes: Sequence[str],
    table: Callable[[Sequence[Any]], tuple[list[str], list[list[str]]]],
    picture: Callable[[], str],
    leave_out: Collection[str] = (),
) -> None:
    """Prints the rows, as a table or as JSON, and writes the files that were asked for.

    What is `leave_out` has no place in a CSV file.
    """
    records = [asdict(row) for row in rows]
    if options.json:
        print(json.dumps({"notes": list(notes), "rows": records}, indent=2))
    else:
        show(*table(rows))
        for note in notes:
            say(note)
    if options.output is not None:
        from unloaf.measure.costs import write_csv

        flat = [{name: _cell(v) for name, v in r.items() if name not in leave_out} for r in records]
        write_csv(flat, Path(options.output))
        _tell(options, f"table: {options.output}")
    if options.plot is not None:
        write_whole(Path(options.plot), picture(), advice="give another file")
        _tell(options, f"picture: {options.plot}")


def _cell(value: Any) -> Any:
    return " ".join(map(str, value)) if isinstance(value, tuple) else value


def _tell(options: OfRuns, line: str) -> None:
    """Beside JSON a line goes where it is no part of it."""
    if options.json:
        standard_error().write(f"{printable(line)}\n")
    else:
        say(line)
