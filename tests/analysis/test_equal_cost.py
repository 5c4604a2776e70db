"""Runs at equal cost, by hand."""

import pytest

from unloaf.analysis.equal_cost import by_seed, curve_over_seconds, equal_cost_rows
from unloaf.runs.histories import read_histories
from written_runs import write_run


def test_each_run_is_taken_at_the_training_time_of_the_cheapest(tmp_path):
    # 3 epochs of 10 s are 30 s: two epochs of 15 s, one of 20 s.
    runs = [
        write_run(tmp_path / "common", tops=[1.0, 2.0, 3.0], seconds=10, method="common"),
        write_run(tmp_path / "st", tops=[10.0, 20.0, 30.0], seconds=15, method="st"),
        write_run(tmp_path / "gkt", tops=[7.0, 8.0], seconds=20, method="gkt"),
    ]
    rows, notes = equal_cost_rows(read_histories(runs))
    assert [(row.run, row.epoch, row.value, row.whole) for row in rows] == [
        ("common", 3, 3.0, 3.0),
        ("st", 2, 20.0, 30.0),
        ("gkt", 1, 7.0, 8.0),
    ]
    assert [row.relative for row in rows] == pytest.approx([1, 1.5, 4 / 3])
    assert notes == []


def test_a_run_in_progress_sets_no_budget_and_gaps_end_what_is_known(tmp_path):
    begun = write_run(tmp_path / "begun", tops=[1.0], finished=False, method="st", epochs=3)
    whole = write_run(tmp_path / "whole", tops=[1.0, 2.0, 3.0], method="common")
    gap = write_run(tmp_path / "gap", tops=[4.0, 5.0, 6.0, 7.0], method="gkt", seconds=40)
    lines = (gap / "summary.csv").read_text().splitlines()
    (gap / "summary.csv").write_text("\n".join([*lines[:2], *lines[3:]]) + "\n")
    rows, notes = equal_cost_rows(read_histories([begun, whole, gap]))
    assert [row.run for row in rows] == ["whole"]
    assert notes == [
        "gap has epochs after one that is missing: they do not count",
        "begun has no validation after 30 s of training yet",
        "gap has no validation after 30 s of training yet",
    ]


def test_times_of_several_machines_are_told(tmp_path):
    one, two = (
        write_run(tmp_path / name, method=method, environment={"hardware": name})
        for name, method in (("slow", "st"), ("fast", "common"))
    )
    _, notes = equal_cost_rows(read_histories([one, two]))
    assert notes == ["the times are of different machines and do not compare methods: slow on slow; fast on fast"]


def test_curve_over_seconds_has_the_epochs_that_were_validated(tmp_path):
    [history] = read_histories([write_run(tmp_path / "run", tops=[1.0, None, 3.0], seconds=5)])
    assert curve_over_seconds(history, "eval_top1") == [(5.0, 1.0), (15.0, 3.0)]


def test_runs_of_other_seeds_are_one_group(tmp_path):
    runs = [write_run(tmp_path / str(n), seed=n % 2, lr=0.1 * (1 + n // 2)) for n in range(3)]
    groups = by_seed(read_histories(runs))
    assert [[history.label for history in group] for group in groups] == [["0", "1"], ["2"]]
