"""`unloaf eval` and `unloaf report` on runs that were trained in this file."""

import csv
import dataclasses
import html
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console

import unloaf
from unloaf.commands import main as cli
from unloaf.config import Config, load_config
from unloaf.engine.checkpoint import load_checkpoint
from unloaf.engine.checkpoint.capture import restore
from unloaf.engine.run import train
from unloaf.engine.setup import prepare
from unloaf.measure.costs import gmacs
from unloaf.measure.pareto import pareto_front
from unloaf.models.build import build_model
from unloaf.release.exports import export_elastic
from unloaf.runs.histories import differences, read_histories, table_of
from unloaf.runs.judge import judge_run


def train_run(folder, name, **settings):
    tiny = {"model": "cifar/resnet14", "width": 2, "batch_size": 64, "device": "cpu", "eval_subnets": 3}
    config = Config(**(tiny | {"output": str(folder), "name": name} | settings))
    return train(config, console=Console(file=io.StringIO())).path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of three epochs with a moving average; nobody writes to it."""
    return train_run(tmp_path_factory.mktemp("runs"), "first", epochs=3, model_ema=True, model_ema_decay=0.9)


@pytest.fixture
def run(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "first", symlinks=True))


def summary(run):
    return list(csv.DictReader((run / "summary.csv").read_text().splitlines()))


def events(run, kind):
    found = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [event for event in found if event["event"] == kind]


def in_process(capsys, *words):
    code = cli.main([str(word) for word in words])
    return code, *capsys.readouterr()


def test_main_network_has_the_logged_accuracy_to_the_last_digit(trained):
    judged, logged = judge_run(trained), summary(trained)[-1]
    assert judged.epoch == 3
    assert str(judged.main["val"].top1) == logged["eval_top1"]
    assert (str(judged.main["val"].loss), str(judged.main["val"].top5)) == (logged["eval_loss"], logged["eval_top5"])
    [result] = events(trained, "result")
    assert judged.main["test"].top1 == result["test_top1"]


def test_best_checkpoint_has_the_accuracy_of_its_own_epoch(run):
    older = min((run / "checkpoints").iterdir())
    (run / "model_best").unlink()
    (run / "model_best").symlink_to(older.relative_to(run))
    judged = judge_run(run, checkpoint="best", split="val")
    assert judged.checkpoint == older.name
    assert judged.epoch < 3
    assert str(judged.main["val"].top1) == summary(run)[judged.epoch - 1]["eval_top1"]
    assert set(judged.main) == {"val"}


def test_moving_average_has_its_logged_accuracy(trained):
    judged = judge_run(trained, ema=True)
    assert str(judged.main["val"].top1) == summary(trained)[-1]["ema_top1"]
    assert judged.weights == "model_ema"


def test_drawn_subnets_are_those_of_the_run_with_their_accuracy(trained):
    main, *rows = judge_run(trained, subnets="3").subnets
    assert str(main.subnet) == "2-2-2"
    assert {str(row.subnet): row.top1 for row in rows} == events(trained, "subnets")[-1]["top1"]
    assert str(main.top1) == summary(trained)[-1]["main_top1_reestimated"]


def test_other_batch_size_gives_the_same_accuracy(trained):
    assert judge_run(trained, batch_size=300).main["val"].top1 == judge_run(trained).main["val"].top1


def test_recalibration_on_other_images_changes_subnets_and_not_the_main_network(trained):
    few, many = judge_run(trained, subnets="all", recalibrate=8), judge_run(trained, subnets="all")
    assert few.main == many.main
    assert few.subnets[0].running == many.subnets[0].running == many.main["val"]
    assert few.subnets[1:] != many.subnets[1:]


def test_pareto_front_by_hand():
    figures = {"a": (90, 4), "b": (80, 2), "c": (85, 3), "d": (80, 3), "e": (79, 1), "f": (80, 2), "g": (90, 5)}
    rows = {
        name: unloaf.SubnetRow(unloaf.Subnet(((True,) * (index + 1),)), top1=top1, gmacs=cost)
        for index, (name, (top1, cost)) in enumerate(figures.items())
    }
    assert pareto_front(list(rows.values())) == [rows[name] for name in "ebfca"]


def test_pareto_is_the_front_of_all(trained):
    everyone, best = judge_run(trained, subnets="all"), judge_run(trained, subnets="pareto")
    assert len(everyone.subnets) == 8  # two depths in each of three stages
    assert best.judged == everyone.subnets
    assert best.subnets == tuple(pareto_front(everyone.subnets))


def test_many_subnets_are_drawn_and_said_so(trained, monkeypatch):
    monkeypatch.setattr("unloaf.runs.judge._MOST_JUDGED", 4)
    judged = judge_run(trained, subnets="pareto")
    assert len(judged.judged) == 4
    drawn = "4 of 8 ordered subnets were drawn; others may be better"
    assert judged.notes == (f"{drawn} (give all instead of pareto to evaluate every one)",)


def test_gmacs_by_hand_and_as_published():
    resnet20 = build_model("cifar/resnet20", num_classes=10, in_chans=3, img_size=32, width=16)
    # Stride 2 in the first convolution of a stage, shortcuts without parameters: 3x3 convolutions alone.
    stages = [
        6 * 16 * 16 * 9 * 32**2,
        (16 * 32 + 5 * 32 * 32) * 9 * 16**2,
        (32 * 64 + 5 * 64 * 64) * 9 * 8**2,
    ]
    by_hand = 3 * 16 * 9 * 32**2 + sum(stages) + 64 * 10
    assert gmacs(resnet20, torch.zeros(1, 3, 32, 32)) * 1e9 == by_hand
    # torchvision's documentation of resnet50 states 4.09 GFLOPS, which are multiply-adds.
    resnet50 = build_model("tv/resnet50", num_classes=1000, in_chans=3, img_size=224)
    assert gmacs(resnet50, torch.zeros(1, 3, 224, 224)) == pytest.approx(4.09, abs=0.005)


def test_command_prints_and_writes_every_subnet_and_nothing_else(run, capsys):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    code, out, err = in_process(capsys, "eval", run, "--subnets", "pareto")
    assert (code, err) == (0, "")
    top1 = float(summary(run)[-1]["eval_top1"])
    assert f"val top-1 {top1:.2f} %" in out
    assert re.search(r"^test top-1 ", out, flags=re.M)
    rows = list(csv.DictReader((run / "subnets.csv").read_text().splitlines()))
    assert len(rows) == 8
    assert rows[0]["subnet"] == "2-2-2"
    assert float(rows[0]["running_top1"]) == top1
    assert rows[0]["top1"] == summary(run)[-1]["main_top1_reestimated"]
    assert {row["statistics"] for row in rows} == {"re-estimated"}
    assert {row["checkpoint"] for row in rows} == {(run / "last").resolve().name}
    after = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    del after[run / "subnets.csv"]
    assert after == before


def test_command_writes_elsewhere(run, capsys, tmp_path):
    code, _, _ = in_process(capsys, "eval", run, "--subnets", "1", "--output", tmp_path / "new" / "table.csv")
    assert code == 0
    assert len((tmp_path / "new" / "table.csv").read_text().splitlines()) == 3
    assert not (run / "subnets.csv").exists()


def test_run_is_judged_while_it_trains(run):
    # The lock of a run that trains, held by another process.
    code = "import sys, time; from pathlib import Path; from unloaf.engine.run_folder import RunFolder\n"
    code += "folder = RunFolder(Path(sys.argv[1])); print('locked', flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", code, str(run)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "locked\n"
        owner = (run / "run.lock").read_text()
        assert cli.main(["eval", str(run)]) == 0
        assert (run / "run.lock").read_text() == owner
    finally:
        other.kill()
        other.communicate()


def test_damaged_checkpoint_is_passed_over_and_said_so(run, capsys):
    weights = (run / "last").resolve() / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    code, out, _ = in_process(capsys, "eval", run, "--split", "val")
    assert code == 0
    assert out.startswith("passed over step-")
    assert f"val top-1 {float(summary(run)[-2]['eval_top1']):.2f} %" in out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--subnets", "best"], "subnets 'best': give all, pareto or a number"),
        (["-b", "1"], "batch_size 1: give at least 2"),
    ],
)
def test_bad_option_is_answered(run, capsys, words, message):
    code, _, err = in_process(capsys, "eval", run, *words)
    assert code == 2
    assert message in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "words", [["eval", "first", "--subnets", "1"], ["subnets", "output/first"], ["subnets", "cifar/resnet20"]]
)
@pytest.mark.parametrize(
    ("place", "reason"),
    [("taken/table.csv", "taken is no folder"), (".", "it is a folder"), ("locked/t.csv", "may not")],
)
def test_place_that_cannot_be_written_is_known_before_anything_is_judged(
    words, place, reason, capsys, monkeypatch, tmp_path
):
    for judging in ("runs.judge.judge_run", "inspection.cost_of_model"):
        monkeypatch.setattr(f"unloaf.{judging}", lambda *args, **kwargs: pytest.fail("it was judged"))
    monkeypatch.setattr(
        os, "access", lambda path, mode: Path(path).name != "locked"
    )  # the superuser may write anywhere
    (tmp_path / "taken").write_text("")
    (tmp_path / "locked").mkdir()
    code, out, err = in_process(capsys, *words, "--output", tmp_path / place)
    assert (code, out) == (2, "")
    assert f"cannot write {tmp_path / place}: " in err
    assert reason in err
    assert "give another --output" in err


def test_folder_without_a_run_or_a_checkpoint_is_answered(run, capsys, tmp_path):
    code, _, err = in_process(capsys, "eval", tmp_path)
    assert (code, "is not a run" in err) == (2, True)
    (run / "model_best").unlink()
    code, _, err = in_process(capsys, "eval", run, "--checkpoint", "best")
    assert (code, "has no model_best" in err) == (2, True)
    shutil.rmtree(run / "checkpoints")
    for name in ("last", "summary.csv"):  # as of a run that has just begun
        (run / name).unlink()
    code, _, err = in_process(capsys, "eval", run)
    assert (code, "has no checkpoint yet" in err) == (2, True)


@pytest.fixture(scope="module")
def second(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs")
    return train_run(path, "second", epochs=2, method="common", lr=0.05, eval_subnets=0)


def test_network_without_average_is_answered(second, capsys):
    code, _, err = in_process(capsys, "eval", second, "--ema")
    assert (code, "kept no moving average" in err) == (2, True)


@pytest.mark.parametrize("words", [["eval", "--subnets", "3"], ["subnets"]])
def test_network_without_blocks_is_answered_in_words_that_fit_both_commands(tmp_path, capsys, words):
    plain = train_run(tmp_path, "plain", model="cifar/resnet8", epochs=1, method="common", eval_subnets=0)
    code, _, err = in_process(capsys, words[0], plain, *words[1:])
    reason = "its network has no residual blocks that could be skipped, so it has no subnets"
    assert (code, err) == (2, f"unloaf: error: {plain}: {reason}\n")


def test_report_states_what_the_folders_say(trained, second, capsys):
    code, out, err = in_process(capsys, "report", trained, second)
    assert (code, err) == (0, "")
    [line] = [line.split() for line in out.splitlines() if line.startswith(" first ")]
    logged, [result] = summary(trained), events(trained, "result")
    assert line[:4] == ["first", "cifar/resnet14", "st", "3/3"]
    best = max(logged, key=lambda row: float(row["eval_top1"]))
    figures = [f"{float(best['eval_top1']):.2f}", f"({best['epoch']})", f"{float(logged[-1]['eval_top1']):.2f}"]
    columns = ("ema_top1", "subnets_top1_mean", "subnets_top1_min", "main_top1_reestimated")
    figures += [f"{result['test_top1']:.2f}", *(f"{float(logged[-1][name]):.2f}" for name in columns)]
    assert line[4:12] == figures
    assert "\\n" not in out  # heads of two lines
    [learning_rate] = [line.split() for line in out.splitlines() if line.startswith(" lr ")]
    assert learning_rate == ["lr", "0.1", "0.05"]


def test_page_needs_no_other_file_and_shows_every_curve(trained, second, tmp_path, capsys):
    page = tmp_path / "new" / "report.html"
    code, out, _ = in_process(capsys, "report", trained, second, "--output", page)
    assert code == 0
    assert out.endswith(f"report: {page}\n")
    html = page.read_text(encoding="utf-8")
    assert re.findall(r'(?:src|href)="(?!#|data:text/csv)', html) == []
    assert "Learning rate" in html
    assert html.count('class="key"') == 2 * html.count('class="legend"')
    for head in ("Validation", "Training loss", "Mean of the evaluated subnets", "Validation over training time"):
        assert f"<h3>{head}</h3>" in html


def test_report_of_a_run_that_has_just_begun_or_is_being_written(trained, tmp_path):
    run = Path(shutil.copytree(trained, tmp_path / "begun", symlinks=True))
    text = (run / "summary.csv").read_text()
    (run / "summary.csv").write_text(text[: text.rindex(",")])  # the last line lacks a cell
    (run / "metrics.jsonl").write_text('{"event": "res')
    heads, [cells] = table_of(read_histories([run]))
    assert cells[heads.index("epochs")].startswith("2/")
    assert "test\ntop-1 %" not in heads
    assert cells[heads.index("state")] == "stopped"
    (run / "summary.csv").unlink()
    (run / "metrics.jsonl").unlink()
    heads, [cells] = table_of(read_histories([run]))
    assert heads == ["run", "model", "method", "state", "epochs"]
    assert cells[4].startswith("0/")


def test_runs_of_the_same_name_are_told_apart_by_their_folders(trained, tmp_path):
    copied = shutil.copytree(trained, tmp_path / "first", symlinks=True)
    assert [history.label for history in read_histories([trained, copied])] == [str(trained), str(copied)]
    assert differences(read_histories([trained, copied])) == {}


def test_report_imports_no_torch(trained, tmp_path):
    code = (
        "import sys; from unloaf.commands.main import main; code = main(sys.argv[1:]); "
        "sys.exit(code or 'torch' in sys.modules)"
    )
    words = ["report", str(trained), "--output", str(tmp_path / "page.html")]
    assert subprocess.run([sys.executable, "-c", code, *words], capture_output=True).returncode == 0


@pytest.mark.parametrize("above", [".", ".."], ids=["folder of runs", "folder above it"])
def test_report_of_a_folder_takes_all_runs_in_it(trained, second, tmp_path, capsys, above):
    runs = tmp_path / "output" / "train"
    for run in (trained, second):
        shutil.copytree(run, runs / run.name, symlinks=True)
    shutil.copytree(second, runs / ".removed", symlinks=True)
    (runs / "notes").mkdir()
    code, out, err = in_process(capsys, "report", runs / above)
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines() if "cifar/resnet14" in line] == ["first", "second"]
    code, _, err = in_process(capsys, "report", runs / "notes")
    assert (code, err.count("\n")) == (2, 1)
    assert "notes is not a run: neither it nor a folder in it has args.yaml; give runs or their folder" in err


def test_no_number_is_broken_on_a_terminal_of_80_columns(trained, second, capsys, monkeypatch):
    _, wide, _ = in_process(capsys, "report", trained, second)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "80")
    narrow = re.sub(r"\x1b\[[\d;]*m", "", in_process(capsys, "report", trained, second)[1])  # bold heads
    assert max(len(line) for line in wide.splitlines()) > 80 >= max(len(line) for line in narrow.splitlines())
    numbers = re.findall(r"\d+\.\d+", wide)
    assert len(numbers) > 15
    assert sorted(re.findall(r"\d+\.\d+", narrow)) == sorted(numbers)


def test_report_of_no_run_is_answered(tmp_path, capsys):
    code, _, err = in_process(capsys, "report", tmp_path)
    assert (code, "is not a run" in err) == (2, True)
    code, _, err = in_process(capsys, "report")
    assert (code, "give at least one run folder" in err) == (2, True)


def test_network_that_asks_for_the_version_of_its_weights_is_resumed_judged_and_exported(tmp_path):
    # torchvision's MNASNet takes tensors without a version for those of an old release and refuses them.
    for number in range(16):
        path = tmp_path / "images" / ("train", "val")[number // 8] / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (32, 32), (16 * number, 0, 0)).save(path)
    settings = {"model": "tv/mnasnet0_5", "img_size": 32, "batch_size": 4, "eval_subnets": 0, "model_ema": True}
    data = {"dataset": "imagefolder", "data_dir": str(tmp_path / "images")}
    folder = train_run(tmp_path, "versioned", epochs=1, **settings, **data)
    checkpoint = load_checkpoint(folder / "last")
    training = prepare(load_config(folder / "args.yaml"))
    restore(training, checkpoint)
    weights = training.model.state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in checkpoint.weights["model"].items())
    assert str(judge_run(folder).main["val"].top1) == summary(folder)[-1]["eval_top1"]
    export_elastic(folder, output=tmp_path / "elastic", device="cpu", subnets=1)
    unloaf.load_elastic(tmp_path / "elastic")


def resumed(folder, monkeypatch, *words):
    monkeypatch.setattr("sys.argv", ["/usr/bin/unloaf", "train", *words])
    config = load_config(folder / "args.yaml")
    train(
        dataclasses.replace(config, epochs=config.epochs + 1), resume=str(folder), console=Console(file=io.StringIO())
    )


def test_report_lists_the_commands_of_resumes(run, monkeypatch, tmp_path):
    begun = json.loads((run / "env.json").read_text())
    resumed(run, monkeypatch, "--resume", "first run")
    resumed(run, monkeypatch, "--epochs", "5")
    env = json.loads((run / "env.json").read_text())
    assert [entry["command"][1:] for entry in env.pop("resumed")] == [
        ["train", "--resume", "first run"],
        ["train", "--epochs", "5"],
    ]
    assert env == begun
    page = tmp_path / "page.html"
    assert cli.main(["report", str(run), "--output", str(page)]) == 0
    text = html.unescape(page.read_text())
    assert "resumed: unloaf train --resume 'first run', " in text
    assert "resumed: unloaf train --epochs 5, " in text


@pytest.mark.parametrize("damage", ["[1, 2", '{"resumed": 3}', "[]"])
def test_a_damaged_record_of_the_environment_does_not_stop_a_resume(run, monkeypatch, damage):
    (run / "env.json").write_text(damage)
    resumed(run, monkeypatch)
    assert (run / "env.json").read_text() == damage
    assert len(summary(run)) == 4
