"""All subnets of a run: each figure against another way to have it, on a tiny network."""

import io
import json
import math
from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from rich.console import Console
from torchmetrics.classification import BinaryAUROC, MulticlassCalibrationError

import unloaf
from unloaf.analysis.runs import open_alike
from unloaf.analysis.subnets import (
    BINS,
    calibration_error,
    disagreement,
    separation,
    stage_means,
    subnet_analysis,
    subnet_analysis_table,
    unknown_images,
)
from unloaf.commands.main import main
from unloaf.config import Config
from unloaf.engine.run import train
from unloaf.pages.subnets import depth_maps, subnet_analysis_picture


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A ResNet-14 after an epoch of ST: 8 ordered subnets."""
    tiny = {"model": "cifar/resnet14", "width": 2, "batch_size": 64, "device": "cpu", "epochs": 1, "recalibrate": 64}
    output = str(tmp_path_factory.mktemp("runs"))
    return train(Config(**tiny, name="st", output=output), console=Console(file=io.StringIO())).path


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """Images of noise in folders."""
    folder = tmp_path_factory.mktemp("noise")
    for split, number in product(("train", "val"), range(24)):
        path = folder / split / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = torch.randint(256, (12, 12, 3), generator=torch.Generator().manual_seed(number), dtype=torch.uint8)
        Image.fromarray(noise.numpy()).save(path)
    return folder


@pytest.fixture(scope="module")
def run(folder):
    [opened] = open_alike([folder], device="cpu")
    return opened


@pytest.fixture(scope="module")
def rows(run, elsewhere):
    return subnet_analysis(run, against=unknown_images(run, str(elsewhere), None), timed=False)


def test_calibration_error_is_that_of_torchmetrics():
    torch.manual_seed(0)
    p, y = torch.randn(500, 7).mul(2).softmax(1), torch.randint(7, (500,))
    theirs = MulticlassCalibrationError(7, n_bins=BINS, norm="l1")(p, y)
    assert calibration_error(p, y) == pytest.approx(100 * float(theirs), rel=1e-5)


def test_a_sure_network_that_is_right_is_calibrated():
    assert calibration_error(torch.eye(3), torch.arange(3)) == 0
    assert calibration_error(torch.eye(3), torch.tensor([1, 2, 0])) == 100


def test_separation_is_that_of_torchmetrics():
    torch.manual_seed(0)
    known, unknown = torch.randn(40), torch.randn(30) + 1
    truth = torch.cat([torch.zeros(40), torch.ones(30)]).int()
    theirs = BinaryAUROC()(torch.cat([known, unknown]).sigmoid(), truth)
    assert separation(known, unknown) == pytest.approx(100 * float(theirs), rel=1e-5)


def test_networks_that_agree_do_not_disagree():
    p = torch.randn(3, 5, 4, dtype=torch.float64).softmax(-1)
    same = p[:1].expand(3, -1, -1)
    assert disagreement(same.mean(0), torch.xlogy(same, same).sum(-1).mean(0)).abs().max() < 1e-12
    by_hand = torch.stack([F.kl_div(p.mean(0).log(), each, reduction="none").sum(1) for each in p]).mean(0)
    assert disagreement(p.mean(0), torch.xlogy(p, p).sum(-1).mean(0)) == pytest.approx(by_hand.numpy())


def test_every_row_by_other_means(run, rows, elsewhere):
    batches = run.training.eval_batches("val")
    images, labels = (torch.cat(part) for part in zip(*((b.x, b.y) for b in batches), strict=True))
    noise = torch.cat([batch.x for batch in unknown_images(run, str(elsewhere), None)])
    stages, known, other = run.training.stages, [], []
    for depths in ("2-2-2", *(row.depths for row in rows[1:-1])):
        subnet = unloaf.Subnet.from_depths(stages, tuple(map(int, depths.split("-"))))
        network = (run.network if depths == "2-2-2" else run.subnet(subnet)).eval()
        with torch.no_grad():
            known.append(network(images).double().softmax(1))
            other.append(network(noise).double().softmax(1))
    assert len(rows) == 9
    for row, p, q in zip(rows, [*known, torch.stack(known).mean(0)], [*other, torch.stack(other).mean(0)], strict=True):
        assert row.top1 == pytest.approx(100 * float((p.argmax(1) == labels).double().mean()))
        assert row.loss == pytest.approx(float(F.nll_loss(p.log(), labels)), rel=1e-6)
        assert row.agreement == pytest.approx(100 * float((p.argmax(1) == known[0].argmax(1)).double().mean()))
        pairs = (p.amax(1)[:, None] > q.amax(1)).double() + 0.5 * (p.amax(1)[:, None] == q.amax(1)).double()
        assert row.unknown == pytest.approx(100 * float(pairs.mean()), abs=0.05)
    assert [row.kind for row in rows] == ["main", *["subnet"] * 7, "ensemble"]
    assert rows[-1].gmacs == pytest.approx(sum(row.gmacs for row in rows[:-1]))
    assert [row.disagreement is None for row in rows] == [*[True] * 8, False]


def test_the_front_is_what_nothing_beats(rows):
    networks = rows[:-1]
    for row in networks:
        beaten = any(
            (other.gmacs <= row.gmacs and other.top1 >= row.top1) and (other.gmacs, other.top1) != (row.gmacs, row.top1)
            for other in networks
        )
        assert row.pareto == (not beaten)


def test_means_by_two_stages_are_those_of_the_rows(rows):
    found = stage_means(rows)
    assert list(found) == [(0, 1), (0, 2), (1, 2)]
    tops = [row.top1 for row in rows[:-1] if row.depths.startswith("1-2-")]
    assert found[0, 1][1, 2] == pytest.approx(math.fsum(tops) / 2)


def test_pictures_show_every_panel(rows):
    text = subnet_analysis_picture(rows)
    assert [head in text for head in ("GMACs of an image", "latency of an image, ms", "ECE, %", "agreement, %")] == [
        True, False, True, True,
    ]  # fmt: skip
    assert depth_maps(rows).count("blocks of stage 1<") == 2
    heads, lines = subnet_analysis_table(rows)
    assert "ms" not in heads
    assert lines[-1][0] == "8 networks (ensemble)"


def test_the_command_writes_json_page_and_picture(folder, elsewhere, tmp_path, capsys):
    words = [
        "subnets",
        str(folder),
        "--all",
        "--device",
        "cpu",
        "--against",
        str(elsewhere),
        "--repeats",
        "1",
        "--json",
    ]
    page = tmp_path / "s.html"
    assert main([*words, "--output", str(page), "--plot", str(tmp_path / "s.svg")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["kind"] for row in found["rows"]] == ["main", *["subnet"] * 7, "ensemble"]
    assert all(row["latency_ms"] > 0 for row in found["rows"][:-1])
    assert "by how much the networks disagree" in found["notes"][-1]
    assert page.read_text().count('role="img"') == 2
    assert (tmp_path / "s.svg").read_text().startswith("<svg")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--against", "digits"], "against is for all subnets of a run; give --all with it"),
        (["--all", "--against", "nothing"], "dataset"),
        (["--all", "--repeats", "-1"], "repeats -1: give at least 0"),
    ],
)
def test_bad_input_is_answered(folder, more, said, capsys):
    assert main(["subnets", str(folder), "--device", "cpu", *more]) == 2
    err = capsys.readouterr().err
    assert said in err
    assert err.count("\n") == 1


def test_a_model_has_no_analysis(capsys):
    assert main(["subnets", "cifar/resnet20", "--all"]) == 2
    assert "cifar/resnet20 is a model; --all is for a run, which is trained" in capsys.readouterr().err


def test_images_of_other_channels_are_refused(run, monkeypatch):
    from unloaf.analysis import subnets
    from unloaf.data.images import ImageSet

    coloured = ImageSet(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64))
    monkeypatch.setattr(subnets, "load_data", lambda config: replace(run.training.data, val=coloured))
    with pytest.raises(ValueError, match="its images have 3 channels, those of the run 1"):
        unknown_images(run, "digits", None)
