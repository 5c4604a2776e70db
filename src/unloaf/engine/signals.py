"""Ctrl-C and SIGTERM: a run ends between two steps, after its checkpoint is written."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


@dataclass
class StopRequest:
    """Whether a signal asked the run to stop, and the exit code that says which; 0 for none."""

    code: int = 0


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Inside, the first signal is only noted; a second Ctrl-C quits at once, as if nothing had been said."""
    request = StopRequest()

    def note(number: int, frame: Any) -> None:
        if request.code and number == signal.SIGINT:
            raise KeyboardInterrupt
        request.code = request.code or EXIT_CODES[signal.Signals(number)]

    before = {number: signal.signal(number, note) for number in EXIT_CODES}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
