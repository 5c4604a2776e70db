"""`unloaf loafing`, and the store of runs that it shares with `unloaf ablate`, on tiny networks."""

import csv
import io
import json
import signal
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest
import torch
from rich.console import Console

import unloaf
from unloaf.analysis import cells
from unloaf.analysis.cells import Cell, Store
from unloaf.analysis.loafing import LoafingRow, loafing_table, mean_gaps, spread_depths
from unloaf.commands import main as cli
from unloaf.commands.loafing import Loafing, configs_of
from unloaf.commands.studies import split_words
from unloaf.config import Config
from unloaf.errors import StoppedError
from unloaf.pages.studies import loafing_picture
from unloaf.runs.opened import open_trained
from unloaf.stages import Stage

TINY = ("--model", "cifar/resnet14", "--width", "2", "--batch-size", "64", "--device", "cpu", "--epochs", "1",
        "--recalibrate", "64")  # fmt: skip
CONFIG = Config(
    model="cifar/resnet14", width=2, batch_size=64, device="cpu", epochs=1, recalibrate=64, train_images=128
)


def in_process(capsys, *words):
    code = cli.main([str(word) for word in words])
    return code, *capsys.readouterr()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One seed of common training and ST, and one subnet alone."""
    folder = tmp_path_factory.mktemp("loafing")
    words = [
        "loafing",
        *TINY,
        "--methods",
        "common",
        "st",
        "--seeds",
        "1",
        "--subnets",
        "1-1-1",
        "--output",
        str(folder),
    ]
    assert cli.main(words) == 0
    return folder


def rows_in(folder):
    return json.loads((folder / "loafing.json").read_text())["rows"]


def run_of(folder, name):
    [found] = [path for path in (folder / "runs").iterdir() if path.name.startswith(name)]
    return found


def accuracy_by_hand(network, run):
    """On the test images, in percent."""
    images, labels = zip(*run.training.eval_batches("test"), strict=True)
    with torch.no_grad():
        return 100 * (network.eval()(torch.cat(images)).argmax(1) == torch.cat(labels)).double().mean().item()


@pytest.mark.parametrize(
    ("words", "warmup"), [([], 2), (["--epochs", "2"], 1), (["--epochs=9", "--warmup-epochs=3"], 3)]
)
def test_the_warm_up_of_the_demo_is_cut_where_fewer_epochs_are_asked_for(words, warmup):
    [config] = configs_of(Loafing(methods=("common",)), words).values()
    assert config.warmup_epochs == warmup


def test_the_gap_is_between_a_subnet_and_the_same_network_trained_alone(folder):
    rows = rows_in(folder)
    assert [(row["method"], row["depths"], row["main"]) for row in rows] == [
        ("common training", "1-1-1", False),
        ("common training", "2-2-2", True),
        ("ST", "1-1-1", False),
        ("ST", "2-2-2", True),
    ]
    inside = open_trained(run_of(folder, "cifar-resnet14-st-"), device="cpu")
    small = inside.subnet(unloaf.Subnet.from_depths(inside.training.stages, (1, 1, 1)))
    assert rows[2]["inside"] == pytest.approx(accuracy_by_hand(small, inside))
    alone = open_trained(run_of(folder, "cifar-resnet14-1-1-1-"), device="cpu", need_subnets=False)
    network = alone.network
    unloaf.recalibrate_bn(network, alone.calibration())
    assert rows[2]["alone"] == pytest.approx(accuracy_by_hand(network, alone))
    assert rows[2]["gap"] == pytest.approx(rows[2]["alone"] - rows[2]["inside"])
    assert rows[0]["alone"] == rows[2]["alone"]
    assert rows[3]["alone"] == rows[1]["inside"]


def test_a_subnet_alone_is_the_smaller_network_of_the_family(folder):
    alone = open_trained(run_of(folder, "cifar-resnet14-1-1-1-"), device="cpu", need_subnets=False)
    named = unloaf.models.build.build_model("cifar/resnet8", num_classes=10, in_chans=1, img_size=8, width=2)
    assert {k: v.shape for k, v in alone.network.state_dict().items()} == {
        k: v.shape for k, v in named.state_dict().items()
    }


def test_files_hold_the_same_rows(folder):
    lines = list(csv.DictReader((folder / "loafing.csv").read_text().splitlines()))
    assert [float(line["gap"]) for line in lines] == [row["gap"] for row in rows_in(folder)]
    picture = (folder / "loafing.svg").read_text()
    ElementTree.fromstring(picture)
    assert all(text in picture for text in ("1-1-1", "common training", "ST", "trained alone"))
    page = (folder / "loafing.html").read_text()
    assert "<svg" in page
    assert "cifar/resnet14" in page


def test_finished_runs_are_not_trained_again(folder, capsys, monkeypatch):
    monkeypatch.setattr(cells, "train", None)
    words = ["loafing", *TINY, "--methods", "common", "st", "--seeds", "1", "--output", folder]
    code, out, err = in_process(capsys, *words, "--subnets", "1-1-1", "--json")
    assert code == 0
    assert json.loads(out)["rows"] == rows_in(folder)
    assert "to train" not in err


def test_a_mean_gap_leaves_the_main_network_out():
    rows = [
        LoafingRow("ST", depths, depths == "3", seed, 80.0, alone, alone - 80.0)
        for seed, values in enumerate([(90.0, 94.0, 99.0), (84.0, 84.0, 99.0)])
        for depths, alone in zip(("1", "2", "3"), values, strict=True)
    ]
    # 12 and 4 points: mean 8, deviation of two values 8 / sqrt(2).
    assert str(mean_gaps(rows)["ST"]) == "8.0 ± 5.7"
    assert loafing_table(rows)[1][2] == ["3 (main)", "99.0 ± 0.0", "80.0 ± 0.0", "19.0 ± 0.0"]


def test_accuracies_alone_are_spread_over_seeds_not_over_methods():
    """Rows come seed by seed, the methods of a seed one after another."""
    rows = [
        LoafingRow(method, "1", False, seed, 80.0, 90.0 + seed, 10.0 + seed)
        for seed in (0, 1, 2)
        for method in ("common training", "ST")
    ]
    assert loafing_table(rows)[1] == [
        ["1", "91.0 ± 1.0", "80.0 ± 0.0", "11.0 ± 1.0", "80.0 ± 0.0", "11.0 ± 1.0"],
    ]


def test_a_run_that_diverged_is_told():
    rows = [LoafingRow("ST", "1", False, 0, None, 90.0, None)]
    assert loafing_table(rows)[1] == [["1", "90.0", "diverged", "diverged"]]
    assert "90" not in mean_gaps(rows)
    ElementTree.fromstring(loafing_picture(rows))


def test_depths_are_spread_over_the_stages():
    def stage(name, depth):
        return Stage(name, tuple(f"{name}.{i}" for i in range(depth)), (False, *(True,) * (depth - 1)))

    assert spread_depths([stage(name, depth) for name, depth in zip("abcd", (3, 4, 6, 3), strict=True)]) == (
        "1-1-2-1",
        "2-2-3-2",
        "3-3-5-3",
    )
    assert spread_depths([stage("a", 2)]) == ("1",)


@pytest.mark.parametrize(
    ("words", "own", "others"),
    [
        (["--epochs", "3", "--seeds=2", "--lr", "0.1"], ["--seeds=2"], ["--epochs", "3", "--lr", "0.1"]),
        (["--subnets", "1-1", "2-2", "--amp"], ["--subnets", "1-1", "2-2"], ["--amp"]),
        (["-c", "a.yaml", "-b", "8"], ["-c", "a.yaml"], ["-b", "8"]),
        (["--run_own_code"], ["--run_own_code"], []),
        (["stray"], ["stray"], []),
    ],
)
def test_words_are_sorted_into_options_and_settings(words, own, others):
    assert split_words(words, Loafing) == (own, others)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--methods", "st"], "give common first"),
        (["--methods", "common", "common"], "give each once"),
        (["--seeds", "0"], "seeds 0: give at least 1"),
        (["--subnets", "x"], "subnets 'x': give a number for each stage"),
        (["--subnets", "1-1"], "cifar/resnet26 has no such subnet; legal depths are layer1: 1, 2, 3, 4"),
        (["--subnets", "4-4-4"], "give at least one that is not the main network"),
        (["--method", "st"], "--method: give --methods"),
        (["--depths", "1-1-1"], "--depths: give --subnets"),
        (["--epoch", "3"], "did you mean --epochs?"),
        (["-c", "a.yaml", "--recipe", "digits_st"], "both give all settings"),
        (["--dataset", "cifar10"], "give --data-dir"),
        (["--output", "{file}"], "is no folder"),
        (["--model", "mine:build"], "add --run-own-code if you trust it"),
        (["--task", "detection"], "this is for classification"),
    ],
)
def test_bad_input_is_answered_in_a_line(words, said, capsys, tmp_path):
    (tmp_path / "file").write_text("")
    output = [] if "--output" in words else ["--output", tmp_path / "out"]
    code, out, err = in_process(capsys, "loafing", *(str(w).format(file=tmp_path / "file") for w in words), *output)
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


# --- the store


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    return folder, Store(folder, asked=1, split="val").results([Cell("a", CONFIG)])[0]


def saying():
    return Console(file=io.StringIO(), width=1000)


def test_a_record_says_what_was_found(stored):
    _, found = stored
    run = open_trained(found.path, device="cpu")
    assert found.main == pytest.approx(run.training.evaluate("val").main.top1)
    assert found.flops > 1  # ST, which is the default method, runs a subnet too
    assert len(found.subnets) == 1
    assert found.seconds > 0


def test_the_same_settings_are_one_run_whatever_they_are_called(stored, monkeypatch):
    folder, found = stored
    monkeypatch.setattr(cells, "train", None)
    elsewhere = replace(CONFIG, name="c", output="elsewhere", log_interval=3)
    again = [Cell("b", CONFIG), Cell("c", elsewhere), Cell("d", replace(CONFIG, groups=9))]  # which ST does not read
    assert [run.path for run in Store(folder, asked=1, split="val").results(again)] == [found.path] * 3


def test_other_subnets_are_evaluated_without_a_training(stored, monkeypatch):
    folder, _ = stored
    monkeypatch.setattr(cells, "train", None)
    [found] = Store(folder, asked=("1-1-1", "1-1"), split="test").results([Cell("a", CONFIG)])
    assert list(found.subnets) == ["1-1-1"]
    assert found.split == "test"


@pytest.mark.parametrize(("what", "said"), [("code", "torch was 1.0 and is"), ("data", "num_classes was 3 and is 10")])
def test_a_run_of_other_code_or_data_is_not_used_and_the_reason_told(stored, what, said, tmp_path, monkeypatch):
    folder, found = stored
    record = json.loads((folder / "cells" / f"{found.path.name}.json").read_text())
    record["identity"][what] |= {"torch": "1.0"} if what == "code" else {"num_classes": 3}
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / f"{found.path.name[:-10]}0123456789.json").write_text(json.dumps(record))
    console, asked = saying(), []
    store = Store(tmp_path, asked=1, split="val", console=console)
    monkeypatch.setattr(store, "_train", lambda name, config: asked.append(name) or {"failed": "no", "seconds": 0.0,
                                                                                   "environment": {}})  # fmt: skip
    store.results([Cell("a", CONFIG)])
    assert len(asked) == 1
    assert "is not used" in console.file.getvalue()
    assert said in console.file.getvalue()


def test_a_record_that_was_tampered_with_is_not_used(stored, tmp_path):
    folder, found = stored
    record = json.loads((folder / "cells" / f"{found.path.name}.json").read_text())
    record["identity"]["settings"]["lr"] = 9.0
    (tmp_path / "cells").mkdir()
    (tmp_path / "cells" / f"{found.path.name}.json").write_text(json.dumps(record))
    assert not Store(tmp_path, asked=1, split="val").finished(Cell("a", CONFIG))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"identity": 1}'])
def test_a_torn_record_is_made_again(stored, text, tmp_path):
    folder, found = stored
    (tmp_path / "cells").mkdir()
    (tmp_path / "runs").symlink_to(folder / "runs")
    (tmp_path / "cells" / f"{found.path.name}.json").write_text(text)
    [again] = Store(tmp_path, asked=1, split="val").results([Cell("a", CONFIG)])
    assert (again.main, again.subnets) == (found.main, found.subnets)


def test_a_stopped_study_goes_on(tmp_path, monkeypatch):
    """SIGTERM in the second of two runs: the first is kept, the second continues from its checkpoint."""
    two = [Cell(str(seed), replace(CONFIG, method="common", epochs=2, seed=seed)) for seed in (0, 1)]
    store = Store(tmp_path, asked=1, split="val")
    plain, calls = cells.train, []

    def train(config, **options):
        calls.append(config.seed)
        if config.seed == 1 and calls.count(1) == 1:
            return _stopped(plain, config, options)
        return plain(config, **options)

    monkeypatch.setattr(cells, "train", train)
    with pytest.raises(StoppedError, match="what is finished is kept, the same command goes on") as stopped:
        store.results(two)
    assert stopped.value.code == 143
    [kept] = (tmp_path / "cells").iterdir()
    assert "-0-" in kept.name
    assert len(store.results(two)) == 2
    assert calls == [0, 1, 1]


def _stopped(train, config, options):
    """A training that a signal meets in its first step."""
    from unloaf.engine import run as engine

    real = engine.Run.after_step

    def after_step(self, row):
        signal.raise_signal(signal.SIGTERM)
        real(self, row)

    engine.Run.after_step = after_step
    try:
        return train(config, **options)
    finally:
        engine.Run.after_step = real


def test_a_run_that_diverges_is_a_result(tmp_path):
    config = replace(CONFIG, method="common", lr=1e30, opt="momentum", momentum=0.0)
    [found] = Store(tmp_path, asked=1, split="val").results([Cell("wild", config)])
    assert found.main is None
    assert "not finite" in found.failed
    assert Store(tmp_path, asked=1, split="val").finished(Cell("wild", config))
