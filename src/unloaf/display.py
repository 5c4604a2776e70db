"""What a run shows while it continues: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from unloaf.printable import printable
from unloaf.streams import send_nowhere, standard_error


class RunConsole(Console):
    """Standard error. Once nobody reads it, as after ``unloaf train 2>&1 | head``, the run ends as at SIGTERM.

    Attributes:
        unread: whether that happened.
    """

    def __init__(self) -> None:
        super().__init__(file=standard_error())
        self.unread = False

    def on_broken_pipe(self) -> None:
        """Sends what is still to be said nowhere, and asks the run to stop; rich would end the process here."""
        send_nowhere(self.file)
        self.unread = True
        signal.raise_signal(signal.SIGTERM)


@dataclass(frozen=True)
class Display:
    """How to show something."""

    advance: Callable[[str], None]  # moves the bar by one and puts a text beside it; nothing where there is no terminal
    line: Callable[[str], None]  # prints a line that stays


SILENT = Display(advance=lambda text: None, line=lambda text: None)


_SECONDS_BETWEEN_LINES = 30.0


@contextmanager
def show_progress(
    console: Console | None, *, total: int, done: int = 0, label: str, lines: bool = False
) -> Iterator[Display]:
    """Gives the display of something that has so many parts, of which some are done already.

    A terminal shows a bar with the time left; elsewhere, with ``lines``, a line says every 30 seconds how far it is.
    """
    if console is None:
        yield SILENT
        return

    def line(text: str) -> None:
        console.print(printable(text), highlight=False, markup=False, soft_wrap=True)

    if not console.is_terminal:
        advance = _saying(line, label, total - done) if lines else SILENT.advance
        yield Display(advance=advance, line=line)
        return
    columns = (TextColumn("{task.fields[label]}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.description}"), console=console, transient=True) as progress:
        task = progress.add_task("", total=total, completed=done, label=escape(printable(label)))
        yield Display(
            advance=lambda text: progress.update(task, advance=1, description=escape(printable(text))), line=line
        )


def _saying(line: Callable[[str], None], label: str, total: int) -> Callable[[str], None]:
    """Counts, and now and then says how far it is."""
    start = said = time.monotonic()
    made = 0

    def advance(text: str) -> None:
        nonlocal said, made
        made, now = made + 1, time.monotonic()
        if now - said >= _SECONDS_BETWEEN_LINES and made < total:
            said = now
            left = (now - start) / made * (total - made)
            line(f"{label} {made}/{total}, {timedelta(seconds=round(left))} left")

    return advance
