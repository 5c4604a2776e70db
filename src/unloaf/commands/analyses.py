"""What the commands of analyses share: rows printed, as a table or JSON, and written to files."""

from __future__ import annotations

import json
import shlex
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
    from unloaf.pages.analysis_sections import Analysis
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
    analysis: Analysis | None = None,
) -> None:
    """Prints the rows, as a table or as JSON, and writes the files that were asked for.

    What is `leave_out` has no place in a CSV file. With an `analysis` of the same rows --output may be a .json file,
    for --analysis of report, or an .html page.
    """
    records = [asdict(row) for row in rows]
    if options.json:
        print(json.dumps({"notes": list(notes), "rows": records}, indent=2))
    else:
        show(*table(rows))
        for note in notes:
            say(note)
    if options.output is not None and analysis is not None and Path(options.output).suffix in (".html", ".json"):
        _write(Path(options.output), analysis, options.runs)
        _tell(options, f"{'page' if options.output.endswith('.html') else 'analysis'}: {options.output}")
    elif options.output is not None:
        from unloaf.measure.costs import write_csv

        flat = [{name: _cell(v) for name, v in r.items() if name not in leave_out} for r in records]
        write_csv(flat, Path(options.output))
        _tell(options, f"table: {options.output}")
    if options.plot is not None:
        write_whole(Path(options.plot), picture(), advice="give another file")
        _tell(options, f"picture: {options.plot}")


def _write(path: Path, analysis: Analysis, runs: Sequence[str]) -> None:
    from unloaf.pages.analysis_sections import section_of, text_of
    from unloaf.pages.runs import analysis_page
    from unloaf.runs.histories import read_histories

    if path.suffix == ".json":
        write_whole(path, text_of(analysis))
    else:
        write_whole(path, analysis_page(section_of(analysis), read_histories(runs)))


def analysis_of(
    name: str, rows: Sequence[Any], notes: Sequence[str], opened: Sequence[OpenedRun], **options: Any
) -> Analysis:
    """What a command found, with where and on what; `options` are what its picture and table need."""
    from unloaf.environment import environment
    from unloaf.pages.analysis_sections import Analysis

    first = opened[0]
    env, data = environment(device=first.training.device), first.training.data
    versions = ", ".join(f"{name} {version}" for name, version in env["versions"].items() if version)
    facts = {
        "command": shlex.join(env["command"]),
        "networks": "; ".join(f"{run.run.resolve().name}: {run.weights} after epoch {run.epoch}" for run in opened),
        "hardware": env["hardware"],
        "versions": f"{versions}, python {env['python']}",
        **({"revision": env["revision"]} if env["revision"] else {}),
        "date": env["started"],
    }
    found = {"dataset": data.name, "num_classes": data.num_classes}
    return Analysis(name, rows, notes, facts, found, options)


def _cell(value: Any) -> Any:
    return " ".join(map(str, value)) if isinstance(value, tuple) else value


def _tell(options: OfRuns, line: str) -> None:
    """Beside JSON a line goes where it is no part of it."""
    if options.json:
        standard_error().write(f"{printable(line)}\n")
    else:
        say(line)
