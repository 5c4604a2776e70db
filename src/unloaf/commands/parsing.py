"""Words of the command line, as a dataclass: tyro reads them, and an error is one line. Imports no torch."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
from collections.abc import Mapping
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import tyro

from unloaf.config.names import similar

_POSITIONAL = get_args(tyro.conf.Positional[str])[1]  # the mark alone


def parse(
    kind: Any,
    words: list[str],
    *,
    prog: str,
    default: Any = None,
    about: str | None = None,
    more_flags: tuple[str, ...] = (),
    former: Mapping[str, str] | None = None,
) -> Any:
    """Tyro's parser, with one line for an error where tyro draws a box.

    Args:
        kind: a dataclass.
        words: flags and values.
        prog: how the command is called, for its help.
        default: an instance whose values the flags override.
        about: the first lines of the help; default: the docstring of `kind`.
        more_flags: flags that the caller has taken out of the words already, to be suggested like others.
        former: flags of before, and what to give instead.

    Raises:
        ValueError: a flag or value is not allowed.
        SystemExit: help was asked for and shown.

    >>> from unloaf.commands.options import Demo
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
        reason = _reason(error, box.getvalue())
        if found := re.match(r"Unrecognized options: (\S+?),?(?: |$)", reason):
            reason = _unknown(found[1], [*flags_of(kind), *more_flags], prog, former or {})
        raise ValueError(reason) from error


def flags_of(kind: Any) -> list[str]:
    """The flags that tyro makes of a dataclass, with their aliases.

    >>> from unloaf.commands.options import Demo
    >>> flags_of(Demo)
    ['--output', '--seeds', '--epochs']
    """
    flags, hints = [], get_type_hints(kind, include_extras=True)
    for name, hint in ((field.name, hints[field.name]) for field in dataclasses.fields(kind)):
        marks = get_args(hint)[1:] if get_origin(hint) is Annotated else ()
        if _POSITIONAL in marks:
            continue
        flag = f"--{name.replace('_', '-')}"
        aliases = [alias for mark in marks for alias in getattr(mark, "aliases", None) or ()]
        flags += [flag, *[flag.replace("--", "--no-", 1)] * (hint is bool), *aliases]
    return flags


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
