"""`unloaf report`: runs compared by what is in their folders."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from unloaf.commands.parsing import parse
from unloaf.commands.tables import show
from unloaf.files.writing import check_writable, write_whole
from unloaf.printable import printable
from unloaf.streams import say


@dataclass(frozen=True, kw_only=True)
class Report:
    """Compare runs by what is in their folders, also while they train."""

    runs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN...")] = ()
    """Folders of the runs, or folders that hold runs, as OUTPUT of train does: then all of them."""
    output: str | None = None
    """Write a page with the curves of the runs to this .html file."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("report: give at least one run folder")


def run(words: list[str]) -> int:
    """Prints the comparison, writes the page if asked to."""
    options = parse(Report, words, prog="unloaf report")
    from unloaf.runs.histories import cautions, differences, read_histories, table_of

    if options.output is not None:
        check_writable(Path(options.output))
    histories = read_histories(options.runs)
    show(*table_of(histories))
    different = differences(histories)
    if different:
        heads = ["settings that differ", *(printable(history.label) for history in histories)]
        show(heads, [[name, *values] for name, values in different.items()])
    for line in cautions(histories):
        say(f"note: {line}")
    if options.output is not None:
        from unloaf.pages.runs import runs_page

        write_whole(Path(options.output), runs_page(histories))
        say(f"report: {options.output}")
    return 0
