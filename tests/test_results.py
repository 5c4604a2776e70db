"""The tables of the pages, figure by figure against the records of runs; and how the study plans and continues runs."""

import argparse
import json
import math
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from benchmarks.accuracy import job as process
from benchmarks.accuracy import run
from benchmarks.accuracy.jobs import MissingError, Results, altered, best_trial, command, plan
from benchmarks.accuracy.pages import (
    FIRST_ROWS,
    PAGES,
    PICTURE,
    PICTURED,
    about,
    accuracies,
    differences,
    inside,
    picture,
    written,
)
from benchmarks.accuracy.tables import GROUPS, TABLES, Row, Table

import mask_files
from unloaf.config import Config
from unloaf.config.names import current_names

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs" / "results"
PLACES = [
    pytest.param(name, view, body, id=f"{page} {name} {view}".strip())
    for page in PAGES
    for name, view, body in re.findall(
        r"<!-- results: ([\w-]+) ?(\w*) -->\n(.*?)<!-- end of results -->", (ROOT / page).read_text("utf-8"), re.S
    )
]
COSTS = {"cost": "cost_time", "FLOPs": "cost_flops"}
RECORDED = sorted(path.stem for path in RESULTS.glob("*.json") if path.stem in TABLES)


def parsed(body: str) -> list[dict[str, str]]:
    """The lines of a table by their heads."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in body.splitlines() if line.startswith("|")]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


def stated(values: Sequence[Any]) -> str:
    """How a page states a mean: computed by numpy, not by what wrote the page."""
    array = np.asarray(values, dtype=np.float64)
    text = f"{array.mean():.1f}"
    return text if len(array) == 1 else f"{text} ± {array.std(ddof=1) / math.sqrt(len(array)):.1f}"


def main_of(record):
    """What decides of the main network: top-1, of other tasks their own figure; None where the run diverged."""
    return record["top1"] if "top1" in record else record["metric"]


def records_of(name: str, row: str | None = None) -> list[dict]:
    records = json.loads((RESULTS / f"{name}.json").read_text("utf-8"))["records"]
    return [r for r in records if row is None or (r["row"] == row and main_of(r) is not None)]


def tops(name: str, row: str) -> np.ndarray:
    return np.array([main_of(r) for r in records_of(name, row)])


# --- what the pages say


@pytest.mark.parametrize(("name", "view", "body"), PLACES)
def test_a_table_states_its_records(name, view, body):
    if not (RESULTS / f"{name}.json").exists():
        assert body.startswith("Not run yet: ")
        words = ["python", "-m", "benchmarks.accuracy.run", name]
        words += [] if TABLES[name].common["dataset"] == "digits" else ["--data-dir", "DIR"]
        assert re.findall("`(.*)`", body) == [" ".join(words)]
        return
    rows = parsed(body)
    assert rows or view
    if view not in ("", "first"):
        return
    shown = set(FIRST_ROWS) if view else {row.label for row in TABLES[name].rows}
    assert {row[""] for row in rows} == shown & {r["row"] for r in records_of(name) if main_of(r) is not None}
    assert rows[0][""] == TABLES[name].rows[0].label or len(rows) == 1
    for row in rows:
        found = records_of(name, row[""])
        subnets = [list(r["subnets"].values()) for r in found]
        assert row["main, %"] == stated([main_of(r) for r in found])
        if all(subnets):
            assert row["mean subnet, %"] == stated([np.mean(values) for values in subnets])
            assert row["worst subnet, %"] == stated([np.min(values) for values in subnets])
        for head, key in COSTS.items():
            if head in row or not view:
                assert {row.get(head)} == {None if r[key] is None else f"{r[key]:.2f}" for r in found}
        if not view:
            assert row["seeds"] == str(len({r["seed"] for r in found}))
            assert {row["epochs"]} == {str(r["settings"].get("epochs", Config().epochs)) for r in found}


@pytest.mark.parametrize(("name", "view", "body"), [place for place in PLACES if place.values[1] == "differences"])
def test_differences_are_those_of_the_means(name, view, body):
    for row in parsed(body) if (RESULTS / f"{name}.json").exists() else []:
        found = records_of(name, row[""])
        pairs = []
        if not TABLES[name].row(row[""]).costs_as:
            pairs.append((row["over common training, same epochs"], TABLES[name].rows[0].label))
        if row["which"]:
            pairs.append((row["over common training, at least its cost"], row["which"]))
            cost = max(found[0]["cost_time"], found[0]["cost_flops"])
            assert records_of(name, row["which"])[0]["cost_time"] >= cost - 0.01
        if row.get("over ST"):
            pairs.append((row["over ST"], "ST"))
        for cell, base in pairs:
            mine, theirs = tops(name, row[""]), tops(name, base)
            text = f"{mine.mean() - theirs.mean():+.1f}"
            if min(len(mine), len(theirs)) > 1:
                text += f" ± {math.hypot(*(v.std(ddof=1) / math.sqrt(len(v)) for v in (mine, theirs))):.1f}"
            assert cell == text


@pytest.mark.parametrize(("name", "view", "body"), [place for place in PLACES if place.values[1] == "inside"])
def test_subnets_inside_and_alone_are_those_of_the_records(name, view, body):
    for row in parsed(body) if (RESULTS / f"{name}.json").exists() else []:
        depths = row.pop("subnet")
        alone = row.pop("alone")
        main = {"main network": "top1", "main network, statistics re-estimated": "top1_reestimated"}.get(depths)
        recorded = [] if main else [r["top1"] for r in records_of(name, f"alone {depths}")]
        assert alone == (stated(recorded) if recorded else "")
        for head, cell in row.items():
            found = records_of(name, head.removeprefix("inside "))
            assert cell == stated([r[main] if main else r["subnets"][depths] for r in found])


def test_the_demo_of_the_readme_is_its_record():
    table = parsed((ROOT / "README.md").read_text("utf-8").partition("\n## Demo\n")[2].partition("\n## ")[0])
    rows = json.loads((RESULTS / "demo-digits-3-seeds.json").read_text("utf-8"))["rows"]
    assert [line["method"] for line in table] == list(dict.fromkeys(row["method"] for row in rows))
    for line in table:
        mine = [row for row in rows if row["method"] == line["method"]]
        # A line of the record for each seed and subnet, the main network, 4-4-4, first.
        tops = np.array([row["test_top1"] for row in mine]).reshape(3, 64)
        for head, values in (("main", tops[:, 0]), ("mean subnet", tops[:, 1:].mean(1)), ("worst subnet", tops.min(1))):
            assert line[f"{head}, %"] == f"{values.mean():.1f} ± {values.std(ddof=1):.1f}"
        costs = {"cost": "cost", "FLOPs limit": "flops_limit"}
        assert all(line[head] == f"{np.mean([row[key] for row in mine]):.2f}" for head, key in costs.items())


@pytest.mark.parametrize("page", ["README.md", "docs/results.md", "docs/reproduction.md"])
def test_a_figure_with_its_error_in_the_text_stands_in_a_table(page):
    """Every "1.7 ± 0.2" of a sentence. A minus counts, so -0.2 is not 0.2; a plus may be left out."""
    figure = r"(?<![\d.])[+−-]?\d+(?:\.\d+)? ?± ?\d+(?:\.\d+)?"
    lines = [line for name in PAGES for line in (ROOT / name).read_text("utf-8").splitlines() if line.startswith("|")]
    in_tables = {found.lstrip("+") for found in re.findall(figure, " ".join(lines))}
    lines = (ROOT / page).read_text("utf-8").splitlines()
    text = " ".join(" ".join(line for line in lines if not line.startswith("|")).split())
    assert re.search(figure, text)
    assert [found for found in re.findall(figure, text) if found.lstrip("+") not in in_tables] == []


@pytest.mark.parametrize(("page", "links"), PAGES.items())
def test_pages_are_up_to_date(page, links):
    text = (ROOT / page).read_text("utf-8")
    assert written(text, Results(RESULTS), links=links) == text


def test_first_screen_of_the_readme_has_a_table_and_an_example():
    lines = (ROOT / "README.md").read_text("utf-8").splitlines()
    assert lines.index("```") <= 24
    assert len(parsed("\n".join(lines[:25]))) == len(FIRST_ROWS) == 4


def described(svg: str) -> dict[str, list[dict]]:
    """The points that a picture holds, by panel."""
    [text] = [element.text for element in ElementTree.fromstring(svg).iter() if element.tag.endswith("description")]
    return json.loads(text or "")


def test_the_picture_shows_the_records():
    panels = described((RESULTS / PICTURE).read_text("utf-8"))
    assert panels == described(picture(Results(RESULTS)))
    assert list(panels) == list(PICTURED.values())
    for name, points in zip(PICTURED, panels.values(), strict=True):
        rows = [row.label for row in TABLES[name].rows if row.tier == 1 and records_of(name, row.label)]
        expected = []
        for row in rows:
            found = records_of(name, row)
            spread = tops(name, row).std(ddof=1) / math.sqrt(len(found))
            mean_subnet = np.mean([list(r["subnets"].values()) for r in found])
            cost = max(found[0]["cost_time"], found[0]["cost_flops"])
            expected.append([cost, tops(name, row).mean(), spread, mean_subnet])
        assert [point["label"] for point in points].count("common training") == 1 + sum("cost of" in r for r in rows)
        drawn = [[point[key] for key in ("cost", "main", "error", "subnets")] for point in points]
        np.testing.assert_allclose(drawn, expected)


@pytest.mark.parametrize("name", RECORDED)
def test_a_record_says_how_it_came_about(name):
    table, seen = TABLES[name], set()
    for record in records_of(name):
        seen.add((record["row"], record["seed"]))
        assert record["row"] in {row.label for row in table.rows}
        assert record["split"] == table.split
        assert set(record["versions"]) == {"unloaf", "torch", "timm"}
        assert all(record[key] for key in ("command", "hardware", "commit", "date"))
        assert record["command"].startswith("unloaf train ")
        settings = {k: tuple(v) if isinstance(v, list) else v for k, v in current_names(record["settings"]).items()}
        Config(**settings | ({} if settings.get("dataset") is None else {"data_dir": "DIR"}))
    assert len(seen) == len(records_of(name))


# --- how runs are planned


TRIALS = Table(
    name="trials",
    title="",
    about="",
    common={"dataset": "digits"},
    rows=tuple(Row(label=f"lr {lr}", tuned="st", settings={"lr": lr}) for lr in (0.1, 0.2, 0.3)),
    seeds=(0,),
    split="val",
)
TINY = Table(
    name="tiny",
    title="",
    about="",
    common={
        "dataset": "digits", "model": "cifar/resnet14", "width": 4, "device": "cpu", "batch_size": 128, "epochs": 4,
        "eval_interval": 1000,
    },
    rows=(
        Row(label="common training", settings={"method": "common"}),
        Row(label="ST", settings={"method": "st"}),
        Row(label="later", settings={"method": "gkt"}, tier=2),
        Row(label="common training, cost of ST", settings={"method": "common"}, costs_as=("ST",)),
    ),
    seeds=(0, 1),
    subnets=("2-2-2", "1-1-1"),
)  # fmt: skip


def record(row: str, top1: float | None, seed: int = 0, **more) -> dict:
    return {"row": row, "seed": seed, "top1": top1} | more


@pytest.fixture
def results(tmp_path) -> Results:
    found = Results(tmp_path / "results")
    costs = {"common training": (1, 1), "ST": (1.3, 1.6), "later": (2.0, 1.9)}
    rows = {label: {"time": time, "flops": flops} for label, (time, flops) in costs.items()}
    found.folder.mkdir()
    (found.folder / "tiny-cost.json").write_text(json.dumps({"rows": rows}), encoding="utf-8")
    return found


def test_runs_are_planned_by_tier_then_seed_then_row(results):
    jobs = plan(TINY, results)
    first = [(label, seed) for seed in (0, 1) for label in ("common training", "ST", "common training, cost of ST")]
    assert [job.key for job in jobs] == [*first, ("later", 0), ("later", 1)]
    assert len({job.name for job in jobs}) == len(jobs)


def test_equal_cost_is_the_higher_of_time_and_arithmetic_in_whole_epochs(results):
    jobs = {job.row.label: job for job in plan(TINY, results)}
    # 1.6 x 4 = 6.4
    assert jobs["common training, cost of ST"].settings["epochs"] == 7
    assert jobs["common training, cost of ST"].cost == {"time": 1.75, "flops": 1.75}
    assert jobs["ST"].cost == {"time": 1.3, "flops": 1.6}


def test_a_table_is_not_planned_without_its_costs(tmp_path):
    with pytest.raises(MissingError, match="tiny lacks the cost of ST; later"):
        plan(TINY, Results(tmp_path))


def test_a_record_of_other_settings_than_its_table_is_found(results):
    common = {"model": "cifar/resnet14", "width": 4, "device": "cpu", "epochs": 4, "eval_interval": 1000}
    for label, seed, split, changed in (
        ("common training", 0, "test", {"method": "common"}),
        ("common training", 1, "test", {"method": "common", "width": 8, "lr": 0.3}),
        ("ST", 0, "val", {}),
        ("ST", 7, "test", {}),
    ):
        seeded = {"seed": seed} if seed else {}
        results.add(TINY, record(label, 50.0, seed, split=split, settings=common | seeded | changed))
    assert altered(TINY, results) == [
        "tiny, common training, seed 1: lr is 0.3 in the record, the default in the table",
        "tiny, common training, seed 1: width is 8 in the record, 4 in the table",
        "tiny, ST, seed 0: split is val in the record, test in the table",
        "tiny, ST, seed 7: the table has no such row or seed",
    ]


@pytest.mark.parametrize("name", RECORDED)
def test_records_are_of_the_settings_of_their_tables(name):
    assert altered(TABLES[name], Results(RESULTS)) == []


@pytest.mark.parametrize(
    ("labels", "needed"),
    [(["common training"], None), (["common training, cost of ST"], "ST"), (["later", "common training"], "later")],
)
def test_rows_that_are_asked_for_need_their_costs_only(tmp_path, labels, needed):
    results = Results(tmp_path)
    if needed is not None:
        with pytest.raises(MissingError, match=f"lacks the cost of {needed}$"):
            plan(TINY, results, labels=labels)
        results.add_cost(TINY, {needed: {"time": 1.5, "flops": 1.5}})
    jobs = plan(TINY, results, labels=labels)
    assert {job.row.label for job in jobs} == set(labels)
    baseline = [job.cost for job in jobs if job.row.label == "common training"]
    assert baseline == [{"time": 1.0, "flops": 1.0}] * (2 if "common training" in labels else 0)


def test_a_tier_needs_the_costs_of_its_own_rows_only(results):
    rows = json.loads((results.folder / "tiny-cost.json").read_text(encoding="utf-8"))["rows"]
    rows.pop("later")
    (results.folder / "tiny-cost.json").write_text(json.dumps({"rows": rows}), encoding="utf-8")
    assert "later" not in {job.row.label for job in plan(TINY, results, 1)}
    with pytest.raises(MissingError, match="lacks the cost of later"):
        plan(TINY, results)


def test_the_best_trial_is_that_with_the_highest_accuracy():
    tops = {"lr 0.1": 60.0, "lr 0.2": 61.0, "lr 0.3": None}
    assert best_trial(TRIALS, [record(*entry) for entry in tops.items()], "st") == {"lr": 0.2}
    with pytest.raises(MissingError, match=r"trials lacks lr 0\.3"):
        best_trial(TRIALS, [record("lr 0.1", 60.0), record("lr 0.2", 61.0)], "st")


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_settings_of_a_table_are_settings(table):
    labels = [row.label for row in table.rows]
    assert len(set(labels)) == len(labels)
    assert table.row(labels[0]).costs_as == ()
    for row in table.rows:
        Config(**{**table.common, **row.settings}, data_dir="DIR" if table.common["dataset"] != "digits" else None)
        assert set(row.costs_as) <= set(labels)
        if table.trials is not None:
            trials = TABLES[table.trials]
            assert trials.split == "val"
            assert row.tuned is None or row.tuned in {trial.tuned for trial in trials.rows}


@pytest.mark.parametrize("table", [table for table in TABLES.values() if table.name.endswith("-trials")])
def test_every_method_has_the_same_number_of_trials(table):
    methods = [row.tuned for row in table.rows]
    few_images = table.common.get("train_images") == 2_500
    assert {methods.count(method) for method in methods} == {4 if few_images else 3}
    assert {row.settings["method"] for row in table.rows} == set(methods)


def test_groups_name_tables():
    assert {name for names in GROUPS.values() for name in names} <= set(TABLES)


def test_the_command_of_a_record_is_the_run():
    config = Config(method="st", lr=0.2, amp=True, norm_decay=False, sides=(8, 6), dataset="cifar100", data_dir="x")
    assert (
        command(config) == "unloaf train --dataset cifar100 --sides 8 6 --lr 0.2 --no-norm-decay --amp --data-dir DIR"
    )


# --- how tables are written, from records made up here


def test_a_method_is_compared_with_the_cheapest_baseline_that_costs_as_much():
    rows = (
        *TINY.rows,
        Row(label="common training, costly", settings={"method": "common"}, costs_as=("later",)),
        Row(label="costliest", settings={}),
        Row(label="cheap", settings={}),
        Row(label="other, costly", settings={"mixup": 1.0}, costs_as=("later",)),
    )
    costs = (1.0, 1.4, 2.0, 1.5, 2.0, 2.5, 0.9, 2.0)
    records = [
        record(row.label, 50.0 + 2 * number + seed, seed, cost_time=cost, cost_flops=0.8)
        for number, (row, cost) in enumerate(zip(rows, costs, strict=True))
        for seed in (0, 2)
    ]
    lines = [line.split(" | ") for line in differences(replace(TINY, rows=rows), records)[2:]]
    # Two seeds two points apart: each mean has a standard error of 1, their difference of the root of 2.
    assert lines == [
        ["| ST", "+2.0 ± 1.4", "-4.0 ± 1.4", "common training, cost of ST", " |"],
        ["| later", "+4.0 ± 1.4", "-4.0 ± 1.4", "common training, costly", "+2.0 ± 1.4 |"],
        ["| costliest", "+10.0 ± 1.4", "", "", "+8.0 ± 1.4 |"],
        ["| cheap", "+12.0 ± 1.4", "+12.0 ± 1.4", "common training", "+10.0 ± 1.4 |"],
        ["| other, costly", "", "+6.0 ± 1.4", "common training, costly", " |"],
    ]


def test_a_table_without_costs_has_no_columns_for_them():
    records = [record("ST", top1, seed, epochs=4, subnets={"1": 50.0, "2": 60.0}) for seed, top1 in enumerate((70, 72))]
    records.append(record("common training", None, epochs=4, subnets={}))
    assert accuracies(TINY, [r | {"cost_time": None, "cost_flops": None} for r in records]) == [
        "|  | epochs | main, % | mean subnet, % | worst subnet, % | seeds |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        # 70 and 72 have a standard deviation of the root of 2, and their mean a standard error of 1.
        "| ST | 4 | 71.0 ± 1.0 | 55.0 ± 0.0 | 50.0 ± 0.0 | 2 |",
        "\nDiverged: common training.",
    ]


def test_subnets_stand_beside_the_same_networks_alone():
    rows = (Row(label="ST", settings={}), Row(label="alone 1-1", settings={}))
    records = [record("ST", 70.0, subnets={"1-1": 65.0}), record("alone 1-1", 66.0, subnets={})]
    lines = inside(replace(TINY, rows=rows), records)
    assert lines[2:] == ["| 1-1 | 66.0 | 65.0 |", "| main network |  | 70.0 |"]
    assert inside(replace(TINY, rows=rows), records[:1])[2] == "| 1-1 |  | 65.0 |"
    both = inside(replace(TINY, rows=rows), [records[0] | {"top1_reestimated": 71.0}, records[1]])
    assert both[2:] == [*lines[2:], "| main network, statistics re-estimated |  | 71.0 |"]


def test_a_network_trained_alone_has_no_cost():
    rows = (Row(label="ST", settings={}), Row(label="alone 1-1", settings={}))
    costs = {"cost_time": 1.5, "cost_flops": 1.25}, dict.fromkeys(("cost_time", "cost_flops"))
    records = [record(row.label, 70.0, epochs=4, subnets={}) | cost for row, cost in zip(rows, costs, strict=True)]
    assert accuracies(replace(TINY, rows=rows), records)[2:] == [
        "| ST | 4 | 70.0 |  |  | 1.50 | 1.25 | 1 |",
        "| alone 1-1 | 4 | 70.0 |  |  |  |  | 1 |",
    ]


def test_a_record_replaces_the_one_of_the_same_run(tmp_path):
    results = Results(tmp_path)
    for row, top1, seed in (("ST", 1.0, 0), ("common training", 2.0, 1), ("ST", 3.0, 0), ("common training", 4.0, 0)):
        results.add(TINY, record(row, top1, seed))
    assert [r["top1"] for r in results.records("tiny")] == [4.0, 2.0, 3.0]


# --- processes


def order(folder: Path, *, epochs: int = 1) -> dict:
    config = {**TINY.common, "method": "common", "epochs": epochs, "output": str(folder), "name": "run"}
    return {"kind": "train", "config": config, "split": "test", "subnets": ["2-2-2", "1-1-1"]}


def test_a_finished_run_leaves_its_record(tmp_path):
    found = process.train_and_judge(order(tmp_path))
    assert (found["epochs"], found["split"], list(found["subnets"])) == (1, "test", ["1-1-1"])
    assert found["settings"]["width"] == 4
    assert 5 < found["top1"] <= 100
    [event] = [
        e for e in map(json.loads, (tmp_path / "run/metrics.jsonl").read_text().splitlines()) if "test_top1" in e
    ]
    assert found["top1"] == pytest.approx(event["test_top1"], abs=1e-3)


@pytest.fixture(scope="module")
def of_masks(tmp_path_factory):
    """A segmenter that is trained for an epoch, and its record."""
    folder = tmp_path_factory.mktemp("masks")
    common = {**TABLES["camvid-cpu"].common, "backbone": "timm/resnet18", "img_size": 32, "epochs": 1, "batch_size": 4}
    common |= {"num_classes": None, "data_dir": str(mask_files.masked(folder / "set")), "recalibrate": 4}
    config = common | {"method": "common", "output": str(folder), "name": "run"}
    asked = {"kind": "train", "config": config, "split": "val", "subnets": ["2-2-2-2", "1-1-1-1"]}
    return common, process.train_and_judge(asked), folder / "run"


def test_a_run_of_another_task_leaves_the_figure_that_decides_there(of_masks):
    _, found, path = of_masks
    assert list(found["subnets"]) == ["1-1-1-1"]
    assert "top1" not in found
    [event] = [e for e in map(json.loads, (path / "metrics.jsonl").read_text().splitlines()) if "eval_miou" in e]
    assert found["metric"] == pytest.approx(event["eval_miou"], abs=1e-3)


def test_pages_know_the_figure_of_another_task(of_masks):
    record = of_masks[1] | {"row": "common training", "seed": 0, "cost_time": None, "cost_flops": None}
    table = replace(TABLES["camvid-cpu"], split="val")
    [line] = parsed("\n".join(accuracies(table, [record])))
    assert line["main, %"] == f"{record['metric']:.1f}"
    assert ". mIoU on the validation images, mean" in about(table, [record])
    assert ". Top-1 on the validation images, mean" in about(replace(TINY, split="val"), [record])


def test_the_step_of_another_task_is_counted_as_it_runs(of_masks, monkeypatch):
    monkeypatch.setattr(process, "_FEWEST", 2)
    monkeypatch.setattr(process, "_COUNTED", 2)
    common = of_masks[0]
    asked = {"baseline": common | {"method": "common"}, "rounds": 4, "seconds": 0, "draws": 20}
    found = process.measure(asked | {"row": common | {"method": "st-star", "subnet_inputs": "same"}})
    # A subnet of ST* runs its head once more, and the blocks behind the first one that it skips.
    assert 1.3 < found["flops"] < 2


def test_a_network_trained_alone_is_judged_without_the_subnets_that_it_does_not_have(tmp_path):
    """ResNet-8 has one block that can be skipped, in its first stage."""
    asked = order(tmp_path)
    asked["config"] |= {"model": "cifar/resnet8"}
    assert process.train_and_judge(asked)["subnets"] == {}


def test_a_run_that_diverges_leaves_a_record_without_an_accuracy(tmp_path):
    asked = order(tmp_path)
    asked["config"] |= {"lr": 1e30}
    found = process.train_and_judge(asked)
    assert (found["top1"], found["subnets"]) == (None, {})
    assert "not finite" in found["failed"]


def test_costs_are_relative_to_the_baseline():
    base, row = ({**TINY.common, **row.settings} for row in TINY.rows[:2])
    asked = {"baseline": base, "rounds": 30, "seconds": 0, "draws": 20}
    found = process.measure(asked | {"row": row})
    # Ordered subnets of 2-2-2 at equal chances; a subnet shares what comes before the first block it skips.
    assert 1.2 < found["flops"] < 1.7
    assert found["time"] > 1
    assert found["rounds"] == 20
    assert process.measure(asked | {"row": base | {"epochs": 9}})["flops"] == 1


@pytest.mark.slow
def test_a_table_trained_in_slices_is_the_table_trained_at_once(tmp_path, results, monkeypatch):
    table = replace(TINY, rows=TINY.rows[:2], seeds=(0,))
    monkeypatch.setitem(TABLES, "tiny", replace(table, common={**table.common, "epochs": 20}))
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    words = ["tiny", "--output", str(tmp_path / "sliced"), "--results", str(results.folder)]
    seconds, ends = iter([14] * 30), []
    while not ends or ends[-1] == run.UNFINISHED:
        minutes = (next(seconds) + run._TO_SAVE) / 60
        ends.append(run.main([*words, "--minutes", str(minutes)]))
    assert len(ends) > 1
    assert ends[-1] == 0
    sliced = results.records("tiny")
    (results.folder / "tiny.json").unlink()
    assert run.main([*words[:2], str(tmp_path / "whole"), *words[3:], "--jobs", "2"]) == 0
    private = ("train_seconds", "date", "commit")
    whole = results.records("tiny")
    assert [{k: v for k, v in r.items() if k not in private} for r in sliced] == [
        {k: v for k, v in r.items() if k not in private} for r in whole
    ]


def test_the_command_ends_its_processes_when_it_is_told_to(tmp_path):
    words = [sys.executable, "-m", "benchmarks.accuracy.run", "digits"]
    words += ["--output", str(tmp_path / "out"), "--results", str(tmp_path / "results")]
    study = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert study.stdout is not None
    assert "cost of stochastic depth" in study.stdout.readline()
    time.sleep(0.5)
    study.send_signal(signal.SIGTERM)
    out, _ = study.communicate(timeout=180)
    assert (study.returncode, "give the same command again" in out) == (run.UNFINISHED, True)


def test_a_cost_that_cannot_be_measured_is_a_failure(tmp_path, results, monkeypatch, capsys):
    rows = json.loads((results.folder / "tiny-cost.json").read_text(encoding="utf-8"))["rows"]
    rows.pop("ST")
    (results.folder / "tiny-cost.json").write_text(json.dumps({"rows": rows}), encoding="utf-8")
    monkeypatch.setitem(TABLES, "tiny", TINY)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(run.Study, "_start", lambda *_: subprocess.Popen([sys.executable, "-c", "raise SystemExit(9)"]))
    assert run.main(["tiny", "--output", str(tmp_path / "out"), "--results", str(results.folder)]) == 1
    out = capsys.readouterr().out
    log = tmp_path / "out" / "jobs" / "tiny" / "cost" / "log.txt"
    assert f"failed: cost of ST: code 9, see {log}\n" in out
    assert "give the same command again" not in out


def test_a_run_that_the_system_killed_has_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    study = run.Study(argparse.Namespace(results=tmp_path, output=tmp_path, minutes=None))
    job = plan(TABLES["cifar100-cpu-trials"], Results(tmp_path))[0]
    for code, failures in ((-15, 0), (-9, 1)):
        with subprocess.Popen([sys.executable, "-c", f"import os; os.kill(os.getpid(), {-code})"]) as process:
            process.wait()
        assert study._ended(job, tmp_path, process)
        assert len(study.failed) == failures


def test_a_process_that_does_not_end_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "_TO_SAVE", 6)
    options = argparse.Namespace(results=tmp_path, output=tmp_path, minutes=0)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    deaf = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", deaf], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        run.Study(options)._wait([(tmp_path, process)])
    assert process.returncode == -signal.SIGKILL


def test_a_backbone_is_the_run_of_the_same_seed(tmp_path):
    jobs = {job.key: job for job in plan(TABLES["camvid-transfer-cpu"], Results(tmp_path))}
    config = jobs["ST* on a backbone of common training", 2].config("DIR", tmp_path / "runs")
    assert config.backbone_weights == str(tmp_path / "runs" / "backbones-cpu" / "common-training-2")
    words = command(config).split()
    assert words[words.index("--backbone-weights") + 1] == "backbones-cpu/common-training-2"
    assert str(tmp_path) not in command(config)


def test_what_begins_from_a_backbone_waits_for_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    words = ["camvid-transfer-cpu", "--data-dir", "none", "--output", str(tmp_path), "--results", str(tmp_path)]
    assert run.main([*words, "--seeds", "1"]) == run.UNFINISHED
    assert "common-training-1 is not there: train backbones-cpu first" in capsys.readouterr().out
