"""Writes the tables of the pages here that the code knows: options, parameters of the methods, recipes.

    python docs/generate.py [--check]

A table stands between a line that says what is in it, `<!-- options: train, augmentation -->`, and
`<!-- end of table -->`; what is written between them by hand is lost. `--check` writes nothing and ends with code 1 if
a page is not current.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import unloaf
from unloaf.commands import (
    ablate,
    anytime,
    bench,
    bound,
    check_data,
    damage,
    demo,
    eval,
    exits,
    export,
    loafing,
    logits,
    predict,
    probe,
    receptive_field,
    report,
    subnets,
    train,
)
from unloaf.commands import inspect as inspect_command
from unloaf.commands.help import Option, options_of
from unloaf.config import Config
from unloaf.recipes import RECIPES

DOCS = Path(__file__).parent
COMMANDS = {
    "demo": demo.Demo,
    "train": Config,
    "train beside": train.Train,
    "eval": eval.Eval,
    "subnets": subnets.Subnets,
    "anytime": anytime.Anytime,
    "exits": exits.Exits,
    "loafing": loafing.Loafing,
    "ablate": ablate.Ablate,
    "logits": logits.Logits,
    "receptive-field": receptive_field.ReceptiveField,
    "damage": damage.Damage,
    "bound": bound.Bound,
    "inspect": inspect_command.Inspect,
    "predict": predict.Predict,
    "probe": probe.Probe,
    "export": export.Export,
    "report": report.Report,
    "check-data": check_data.CheckData,
    "bench step": bench.BenchStep,
}


def options_table(what: str) -> str:
    """The options of a command, or of one group of them, as in `train, augmentation`."""
    command, _, title = what.partition(", ")
    options = [one for one in options_of(COMMANDS[command]) if one.flags and title in ("", one.group)]
    groups = {group: list(members) for group, members in groupby(options, key=lambda option: option.group)}
    rows = []
    for group, members in groups.items():
        rows += [[f"*{group}*", "", ""]] * (len(groups) > 1)
        rows += [_row(option) for option in members]
    return table(["option", "default", "meaning"], rows)


def _row(option: Option) -> list[str]:
    default = option.default or ("off" if len(option.flags) == 2 and not option.value else "")
    names = [name for name in option.flags if not name.startswith("--no-") or option.value]
    meaning = re.sub(r"(?<![\w`-])--[a-z][\w-]*", r"`\g<0>`", option.meaning)
    if option.choices:
        meaning += f" One of {', '.join(map(_code, option.choices))}."
    return [", ".join(map(_code, names)), default and _code(default), meaning]


def parameters_table(name: str) -> str:
    """The arguments by keyword of a method, from its docstring."""
    method = getattr(unloaf, name)
    section = re.search(r"^Args:\n(.*?)\n\n", str(inspect.getdoc(method)), flags=re.M | re.S)
    assert section is not None
    told = dict(re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", section[1], flags=re.M))
    named = [one for one in inspect.signature(method).parameters.values() if one.kind is one.KEYWORD_ONLY]
    rows = [[_code(one.name), _code(_default(one.default)), _markdown(told[one.name])] for one in named]
    return table(["parameter", "default", "meaning"], rows)


def _default(value: Any) -> str:
    return getattr(value, "__name__", repr(value)).replace("e-0", "e-")


def _markdown(text: str) -> str:
    text = " ".join(text.split()).replace("``", "`")
    return text[0].upper() + text[1:]


def recipes_table(_: str) -> str:
    """All recipes."""
    heads = ["name", "network", "method", "epochs", "global batch", "published figure", "source"]
    rows = []
    for name, entry in RECIPES.items():
        config = entry.config()
        batch = config.global_batch_size or config.batch_size * config.grad_accum_steps
        cells = [_code(name), _code(config.model), config.method, str(config.epochs), str(batch)]
        rows.append([*cells, entry.published or "-", entry.source])
    return table(heads, rows)


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells as a table of Markdown."""
    lines = [[cell.replace("|", "\\|") for cell in line] for line in [heads, *rows]]
    head, *body = [f"| {' | '.join(line)} |\n" for line in lines]
    return "".join([head, f"{'|---' * len(heads)}|\n", *body])


def _code(text: str) -> str:
    return f"`{text}`"


TABLES = {"options": options_table, "parameters": parameters_table, "recipes": recipes_table}
PLACE = re.compile(r"(<!-- (\w+): ([^\n]+) -->\n).*?(<!-- end of table -->\n)", flags=re.S)


def current(text: str) -> str:
    """A page with the tables that it should have."""
    return PLACE.sub(lambda found: f"{found[1]}{TABLES[found[2]](found[3])}{found[4]}", text)


def main(words: Sequence[str]) -> int:
    """Writes the pages that are not current, or names them."""
    stale = 0
    for page in sorted(DOCS.rglob("*.md")):
        text = page.read_text(encoding="utf-8")
        if (made := current(text)) != text:
            stale += 1
            print(
                f"{page.relative_to(DOCS.parent)}: {'is not current: make docs' if '--check' in words else 'written'}"
            )
            if "--check" not in words:
                page.write_text(made, encoding="utf-8")
    return stale if "--check" in words else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) > 0)
