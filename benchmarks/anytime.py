"""Cascades of the digits recipes: trained, judged, and written into docs/anytime.md and README.

    python -m benchmarks.anytime measure     # trains what is missing in output/anytime, writes the record
    python -m benchmarks.anytime pages       # writes tables and picture from the record

The record is docs/results/anytime-digits.json.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unloaf.analysis.comparison import Spread
from unloaf.environment import environment
from unloaf.files.writing import write_whole
from unloaf.measure.exits import AnytimePoint, Target
from unloaf.methods.table import METHODS
from unloaf.pages.cascades import accuracy_over_gmacs
from unloaf.runs.anytime import AnytimeJudgement, NetworkRow, judge_anytime
from unloaf.runs.anytime_records import json_records

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "docs" / "results" / "anytime-digits.json"
PICTURE = RECORD.with_suffix(".svg")
PAGES = ("docs/anytime.md", "README.md")
_METHODS = ("common", "st", "gkt")
_SEEDS = (0, 1, 2)
_DROP = 0.5  # points on the validation images
_BATCHES = (1, 32)
_PLACES = re.compile(r"(<!-- anytime: (\w+) -->\n).*?(<!-- end of anytime -->)", flags=re.S)


def measure(runs: Path, *, device: str = "cpu") -> None:
    """Trains the runs that are missing and judges all."""
    rows, where = [], environment() | {"command": ["python", "-m", "benchmarks.anytime", "measure"]}
    for method in _METHODS:
        for seed in _SEEDS:
            folder = runs / f"{method}-{seed}"
            if not folder.exists():
                _train(method, seed, folder)
            judgement, _, _ = judge_anytime(
                folder, target=Target(max_drop=_DROP), timed=_BATCHES, repeats=5, device=device
            )
            [found] = json_records([judgement])
            rows.append({"method": method, "seed": seed, **found})
            settings = {"max_drop": _DROP, "recipes": "digits"}
            document = {"settings": settings, "environment": where, "rows": rows}
            write_whole(RECORD, json.dumps(document, indent=1) + "\n")


def _train(method: str, seed: int, folder: Path) -> None:
    from unloaf.commands.main import main as command

    words = ["train", "--recipe", f"digits_{method}", "--seed", str(seed), "--device", "cpu"]
    code = command([*words, "--output", str(folder.parent), "--name", folder.name])
    if code:
        raise SystemExit(code)


def records() -> list[dict[str, Any]]:
    """A record for each run."""
    return json.loads(RECORD.read_text(encoding="utf-8"))["rows"]


def row_of(record: dict[str, Any], kind: str) -> dict[str, Any]:
    """The figures of one network of a run; of the main network where a subnet alone is nothing else."""
    found = {row["kind"]: row for row in record["rows"]}
    return found.get(kind) or found["main, re-estimated"]


def _share(record: dict[str, Any], kind: str) -> float:
    return 100 * row_of(record, kind)["gmacs"] / row_of(record, "main")["gmacs"]


def _speed(record: dict[str, Any], kind: str, size: int) -> float:
    speeds = [row_of(record, name)["images_per_second"][str(size)] for name in (kind, "main")]
    return speeds[0] / speeds[1]


def _of(group: Sequence[dict[str, Any]], figure: Any, digits: int) -> str:
    return Spread.of([figure(record) for record in group]).text(digits=digits)


def main_table(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Of each method, over seeds: the main network, the best subnet alone, the cascade."""
    heads = ["", "main, %", "best subnet, %", "its GMACs", "Anytime, %", "its mean GMACs"]
    lines = [heads]
    for method in _METHODS:
        group = [record for record in rows if record["method"] == method]
        cells = [METHODS[method].label, _of(group, lambda r: row_of(r, "main")["top1"], 1)]
        for kind in ("chosen subnet", "cascade"):
            cells.append(_of(group, lambda r, kind=kind: row_of(r, kind)["top1"], 1))
            cells.append(_of(group, lambda r, kind=kind: _share(r, kind), 0) + " %")
        lines.append(cells)
    return lines


def speed_table(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Measured images per second over those of the main network: median over seeds."""
    lines = [["", "best subnet, batch of 1", "Anytime, batch of 1", "best subnet, batch of 32", "Anytime, batch of 32"]]
    for method in _METHODS:
        group = [record for record in rows if record["method"] == method]
        cells = [METHODS[method].label]
        for size in _BATCHES:
            for kind in ("chosen subnet", "cascade"):
                cells.append(f"{statistics.median(_speed(r, kind, size) for r in group):.2f}x")
        lines.append(cells)
    return lines


def run_table(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Each run: its exits, its threshold, how many images left where."""
    lines = [["run", "exits", "threshold", "left at each, %", "main, %", "Anytime, %", "of main's GMACs"]]
    for record in rows:
        left = " ".join(f"{100 * share:.0f}" for share in record["test"]["shares"])
        top1, main = (row_of(record, kind)["top1"] for kind in ("cascade", "main"))
        cells = [f"{METHODS[record['method']].label}, {record['seed']}", " ".join(record["chain"])]
        cells += [f"{record['test']['threshold']:.2f}", left, f"{main:.2f}", f"{top1:.2f}"]
        lines.append([*cells, f"{_share(record, 'cascade'):.0f} %"])
    return lines


def curve_table(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Accuracy, and mean GMACs relative to the main network, at the same thresholds."""
    labels = [METHODS[method].label for method in _METHODS]
    lines = [["threshold", *(f"{label}, {what}" for label in labels for what in ("%", "GMACs"))]]
    for index, point in enumerate(rows[0]["curve"]):
        cells = [f"{point['threshold']:g}"]
        for method in _METHODS:
            group = [record for record in rows if record["method"] == method]
            cells.append(_of(group, lambda r, i=index: r["curve"][i]["top1"], 1))
            share = [100 * r["curve"][index]["gmacs"] / row_of(r, "main")["gmacs"] for r in group]
            cells.append(f"{statistics.fmean(share):.0f} %")
        lines.append(cells)
    return lines


TABLES = {"first": main_table, "main": main_table, "speed": speed_table, "runs": run_table, "curve": curve_table}


def written(text: str, rows: Sequence[dict[str, Any]]) -> str:
    """The page with its tables."""

    def table(found: re.Match[str]) -> str:
        heads, *lines = TABLES[found[2]](rows)
        rule = ["---", *("---:" for _ in heads[1:])]
        return found[1] + "".join(f"| {' | '.join(cells)} |\n" for cells in (heads, rule, *lines)) + found[3]

    return _PLACES.sub(table, text)


def picture(rows: Sequence[dict[str, Any]]) -> str:
    """The curves of the first seed."""
    return accuracy_over_gmacs([_judgement(record) for record in rows if record["seed"] == _SEEDS[0]])


def _judgement(record: dict[str, Any]) -> AnytimeJudgement:
    fields = {name: value for name, value in record.items() if name not in ("method", "seed")}
    fields |= {"run": Path(METHODS[record["method"]].label), "test": AnytimePoint(**record["test"])}
    fields |= {"curve": tuple(AnytimePoint(**point) for point in record["curve"])}
    fields |= {"rows": tuple(NetworkRow(**row) for row in record["rows"])}
    return AnytimeJudgement(**fields)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("measure", "pages"))
    parser.add_argument("--runs", type=Path, default=ROOT / "output" / "anytime")
    options = parser.parse_args()
    if options.what == "measure":
        measure(options.runs)
    rows = records()
    write_whole(PICTURE, picture(rows))
    for name in PAGES:
        page = ROOT / name
        write_whole(page, written(page.read_text(encoding="utf-8"), rows))


if __name__ == "__main__":
    main()
