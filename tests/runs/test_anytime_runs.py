"""`unloaf anytime` on runs that are trained in this file: what is set on which images, and what is printed."""

import csv
import io
import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from rich.console import Console

import unloaf
from unloaf.commands import main as cli
from unloaf.config import Config
from unloaf.engine.run import train
from unloaf.measure.exits import Target
from unloaf.runs import anytime as runs
from unloaf.runs.judge import judge_run


def train_run(folder, name, **settings):
    tiny = {"model": "cifar/resnet14", "width": 4, "batch_size": 64, "epochs": 1, "device": "cpu", "recalibrate": 64}
    config = Config(**(tiny | {"output": str(folder), "name": name} | settings))
    return train(config, console=Console(file=io.StringIO())).path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run that nobody writes to."""
    return train_run(tmp_path_factory.mktemp("runs"), "first", method="st", lr=0.1)


@pytest.fixture(scope="module")
def judged(trained):
    judgement, anytime, _ = runs.judge_anytime(trained, target=Target(max_drop=2), device="cpu")
    return judgement, anytime


def with_data(monkeypatch, change):
    """Runs are opened with other images."""
    opened = runs.open_trained

    def other(run, **options):
        found = opened(run, **options)
        return replace(found, training=replace(found.training, data=change(found.training.data)))

    monkeypatch.setattr(runs, "open_trained", other)


def in_process(capsys, *words):
    code = cli.main([*map(str, words)])
    out, err = capsys.readouterr()
    return code, out, err


def test_networks_alone_are_those_of_unloaf_eval(trained, judged):
    judgement, _ = judged
    found = judge_run(trained, subnets="all", split="test", device="cpu")
    rows = {str(row.subnet): row for row in found.judged}
    for row in judgement.rows[1:-1]:
        assert row.top1 == pytest.approx(rows[row.name].top1, abs=1e-9)
        assert row.gmacs == pytest.approx(rows[row.name].gmacs, rel=1e-12)
    main = judgement.rows[0]
    assert (main.kind, main.top1, main.gmacs) == ("main", found.main["test"].top1, found.gmacs)


def test_the_threshold_is_set_on_validation_images_for_the_target(trained, judged):
    judgement, anytime = judged
    found = judge_run(trained, subnets="all", split="val", device="cpu")
    main = found.judged[0].top1
    assert main is not None
    assert judgement.val.images == 300
    assert judgement.val.top1 >= main - 2
    assert judgement.test.images == 600
    assert anytime.thresholds == (judgement.val.threshold,) * (len(judgement.chain) - 1)
    assert str(anytime.subnets[-1]) == "2-2-2"
    assert judgement.test.shares != (0.0, 1.0)


def test_test_images_change_neither_chain_nor_threshold(trained, judged, monkeypatch):
    def other_labels(data):
        test = data.test.subset(torch.arange(len(data.test)))
        test.labels.copy_((test.labels + 1) % 10)
        return replace(data, test=test)

    with_data(monkeypatch, other_labels)
    found, _, _ = runs.judge_anytime(trained, target=Target(max_drop=2), device="cpu")
    judgement, _ = judged
    assert (found.chain, found.val) == (judgement.chain, judgement.val)
    assert found.test.top1 < judgement.test.top1


def test_a_run_without_validation_images_is_refused(trained, monkeypatch):
    with_data(monkeypatch, lambda data: replace(data, val=data.val.subset(torch.arange(0))))
    with pytest.raises(ValueError, match=r"has no validation images, and a threshold that is set on the test images"):
        runs.judge_anytime(trained, device="cpu")
    found, _, _ = runs.judge_anytime(trained, subnets=["1-1-1", "2-2-2"], threshold=0.5, device="cpu")
    assert (found.val, found.test.images, found.test.threshold) == (None, 600, 0.5)


def test_validation_images_alone_are_halved(trained, monkeypatch):
    with_data(monkeypatch, lambda data: replace(data, test=data.val))
    found, _, _ = runs.judge_anytime(trained, subnets=["2-2-1", "2-2-2"], device="cpu")
    assert found.val is not None
    assert (found.val.images, found.test.images, found.judged_on) == (150, 150, "held-back validation")
    assert "every second validation image set the threshold" in found.notes[-1]


def test_a_table_for_several_runs_csv_json_and_a_picture(trained, tmp_path, capsys):
    words = ["anytime", trained, trained, "--subnets", "2-2-1", "2-2-2", "--threshold", "0.5", "--device", "cpu"]
    words += ["--repeats", "1", "-b", "128", "256"]
    code, out, _ = in_process(capsys, *words, "--output", tmp_path / "a.csv", "--plot", tmp_path / "a.svg")
    assert code == 0
    assert out.count("first: Anytime") == 2
    assert "images/s, batch of 256" in out
    records = list(csv.DictReader((tmp_path / "a.csv").read_text().splitlines()))
    kinds = ["main", "main, re-estimated", "subnet", "cascade"]
    assert [record["network"] for record in records] == 2 * [*kinds, *["curve"] * len(runs.CURVE)]
    assert all(float(record["b128_images_per_second"]) > 0 for record in records if record["network"] != "curve")
    assert ElementTree.parse(tmp_path / "a.svg").getroot().tag.endswith("svg")
    code, out, _ = in_process(capsys, *words[:2], *words[3:], "--json")
    [found] = json.loads(out)
    assert (code, found["run"], found["chain"], found["test"]["threshold"]) == (0, "first", ["2-2-1", "2-2-2"], 0.5)


def test_an_exported_cascade_answers_as_it_did(trained, tmp_path, capsys):
    place = tmp_path / "cascade"
    words = ["--subnets", "1-1-1", "2-2-2", "--threshold", "0.5", "--confidence", "entropy", "--repeats", "0"]
    code, out, _ = in_process(capsys, "anytime", trained, *words, "--export", place, "--device", "cpu")
    assert code == 0
    assert "unloaf.load_anytime" in out
    again = unloaf.load_anytime(place)
    _, anytime, opened = runs.judge_anytime(
        trained, subnets=["1-1-1", "2-2-2"], threshold=0.5, confidence="entropy", device="cpu"
    )
    x = opened.noise(16, 3)
    assert torch.equal(again(x).logits, anytime(x).logits)
    assert (again.confidence, again.thresholds) == ("entropy", (0.5,))
    assert again.class_names == tuple("0123456789")
    elastic = unloaf.load_elastic(place)
    assert torch.equal(elastic(x, subnet="1-1-1"), anytime.all_exits(x)[0])
    code, _, err = in_process(capsys, "anytime", trained, *words, "--export", place)
    assert (code, str(place) in err) == (2, True)


def test_onnx_files_of_the_exits_answer_as_the_cascade(trained, tmp_path, capsys):
    onnxruntime, place = pytest.importorskip("onnxruntime"), tmp_path / "segments"
    words = ["--subnets", "2-1-1", "2-2-1", "2-2-2", "--threshold", "0.5", "--repeats", "0", "--format", "onnx"]
    assert in_process(capsys, "anytime", trained, *words, "--export", place, "--device", "cpu")[0] == 0
    _, anytime, opened = runs.judge_anytime(trained, subnets=words[1:4], threshold=0.5, device="cpu")
    described = json.loads((place / "anytime.json").read_text())
    x = opened.noise(7, 3)
    held, files = {"images": x.numpy()}, []
    for entry, expected in zip(described["exits"], anytime.all_exits(x), strict=True):
        session = onnxruntime.InferenceSession(place / entry["file"])
        logits, *made = session.run(None, {name: held[name] for name in entry["takes"]})
        held |= dict(zip(entry["makes"], made, strict=True))
        assert torch.allclose(torch.from_numpy(logits), expected, atol=1e-5)
        files.append(onnx_convolutions(place / entry["file"]))
    # The first file has a whole subnet; the last one a block of two convolutions that only the main network has.
    assert files[0] == convolutions(anytime, 0)
    assert files[1] < convolutions(anytime, 1)
    assert files[2] == 2
    assert described["exits"][0]["takes"] == ["images"]


def onnx_convolutions(file):
    return sum(node.op_type == "Conv" for node in pytest.importorskip("onnx").load(file).graph.node)


def convolutions(anytime, index):
    """Those that a pass of the subnet alone calls."""
    calls, hooks = [], []
    for module in anytime.model.modules():
        if isinstance(module, torch.nn.Conv2d):
            hooks.append(module.register_forward_hook(lambda *_: calls.append(1)))
    with torch.no_grad(), unloaf.active_subnet(anytime.model, anytime.stages, anytime.subnets[index]):
        anytime.model(torch.zeros(1, 1, 8, 8))
    for hook in hooks:
        hook.remove()
    return len(calls)


def test_an_elastic_file_without_a_cascade_is_told_apart(trained, tmp_path):
    from unloaf.release.exports import export_elastic

    export_elastic(trained, subnets=["1-1-1"], output=tmp_path / "elastic", device="cpu")
    with pytest.raises(ValueError, match="holds no cascade"):
        unloaf.load_anytime(tmp_path / "elastic")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--subnets", "1-1-1"], "give at least two exits"),
        (["--subnets", "2-2-2", "1-1-1"], "subnet 2-2-2 is no part of 1-1-1"),
        (["--subnets", "1-1-1", "1-1-1"], "subnets names 1-1-1 twice"),
        (["--subnets", "1-1", "2-2"], "depths"),
        (["--subnets", "1-1-1", "9-9-9"], "keeps 9 of 2 blocks"),
        (["--max-drop", "1", "--max-gmacs", "1"], "max_drop and max_gmacs are all given"),
        (["--max-drop", "-1"], "max_drop -1.0: give at least 0"),
        (["--max-gmacs", "1e-9", "--subnets", "1-1-1", "2-2-2"], "GMACs at least; give more"),
        (["--min-top1", "101", "--subnets", "1-1-1", "2-2-2"], "no threshold has a top-1 of at least 101.00 %"),
        (["--threshold", "0.5"], "and --subnets with it"),
        (["--subnets", "1-1-1", "2-2-2", "--threshold", "1.5"], "give a confidence from 0 to 1"),
        (["--recalibrate", "1"], "recalibrate 1: give at least 2"),
        (["--exits", "1"], "exits 1: give at least 2"),
        (["-b", "0"], "batch_size (0,)"),
        (["--confidence", "margin"], "margin"),
        (["--format", "onnx"], "give --export FOLDER with it"),
        (["other", "--export", "folder"], "export writes one cascade"),
        (["--ema"], "kept no moving average"),
    ],
    ids=str,
)
def test_bad_input_is_answered_in_a_line(trained, words, said, capsys):
    code, out, err = in_process(capsys, "anytime", trained, *words)
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1


def test_a_folder_that_is_no_run_is_answered(tmp_path, capsys):
    code, _, err = in_process(capsys, "anytime", tmp_path)
    assert (code, "is no run" in err or "no args.yaml" in err) == (2, True), err
    assert in_process(capsys, "anytime")[2] == "unloaf: error: anytime: give at least one run folder\n"


def test_the_command_writes_nothing_into_the_run(trained, capsys):
    before = sorted(Path(trained).rglob("*"))
    words = ["--subnets", "1-1-1", "2-2-2", "--repeats", "0", "--device", "cpu"]
    assert in_process(capsys, "anytime", trained, *words)[0] == 0
    assert sorted(Path(trained).rglob("*")) == before
