"""`unloaf bound`: by hand on two classes, against a slow search on more, and on the checkpoints of a run."""

import csv
import io
import json
import math
import shutil
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest
import torch
from rich.console import Console

import unloaf
from unloaf.analysis.bound import bound_rows, constant, distances, largest_distance
from unloaf.analysis.runs import open_alike
from unloaf.commands import main as cli
from unloaf.config import Config
from unloaf.engine.run import train

CONFIG = Config(
    model="cifar/resnet14", width=2, batch_size=64, device="cpu", epochs=2, recalibrate=64, train_images=128,
    checkpoint_hist=9, name="st",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """ST of two epochs, both checkpoints kept."""
    config = replace(CONFIG, output=str(tmp_path_factory.mktemp("runs")))
    return train(config, console=Console(file=io.StringIO())).path


def in_process(capsys, *words):
    code = cli.main([str(word) for word in words])
    return code, *capsys.readouterr()


# --- the theorem


@pytest.mark.parametrize(("q", "farther"), [(0.6, True), (0.9, False)])
def test_two_classes_by_hand(q, farther):
    """Main network 0.8 for the label, subnet q: divergence and distance by the formulas, the bound attained below."""
    main, subnet = torch.tensor([[0.8, 0.2]]).log(), torch.tensor([[q, 1 - q]]).log()
    found = distances(main, subnet, torch.tensor([0]))
    assert found.ce_main.item() == pytest.approx(-math.log(0.8), rel=1e-6)
    assert found.ce_subnet.item() == pytest.approx(-math.log(q), rel=1e-6)
    assert found.kl.item() == pytest.approx(0.8 * math.log(0.8 / q) + 0.2 * math.log(0.2 / (1 - q)), rel=1e-5)
    assert found.gap.item() == pytest.approx(abs(math.log(0.8 / q)), rel=1e-5)
    if farther:  # a student that is less sure is the farthest of this divergence: the bound is attained
        assert found.bound.item() == pytest.approx(found.gap.item(), rel=1e-5)
    else:
        assert found.bound.item() > found.gap.item()


def slow_bound(p, kl):
    """Over a fine grid of q, those whose two-class divergence is allowed."""
    q = torch.linspace(1e-6, 1 - 1e-6, 1_000_001, dtype=torch.float64)
    divergence = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
    return (p / q).log().abs()[divergence <= kl].max().item()


@pytest.mark.parametrize("p", [0.05, 0.5, 0.99])
@pytest.mark.parametrize("kl", [1e-3, 0.1, 1.0])
def test_the_bound_is_that_of_a_slow_search(p, kl):
    if (p, kl) == (0.05, 1.0):  # its q is below the grid
        return
    of = {"log_p": math.log(p), "log_rest": math.log1p(-p), "kl": kl}
    found = largest_distance(**{name: torch.tensor([value], dtype=torch.float64) for name, value in of.items()})
    assert found.item() == pytest.approx(slow_bound(p, kl), rel=2e-3)


def test_no_subnet_is_farther_than_the_bound_and_the_constant():
    generator = torch.Generator().manual_seed(0)
    main = 4 * torch.randn(4000, 10, generator=generator)
    scale = torch.logspace(-3, 0.5, 4000).unsqueeze(1)
    found = distances(main, main + scale * torch.randn(4000, 10, generator=generator), main.argmax(1))
    assert torch.all(found.gap <= found.bound * (1 + 1e-9) + 1e-12)
    constants = torch.tensor([constant(c, k) for c, k in zip(found.ce_main.tolist(), found.kl.tolist(), strict=True)])
    assert torch.all(found.bound <= constants * (1 + 1e-6) + 1e-12)
    assert constants.isfinite().sum() > 1000
    # It is the best that p and the divergence allow, so some come near to it.
    assert float((found.gap / found.bound).max()) > 0.9


def test_a_main_network_that_is_certain_bounds_by_the_divergence():
    """p = 1: the divergence is log(1 / q), and so is the distance."""
    found = distances(torch.tensor([[800.0, 0.0, 0.0]]), torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([0]))
    expected = math.log(1 + 2 / math.e)
    assert [round(getattr(found, name).item(), 9) for name in ("gap", "kl", "bound")] == [round(expected, 9)] * 3


def test_equal_predictions_have_no_distance():
    logits = torch.randn(50, 7, generator=torch.Generator().manual_seed(1))
    found = distances(logits, logits + 3, torch.arange(50) % 7)  # the same probabilities
    assert float(found.gap.max()) < 1e-6
    assert float(found.bound.max()) < 1e-2


# --- over a training


def test_each_checkpoint_is_evaluated(run):
    [opened] = open_alike([run])
    rows, notes = bound_rows([opened], subnets=2, split="train")
    assert [row.epoch for row in rows] == [1, 1, 2, 2]
    assert len({row.depths for row in rows}) == 2
    assert notes == []
    images, labels = zip(*opened.training.eval_batches("train"), strict=True)
    x, y = torch.cat(images), torch.cat(labels)
    last = rows[-1]  # the network has the last checkpoint's weights by now
    small = opened.subnet(unloaf.Subnet.from_depths(opened.training.stages, tuple(map(int, last.depths.split("-")))))
    with torch.no_grad():
        logits = [network.eval()(x).double() for network in (opened.network, small)]
    ces = [torch.nn.functional.cross_entropy(z, y, reduction="none") for z in logits]
    assert last.ce_main == pytest.approx(ces[0].mean().item(), rel=1e-6)
    assert last.gap == pytest.approx((ces[0] - ces[1]).abs().mean().item(), rel=1e-6)
    assert last.kl == pytest.approx(unloaf.kl_loss(logits[1], logits[0]).item(), rel=1e-6)
    assert all(row.gap <= row.bound and row.gap_median <= row.bound_median for row in rows)


def test_a_damaged_checkpoint_is_left_out_and_told(run, tmp_path):
    shutil.copytree(run, tmp_path / "st", symlinks=True)
    first = min((tmp_path / "st" / "checkpoints").glob("step-*"))
    (first / "model.safetensors").write_bytes(b"")
    rows, notes = bound_rows(open_alike([tmp_path / "st"]), subnets=1)
    assert [row.epoch for row in rows] == [2]
    assert f"{first.name} is left out" in notes[0]
    assert "kept checkpoints of 1 of its 2 epochs; to see the course over training give --checkpoint-hist 2" in notes[1]


def test_the_command_writes_table_and_picture(run, tmp_path, capsys):
    words = ["bound", run, "--subnets", 1, "--images", 64, "--device", "cpu", "--output", tmp_path / "b.csv"]
    code, out, err = in_process(capsys, *words, "--plot", tmp_path / "b.svg")
    assert (code, err) == (0, "")
    assert [line.split()[:3] for line in out.splitlines() if line.startswith(" st")] == [
        ["st", "ST", "1"],
        ["st", "ST", "2"],
    ]
    assert len(list(csv.DictReader((tmp_path / "b.csv").read_text().splitlines()))) == 2
    picture = (tmp_path / "b.svg").read_text()
    ElementTree.fromstring(picture)
    assert all(word in picture for word in ("bound", "gap", "epoch", ">st<"))
    texts = [
        "".join(text.itertext()).strip()
        for text in ElementTree.fromstring(picture).iter("{http://www.w3.org/2000/svg}text")
    ]
    assert "1" in texts
    assert not [text for text in texts if "$" in text]
    code, out, _ = in_process(capsys, *words, "--json")
    assert [row["epoch"] for row in json.loads(out)["rows"]] == [1, 2]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "give at least one run folder"),
        (["nowhere"], "nowhere is not a run"),
        (["{run}", "--subnets", "0"], "subnets 0: give at least 1"),
        (["{run}", "--images", "0"], "images 0: give at least 1"),
        (["{run}", "--plot", "{run}"], "is a folder"),
    ],
)
def test_bad_input_is_answered_in_a_line(run, words, said, capsys):
    code, out, err = in_process(capsys, "bound", *(word.format(run=run) for word in words))
    assert (code, out) == (2, "")
    assert said in err
    assert err.count("\n") == 1


def test_a_loss_without_probabilities_of_classes_is_refused(run, tmp_path):
    [opened] = open_alike([run])
    binary = replace(opened, config=replace(opened.config, bce_loss=True))
    with pytest.raises(ValueError, match="its loss is a binary one for each class"):
        bound_rows([binary])
