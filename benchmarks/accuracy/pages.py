"""Writes the tables of `PAGES` and the picture of the results from the records in docs/results.

    python -m benchmarks.accuracy.pages [--check]

A table stands between <!-- results: NAME --> and <!-- end of results -->; NAME is a table of tables.py, with "first",
"differences" or "inside" after it for those views of it. --check writes nothing and says what is out of date. Code 2,
and nothing written: a record has other settings than its table.
"""

from __future__ import annotations

import argparse
import re
import statistics
import sys
import textwrap
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.accuracy.jobs import Results, altered, figure
from benchmarks.accuracy.tables import TABLES, Table

from unloaf.config.figures import FIGURES
from unloaf.pages.plots import CostPoint, accuracy_over_cost

ROOT = Path(__file__).resolve().parents[2]

Records = Sequence[Mapping[str, Any]]
# Each with the path from it to the records.
PAGES = {"README.md": "docs/results/", "docs/results.md": "results/", "docs/results/trials.md": ""}
# Of the table at the head of README.md.
FIRST_ROWS = ("common training", "ST", "ST++, 1 subnet, ordered", "GKT")
PICTURE = "accuracy-over-cost.svg"
PICTURED = {"cifar100-cpu": "5,000 images, 40 epochs", "cifar100-cpu-few": "2,500 images, 80 epochs"}
_PLACE = re.compile(r"(<!-- results: ([\w-]+)(?: (\w+))? -->\n).*?(<!-- end of results -->)", re.S)


def mean(values: Sequence[float], *, digits: int = 1, sign: str = "") -> str:
    """Mean and standard error, "76.5 ± 0.2"; of a single value, the value."""
    text = f"{statistics.fmean(values):{sign}.{digits}f}"
    if len(values) < 2:
        return text
    return f"{text} ± {standard_error(values):.{digits}f}"


def standard_error(values: Sequence[float]) -> float:
    """Of their mean; 0 where a single value tells nothing of it."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def by_row(table: Table, records: Records) -> dict[str, list[Mapping[str, Any]]]:
    """The records of each row that has some, in the order of the table; runs that diverged are left out."""
    rows = {row.label: [r for r in records if r["row"] == row.label and figure(r) is not None] for row in table.rows}
    return {label: found for label, found in rows.items() if found}


def _known(record: Mapping[str, Any]) -> float:
    value = figure(record)
    assert value is not None  # `by_row` leaves out what diverged
    return value


def accuracies(table: Table, records: Records, *, without: Collection[str] = ()) -> list[str]:
    """A line for each row: main network, its subnets, cost; `without` names columns that are left out."""
    costs = any(r["cost_time"] is not None for r in records)
    heads = ["", "epochs", "main, %", "mean subnet, %", "worst subnet, %", *["cost", "FLOPs"] * costs, "seeds"]
    lines = []
    for label, found in by_row(table, records).items():
        subnets = [list(r["subnets"].values()) for r in found]
        cells = [label, str(found[0]["epochs"]), mean([_known(r) for r in found])]
        cells += [mean([pick(tops) for tops in subnets]) if all(subnets) else "" for pick in (statistics.fmean, min)]
        cells += [_cost(found[0][name]) for name in ("cost_time", "cost_flops") if costs]
        lines.append([*cells, str(len(found))])
    kept = [number for number, head in enumerate(heads) if head not in without]
    heads, *lines = ([cells[number] for number in kept] for cells in (heads, *lines))
    diverged = sorted({r["row"] for r in records if figure(r) is None})
    return [*_table(heads, lines), *[f"\nDiverged: {'; '.join(diverged)}."] * bool(diverged)]


def _cost(value: float | None) -> str:
    """A network trained alone has no method whose cost could be compared."""
    return "" if value is None else f"{value:.2f}"


def first(table: Table, records: Records) -> list[str]:
    """`FIRST_ROWS` in the columns that need no explanation."""
    chosen = [r for r in records if r["row"] in FIRST_ROWS]
    return accuracies(table, chosen, without=("epochs", "FLOPs", "seeds"))


def differences(table: Table, records: Records) -> list[str]:
    """Points of each row's main network over common training, at equal epochs and at its cost or more, and over ST.

    A row with more epochs is the baseline at equal cost, or, where its settings are others, compared with it alone.
    """
    rows = by_row(table, records)
    longer = {row.label: row.settings for row in table.rows if row.costs_as}
    equal = [label for label, settings in longer.items() if settings == table.rows[0].settings and label in rows]
    base = table.rows[0].label
    if base not in rows:
        return ["Common training is not recorded yet."]
    lines = []
    for label, found in rows.items():
        if label == base or label in equal:
            continue
        same_epochs = label not in longer
        as_costly = [e for e in (base, *equal) if cost(rows[e]) >= cost(found) - 0.005]
        against = min(as_costly, key=lambda e: cost(rows[e]), default=None)
        cells = [label, over(found, rows[base]) if same_epochs else ""]
        cells += [over(found, rows[against]), against] if against else ["", ""]
        if "ST" in rows:
            cells.append(over(found, rows["ST"]) if same_epochs and label != "ST" else "")
        lines.append(cells)
    heads = ["over common training, same epochs", "over common training, at least its cost", "which"]
    return _table(["", *heads, *["over ST"] * ("ST" in rows)], lines)


def cost(records: Records) -> float:
    """Of training a row: the higher one of time and FLOPs."""
    return max(records[0]["cost_time"], records[0]["cost_flops"])


def over(found: Records, base: Records) -> str:
    """Difference of two means, with the standard error of a difference of independent means."""
    tops = [[_known(r) for r in records] for records in (found, base)]
    text = f"{statistics.fmean(tops[0]) - statistics.fmean(tops[1]):+.1f}"
    if min(map(len, tops)) < 2:
        return text
    return f"{text} ± {sum(statistics.variance(values) / len(values) for values in tops) ** 0.5:.1f}"


# Records of older runs have the main network with its running statistics alone.
_JUDGED = {"main network": "top1", "main network, statistics re-estimated": "top1_reestimated"}


def inside(table: Table, records: Records) -> list[str]:
    """A line for each subnet: trained alone, and inside the networks of each method.

    Subnets have re-estimated batch-norm statistics; the main network is evaluated with its running ones and with these.
    """
    rows = by_row(table, records)
    # Also those that are not trained alone yet: what they are worth inside is known before.
    asked = [row.label for row in table.rows if row.label.startswith("alone ")]
    alone = {label.removeprefix("alone "): rows.get(label, []) for label in asked}
    methods = {label: found for label, found in rows.items() if not label.startswith("alone ")}
    lines = []
    for depths, found in alone.items():
        judged = [[r["subnets"][depths] for r in rs if depths in r["subnets"]] for rs in methods.values()]
        tops_alone = [_known(r) for r in found]
        if tops_alone or any(judged):
            lines.append([depths, *(mean(tops) if tops else "" for tops in (tops_alone, *judged))])
    for name, key in _JUDGED.items():
        tops = [[r[key] for r in found if key in r] for found in methods.values()]
        if any(tops):
            lines.append([name, "", *(mean(values) if values else "" for values in tops)])
    return _table(["subnet", "alone", *(f"inside {label}" for label in methods)], lines)


_VIEWS: dict[str | None, Callable[[Table, Records], list[str]]] = {
    None: accuracies,
    "differences": differences,
    "inside": inside,
}


def _table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    rule = ["---", *["---:"] * (len(heads) - 1)]
    return [f"| {' | '.join(cells)} |" for cells in (heads, rule, *lines)]


def about(table: Table, records: Records) -> str:
    """On what, with what, by which command."""
    first = records[0]
    versions = ", ".join(f"{name} {version}" for name, version in first["versions"].items())
    days = [pick(r["date"] for r in records) for pick in (min, max)]
    when = " to ".join(dict.fromkeys(days))
    split = {"test": "test", "val": "validation"}[table.split]
    label = FIGURES[table.common.get("task", "classification")].chief.label
    label = label.capitalize() if label.islower() else label
    return (
        f"{table.about}. {label} on the {split} images, mean and standard error over seeds. "
        f"{first['hardware']}, {first['threads']} thread a run; {versions}; {when}. "
        f"`{_command(table.name, table.common['dataset'])}`"
    )


def _command(name: str, dataset: str) -> str:
    return f"python -m benchmarks.accuracy.run {name}" + " --data-dir DIR" * (dataset != "digits")


def written(text: str, results: Results, *, links: str) -> str:
    """A page with its tables from the records, to whose folder `links` leads."""

    def place(match: re.Match[str]) -> str:
        start, name, view, end = match.groups()
        table, records = TABLES[name], results.records(name)
        if not records:
            return f"{start}Not run yet: `{_command(name, table.common['dataset'])}`.\n{end}"
        if view == "first":  # no blank lines: it has to fit on one screen with its example
            return start + "\n".join([*first(table, records), ""]) + end
        lines = _VIEWS[view](table, records)
        if not view:
            record = f"([records]({links}{name}.json))"
            lines += ["", textwrap.fill(f"{about(table, records)} {record}.", 120, break_on_hyphens=False)]
        return start + "\n".join(["", *lines, "", ""]) + end

    return _PLACE.sub(place, text)


def points(table: Table, records: Records) -> list[CostPoint]:
    """Main network and mean subnet of each row, over its cost."""
    found = []
    for label, rows in by_row(table, records).items():
        row = table.row(label)
        if row.tuned is None or row.tier > 1:  # our combinations would be more than one can tell apart
            continue
        tops = [_known(r) for r in rows]
        subnets = statistics.fmean(statistics.fmean(r["subnets"].values()) for r in rows)
        found.append(
            CostPoint(
                label.partition(", cost of")[0], cost(rows), statistics.fmean(tops), standard_error(tops), subnets
            )
        )
    return found


def picture(results: Results) -> str:
    """Accuracy over cost, a panel for each of `PICTURED`."""
    panels = {title: points(TABLES[name], results.records(name)) for name, title in PICTURED.items()}
    return accuracy_over_cost(panels, axis="top-1 accuracy, % of test images")


def main() -> int:
    """0, 1 when --check finds something out of date, 2 when a record is not of its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing")
    parser.add_argument("--results", type=Path, default=ROOT / "docs" / "results", help="folder of the records")
    options = parser.parse_args()
    results = Results(options.results)
    if wrong := [line for table in TABLES.values() for line in altered(table, results)]:
        print("records that are not of their tables; move them away or put the table back:", *wrong, sep="\n")
        return 2
    texts = {options.results / PICTURE: picture(results) + "\n"}
    for name, links in PAGES.items():
        texts[ROOT / name] = written((ROOT / name).read_text(encoding="utf-8"), results, links=links)
    stale = []
    for path, text in texts.items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(path.name)
            if not options.check:
                path.write_text(text, encoding="utf-8")
    print(f"{'out of date' if options.check else 'written'}: {', '.join(stale) or 'nothing'}")
    return 1 if stale and options.check else 0


if __name__ == "__main__":
    sys.exit(main())
