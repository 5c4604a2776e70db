"""Words of the command line, as a dataclass: tyro reads them, and an error is one line. Imports no torch."""

from __future__ import annotations

import contextlib
import inspect
import io
import re
from collections.abc import Mapping
from typing import Any

import tyro

from unloaf.commands.help import help_text, options_of
from unloaf.config.names import similar


def parse(
    kind: Any,
    words: list[str],
    *,
    prog: str,
    default: Any = None,
    about: str | None = None,
    more: Any = None,
    former: Mapping[str, str] | None = None,
) -> Any:
    """Tyro's parser, with one line for an error where tyro draws a box, and a help of our own.

    Args:
        kind: a dataclass.
        words: flags and values.
        prog: how the command is called, for its help.
        default: an instance whose values the flags override.
        about: the first lines of the help; default: the docstring of `kind`.
        more: a dataclass of options that the caller has taken out of the words already.
        former: flags of before, and what to give instead.

    Raises:
        ValueError: a flag or value is not allowed.
        SystemExit: help was asked for and shown.

    >>> from unloaf.commands.demo import Demo
    >>> parse(Demo, ["--seeds", "3"], prog="unloaf demo").seeds
    3
    """
    if {"-h", "--help"} & {*words}:
        options = options_of(kind, default) + ([] if more is None else options_of(more))
        print(help_text(prog, about or inspect.getdoc(kind) or "", options), flush=True)
        raise SystemExit(0)
    box = io.StringIO()
    extra = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(box):
            return tyro.cli(kind, args=words, prog=prog, **extra)
    except SystemExit as error:
        reason = _reason(error, box.getvalue())
        if found := re.match(r"Unrecognized options: (\S+?),?(?: |$)", reason):
            flags = [flag for one in (kind, more) if one for option in options_of(one) for flag in option.flags]
            reason = _unknown(found[1], flags, prog, former or {})
        raise ValueError(reason) from error


def _unknown(word: str, flags: list[str], prog: str, former: Mapping[str, str]) -> str:
    where = f"`{prog} --help` lists them"
    if not word.startswith("-"):
        return f"{word!r} belongs to no option of {prog}; a switch such as --amp takes no value; {where}"
    name = word.partition("=")[0]
    if name in former:
        return f"{name} is no option of {prog} any more; give {former[name]}"
    close = similar(name, [flag for flag in flags if flag.startswith("--")])
    hint = f"did you mean {close}? " if close else ""
    return f"{name} is no option of {prog}; {hint}{where}"


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
