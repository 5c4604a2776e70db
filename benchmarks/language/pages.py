"""Tables of docs/language.md and README from the records of language models.

    unloaf demo --task language --output output/language
    cp output/language/results.json docs/results/demo-language.json
    python -m benchmarks.language.pages

docs/results/smollm2.json is what `benchmarks/language/smollm2.py` writes.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from unloaf.files.writing import write_whole

ROOT = Path(__file__).parents[2]
DEMO, SMOLLM2 = (ROOT / "docs" / "results" / f"{name}.json" for name in ("demo-language", "smollm2"))
PAGES = ("docs/language.md", "README.md")
_PLACES = re.compile(r"(<!-- language: (\w+) -->\n).*?(<!-- end of language -->)", flags=re.S)
_Cells = list[list[str]]


def runs() -> list[dict[str, Any]]:
    """The demo's, common training first."""
    return json.loads(DEMO.read_text(encoding="utf-8"))["runs"]


def fastest(run: dict[str, Any], decoder: str = "unloaf") -> dict[str, Any]:
    """The exit that decodes fastest."""
    return max((row for row in run["decoding"] if row["decoder"] == decoder), key=lambda row: row["speed"] or 0.0)


def first() -> _Cells:
    """A line for each method."""
    lines = [["", "main, nats", "exit 1, nats", "best exit", "taken", "layer calls", "speed"]]
    for run in runs():
        nats, best = {int(depth): value for depth, value in run["nats"].items()}, fastest(run)
        cells = [run["label"], f"{nats[max(nats)]:.3f}", f"{nats[1]:.3f}", str(best["depth"])]
        cells += [f"{100 * best['acceptance']:.0f} %", f"{best['layer_calls']:.2f}", f"{best['speed']:.2f}x"]
        lines.append(cells)
    return lines


def exits() -> _Cells:
    """Nats per byte and perplexity of each exit of the demo."""
    both = runs()
    lines = [["layers", *(f"{run['label']}, {what}" for run in both for what in ("nats per byte", "perplexity"))]]
    for depth in both[0]["nats"]:
        values = [run["nats"][depth] for run in both]
        lines.append([depth, *(text for nats in values for text in (f"{nats:.3f}", f"{math.exp(nats):.2f}"))])
    return lines


def decoding() -> _Cells:
    """Each way to decode of the demo."""
    lines = [["method", "decoding", "taken", "layer calls", "tokens/s", "speed"]]
    for run in runs():
        for row in run["decoding"]:
            if row["note"]:
                continue
            way = "plain" if row["depth"] is None else f"{row['decoder']}, exit {row['depth']}"
            taken = "–" if row["acceptance"] is None else f"{100 * row['acceptance']:.0f} %"
            measured = [f"{row['layer_calls']:.2f}", f"{row['tokens_per_second']:.0f}", f"{row['speed']:.2f}x"]
            lines.append([run["label"], way, taken, *measured])
    return lines


def smollm2() -> _Cells:
    """Exits of the pretrained network before and after."""
    record = json.loads(SMOLLM2.read_text(encoding="utf-8"))
    lines = [["layers"]]
    for name in ("before", "after"):
        lines[0] += [f"nats per token {name}", "agreement", "layer calls"]
    for old, new in zip(record["before"]["rows"], record["after"]["rows"], strict=True):
        cells = [str(old["depth"])]
        for name, row in (("before", old), ("after", new)):
            ways = {(way["decoder"], way["depth"]): way for way in record[name]["ways"]}
            way = ways.get(("unloaf", row["depth"]), ways[("plain", None)])
            cells += [f"{row['nats']:.2f}", f"{100 * row['agreement']:.0f} %", f"{way['layer_calls']:.2f}"]
        lines.append(cells)
    return lines


TABLES = {"first": first, "exits": exits, "decoding": decoding, "smollm2": smollm2}


def written(text: str) -> str:
    """The page with its tables."""

    def table(found: re.Match[str]) -> str:
        heads, *lines = TABLES[found[2]]()
        rule = ["---", *("---:" for _ in heads[1:])]
        return found[1] + "".join(f"| {' | '.join(cells)} |\n" for cells in (heads, rule, *lines)) + found[3]

    return _PLACES.sub(table, text)


if __name__ == "__main__":
    for page in PAGES:
        write_whole(ROOT / page, written((ROOT / page).read_text(encoding="utf-8")))
