"""The options of a command, read from the dataclass that holds them, and its help. Imports no torch.

The tables of docs/command-line.md are written from the same options.
"""

from __future__ import annotations

import ast
import inspect
import shutil
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro

_POSITIONAL = get_args(tyro.conf.Positional[str])[1]  # the mark alone
_VALUES = {
    "data_dir": "DIR",
    "output": "PATH",
    "plot": "PATH",
    "initial_checkpoint": "PATH",
    "depths": "DEPTHS",
    "model_kwargs": "NAME=VALUE",
}
_LONGEST_CHOICES = 36  # letters; longer lists of choices stand in the text, where they can be broken


@dataclass(frozen=True)
class Option:
    """An option, or an argument, which has no flag."""

    group: str  # the title that it stands under
    flags: tuple[str, ...]  # its names, a short one first; of most switches `--name` and `--no-name`
    value: str  # what stands after the flag; empty for a switch
    choices: tuple[str, ...]  # all that it takes, where those are some words
    default: str  # as it is typed; empty where there is none or it is off
    meaning: str  # in a sentence or two

    @property
    def term(self) -> str:
        """Flags and value as the help shows them."""
        is_pair = len(self.flags) == 2 and not self.value
        return f"--[no-]{self.flags[0][2:]}" if is_pair else f"{', '.join(self.flags)} {self.value}".strip()


def options_of(kind: Any, default: Any = None) -> list[Option]:
    """The options that tyro makes of a dataclass, in their order; `default` is an instance with other defaults.

    >>> from unloaf.commands.demo import Demo
    >>> options_of(Demo)[2]
    Option(group='options', flags=('--seeds',), value='N', choices=(), default='1',
           meaning='Repeat with seeds 0, 1, ...; the table then has mean and standard deviation.')
    """
    hints, meanings = get_type_hints(kind, include_extras=True), _meanings(kind)
    titles, title, found = dict(getattr(kind, "option_groups", ())), "options", []
    for field in fields(kind):
        title = titles.get(field.name, title)
        value = field.default if default is None else getattr(default, field.name)
        found.append(_option(field.name, hints[field.name], title, value, meanings[field.name]))
    return found


def help_text(prog: str, about: str, options: Sequence[Option]) -> str:
    """The help of a command for the width of the terminal: how it is called, what it does, its options by group."""
    width, arguments = text_width(), [option for option in options if not option.flags]
    usage = " ".join(["usage:", prog, "[OPTIONS]", *(option.value for option in arguments)])
    groups = {"arguments": [(option.value, option.meaning) for option in arguments]}
    for option in options:
        if option.flags:
            groups.setdefault(option.group, []).append((option.term, _sentence(option)))
    last = next(reversed(groups)) if len(groups) > 1 else "options"
    groups.setdefault(last, []).append(("-h, --help", "Show this and stop."))
    lines = [*wrapped(usage, width), "", *wrapped(about, width)]
    for title, rows in groups.items():
        lines += ["", f"{title}:", *beside(rows, width)] if rows else []
    return "\n".join(lines)


def text_width() -> int:
    """Columns for text: those of the terminal, 80 where there is none, at most 120."""
    return max(40, min(shutil.get_terminal_size().columns, 120))


def beside(rows: Iterable[tuple[str, str]], width: int, left: int = 30) -> list[str]:
    """Lines of terms with a text beside each, or below it where the term is long or the terminal narrow.

    >>> beside([("--lr X", "Highest learning rate."), ("--name NAME", "")], 40)
    ['  --lr X', '      Highest learning rate.', '  --name NAME']
    """
    left, lines = (left if width >= 2 * left + 12 else 6), []
    for term, text in rows:
        texts, head = wrapped(text, width - left), f"  {term}"
        if texts and len(head) + 2 <= left:
            head = f"{head:<{left}}{texts.pop(0)}"
        lines += [head, *(" " * left + line for line in texts)]
    return lines


def wrapped(text: str, width: int) -> list[str]:
    """The text in lines; no word is broken, and no flag at its hyphens."""
    kept = text.replace("(default: ", "(default:\0")  # stays in one line
    lines = textwrap.wrap(kept, width, break_long_words=False, break_on_hyphens=False)
    return [line.replace("\0", " ") for line in lines]


def _sentence(option: Option) -> str:
    listed = f" One of {', '.join(option.choices)}." if option.choices and "|" not in option.value else ""
    return option.meaning + listed + (f" (default: {option.default})" if option.default else "")


def _meanings(kind: Any) -> dict[str, str]:
    """The text below each field of a class, in one line."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(body, ast.ClassDef)
    return {
        field.target.id: " ".join(str(text.value.value).split())
        for field, text in pairwise(body.body)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }


def _option(name: str, hint: Any, group: str, default: Any, meaning: str) -> Option:
    hint, *marks = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    told: Any = next((mark for mark in marks if hasattr(mark, "metavar")), tyro.conf.arg())
    if _POSITIONAL in marks:
        return Option(group, (), told.metavar, (), "", meaning)
    flag = f"--{name.replace('_', '-')}"
    if hint is bool:
        off = [] if marks else [flag.replace("--", "--no-", 1)]
        return Option(group, (flag, *off), "", (), "on" if default else "", meaning)
    flags = sorted({flag, *(told.aliases or ())}, key=lambda one: (len(one) > 2, one != flag))
    value, choices = _value(name, hint)
    return Option(group, tuple(flags), told.metavar or value, choices, _typed(default), meaning)


def _value(name: str, hint: Any) -> tuple[str, tuple[str, ...]]:
    """What a value looks like, and all that it may be, where those are some words."""
    kinds = (
        [kind for kind in get_args(hint) if kind is not type(None)]
        if get_origin(hint) in (Union, UnionType)
        else [hint]
    )
    if get_origin(kinds[0]) is tuple:
        first, *others = get_args(kinds[0])
        value, choices = _value(name, first)
        return f"{value} ..." if others == [...] else " ".join([value] * (1 + len(others))), choices
    choices = tuple(word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind))
    words = [
        _VALUES.get(name) or {int: "N", float: "X"}.get(kind, "NAME")
        for kind in kinds
        if get_origin(kind) is not Literal
    ]
    value = "|".join([*words, *choices])
    told = len(value) <= _LONGEST_CHOICES
    return value if told else "NAME", choices if not (words and told) else ()


def _typed(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(map(_typed, value))
    return "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
