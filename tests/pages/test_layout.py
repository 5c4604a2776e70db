"""Pages as a browser, a screen reader and a stranger's names meet them; a browser looks in benchmarks/pages."""

import csv
import io
import re
from html.parser import HTMLParser
from itertools import pairwise
from urllib.parse import unquote

import pytest

from unloaf.pages.layout import Figure, Picture, Section, Table, csv_text, page
from unloaf.pages.plots import curves
from unloaf.pages.runs import runs_page
from unloaf.pages.style import COLOURS, PAGE, SCRIPT, themed
from unloaf.runs.histories import read_histories
from written_runs import HOSTILE, write_run


class Reader(HTMLParser):
    """Elements in their order, with their attributes, and the text inside each kind."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.texts, self.open = [], {}, []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        for tag in set(self.open):
            self.texts.setdefault(tag, []).append(data)

    def of(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    each = [{"1-1-1": 20.0, "3-3-3": 50.0}, {"1-1-1": 30.0, "3-3-3": 60.0}]
    runs = [
        write_run(folder / "a", method="common", subnets=each),
        write_run(folder / "b", method="st", seconds=15.0, subnets=each),
    ]
    return runs_page(read_histories(runs))


def test_headings_of_a_report_are_in_order(report):
    levels = [int(tag[1]) for tag, _ in Reader(report).elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels))


def test_every_picture_has_an_alternative_and_its_data(report):
    found = Reader(report)
    pictures = [svg for svg in found.of("svg") if svg.get("role") == "img"]
    links = [link for link in found.of("a") if "download" in link]
    assert len(pictures) == len(links) == 9
    assert all(len(svg["aria-label"]) > 40 for svg in pictures)
    assert all(svg.get("aria-hidden") == "true" for svg in found.of("svg") if svg not in pictures)


def test_regions_and_tables_are_named_and_names_are_unique(report):
    found = Reader(report)
    ids = [attributes["id"] for _, attributes in found.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    labels = [box["aria-label"] for box in found.of("div") if box.get("role") == "region"]
    assert len(labels) == len(set(labels)) == len(found.of("table"))
    assert all(box["tabindex"] == "0" for box in found.of("div") if box.get("role") == "region")
    assert all(head["scope"] in ("col", "row") for head in found.of("th"))
    assert all(section["aria-labelledby"] in ids for section in found.of("section"))
    [html] = found.of("html")
    assert html["lang"] == "en"


def test_a_page_asks_for_nothing_and_lets_its_own_script_alone_run(report):
    found = Reader(report)
    links = [value for _, attributes in found.elements for name, value in attributes.items() if name in ("src", "href")]
    assert all(link.startswith(("#", "data:text/csv")) for link in links)
    assert "".join(found.texts["script"]) == SCRIPT
    [policy] = [meta["content"] for meta in found.of("meta") if "http-equiv" in meta]
    assert policy.startswith("default-src 'none'; ")
    assert "'unsafe-inline'" not in policy.partition("script-src")[2]
    assert not re.search(r"@import|url\((?!#)", report)


def test_data_of_a_picture_are_its_numbers(report):
    [link] = [link["href"] for link in Reader(report).of("a") if link.get("download") == "validation.csv"]
    rows = list(csv.reader(io.StringIO(unquote(link.partition(",")[2]))))
    assert rows == [["epoch", "a", "b"], ["1", "50", "50"], ["2", "60", "60"]]


def test_hostile_names_are_text_everywhere(tmp_path):
    name = HOSTILE.replace("/", "|").replace("\n", "\\n")
    runs = [
        write_run(
            tmp_path / f"{name}{n}", method=method, data={"dataset": HOSTILE, "class_names": [HOSTILE]},
            environment={"hardware": HOSTILE, "command": [HOSTILE], "versions": {HOSTILE: HOSTILE}},
            subnets=[{HOSTILE: 1.0, "1-1": 3.0}] * 2,
        )
        for n, method in enumerate(("st", "gkt"))
    ]  # fmt: skip
    text = runs_page(read_histories(runs))
    found = Reader(text)
    assert len(found.of("script")) == 1
    assert not [name for _, attributes in found.elements for name in attributes if name.startswith("on")]
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", text)
    # Shown as it is: letters of any script, and an escape for what turns the direction or moves a cursor.
    shown = "".join(found.texts["th"])
    assert "<script>alert(1)<|script>\"'&\\x1b[31m\\nrm \\u202eevil $x$ עברית0" in shown


def luminance(colour):
    """WCAG 2.2's relative luminance, of '#rrggbb'."""
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one, other):
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_by_hand():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.005)


@pytest.mark.parametrize("place", [0, 1], ids=["light", "dark"])
def test_colours_can_be_seen_on_what_they_lie_on(place):
    colours = {name: values[place] for name, *values in COLOURS.values()}
    own = {name: values[place] for name, values in PAGE.items()}
    for name in ("--ink", "--soft"):
        assert min(contrast(colours[name], back) for back in (own["--page"], colours["--card"])) >= 4.5
    for name in ("--faint", "--link", "--mark"):
        assert min(contrast(own[name], back) for back in (own["--page"], colours["--card"])) >= 4.5
    lines = {name: value for name, value in colours.items() if name not in ("--grid", "--card")}
    assert {name: round(contrast(value, colours["--card"]), 2) for name, value in lines.items()
            if contrast(value, colours["--card"]) < 3} == {}  # fmt: skip
    assert len(set(colours.values())) == len(colours)


def test_a_name_that_looks_like_a_colour_stays_a_name():
    assert themed('<text style="fill: #0072b2">#0072b2</text>').endswith(">#0072b2</text>")


def test_two_pictures_share_no_name():
    svg = curves({"a": [(1.0, 2.0), (2.0, 3.0)]}, ylabel="y")
    text = page("t", "", [Section("s", [Figure([Picture("a", svg, "one", None), Picture("b", svg, "two", None)], "")])])
    ids = re.findall(r' id="(p\d-[^"]+)"', text)
    assert len(ids) == len(set(ids)) > 0
    assert set(re.findall(r'(?:url\(#|href="#)(p\d-[^")]+)', text)) == set(ids)


def test_empty_sections_and_heads_leave_nothing_behind():
    text = page("t", "", [Section("gone", []), Section("there", [Table("n", ["a", ""], [["1", "*"], ["2", ""]])])])
    assert "gone" not in text
    assert [head["scope"] for head in Reader(text).of("th")] == ["col", "row", "row"]


@pytest.mark.parametrize(
    ("cell", "written"),
    [("=1+1", "'=1+1"), ("@a", "'@a"), ("-x", "'-x"), ("-1", "-1"), ("a\nb", "a\\nb"), (None, ""), (1 / 3, "0.333333")],
)
def test_cells_of_csv_begin_no_formula(cell, written):
    assert csv_text((["head"], [[cell]])) == f"head\n{written or chr(34) * 2}\n"
