"""A comparison as one self-contained web page. Takes rows, returns text; reads no file and no clock."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unloaf.analysis.comparison import MethodRow

_STYLE = """
:root { color-scheme: light dark;
  --page: #fbfbfa; --card: #ffffff; --ink: #1d1d1f; --soft: #55555c; --faint: #5f5f66; --line: #e5e5e2; --rule: #9a9a9a;
  --grid: #e4e4e4; --blue: #0072b2; --shade: rgba(0, 0, 0, .16); }
@media screen and (prefers-color-scheme: dark) { :root {
  --page: #17181a; --card: #1f2123; --ink: #e9e9ea; --soft: #b9bac0; --faint: #a9aab0; --line: #34363a; --rule: #75777c;
  --grid: #35373b; --blue: #56b4e9; --shade: rgba(0, 0, 0, .7); } }
body { margin: 0; background: var(--page); color: var(--ink);
       font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2.2rem 1.1rem 3rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { font-size: 1.12rem; margin: 2.4rem 0 .6rem; }
p { max-width: 46rem; margin: .5rem 0; }
.lead { font-size: 1.08rem; color: var(--soft); }
/* Shadows at the sides, as far as a table continues there (Lea Verou's scrolling shadows). */
.scroll { overflow-x: auto; scrollbar-width: thin; background:
  linear-gradient(to right, var(--page) 40%, transparent) 0 0 / 2.5rem 100% no-repeat local,
  linear-gradient(to left, var(--page) 40%, transparent) 100% 0 / 2.5rem 100% no-repeat local,
  linear-gradient(to right, var(--shade), transparent) 0 0 / .8rem 100% no-repeat scroll,
  linear-gradient(to left, var(--shade), transparent) 100% 0 / .8rem 100% no-repeat scroll; }
.wide { width: max-content; min-width: 100%; max-width: calc(100vw - 3.4rem); position: relative; left: 50%;
        transform: translateX(-50%); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .42rem .9rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
thead th { font-weight: 600; font-size: .86rem; color: var(--soft); vertical-align: bottom;
           border-bottom: 1.5px solid var(--rule); }
.results { width: 100%; }
.results td:first-child { font-weight: 600; }
.comparison th, .comparison td { padding-left: .6rem; padding-right: .6rem; }
.comparison th:first-child, .comparison td:first-child { padding-left: 0; }
.runs th, .runs td { padding: .4rem .5rem; font-size: .86rem; }
.runs th:nth-child(-n+3), .runs td:nth-child(-n+3) { text-align: left; }
.runs th:first-child, .runs td:first-child { padding-left: 0; }
.runs td:first-child { overflow-wrap: anywhere; white-space: normal; min-width: 8rem; }
.settings { font-size: .88rem; }
.settings td:not(:first-child) { white-space: normal; overflow-wrap: anywhere; min-width: 5rem; max-width: 16rem; }
.settings td:first-child, .facts td:first-child { color: var(--soft); }
.facts td { text-align: left; white-space: normal; font-size: .88rem; vertical-align: top; overflow-wrap: anywhere; }
.facts td:first-child { min-width: 5.5rem; }
figure { margin: 1rem 0 0; display: grid; gap: 1rem;
         grid-template-columns: repeat(auto-fit, minmax(min(25rem, 100%), 1fr)); }
figure > div { background: var(--card); border: 1px solid var(--line); border-radius: 10px; min-width: 0;
               padding: .9rem .7rem .5rem; }
figure h3 { margin: 0 .3rem .3rem; font-size: .95rem; font-weight: 600; }
svg { width: 100%; height: auto; display: block; }
svg text { font-family: inherit !important; fill: var(--ink); }
figcaption { grid-column: 1 / -1; color: var(--faint); font-size: .9rem; max-width: 46rem; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.3rem; margin: 1.2rem 0 0; padding: 0; list-style: none;
          font-size: .92rem; }
.legend li { display: flex; align-items: center; gap: .45rem; overflow-wrap: anywhere; }
svg.key { width: 28px; height: 8px; flex: none; }
@media (max-width: 40rem) { th, td { padding: .4rem .5rem; font-size: .84rem; } thead th { font-size: .76rem; } }
"""


def comparison_report(
    *,
    title: str,
    lead: str,
    rows: Sequence[MethodRow],
    pictures: Mapping[str, str],
    caption: str,
    explanation: Sequence[str],
    settings: Mapping[str, Mapping[str, str]],
    facts: Mapping[str, str],
) -> str:
    """The page, HTML: heading, table, pictures, how to read them, settings, where it was measured.

    Pictures are headings to SVG, settings by method names to values, facts names (command, hardware) to values.
    """
    parts = [
        f'<p class="lead">{escape(lead)}</p>',
        _results(rows),
        _figure(pictures, caption),
        "<h2>How to read this</h2>",
        *(f"<p>{escape(paragraph)}</p>" for paragraph in explanation),
        "<h2>Settings</h2>",
        _settings(settings),
        "<h2>Where it was measured</h2>",
        _facts(facts),
    ]
    return _page(title, parts)


def runs_report(
    *,
    title: str,
    table: tuple[Sequence[str], Sequence[Sequence[str]]],
    legend: Sequence[tuple[str, str]],
    pictures: Mapping[str, str],
    caption: str,
    differences: Mapping[str, Sequence[str]],
    facts: Mapping[str, str],
) -> str:
    """The page that compares runs, HTML: table, curves, settings that differ, where they ran.

    The table has heads and a line of cells for each run, the legend each run with the SVG of its line, differences a
    setting's value in each run, facts the command, hardware and versions of a run.
    """
    heads, lines = table
    marks = "".join(f"<li>{svg}{escape(label)}</li>" for label, svg in legend)
    parts = [_table("results runs", _head(heads), lines)]
    if pictures:
        parts += [f'<ul class="legend">{marks}</ul>', _figure(pictures, caption)]
    if len(lines) > 1:
        parts.append("<h2>Settings that differ</h2>")
        names = ["setting", *(label for label, _ in legend)]
        body = [[name, *values] for name, values in differences.items()]
        parts.append(_table("settings", _head(names), body) if body else "<p>None.</p>")
    parts += ["<h2>Where they ran</h2>", _facts(facts)]
    return _page(title, parts)


def language_report(
    *,
    title: str,
    lead: str,
    tables: Mapping[str, tuple[Sequence[str], Sequence[Sequence[str]]]],
    legend: Sequence[tuple[str, str]],
    pictures: Mapping[str, str],
    caption: str,
    explanation: Sequence[str],
    settings: Mapping[str, Mapping[str, str]],
    facts: Mapping[str, str],
) -> str:
    """The page of a comparison of language models, HTML: tables under their headings, then as `comparison_report`."""
    marks = "".join(f"<li>{svg}{escape(label)}</li>" for label, svg in legend)
    parts = [f'<p class="lead">{escape(lead)}</p>']
    for heading, (heads, lines) in tables.items():
        parts += [f"<h2>{escape(heading)}</h2>", _table("results", _head(heads), lines)]
    parts += [f'<ul class="legend">{marks}</ul>', _figure(pictures, caption), "<h2>How to read this</h2>"]
    parts += [f"<p>{escape(paragraph)}</p>" for paragraph in explanation]
    parts += ["<h2>Settings</h2>", _settings(settings), "<h2>Where it was measured</h2>", _facts(facts)]
    return _page(title, parts)


def _head(heads: Sequence[str]) -> str:
    return "".join(f'<th scope="col">{"<br>".join(map(escape, head.splitlines()))}</th>' for head in heads)


def _page(title: str, parts: Sequence[str]) -> str:
    return "\n".join(
        [
            "<!doctype html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title>",
            f"<style>{_STYLE}</style></head><body><main>",
            f"<h1>{escape(title)}</h1>",
            *parts,
            "</main></body></html>",
            "",
        ]
    )


def _results(rows: Sequence[MethodRow]) -> str:
    both = any(row.main_reestimated for row in rows)
    mains = ["main network\nas trained, %", "main network\nre-estimated, %"] if both else ["main network\ntop-1, %"]
    heads = ["method", *mains, "mean subnet\ntop-1, %", "worst subnet\ntop-1, %", "measured cost\nof a step",
             "its FLOPs\nlimit"]  # fmt: skip
    lines = []
    for row in rows:
        tops = (row.main_top1, *[row.main_reestimated or "–"] * both, row.mean_top1, row.worst_top1)
        costs = [f"{spread.text(digits=2)} ×" for spread in (row.cost, row.flops)]
        lines.append([row.label, *map(str, tops), *costs])
    return _table("results comparison", _head(heads), lines)


def _figure(pictures: Mapping[str, str], caption: str) -> str:
    boxes = "".join(f"<div><h3>{escape(head)}</h3>{svg}</div>" for head, svg in pictures.items())
    return f"<figure>{boxes}<figcaption>{escape(caption)}</figcaption></figure>"


def _settings(settings: Mapping[str, Mapping[str, str]]) -> str:
    names = list(dict.fromkeys(name for values in settings.values() for name in values))
    columns = {name: [values.get(name, "–") for values in settings.values()] for name in names}
    shared = {name: column[0] for name, column in columns.items() if len(set(column)) == 1}
    everyone = "; ".join(f"{name} {value}" for name, value in shared.items())
    lines = [[name, *column] for name, column in columns.items() if name not in shared]
    table = _table("settings", _head(["setting", *settings]), lines)
    return f"<p>All methods: {escape(everyone)}.</p>{table}"


def _facts(facts: Mapping[str, str]) -> str:
    return _table("facts", "", [[name, value] for name, value in facts.items()])


def _table(kind: str, head: str, lines: Sequence[Sequence[str]]) -> str:
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in lines)
    top = f"<thead><tr>{head}</tr></thead>" if head else ""
    # A region that takes the focus: the arrow keys scroll it.
    scroll = f'<div class="scroll{" wide" * ("results" in kind)}" tabindex="0" role="region" aria-label="{kind}">'
    return f'{scroll}<table class="{kind}">{top}<tbody>{body}</tbody></table></div>'
