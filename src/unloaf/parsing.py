"""Words of the command line, as a dataclass: tyro reads them, and an error is one line. Imports no torch."""

from __future__ import annotations

import contextlib
import io
import re
from typing import Any

import tyro


def parse(kind: Any, words: list[str], *, prog: str, default: Any = None, about: str | None = None) -> Any:
    """Tyro's parser, with one line for an error where tyro draws a box.

    Args:
        kind: a dataclass.
        words: flags and values.
        prog: how the command is called, for its help.
        default: an instance whose values the flags override.
        about: the first lines of the help; default: the docstring of `kind`.

    Raises:
        ValueError: a flag or value is not allowed.
        SystemExit: help was asked for and shown.

    >>> from unloaf.arguments import Demo
    >>> parse(Demo, ["--seeds", "3"], prog="unloaf demo").seeds
    3
    """
    box = io.StringIO()
    extra = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(kind, args=words, prog=prog, description=about, **extra)
    except SystemExit as error:
        if error.code == 0:
            raise
        raise ValueError(_reason(error, box.getvalue())) from error


_NOT_A_NUMBER = {
    "invalid literal for int() with base 10": "an integer",
    "could not convert string to float": "a number",
}


def _reason(error: SystemExit, box: str) -> str:
    # The first line is the title in its frame; where the output has no line characters there is no frame.
    lines = [line.strip("│ ") for line in box.splitlines()[1:]]
    useful = [line for line in lines if line.strip("─-╰╯") and not line.startswith(("For full help", "Argument help"))]
    text = " ".join(useful[:3])
    flag = found[1] if (found := re.match(r"Error parsing (\S+): ", text)) else ""
    cause = error.__context__
    while cause is not None and cause.__context__ is not None:
        cause = cause.__context__
    if not isinstance(cause, ValueError):
        return text
    reason = str(cause)
    for start, kind in _NOT_A_NUMBER.items():
        if reason.startswith(start):
            return f"{flag} {reason[len(start) + 2 :][:80]}: give {kind}"
    if found := re.match(r"no type matching (.*) could be instantiated from (\[.*)\.$", reason, flags=re.M):
        return f"{flag} {found[2][:80]}: give {found[1]}"
    return reason
