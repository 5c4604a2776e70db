"""The demo, end to end and small, and the rows and pictures it is made of."""

import csv
import io
import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest
from rich.console import Console

import unloaf
from unloaf import demo
from unloaf.analysis.comparison import MethodRun, Spread, method_rows, size_rows
from unloaf.data import load_data
from unloaf.engine.loop import fit, one_thread
from unloaf.evaluation import Accuracy
from unloaf.pages.layout import Picture
from unloaf.pages.page import comparison_report
from unloaf.pages.plots import CostPoint, accuracy_over_cost, accuracy_over_size
from unloaf.recipes import digits


def row(depths, top1):
    keep = tuple(tuple(index < depth for index in range(2)) for depth in depths)
    return unloaf.SubnetRow(unloaf.Subnet(keep), top1, 100.0, 0.1, 1000)


RUNS = [
    MethodRun("common training", 0, (row((2, 2), 99.0), row((2, 1), 60.0), row((1, 2), 50.0), row((1, 1), 10.0)), 1, 1),
    MethodRun("common training", 1, (row((2, 2), 97.0), row((2, 1), 62.0), row((1, 2), 58.0), row((1, 1), 30.0)), 1, 1),
    MethodRun("ST", 0, (row((2, 2), 98.0), row((2, 1), 97.0), row((1, 2), 96.0), row((1, 1), 95.0)), 1.5, 1.4),
]


def test_method_rows_by_hand():
    common, st = method_rows(RUNS)
    assert common.main_top1 == Spread(98.0, pytest.approx(2**0.5), 2)
    assert common.mean_top1.mean == pytest.approx((40 + 50) / 2)
    assert common.worst_top1.mean == pytest.approx(20)
    assert (st.main_top1, st.worst_top1, st.cost) == (
        Spread(98.0, None, 1),
        Spread(95.0, None, 1),
        Spread(1.5, None, 1),
    )


def test_size_rows_by_hand():
    rows = size_rows(RUNS)["common training"]
    assert [(r.blocks, r.mean_top1, r.lowest_top1, r.highest_top1) for r in rows] == [
        (2, 20.0, 10.0, 30.0),
        (3, 57.5, 50.0, 62.0),
        (4, 98.0, 97.0, 99.0),
    ]


def test_picture_names_axes_and_methods_and_is_the_same_each_time():
    svg = accuracy_over_size(size_rows(RUNS), RUNS)
    assert svg == accuracy_over_size(size_rows(RUNS), RUNS)
    texts = {
        "".join(element.itertext()).strip() for element in ElementTree.fromstring(svg).iter() if "text" in element.tag
    }
    assert {"residual blocks kept, of 4", "top-1 accuracy, % of test images", "common training", "ST"} <= texts


def marks_under_legend(svg):
    """How many points of the data lie in the box of the legend."""
    root = ElementTree.fromstring(svg)
    legend = next(element for element in root.iter() if element.get("id") == "legend_1")
    frame = next(element.get("d") for element in legend.iter() if element.get("d"))
    numbers = [float(number) for number in re.findall(r"[\d.]+", frame)]
    (left, right), (top, bottom) = ((min(axis), max(axis)) for axis in (numbers[::2], numbers[1::2]))
    inside = set(legend.iter())
    points = [(float(e.get("x")), float(e.get("y"))) for e in root.iter() if e.get("y") and e not in inside]
    assert len(points) > 12
    return sum(left <= x <= right and top <= y <= bottom for x, y in points)


FLAT = {"common training": 22.0, "stochastic depth": 25.0, "ST": 35.0, "ST++": 18.0, "GKT": 30.0}
LOW = [
    MethodRun(label, 0, (row((2, 2), 12.0), row((2, 1), top1), row((1, 2), top1), row((1, 1), top1)), 1, 1)
    for label, top1 in FLAT.items()
]


@pytest.mark.parametrize("runs", [RUNS, LOW], ids=["trained", "hardly trained"])
def test_legend_lies_where_no_point_is(runs):
    assert marks_under_legend(accuracy_over_size(size_rows(runs), runs)) == 0


def both_ways(main, as_it_stands, label="ST", seed=0):
    full = replace(row((2, 2), main), running=Accuracy(loss=1.0, top1=as_it_stands, top5=100.0))
    return MethodRun(label, seed, (full, row((2, 1), main - 1), row((1, 1), main - 3)), 1, 1)


def test_main_network_stands_in_the_table_both_ways_and_is_compared_as_its_subnets_are():
    runs = [both_ways(36.0, 20.0, seed=0), both_ways(38.0, 24.0, seed=1)]
    [line] = method_rows(runs)
    assert (line.main_top1.mean, line.main_reestimated.mean, line.mean_top1.mean) == (22.0, 37.0, 35.0)
    assert size_rows(runs)["ST"][-1].mean_top1 == 37.0
    console = Console(file=io.StringIO(), width=80)
    console.print(demo.table([line] * 2))
    assert re.search(r"ST +22\.0 ± 2\.8 +37\.0 ± 1\.4 +35\.0 ± 1\.4 +34\.0 ± 1\.4 ", console.file.getvalue())


# Standard errors by hand: of the difference of two shares on 600 images, and of two means of three seeds.
@pytest.mark.parametrize(
    ("common", "other", "said"),
    [
        (
            [98.0],
            [98.5],
            "no significant difference by one seed and 600 test images (two standard errors are 1.5 ",
        ),
        ([90.0], [98.0], "a significant difference by one seed and 600 test images (two standard errors"),
        ([97, 98, 99], [98, 99, 100], "no significant difference by 3 seeds (two standard errors are 1.6 points)."),
        (
            [97, 98, 99],
            [94, 95, 96],
            "a significant difference by 3 seeds (two standard errors are 1.6 ",
        ),
    ],
)
def test_headline_says_what_so_many_seeds_can_say_of_the_main_networks(common, other, said):
    rows = method_rows(
        [both_ways(90.0, top, label, seed) for label, tops in {"common training": common, "ST": other}.items()
         for seed, top in enumerate(tops)]
    )  # fmt: skip
    assert said in demo._lead(rows, images=600)


def test_pages_and_their_pictures_know_the_dark():
    """Every colour that a page or a picture in it names is defined for light and for dark."""
    rows = method_rows(RUNS)
    page = comparison_report(
        title="", lead="", rows=rows, pictures=[Picture("a", accuracy_over_size(size_rows(RUNS), RUNS), "", None)],
        caption="", explanation=(), words={}, settings={"ST": {}}, facts={},
    )  # fmt: skip
    style, _, body = page.partition("</style>")
    light, dark = style.split("prefers-color-scheme: dark", 1)
    dark = dark[: dark.index("body {")]
    used = set(re.findall(r"var\((--[a-z]+)", page))
    assert {"--ink", "--grid", "--card", "--page"} <= used
    assert used <= set(re.findall(r"(--[a-z]+):", light))
    assert used <= set(re.findall(r"(--[a-z]+):", dark))
    assert not re.search(r"(?<!, )#(222222|444444|e4e4e4)", body)
    assert set(re.findall(r"#[0-9a-f]{6}", style[style.index("body {") :])) == set()


def test_no_marker_hides_another_in_accuracy_over_cost():
    """Subnets of one method where the main network of another lies: the hollow marker is drawn later, with a rim."""
    points = [CostPoint("ST", 1.4, 21.0, 0.1, 20.5), CostPoint("common training", 1.4, 20.5, 0.1, 12.0)]
    svg = accuracy_over_cost({"a": points}, axis="%")
    marks = svg[: svg.index('id="legend_1"')]
    filled = [found.start() for found in re.finditer(r"fill: #\w+; stroke: #ffffff", marks)]
    rims = [found.start() for found in re.finditer(r"fill-opacity: 0; stroke: #ffffff; stroke-width: 3.4", marks)]
    hollow = [found.start() for found in re.finditer(r"fill-opacity: 0; stroke: #(0072b2|222222);", marks)]
    assert (len(filled), len(rims), len(hollow)) == (2, 2, 2)
    assert max(filled) < rims[0] < hollow[0] < rims[1] < hollow[1]


@pytest.mark.parametrize("recipe", demo._RECIPES[1:])
def test_recipes_share_images_network_and_budget(recipe):
    shared = ("dataset", "model", "width", "epochs", "batch_size", "opt", "warmup_epochs", "augment", "val_fraction")
    assert [getattr(recipe(), name) for name in shared] == [getattr(digits.common(), name) for name in shared]


@pytest.fixture
def small(monkeypatch):
    configs = [
        replace(recipe(), model="cifar/resnet14", width=4, batch_size=256, device="cpu") for recipe in demo._RECIPES
    ]
    monkeypatch.setattr(demo, "_RECIPES", [lambda config=config: config for config in configs])
    return dict(zip(["common training", "stochastic depth", "ST", "ST++", "GKT"], configs, strict=True))


def test_demo_writes_report_and_results(tmp_path, small):
    result = demo.run_demo(output=tmp_path / "new", seeds=2, epochs=1, console=Console(file=io.StringIO()))
    assert [line.label for line in result.rows] == list(small)
    assert all(line.main_top1.n == 2 for line in result.rows)
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"report.html", "results.json", "results.csv"}
    lines = list(csv.DictReader((tmp_path / "new" / "results.csv").read_text().splitlines()))
    # Two blocks in each of three stages are 8 ordered subnets.
    assert len(lines) == 5 * 2 * 8
    assert {line["subnet"] for line in lines if line["method"] == "GKT"} == {
        f"{a}-{b}-{c}" for a in (1, 2) for b in (1, 2) for c in (1, 2)
    }
    results = json.loads((tmp_path / "new" / "results.json").read_text())
    assert results["configs"]["ST++"]["method"] == "st++"
    page = result.report.read_text()
    for line in result.rows:
        assert f'<th scope="row">{line.label}</th><td>{line.main_top1}</td>' in page


def test_report_loads_nothing_from_elsewhere(tmp_path, small):
    page = demo.run_demo(output=tmp_path, epochs=1, console=Console(file=io.StringIO())).report.read_text()
    links = re.findall(r"""(?:src|href)\s*=\s*["']((?!data:text/csv)[^"'#][^"']*)|url\(([^)#]+)\)|@import""", page)
    assert not links
    assert page.count("<script") == 1  # of its own, which alone its policy lets run


def test_demo_runs_are_those_of_train(small):
    configs = {label: replace(config, epochs=2, warmup_epochs=1) for label, config in small.items()}
    data = load_data(configs["ST++"])
    console = Console(file=io.StringIO())
    runs = {run.label: run for run in demo.compare(configs, data=data, split="val", console=console)}
    for label in ("common training", "ST++"):
        alone = fit(configs[label], data=data)
        assert demo.judge(alone, split="val") == runs[label].subnets


def test_unwritable_output_is_told_before_training(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot write to .*; give another --output"):
        demo.run_demo(output=tmp_path / "file", console=Console(file=io.StringIO()))


def test_demo_that_fails_leaves_the_report_of_the_one_before(tmp_path, small, monkeypatch):
    (tmp_path / "report.html").write_text("an evening's work")

    def fail(configs, **options):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(demo, "compare", fail)
    with pytest.raises(RuntimeError):
        demo.run_demo(output=tmp_path, console=Console(file=io.StringIO()))
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text() == "an evening's work"


def test_table_is_plain_text_of_the_rows_within_80_columns():
    console = Console(file=io.StringIO(), width=80)
    console.print(demo.table(method_rows(RUNS)))
    text = console.file.getvalue()
    assert re.search(r"common training\s+98\.0 ± 1\.4\s+45\.0 ± 7\.1\s+20\.0 ± 14\.1\s+1\.00x\s+1\.00x", text)
    assert re.search(r"ST\s+98\.0\s+96\.0\s+95\.0\s+1\.50x\s+1\.40x", text)


@pytest.fixture(autouse=True)
def single_thread():
    """Passes this small are not faster with two."""
    with one_thread():
        yield
