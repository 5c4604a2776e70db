"""`unloaf damage`, `unloaf logits` and the layout of `unloaf inspect`, against networks put together by hand."""

import csv
import io
import json
import statistics
from copy import deepcopy

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch import nn

from unloaf import Subnet
from unloaf.analysis.damage import DamageRow, damage_rows, damage_table, damaged
from unloaf.analysis.logits import logits_rows
from unloaf.analysis.runs import open_alike
from unloaf.commands import main as cli
from unloaf.config import Config
from unloaf.engine.run import train
from unloaf.stages import Stage

STAGES = (Stage("a", ("a.0", "a.1", "a.2"), (False, True, True)), Stage("b", ("b.0", "b.1"), (True, True)))


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Common training and ST of a ResNet-14, an epoch each; nobody writes to them."""
    folder = tmp_path_factory.mktemp("runs")
    tiny = {"model": "cifar/resnet14", "width": 2, "batch_size": 64, "device": "cpu", "epochs": 1, "recalibrate": 64}
    settings = ({"method": method, "name": method, "output": str(folder)} for method in ("common", "st"))
    return [train(Config(**tiny, **more), console=Console(file=io.StringIO())).path for more in settings]


def logits_by_hand(network, run):
    """Of the validation images, and their labels."""
    images, labels = zip(*run.training.eval_batches("val"), strict=True)
    with torch.no_grad():
        return network.eval()(torch.cat(images)).double(), torch.cat(labels)


def without(network, *paths):
    """A copy whose blocks of these names hand their input on."""
    network = deepcopy(network)
    for path in paths:
        parent, _, name = path.rpartition(".")
        setattr(network.get_submodule(parent), name, nn.Identity())
    return network


def in_process(capsys, *words):
    code = cli.main([str(word) for word in words])
    return code, *capsys.readouterr()


# --- damage


def test_each_block_is_deleted_once_and_larger_numbers_are_drawn():
    found = [str(subnet) for subnet in damaged(STAGES)]
    # Of 4 blocks that can be skipped 3 can go: b keeps one of its own.
    assert found[:5] == ["3-2", "2:101-2", "2-2", "3-1:01", "3-1"]
    two, three = {"1-2", "2:101-1:01", "2:101-1", "2-1:01", "2-1"}, {"1-1:01", "1-1"}
    assert set(found[5:]) <= two | three
    assert set(found) & two
    assert set(found) & three


def test_the_same_seed_deletes_the_same_blocks():
    assert damaged(STAGES, draws=1, seed=3) == damaged(STAGES, draws=1, seed=3)
    assert len({tuple(damaged(STAGES, draws=1, seed=seed)) for seed in range(8)}) > 1
    assert max(5 - sum(subnet.depths) for subnet in damaged(STAGES, most=2)) == 2


def test_a_damaged_network_is_the_one_whose_blocks_hand_their_input_on(runs):
    [run] = open_alike(runs[:1])
    rows = damage_rows([run], most=2, draws=2)
    assert [row.deleted for row in rows] == [0, *[1] * 4, 2, 2]
    assert rows[2].blocks == ("layer1.1",)
    for row in rows:
        logits, labels = logits_by_hand(without(run.network, *row.blocks), run)
        assert row.value == pytest.approx(100 * (logits.argmax(1) == labels).double().mean().item())


def test_a_table_of_damage_has_mean_and_deviation_of_each_number():
    values = [90.0, 80.0, 70.0]
    rows = [DamageRow("r", "ST", 0, (), 95.0), *(DamageRow("r", "ST", 1, (str(v),), v) for v in values)]
    heads, lines = damage_table([*rows, DamageRow("other", "ST", 0, (), 50.0)])
    assert heads == ["deleted", "networks", "r", "other"]
    assert lines == [["0", "1", "95.0", "50.0"], ["1", "3", f"80.0 ± {statistics.stdev(values):.1f}", ""]]


def test_statistics_are_reestimated_where_it_is_asked_for(runs):
    opened = open_alike(runs[:1])
    kept, fresh = (damage_rows(opened, most=1, recalibrate=flag) for flag in (False, True))
    assert kept[0] == fresh[0]
    assert [row.value for row in kept[1:]] != [row.value for row in fresh[1:]]


def test_damage_writes_table_json_and_picture(runs, tmp_path, capsys):
    words = ["damage", *runs, "--most", 1, "--device", "cpu", "--output", tmp_path / "d.csv"]
    words += ["--plot", tmp_path / "d.svg"]
    code, out, err = in_process(capsys, *words)
    assert (code, err) == (0, "")
    assert out.split()[:4] == ["deleted", "networks", "common", "st"]
    lines = list(csv.DictReader((tmp_path / "d.csv").read_text().splitlines()))
    assert [(line["run"], line["deleted"], line["blocks"]) for line in lines[:2]] == [
        ("common", "0", ""),
        ("common", "1", "layer1.0"),
    ]
    picture = (tmp_path / "d.svg").read_text()
    assert all(words in picture for words in ("blocks deleted", "top-1, %", "common (common training)"))
    code, out, _ = in_process(capsys, "damage", runs[0], "--most", 1, "--device", "cpu", "--json")
    assert [row["value"] for row in json.loads(out)["rows"]] == [float(line["value"]) for line in lines[:5]]


# --- logits


def test_sizes_of_logits_are_those_of_numpy(runs):
    [run] = open_alike(runs[1:])
    main, *subnets = logits_rows([run], subnets=2)
    found, labels = logits_by_hand(run.network, run)
    norms = np.sqrt((found.numpy() ** 2).sum(1))
    assert (main.main, main.method, main.depths) == (True, "ST", "2-2-2")
    assert main.magnitude == pytest.approx(norms.mean(), rel=1e-6)
    assert main.magnitude_sd == pytest.approx(norms.std(ddof=1), rel=1e-6)
    assert main.top1 == pytest.approx(100 * (found.argmax(1) == labels).double().mean().item())
    exponents = np.exp(found.numpy())
    assert main.confidence == pytest.approx(100 * (exponents / exponents.sum(1, keepdims=True)).max(1).mean(), rel=1e-6)
    assert main.cosine == pytest.approx(1)
    assert [row.main for row in subnets] == [False, False]
    for row in subnets:
        depths = tuple(map(int, row.depths.split("-")))
        small, _ = logits_by_hand(run.subnet(Subnet.from_depths(run.training.stages, depths)), run)
        unit = [v.numpy() / np.sqrt((v.numpy() ** 2).sum(1, keepdims=True)) for v in (small, found)]
        assert row.cosine == pytest.approx((unit[0] * unit[1]).sum(1).mean(), rel=1e-6)


def test_logits_writes_table_json_and_picture(runs, tmp_path, capsys):
    words = ["logits", *runs, "--subnets", 1, "--device", "cpu", "--json", "--plot", tmp_path / "l.svg"]
    code, out, err = in_process(capsys, *words, "--output", tmp_path / "l.csv")
    assert code == 0
    assert "picture: " in err
    rows = json.loads(out)["rows"]
    assert [(row["run"], row["main"]) for row in rows] == [
        ("common", True),
        ("common", False),
        ("st", True),
        ("st", False),
    ]
    assert len((tmp_path / "l.csv").read_text().splitlines()) == 5
    assert "top-1 accuracy, %" in (tmp_path / "l.svg").read_text()


# --- bad input


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["damage"], "give at least one run folder"),
        (["damage", "{run}", "--most", "0"], "most 0: give at least 1"),
        (["damage", "{run}", "--draws", "0"], "draws 0: give at least 1"),
        (["damage", "nowhere"], "nowhere is not a run"),
        (["logits", "{run}", "--subnets", "pareto"], "subnets pareto: give all or a number"),
        (["logits", "{run}", "--recalibrate", "1"], "recalibrate 1: give at least 2"),
        (["damage", "{run}", "--plot", "{run}"], "is a folder"),
        (["inspect"], "give at least one MODEL"),
    ],
)
def test_bad_input_is_answered_in_a_line(runs, words, said, capsys):
    code, out, err = in_process(capsys, *(word.format(run=runs[0]) for word in words))
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1


def test_runs_of_different_data_are_not_compared(runs, tmp_path, capsys):
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            for at in range(4):
                Image.new("RGB", (16, 16), (at, 9, 9)).save(tmp_path / split / name / f"{at}.png")
    given = {"dataset": "imagefolder", "data_dir": str(tmp_path), "img_size": 16, "model": "cifar/resnet14", "width": 2}
    given |= {"epochs": 1, "batch_size": 4, "device": "cpu", "output": str(tmp_path), "name": "pets", "workers": 0}
    pets = train(Config(**given), console=Console(file=io.StringIO())).path
    code, out, err = in_process(capsys, "damage", runs[0], pets, "--device", "cpu")
    assert (code, out) == (2, "")
    assert "has data set digits" in err
    assert "compare runs of the same data" in err


# --- layout


def test_layouts_of_models_stand_side_by_side(tmp_path, capsys):
    words = ["inspect", "cifar/resnet20", "timm/resnet18", "--num-classes", 10, "--plot", tmp_path / "layout.svg"]
    code, out, _ = in_process(capsys, *words)
    assert code == 0
    lines = [line.split() for line in out.splitlines() if "resnet" in line]
    assert [line[:6] for line in lines] == [
        # Their first stages have no head that changes the shape.
        *(["cifar/resnet20", f"layer{at}", "3", "3" if at == 1 else "2", "33", shape] for at, shape in enumerate(
            ("16x32x32", "32x16x16", "64x8x8"), 1)),
        *(["timm/resnet18", f"layer{at}", "2", "2" if at == 1 else "1", "25", shape] for at, shape in enumerate(
            ("64x56x56", "128x28x28", "256x14x14", "512x7x7"), 1)),
    ]  # fmt: skip
    picture = (tmp_path / "layout.svg").read_text()
    assert all(name in picture for name in ("cifar/resnet20", "timm/resnet18"))


def test_several_models_are_a_list_in_json(capsys):
    code, out, _ = in_process(capsys, "inspect", "cifar/resnet20", "cifar/resnet26", "--json")
    assert code == 0
    assert [one["model"] for one in json.loads(out)] == ["cifar/resnet20", "cifar/resnet26"]
