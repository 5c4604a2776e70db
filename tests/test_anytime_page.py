"""docs/anytime.md and README say what the record of cascades says."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from benchmarks import anytime

ROOT = Path(__file__).parents[1]
TEXTS = {name: (ROOT / name).read_text(encoding="utf-8") for name in anytime.PAGES}
DOCUMENT = json.loads(anytime.RECORD.read_text(encoding="utf-8"))
LABELS = {"common": "common training", "st": "ST", "gkt": "GKT"}


def tables(name):
    """The tables of a page by their name, as rows of cells under heads."""
    found = re.findall(r"<!-- anytime: (\w+) -->\n(.*?)<!-- end of anytime -->", TEXTS[name], flags=re.S)
    cells = {n: [[c.strip() for c in line.split("|")[1:-1]] for line in body.splitlines()] for n, body in found}
    return {n: [dict(zip(rows[0], row, strict=True)) for row in rows[2:]] for n, rows in cells.items()}


def stated(values, digits):
    array = np.asarray(values, dtype=np.float64)
    return f"{array.mean():.{digits}f} ± {array.std(ddof=1):.{digits}f}"


def figures(method, kind, figure):
    """Of each seed: of that network, or of the main one evaluated alike where no other was chosen."""
    found = []
    for record in DOCUMENT["rows"]:
        if record["method"] == method:
            rows = {row["kind"]: row for row in record["rows"]}
            found.append(rows.get(kind, rows["main, re-estimated"])[figure])
    return np.array(found)


def test_pages_are_what_the_script_writes():
    for text in TEXTS.values():
        assert anytime.written(text, anytime.records()) == text
    assert anytime.PICTURE.read_text(encoding="utf-8") == anytime.picture(anytime.records())


@pytest.mark.parametrize(("name", "table"), [("docs/anytime.md", "main"), ("README.md", "first")])
@pytest.mark.parametrize("method", LABELS)
def test_the_table_of_the_methods_states_the_record(name, table, method):
    [row] = [row for row in tables(name)[table] if row[""] == LABELS[method]]
    main = figures(method, "main", "gmacs")
    assert row["main, %"] == stated(figures(method, "main", "top1"), 1)
    assert row["Anytime, %"] == stated(figures(method, "cascade", "top1"), 1)
    assert row["its mean GMACs"] == stated(100 * figures(method, "cascade", "gmacs") / main, 0) + " %"
    assert row["best subnet, %"] == stated(figures(method, "chosen subnet", "top1"), 1)
    assert row["its GMACs"] == stated(100 * figures(method, "chosen subnet", "gmacs") / main, 0) + " %"


@pytest.mark.parametrize("record", DOCUMENT["rows"], ids=lambda record: f"{record['method']}-{record['seed']}")
def test_mean_gmacs_are_those_of_the_shares_that_left(record):
    for point in [record["test"], *record["curve"]]:
        assert sum(point["shares"]) == pytest.approx(1)
        assert np.dot(point["shares"], record["exit_gmacs"]) == pytest.approx(point["gmacs"])
    cascade = record["rows"][-1]
    assert (cascade["top1"], cascade["gmacs"]) == (record["test"]["top1"], record["test"]["gmacs"])
    assert record["test"]["threshold"] == record["val"]["threshold"]
    assert (record["val"]["images"], record["test"]["images"], record["judged_on"]) == (300, 600, "test")


def shares_of_main(method, pick):
    """Of each seed: its point of the curve, or that of its threshold, over the main network in points and in GMACs."""
    found = []
    for record in DOCUMENT["rows"]:
        if record["method"] == method:
            main, point = record["rows"][0], pick(record)
            found.append((point["top1"] - main["top1"], point["gmacs"] / main["gmacs"]))
    return np.array(found)


def test_what_the_page_says_of_the_methods_holds():
    at_its_own = {method: shares_of_main(method, lambda record: record["test"]) for method in LABELS}
    assert at_its_own["st"][:, 1].max() < 0.25
    assert at_its_own["st"][:, 0].min() >= -0.5 - 1e-9
    assert at_its_own["common"][:, 1].min() > 0.5
    assert sorted(at_its_own["common"][:, 0] < -1) == [False, True, True]
    nine = {
        method: shares_of_main(method, lambda record: next(p for p in record["curve"] if p["threshold"] == 0.9))
        for method in LABELS
    }
    assert all(abs(found[:, 0].mean()) < 0.3 for found in nine.values())
    assert max(nine["st"][:, 1].mean(), nine["gkt"][:, 1].mean()) < 0.4 < 0.8 < nine["common"][:, 1].mean()


def test_every_run_has_a_line():
    lines = tables("docs/anytime.md")["runs"]
    names = [f"{LABELS[record['method']]}, {record['seed']}" for record in DOCUMENT["rows"]]
    assert [line["run"] for line in lines] == names
    for line, record in zip(lines, DOCUMENT["rows"], strict=True):
        assert line["exits"] == " ".join(record["chain"])
        assert float(line["Anytime, %"]) == pytest.approx(record["test"]["top1"], abs=0.005)


def test_the_record_names_no_path_of_a_machine():
    assert not re.search(r'["\s](/|[A-Z]:\\)\w', anytime.RECORD.read_text(encoding="utf-8"))
