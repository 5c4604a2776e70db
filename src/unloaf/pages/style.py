"""The style sheet and the script of every page, and the colours of pictures in light and dark. Imports nothing."""

from __future__ import annotations

import re

# A colour of a picture in a file: its name on a page, and what that is in light and in dark. In files the first holds;
# on a page each has a contrast of at least 3 with the card that it lies on (WCAG 2.2, 1.4.11).
COLOURS = {
    "#222222": ("--ink", "#1d1d1f", "#e9e9ea"),
    "#444444": ("--soft", "#55555c", "#b9bac0"),
    "#e4e4e4": ("--grid", "#e4e4e4", "#35373b"),
    "#ffffff": ("--card", "#ffffff", "#1f2123"),
    "#9a9a9a": ("--rule", "#8a8a8a", "#84868b"),
    "#e69f00": ("--orange", "#b97700", "#e69f00"),
    "#0072b2": ("--blue", "#0072b2", "#3f9be0"),
    "#d55e00": ("--red", "#d55e00", "#e8743b"),
    "#009e73": ("--green", "#008a64", "#16b488"),
    "#cc79a7": ("--pink", "#b8578a", "#d98bb5"),
    "#8a8a8a": ("--grey", "#767676", "#96979b"),
    "#56b4e9": ("--sky", "#2b8cc4", "#a6dcff"),
}
# Of text and lines of the page itself.
PAGE = {
    "--page": ("#fbfbfa", "#17181a"),
    "--faint": ("#5f5f66", "#a9aab0"),
    "--line": ("#e5e5e2", "#34363a"),
    "--link": ("#005a9c", "#7cc0f2"),
    "--mark": ("#8a4b00", "#f0b96a"),
    "--shade": ("rgba(0, 0, 0, .16)", "rgba(0, 0, 0, .7)"),
}


def themed(svg: str) -> str:
    """A picture whose colours are those that the page gives them; its texts stay as they are.

    >>> themed('<path style="stroke: #222222"/><text>fill: #222222</text>')
    '<path style="stroke: var(--ink, #222222)"/><text>fill: #222222</text>'
    """
    return re.sub(r'(?<=style=")[^"]*', lambda style: _COLOUR.sub(_named, style[0]), svg)


_COLOUR = re.compile("|".join(f"(?<!, ){colour}" for colour in COLOURS))


def _named(colour: re.Match[str]) -> str:
    return f"var({COLOURS[colour[0]][0]}, {colour[0]})"


def _values(place: int) -> str:
    pairs = [(name, values[place]) for name, values in PAGE.items()]
    pairs += [(name, both[place]) for name, *both in COLOURS.values()]
    return " ".join(f"{name}: {value};" for name, value in pairs)


STYLE = (
    f"\n:root {{ color-scheme: light dark; {_values(0)} }}\n"
    f"@media screen and (prefers-color-scheme: dark) {{ :root {{ {_values(1)} }} }}"
    """
body { margin: 0; background: var(--page); color: var(--ink);
       font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2.2rem 1.1rem 3rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem; overflow-wrap: anywhere; }
p { max-width: 46rem; margin: .5rem 0; overflow-wrap: anywhere; }
a { color: var(--link); }
:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
.lead { font-size: 1.08rem; color: var(--soft); }
.note { border-left: 3px solid var(--mark); padding-left: .7rem; }
nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1.1rem; padding: 0; margin: 1rem 0 0; list-style: none;
         font-size: .92rem; }
.box { position: relative; margin: .8rem 0 0; }
/* Shadows at the sides, as far as a table continues there (Lea Verou's scrolling shadows). */
.scroll { overflow-x: auto; scrollbar-width: thin; background:
  linear-gradient(to right, var(--page) 40%, transparent) 0 0 / 2.5rem 100% no-repeat local,
  linear-gradient(to left, var(--page) 40%, transparent) 100% 0 / 2.5rem 100% no-repeat local,
  linear-gradient(to right, var(--shade), transparent) 0 0 / .8rem 100% no-repeat scroll,
  linear-gradient(to left, var(--shade), transparent) 100% 0 / .8rem 100% no-repeat scroll; }
.hint { display: none; margin: 0 0 .3rem; font-size: .84rem; color: var(--mark); }
.more > .hint { display: block; }
.long { max-height: 34rem; overflow-y: auto; }
.wide { width: max-content; min-width: 100%; max-width: calc(100vw - 3.4rem); left: 50%; transform: translateX(-50%); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .42rem .9rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
tbody th { font-weight: 600; }
tr > :first-child { text-align: left; padding-left: .1rem; }
thead th { font-weight: 600; font-size: .86rem; color: var(--soft); vertical-align: bottom;
           border-bottom: 1.5px solid var(--rule); }
thead button { font: inherit; color: inherit; background: none; border: 0; padding: 0; margin: 0; cursor: pointer;
               text-align: inherit; white-space: inherit; }
thead button::after { content: " \\2195"; opacity: .55; }
th[aria-sort=ascending] button::after { content: " \\2191"; opacity: 1; }
th[aria-sort=descending] button::after { content: " \\2193"; opacity: 1; }
.results { min-width: 100%; }
.runs th, .runs td { padding: .4rem .5rem; font-size: .86rem; }
.runs tr > :first-child { padding-left: .1rem; }
tr > .word { text-align: left; }
.results tbody th { overflow-wrap: anywhere; white-space: normal; min-width: 8rem; max-width: 22rem; }
.settings { font-size: .88rem; }
.settings td { white-space: normal; overflow-wrap: anywhere; min-width: 5rem; max-width: 16rem; }
.settings tbody th, .facts tbody th { color: var(--soft); font-weight: 400; }
.facts td { text-align: left; white-space: pre-line; font-size: .88rem; vertical-align: top; overflow-wrap: anywhere; }
.facts tbody th { min-width: 5.5rem; max-width: 14rem; font-size: .88rem; vertical-align: top; white-space: normal;
                  overflow-wrap: anywhere; }
figure { margin: 1rem 0 0; display: grid; gap: 1rem;
         grid-template-columns: repeat(auto-fit, minmax(min(25rem, 100%), 1fr)); }
figure > .card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; min-width: 0;
                 padding: .9rem .7rem .5rem; display: flex; flex-direction: column; }
.card[data-broad] { grid-column: 1 / -1; } .card[data-broad] svg { max-width: 46rem; }
h3 { margin: 0 .3rem .3rem; font-size: .95rem; font-weight: 600; }
figure svg { width: 100%; height: auto; display: block; margin: auto 0; }
svg text { font-family: inherit !important; fill: var(--ink); }
.save { margin: .4rem .3rem 0; font-size: .84rem; }
figcaption { grid-column: 1 / -1; color: var(--faint); font-size: .9rem; max-width: 46rem; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.3rem; margin: 1.2rem 0 0; padding: 0; list-style: none;
          font-size: .92rem; }
.legend li { display: flex; align-items: center; gap: .45rem; overflow-wrap: anywhere; }
svg.key { width: 28px; height: 8px; flex: none; }
dl { margin: .6rem 0 0; display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: .3rem 1rem;
     font-size: .92rem; max-width: 56rem; }
dt { font-weight: 600; overflow-wrap: anywhere; max-width: 16rem; }
dd { margin: 0; color: var(--soft); overflow-wrap: anywhere; min-width: 0; }
@media (max-width: 40rem) {
  th, td { padding: .4rem .5rem; font-size: .84rem; } thead th { font-size: .76rem; }
  .results tbody th { min-width: 6.5rem; max-width: 9rem; }
  dl { grid-template-columns: 1fr; gap: .1rem; } dd { margin-bottom: .5rem; }
  .card[data-broad] { overflow-x: auto; } .card[data-broad] svg { min-width: 36rem; }
  .noscript .hint { display: block; } }
@media print { body { background: none; font-size: 10pt; } main { max-width: none; padding: 0; }
  .scroll, .long { overflow: visible; max-height: none; background: none; } .hint, nav, .save { display: none; }
  .box.wide { left: 0; transform: none; width: auto; max-width: none; } thead button::after { content: none; }
  th, td { white-space: normal; padding: .2rem .35rem; font-size: 8pt; overflow-wrap: anywhere;
           min-width: 0 !important; }
  .card[data-broad] svg { min-width: 0; } .card, tr, figcaption { break-inside: avoid; }
  h2, h3 { break-after: avoid; } }
"""
)

# Columns are sorted by a button in their head; a table that is wider than the page says so. Without scripts tables
# stand in their own order and the hint stands on narrow pages.
SCRIPT = r"""
document.documentElement.classList.remove("noscript");
const number = /^[-−]?\d[\d,]*(\.\d+)?(e[-+]?\d+)?(?= ?(%|×|x|±|\(|\/|[a-z]{1,3}\b|$))/i;
const value = cell => { const text = cell.textContent.trim();
  const found = number.exec(text);
  if (text === "" || text === "–" || text === "-") return null;
  return found ? Number(found[0].replace(/,/g, "").replace("−", "-")) : text; };
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  heads.forEach((head, column) => {
    if (!head.textContent.trim()) return;
    const button = document.createElement("button");
    button.type = "button"; button.append(...head.childNodes); head.append(button);
    head.setAttribute("aria-sort", "none");
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      for (const other of heads) if (other.hasAttribute("aria-sort")) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const keyed = [...body.rows].map(row => [value(row.cells[column]), row]);
      const numbers = keyed.every(([key]) => key === null || typeof key === "number");
      const text = row => row.cells[column].textContent.trim();
      keyed.sort(([a, one], [b, two]) => a === null || b === null ? (a === null) - (b === null)
        : (up ? 1 : -1) * (numbers ? a - b : text(one).localeCompare(text(two), undefined, {numeric: true})));
      body.append(...keyed.map(([, row]) => row)); }); }); }
const boxes = [...document.querySelectorAll(".scroll")];
const measure = () => { for (const box of boxes)
  box.parentNode.classList.toggle("more", box.scrollWidth > box.clientWidth + 1); };
addEventListener("resize", measure); measure();
"""
