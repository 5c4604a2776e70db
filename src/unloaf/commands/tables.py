"""Tables on a terminal: a number is never broken, and what is too wide continues below."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from textwrap import wrap

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from unloaf.printable import printable

_WORDS = ("blocks", "cannot be skipped", "class", "note")
_WHOLE = 24  # cells of this width at most stay on one line: all numbers, and most names
_GAP = 3  # between columns


def show(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """Prints cells as a table; words stand left, numbers right."""
    table = Table(box=SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for head in heads:
        left = head in (heads[0], *_WORDS)
        shown = "\n".join(map(printable, head.split("\n")))
        table.add_column(Text(shown), justify="left" if left else "right", overflow="fold")
    for line in lines:
        table.add_row(*(Text(printable(cell)) for cell in line))
    print_table(table)


def print_table(table: Table) -> None:
    """Prints a table; one that is wider than the terminal in parts, of which each has the first column.

    In a file or a pipe it is as wide as it needs to be.
    """
    console = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 10_000)
    with console.capture() as text:
        for part in parts(table, console.width):
            console.print(part)
    print(text.get(), end="")  # rich ends the process itself where a pipe is closed


def parts(table: Table, width: int) -> list[Table]:
    """The table, or several that fit into a width, with as many columns as it takes.

    >>> wide = Table("depths", *(f"column {n}" for n in range(9)), box=SIMPLE_HEAD)
    >>> [len(part.columns) for part in parts(wide, 80)]
    [8, 3]
    """
    if sum(_widest([str(column.header), *_texts(column)]) + _GAP for column in table.columns) + 1 <= width:
        return [table]
    first, *others = [_narrow(column) for column in table.columns]
    groups: list[list[Column]] = [[]]
    for column in others:
        if groups[-1] and sum(_need(c) + _GAP for c in (first, *groups[-1], column)) + 1 > width:
            groups.append([])
        groups[-1].append(column)
    made = [_with_columns(table, [first, *group]) for group in groups]
    made[0].title, made[-1].caption = table.title, table.caption
    return made


def _texts(column: Column) -> list[str]:
    return [str(cell) for cell in column.cells]


def _widest(texts: Sequence[str]) -> int:
    return max((cell_len(line) for text in texts for line in text.splitlines()), default=0)


def _need(column: Column) -> int:
    """Columns of the terminal: cells that may be broken need no more than others."""
    return max(min(_widest(_texts(column)), _WHOLE), _widest([str(column.header)]))


def _narrow(column: Column) -> Column:
    """Its head broken between words to the width of its cells."""
    cells, head = _widest(_texts(column)), str(column.header)
    longest = max(map(cell_len, head.split()), default=1)
    head = "\n".join(wrap(" ".join(head.split()), max(min(cells, _WHOLE), longest)))
    return Column(
        Text(head), justify=column.justify, overflow="fold", no_wrap=cells <= _WHOLE, _cells=list(column.cells)
    )


def _with_columns(table: Table, columns: Sequence[Column]) -> Table:
    made = Table(
        box=table.box,
        header_style=table.header_style,
        title_style=table.title_style,
        title_justify=table.title_justify,
        pad_edge=table.pad_edge,
    )
    for column in columns:
        made.add_column(column.header, justify=column.justify, overflow=column.overflow, no_wrap=column.no_wrap)
    for cells in zip(*(column.cells for column in columns), strict=True):
        made.add_row(*cells)
    return made
