"""docs/language.md and README say what the records of language models say."""

import json
import re
from pathlib import Path

import pytest
from benchmarks.language import pages

ROOT = Path(__file__).parents[1]
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in pages.PAGES}
RUNS = {run["label"]: run for run in json.loads(pages.DEMO.read_text(encoding="utf-8"))["runs"]}


def table(text, name):
    """As rows of cells under heads."""
    [body] = re.findall(rf"<!-- language: {name} -->\n(.*?)<!-- end of language -->", text, flags=re.S)
    heads, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in body.splitlines()]
    return [dict(zip(heads, row, strict=True)) for row in rows]


def test_pages_are_what_the_script_writes():
    for text in TEXTS.values():
        assert pages.written(text) == text


@pytest.mark.parametrize("label", RUNS)
def test_readme_states_the_demo(label):
    [row] = [row for row in table(TEXTS["README.md"], "first") if row[""] == label]
    ways = [way for way in RUNS[label]["decoding"] if way["decoder"] == "unloaf"]
    best = sorted(ways, key=lambda way: way["speed"])[-1]
    assert row["main, nats"] == f"{list(RUNS[label]['nats'].values())[-1]:.3f}"
    assert row["exit 1, nats"] == f"{RUNS[label]['nats']['1']:.3f}"
    assert (row["best exit"], row["speed"]) == (str(best["depth"]), f"{best['speed']:.2f}x")


def test_the_texts_are_those_of_plain_decoding():
    assert all(way["same"] == 1.0 for run in RUNS.values() for way in run["decoding"] if way["decoder"] == "unloaf")
