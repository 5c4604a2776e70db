"""Comparisons of methods as pages. Takes rows, returns text; reads no file and no clock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from unloaf.pages.layout import Figure, Picture, Section, Table, Words, page
from unloaf.pages.words import COMPARISON_WORDS

if TYPE_CHECKING:
    from unloaf.analysis.comparison import MethodRow

_Cells = tuple[Sequence[str], Sequence[Sequence[str]]]


def comparison_report(
    *,
    title: str,
    lead: str,
    rows: Sequence[MethodRow],
    pictures: Sequence[Picture],
    caption: str,
    explanation: Sequence[str],
    words: Mapping[str, str],
    settings: Mapping[str, Mapping[str, str]],
    facts: Mapping[str, str],
) -> str:
    """The page, HTML: table, pictures, how to read them, settings, where it was measured.

    Words are the labels of methods with what they mean; settings by method names, then names to values; facts names
    (command, hardware) to values.
    """
    return page(
        title,
        lead,
        [
            Section("Results", [_results(rows), Figure(pictures, caption)]),
            Section("How to read this", [*explanation, Words({**words, **COMPARISON_WORDS})]),
            Section("Settings", settings_parts(settings)),
            Section("Where it was measured", [facts_table(facts)]),
        ],
    )


def language_report(
    *,
    title: str,
    lead: str,
    tables: Mapping[str, _Cells],
    legend: Sequence[tuple[str, str]],
    picture: Picture,
    caption: str,
    explanation: Sequence[str],
    words: Mapping[str, str],
    settings: Mapping[str, Mapping[str, str]],
    facts: Mapping[str, str],
) -> str:
    """The page of a comparison of language models: tables under their headings, then as `comparison_report`."""
    sections = [
        Section(heading, [Table(heading, heads, lines, words=[1] * (heads[1] == "decoding"))])
        for heading, (heads, lines) in tables.items()
    ]
    return page(
        title,
        lead,
        [
            *sections,
            Section("Picture", [Figure([picture], caption, legend)]),
            Section("How to read this", [*explanation, Words(words)]),
            Section("Settings", settings_parts(settings)),
            Section("Where it was measured", [facts_table(facts)]),
        ],
    )


def _results(rows: Sequence[MethodRow]) -> Table:
    both = any(row.main_reestimated for row in rows)
    mains = ["main network\nas trained, %", "main network\nre-estimated, %"] if both else ["main network\ntop-1, %"]
    equal = any(row.equal_cost for row in rows)
    heads = ["method", *mains, "mean subnet\ntop-1, %", "worst subnet\ntop-1, %", "measured cost\nof a step",
             "its FLOPs\nlimit", *["at equal cost\nval top-1, %"] * equal]  # fmt: skip
    lines = []
    for row in rows:
        tops = (row.main_top1, *[row.main_reestimated or "–"] * both, row.mean_top1, row.worst_top1)
        costs = [f"{spread.text(digits=2)} ×" for spread in (row.cost, row.flops)]
        lines.append([row.label, *map(str, tops), *costs, *[str(row.equal_cost or "–")] * equal])
    return Table("Results of each method", heads, lines)


def settings_parts(settings: Mapping[str, Mapping[str, str]]) -> list[str | Table]:
    """What all have in common in a sentence, the rest as a table."""
    names = list(dict.fromkeys(name for values in settings.values() for name in values))
    columns = {name: [values.get(name, "–") for values in settings.values()] for name in names}
    shared = {name: column[0] for name, column in columns.items() if len(set(column)) == 1}
    everyone = "; ".join(f"{name} {value}" for name, value in shared.items())
    lines = [[name, *column] for name, column in columns.items() if name not in shared]
    return [f"All methods: {everyone}.", Table("Settings of each method", ["setting", *settings], lines, "settings")]


def facts_table(facts: Mapping[str, str], *, name: str = "Command, hardware and versions") -> Table:
    """Names and values, without heads."""
    return Table(name, [], [[name, value] for name, value in facts.items()], "facts")
