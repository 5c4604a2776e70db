"""How every page looks: sections of text, tables and pictures in, one HTML file out. Reads no file and no clock.

The file needs no other: pictures are inline, their data are links that hold the CSV files themselves, and the policy in
its head lets nothing in from elsewhere. All text is escaped here.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, NamedTuple
from urllib.parse import quote

from unloaf.pages.style import SCRIPT, STYLE, themed
from unloaf.printable import printable

Cells = tuple[Sequence[str], Sequence[Sequence[Any]]]  # heads and lines


class Table(NamedTuple):
    """Heads and cells; the first cell of a line names it.

    Attributes:
        name: what it is, for who does not see it.
        heads: may have several lines of text; none for a table of names and values.
        lines: of text.
        kind: "results", as wide as the window, "settings" or "facts", whose cells are broken.
        words: numbers of columns, beside the first, that hold words.
    """

    name: str
    heads: Sequence[str]
    lines: Sequence[Sequence[str]]
    kind: str = "results"
    words: Sequence[int] = ()


class Picture(NamedTuple):
    """A picture.

    Attributes:
        heading: what it shows.
        svg: as `unloaf.pages.plots` makes them.
        alt: what it shows, in a sentence or two, for who does not see it.
        data: heads and lines of its numbers; None where a table of the section has them.
        broad: whether it takes the whole width.
    """

    heading: str
    svg: str
    alt: str
    data: Cells | None
    broad: bool = False


class Figure(NamedTuple):
    """Pictures side by side.

    Attributes:
        pictures: one or several.
        caption: how they are read.
        legend: of all of them, labels with a piece of their line as SVG.
    """

    pictures: Sequence[Picture]
    caption: str
    legend: Sequence[tuple[str, str]] = ()


class Note(NamedTuple):
    """A paragraph that nobody may miss."""

    text: str


class Words(NamedTuple):
    """Names and what they mean, a line each."""

    meanings: Mapping[str, str]


class Section(NamedTuple):
    """A part of a page.

    Attributes:
        heading: of it.
        parts: paragraphs, tables, figures, words.
    """

    heading: str
    parts: Sequence[str | Note | Table | Figure | Words]


def page(title: str, lead: str, sections: Sequence[Section]) -> str:
    """The file.

    Args:
        title: of the page.
        lead: what was found, in a paragraph; may be empty.
        sections: in their order; those without a part are left out.

    >>> text = page("<b>", "", [Section("Found", ["a < b"])])
    >>> "<h1>&lt;b&gt;</h1>" in text, "<p>a &lt; b</p>" in text
    (True, True)
    """
    shown = {f"part-{number}": section for number, section in enumerate(sections, 1) if section.parts}
    links = "".join(f'<li><a href="#{name}">{_text(section.heading)}</a></li>' for name, section in shown.items())
    pieces, pictures = [], 0
    for name, section in shown.items():
        text, pictures = _section(section, name, pictures)
        pieces.append(text)
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{_digest(SCRIPT)}'"
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en" class="noscript"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{_text(title)}</title>",
            f"<style>{STYLE}</style></head><body><main>",
            f"<h1>{_text(title)}</h1>",
            f'<p class="lead">{_text(lead)}</p>' if lead else "",
            f'<nav aria-label="Sections"><ul>{links}</ul></nav>' if len(shown) > 2 else "",
            *pieces,
            f"</main><script>{SCRIPT}</script></body></html>",
            "",
        ]
    )


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _text(text: object) -> str:
    """Safe as text and in quotes; what no reader sees, such as marks that turn the direction, is an escape."""
    return "\n".join(escape(printable(line)) for line in str(text).split("\n"))


def _section(section: Section, name: str, pictures: int) -> tuple[str, int]:
    pieces = [f'<h2 id="{name}">{_text(section.heading)}</h2>']
    for part in section.parts:
        if isinstance(part, Figure):
            pieces.append(_figure(part, pictures))
            pictures += len(part.pictures)
        elif isinstance(part, Table):
            pieces.append(table_html(part))
        elif isinstance(part, Words):
            pairs = "".join(f"<dt>{_text(term)}</dt><dd>{_text(text)}</dd>" for term, text in part.meanings.items())
            pieces.append(f"<dl>{pairs}</dl>")
        elif isinstance(part, Note):
            pieces.append(f'<p class="note">{_text(part.text)}</p>')
        else:
            pieces.append(f"<p>{_text(part)}</p>")
    return f'<section aria-labelledby="{name}">{"".join(pieces)}</section>', pictures


_LONG = 40  # lines; a longer table scrolls inside itself


def table_html(table: Table) -> str:
    """A table; the arrow keys scroll the region around it, which says so where there is more."""
    sortable = bool(table.heads) and len(table.lines) > 1
    words = set(table.words)
    head = "".join(
        f'<th scope="col"{_word(index, words)}>{"<br>".join(map(_text, text.splitlines()))}</th>'
        if text
        else f"<td{_word(index, words)}></td>"
        for index, text in enumerate(table.heads)
    )
    body = "".join(
        "<tr>" + "".join(
            f'<th scope="row">{_text(cell)}</th>' if not index else f"<td{_word(index, words)}>{_text(cell)}</td>"
            for index, cell in enumerate(line)
        ) + "</tr>"
        for line in table.lines
    )  # fmt: skip
    top = f"<thead><tr>{head}</tr></thead>" if head else ""
    wide = " wide" * table.kind.startswith("results")
    long = " long" * (len(table.lines) > _LONG)
    sort = " sortable" * sortable
    # A region that takes the focus: the arrow keys scroll it.
    return (
        f'<div class="box{wide}"><p class="hint" aria-hidden="true">scroll sideways for more columns &#8594;</p>'
        f'<div class="scroll{long}" tabindex="0" role="region" aria-label="{_text(table.name)}">'
        f'<table class="{table.kind}{sort}">{top}<tbody>{body}</tbody></table></div></div>'
    )


def _word(index: int, words: set[int]) -> str:
    return ' class="word"' if index in words else ""


def _figure(figure: Figure, first: int) -> str:
    marks = "".join(f"<li>{themed(svg)}{_text(label)}</li>" for label, svg in figure.legend)
    cards = "".join(
        f'<div class="card"{_broad(picture) if picture.broad else ""}><h3>{_text(picture.heading)}</h3>'
        f"{inline(picture, number)}{_link(picture)}</div>"
        for number, picture in enumerate(figure.pictures, first)
    )
    legend = f'<ul class="legend">{marks}</ul>' if marks else ""
    caption = f"<figcaption>{_text(figure.caption)}</figcaption>" if figure.caption else ""
    return f"{legend}<figure>{cards}{caption}</figure>"


def _broad(picture: Picture) -> str:
    """On a phone it scrolls sideways, as its letters would be too small, and so takes the focus."""
    return f' tabindex="0" role="group" aria-label="{_text(picture.heading)}" data-broad'


_ID = re.compile(r' id="([^"<>]*)"')
_USED = re.compile(r'(?:url\(#|href="#)([^")]*)')
_PATH = re.compile(r' d="([^"<>]*)"')
_NUMBER = re.compile(r"-?\d+\.\d+")


def inline(picture: Picture, number: int) -> str:
    """The picture as it stands in a page: its colours follow the page, its names are its own, its alternative is read.

    Coordinates are rounded to a tenth of a point, which nobody sees, and names that nothing refers to are left out.
    """
    used = set(_USED.findall(picture.svg))
    svg = _ID.sub(lambda name: f' id="p{number}-{name[1]}"' if name[1] in used else "", picture.svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>p{number}-", svg)
    svg = _PATH.sub(lambda path: f' d="{_NUMBER.sub(_rounded, path[1])}"', svg)
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(r">\s*\n\s*<", "><", svg)
    return themed(svg).replace("<svg ", f'<svg role="img" aria-label="{_text(picture.alt)}" ', 1)


def _rounded(number: re.Match[str]) -> str:
    return f"{float(number[0]):.1f}".removesuffix(".0")


def _link(picture: Picture) -> str:
    """The data of a picture, as a file that is in the page."""
    if picture.data is None:
        return ""
    name = re.sub(r"[^a-z0-9]+", "-", picture.heading.lower()).strip("-")[:60] or "picture"
    text = quote(csv_text(picture.data), safe=",")
    return (
        f'<p class="save"><a download="{name}.csv" href="data:text/csv;charset=utf-8,{text}">'
        f"Data of “{_text(picture.heading)}” (CSV)</a></p>"
    )


def csv_text(data: Cells) -> str:
    r"""Heads and lines as CSV; None is an empty cell, texts are made printable and begin no formula.

    >>> csv_text((["run", "top1"], [["=a", 91.5], ["b", None]]))
    "run,top1\n'=a,91.5\nb,\n"
    """
    heads, lines = data
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerows([[_cell(cell) for cell in line] for line in (heads, *lines)])
    return text.getvalue()


def _cell(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.6g}"
    if not isinstance(value, str):
        return value
    text = printable(value)
    return f"'{text}" if text[:1] in ("=", "+", "@", "\t") or (text[:1] == "-" and not text[1:2].isdigit()) else text
