"""`unloaf report`: runs compared by what is in their folders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from unloaf.commands.parsing import parse
from unloaf.commands.tables import show
from unloaf.files.writing import check_writable, write_whole
from unloaf.printable import printable
from unloaf.streams import say

if TYPE_CHECKING:
    from unloaf.pages.layout import Section
    from unloaf.runs.histories import RunHistory


@dataclass(frozen=True, kw_only=True)
class Report:
    """Compare runs by what is in their folders, also while they train."""

    runs: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="RUN...")] = ()
    """Folders of the runs, or folders that hold runs, as OUTPUT of train does: then all of them."""
    output: str | None = None
    """Write a page with the curves of the runs to this .html file."""
    analysis: Annotated[tuple[str, ...], tyro.conf.arg(metavar="FILE ...")] = ()
    """Analyses that the page has too: .json files that damage, logits, receptive-field or subnets --all wrote with
    --output."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("report: give at least one run folder")
        if self.analysis and self.output is None:
            raise ValueError(f"analysis {self.analysis[0]} is for the page; give --output FILE.html with it")


def run(words: list[str]) -> int:
    """Prints the comparison, writes the page if asked to."""
    options = parse(Report, words, prog="unloaf report")
    from unloaf.runs.histories import cautions, differences, read_histories, table_of

    if options.output is not None:
        check_writable(Path(options.output))
    histories = read_histories(options.runs)
    sections = _sections(options.analysis, histories)
    show(*table_of(histories))
    different = differences(histories)
    if different:
        heads = ["settings that differ", *(printable(history.label) for history in histories)]
        show(heads, [[name, *values] for name, values in different.items()])
    for line in cautions(histories):
        say(f"note: {line}")
    if options.output is not None:
        from unloaf.pages.runs import runs_page

        write_whole(Path(options.output), runs_page(histories, sections))
        say(f"report: {options.output}")
    return 0


def _sections(files: Sequence[str], histories: Sequence[RunHistory]) -> list[Section]:
    """Of the analyses, which are of the same data as the runs."""
    if not files:
        return []
    from unloaf.pages.analysis_sections import check_alike, read_analysis, section_of

    data, found = histories[0].data, []
    for file in dict.fromkeys(files):
        analysis = read_analysis(Path(file))
        check_alike(analysis, file, data.get("dataset"), data.get("num_classes"), histories[0].label)
        found.append(section_of(analysis))
    return found
