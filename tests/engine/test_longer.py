"""A finished run that is made longer: said openly, kept on record, and nothing else may change with it."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import tiny
from unloaf.config import load_config
from unloaf.engine.run_folder import open_run
from unloaf.runs.judge import judge_run


def config(folder, **settings):
    return tiny.config(output=str(folder), name="run", method="common", **({"epochs": 2} | settings))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two epochs; nobody writes to it."""
    return tiny.run(config(tmp_path_factory.mktemp("runs"))).path


@pytest.fixture
def run(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "run", symlinks=True))


def epochs(run):
    return list(csv.DictReader((run / "summary.csv").read_text().splitlines()))


def changes(run):
    return [json.loads(line) for line in (run / "changes.jsonl").read_text().splitlines()]


def log(run):
    return (run / "log.txt").read_text()


def test_more_epochs_follow_by_the_schedule_of_the_whole_length(run, tmp_path):
    before = epochs(run)
    tiny.run(config(tmp_path, epochs=4), resume="auto")
    whole = tiny.run(config(tmp_path / "whole", epochs=4)).path
    after = epochs(run)
    assert after[:2] == before
    assert [row["epoch"] for row in after] == ["1", "2", "3", "4"]
    assert [row["lr"] for row in after[2:]] == [row["lr"] for row in epochs(whole)[2:]]
    assert "longer: 4 epochs instead of 2, from epoch 3 on" in log(run)
    # 0.025 (1 + cos(pi 7 / 8)) in the last of 8 steps, then 0.025 (1 + cos(pi 8 / 16)).
    assert "--sched cosine is that of 4 epochs from here on: the learning rate was 0.0019 and is 0.025 now" in log(run)


def test_the_change_is_on_record_and_args_yaml_whole(run, tmp_path):
    had = load_config(run / "args.yaml")
    tiny.run(config(tmp_path, epochs=4), resume="auto")
    assert load_config(run / "args.yaml") == replace(had, epochs=4)
    [change] = changes(run)
    assert {name: change[name] for name in ("setting", "before", "now", "epoch")} == {
        "setting": "epochs",
        "before": 2,
        "now": 4,
        "epoch": 3,
    }
    assert sorted(path.name for path in run.iterdir() if "args" in path.name) == ["args.yaml"]


def test_the_best_checkpoint_of_before_can_still_be_judged_and_the_run_grow_again(run, tmp_path):
    for length in (3, 5):
        tiny.run(config(tmp_path, epochs=length), resume="auto")
    assert [(change["before"], change["now"]) for change in changes(run)] == [(2, 3), (3, 5)]
    settings = load_config(run / "args.yaml")
    (run / "args.yaml").write_text((run / "args.yaml").read_text().replace("\nepochs: 5\n", "\nepochs: 4\n"))
    with pytest.raises(ValueError, match=r"args.yaml has other settings .* epochs 4 \(there 5\)"):
        judge_run(run)
    assert settings.epochs == 5


def test_a_run_that_was_killed_before_the_first_new_checkpoint_goes_on(run, tmp_path):
    folder = open_run(config(tmp_path, epochs=3), resume="auto")
    assert folder.epochs_before == 2
    folder.grow(config(tmp_path, epochs=3), before=2, epoch=3)
    folder.close()
    tiny.run(load_config(run / "args.yaml"), resume=str(run))
    assert len(epochs(run)) == 3
    assert len(changes(run)) == 1
    assert "longer: 3 epochs instead of 2, from epoch 3 on" in log(run)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"epochs": 1}, r"was begun with epochs 2 \(now 1\); resume with .*; epochs may grow"),
        ({"epochs": 4, "lr": 0.5}, r"was begun with lr 0\.05 \(now 0\.5\)"),
        ({"epochs": 4, "seed": 3}, r"was begun with seed 0 \(now 3\)"),
    ],
)
def test_fewer_epochs_and_other_settings_are_refused(run, tmp_path, settings, told):
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    with pytest.raises(ValueError, match=told):
        tiny.run(config(tmp_path, **settings), resume="auto")
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


def test_a_record_of_another_length_does_not_excuse_an_edit(run, tmp_path):
    tiny.run(config(tmp_path, epochs=3), resume="auto")
    args = run / "args.yaml"
    args.write_text(args.read_text().replace("\nepochs: 3\n", "\nepochs: 7\n"))
    with pytest.raises(ValueError, match=r"epochs 7 \(there 3\)"):
        tiny.run(load_config(args), resume=str(run))
    with pytest.raises(ValueError, match=r"epochs 9 \(there 3\)"):
        tiny.run(replace(load_config(args), epochs=9), resume=str(run))


def test_a_schedule_that_does_not_look_at_the_length_is_said_to_go_on(tmp_path):
    constant = config(tmp_path, epochs=1, sched="constant")
    tiny.run(constant)
    tiny.run(replace(constant, epochs=2), resume="auto")
    told = log(tmp_path / "run")
    assert "--sched constant continues as it was: it does not look at the number of epochs" in told
    assert [row["lr"] for row in epochs(tmp_path / "run")] == ["0.05", "0.05"]
