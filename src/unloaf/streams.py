"""The standard streams of a process, which may be closed, unread or on a full disk. Imports no torch."""

from __future__ import annotations

import contextlib
import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, cast

from unloaf.printable import printable


def standard_error() -> IO[str]:
    """Standard error for what need not be read: once it takes no more, as on a full disk, the rest goes nowhere."""
    return cast(IO[str], _StandardError())


class _StandardError(io.TextIOBase):
    encoding = "utf-8"

    def write(self, text: str, /) -> int:
        with _or_nowhere():
            sys.stderr.write(text)
        return len(text)

    def flush(self) -> None:
        with _or_nowhere():
            sys.stderr.flush()

    def isatty(self) -> bool:
        return sys.stderr.isatty()

    def fileno(self) -> int:
        return sys.stderr.fileno()


@contextmanager
def _or_nowhere() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError:
        send_nowhere(sys.stderr)


def send_nowhere(stream: IO[str]) -> None:
    """What is still in the stream's buffer, and all that follows, is lost.

    Without it Python tries again at its end, and ends with 120 (docs.python.org, note on SIGPIPE).
    """
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def say(line: str) -> None:
    """Prints a line on standard output, in which names from outside are made harmless."""
    print(printable(line))


def open_closed_streams() -> None:
    """Streams that the caller closed (`2>&-`) lead nowhere; else the next file to be opened would take their place."""
    for name, mode in {"stdin": "r", "stdout": "w", "stderr": "w"}.items():
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115


def stdout_is_closed() -> bool:
    """Whether the reader of the output has seen enough (`unloaf train --help | head -1`): no error, nothing to say."""
    with contextlib.suppress(io.UnsupportedOperation):
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        if any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
            send_nowhere(sys.stdout)
            return True
    return False
