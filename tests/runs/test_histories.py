"""What run folders say when they are damaged, of other data, or written to just now."""

import json

import pytest

from unloaf.commands.main import main
from unloaf.config import Config
from unloaf.files.lock import lock
from unloaf.runs.histories import RunHistory, cautions, read_histories
from written_runs import write_run


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"dataset": "cifar10"}, "a has data set digits, b cifar10: "),
        ({"num_classes": 7}, "a has classes 10, b 7: "),
        ({"class_names": ["cat", "dog"]}, "a has classes 10, b 2 (cat, dog): "),
    ],
)
def test_runs_of_other_data_are_refused_and_both_named(tmp_path, capsys, other, said):
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", data=other)]
    page = tmp_path / "page.html"
    assert main(["report", *map(str, runs), "--output", str(page)]) == 2
    out, err = capsys.readouterr()
    assert (out, said in err) == ("", True)
    assert not page.exists()


def test_a_run_without_a_record_of_its_data_is_compared_by_its_settings(tmp_path):
    one, other = write_run(tmp_path / "a"), write_run(tmp_path / "b", dataset="cifar10", data_dir="data")
    (other / "data.json").unlink()
    with pytest.raises(ValueError, match="a has data set digits, b cifar10"):
        read_histories([one, other])


def test_a_run_in_progress_is_marked_and_its_last_line_may_be_cut(tmp_path):
    run = write_run(tmp_path / "run", finished=False, epochs=9)
    for name in ("summary.csv", "metrics.jsonl"):
        with (run / name).open("a") as file:
            file.write('{"event": "ste' if name == "metrics.jsonl" else "3,10.0,0.1")
    with lock(run):
        [history] = read_histories([run])
        assert (history.state, history.missing) == ("in progress", ())
        assert cautions([history]) == ["run is in progress: 2 of 9 epochs so far"]
    [history] = read_histories([run])
    assert history.state == "stopped"
    assert history.missing == ("summary.csv: line 4 cannot be read", "metrics.jsonl: line 3 cannot be read")


def test_what_a_finished_run_lacks_is_said(tmp_path, capsys):
    run = write_run(tmp_path / "run", tops=[1.0, 2.0, 3.0, 4.0])
    lines = (run / "summary.csv").read_text().splitlines(keepends=True)
    (run / "summary.csv").write_text("".join([*lines[:2], lines[4]]))
    (run / "env.json").unlink()
    assert main(["report", str(run), "--output", str(tmp_path / "page.html")]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert said == [
        "note: run: summary.csv: epoch 2, 3 is missing",
        "note: run: env.json: command, hardware and versions are not known",
        "note: run: summary.csv: 2 of the 4 epochs of a finished run",
    ]
    page = (tmp_path / "page.html").read_text()
    assert all(line.removeprefix("note: ") in page for line in said)


def test_runs_judged_on_other_images_are_told(tmp_path):
    splits = {"val": {"images": 9, "sha256": "other"}}
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", data={"splits": splits}), write_run(tmp_path / "c")]
    [line] = cautions(read_histories(runs))
    assert line.endswith("groups: a, c; b")


def test_terms_and_subnets_of_an_epoch(tmp_path):
    run = write_run(tmp_path / "run", tops=[1.0], subnets=[{"1": 10.0, "2": 20.0, "3": 60.0, "nan": None}])
    with (run / "metrics.jsonl").open("a") as file:
        for terms in ({"main": 3.0, "subnet1": 0.5, "subnet2": 0.25}, {"main": None, "subnet": 9.0}):
            file.write(json.dumps({"event": "step", "epoch": 1, "terms": terms}) + "\n")
    [history] = read_histories([run])
    assert history.terms == {1: {"main": 2.0, "subnets": 0.5}}  # 1.0 and 0.25 are written by write_run
    assert history.subnets == ((1, 10.0, 30.0, 60.0),)
    assert history.last_subnets == {"1": 10.0, "2": 20.0, "3": 60.0}


def test_a_run_whose_end_was_lost_is_not_said_to_have_stopped_early():
    ended = RunHistory("a", Config(epochs=2), ({"epoch": 1.0}, {"epoch": 2.0}), {}, {})
    [line] = cautions([ended])
    assert line == "a has all its 2 epochs, but no result: what was found at its end is missing"
