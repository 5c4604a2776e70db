"""Multi-label classification and regression: lists of images, losses of subnets, figures, runs and refusals."""

import copy
import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import tiny
import unloaf
from unloaf.commands.main import main
from unloaf.config import Config
from unloaf.data import Batch
from unloaf.data.own_sets import load_columns
from unloaf.engine.loop import prepare, train_step
from unloaf.engine.run import train
from unloaf.runs.judge import judge_run
from unloaf.stages import find_stages
from unloaf.tasks.columns import Multilabel, Regression, label_scores, mean_average_precision, value_scores

NAN = float("nan")


def write(folder: Path, split: str, count: int, *, heads="file,red,bright", first=0) -> None:
    """Images of one colour, listed with two labels or numbers: red at all, and bright."""
    (folder / "images").mkdir(exist_ok=True, parents=True)
    lines = [heads]
    for at in range(first, first + count):
        red, bright = at % 2, (at // 2) % 2
        level = 200 if bright else 60
        colour = (level, 0, 0) if red else (0, level, level)
        Image.fromarray(np.full((12, 14, 3), colour, np.uint8)).save(folder / "images" / f"{at}.png")
        lines.append(f"images/{at}.png,{red},{bright}")
    (folder / f"{split}.csv").write_text("\n".join(lines) + "\n")


@pytest.fixture
def folder(tmp_path):
    write(tmp_path, "train", 32)
    write(tmp_path, "val", 8, first=100)
    return tmp_path


def config(folder, task="multilabel", **settings):
    usual = {"task": task, "dataset": "csv", "data_dir": str(folder), "model": "cifar/resnet14", "width": 4}
    usual |= {"img_size": 8, "batch_size": 8, "epochs": 2, "device": "cpu", "log_interval": 1, "recalibrate": 8}
    return Config(**usual | settings)


# --- lists


def test_a_list_is_read(folder):
    data = load_columns(config(folder))
    assert data.class_names == ("red", "bright")
    assert (len(data.train), len(data.val), len(data.test)) == (32, 8, 0)
    assert data.train.labels[:4].tolist() == [[0, 0], [1, 0], [0, 1], [1, 1]]
    assert data.train.name(3) == "images/3.png"
    assert data.train.open(3).getpixel((0, 0)) == (200, 0, 0)


def test_without_validation_images_some_are_held_out_and_shares_are_taken(folder):
    (folder / "val.csv").unlink()
    data = load_columns(config(folder, val_fraction=0.25, train_images=10))
    assert (len(data.train), len(data.val)) == (10, 8)
    assert "8 of 32 images are held out" in " ".join(data.notes)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "its first line must name the columns"),
        ("file\nimages/0.png\n", "its first line must name the columns"),
        ("file,a,a\nimages/0.png,1,1\n", "all of them different"),
        ("file,a,b\n", "lists no image"),
        ("file,a,b\nimages/0.png,1\n", "line 2: 2 cells, but there are 3 columns"),
        ("file,a,b\nimages/0.png,1,yes\n", "line 2: b is yes; give a finite number"),
        ("file,a,b\nimages/0.png,1,nan\n", "line 2: b is nan; give a finite number"),
        ("file,a,b\nimages/0.png,1,\n", "line 2: b is empty; give a finite number"),
        ("file,a,b\nimages/0.png,1,1\nimages/0.png,0,1\n", "lists images/0.png twice"),
        ("file,a,b\nimages/lost.png,1,1\n", "1 of its 1 images are not there, such as images/lost.png"),
        ("file,red,bright\nimages/0.png,1,2\n", "image images/0.png: column 2 is 2, but a label of task multilabel"),
    ],
)
def test_faults_of_a_list_are_told(folder, text, expected):
    (folder / "train.csv").write_text(text)
    with pytest.raises(ValueError, match=expected):
        load_columns(config(folder))


def test_splits_have_the_same_columns(folder):
    write(folder, "val", 8, heads="file,bright,red", first=100)
    with pytest.raises(ValueError, match="the columns of validation are bright, red, those of training red, bright"):
        load_columns(config(folder))


def test_labels_that_nothing_has_are_told(folder):
    (folder / "val.csv").write_text("file,red,bright\nimages/100.png,1,0\n")
    assert (
        "1 of 2 labels are in no validation image: bright, which its mAP leaves out"
        in load_columns(config(folder)).notes
    )
    (folder / "val.csv").write_text("file,red,bright\nimages/100.png,0,0\n")
    with pytest.raises(ValueError, match="no validation image has any of the 2 labels"):
        load_columns(config(folder))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"smoothing": 0.1}, "--smoothing: without effect in task multilabel"),
        ({"subnet_loss": "kl"}, "--subnet-loss: without effect"),
        ({"regression_loss": "l1"}, "--regression-loss: without effect in task multilabel"),
        ({"dataset": "cifar10"}, "task multilabel reads csv, or module:function of yours"),
        ({"task": "classification"}, "dataset 'csv' has columns of numbers; give --task multilabel"),
        ({"device_data": True}, "device_data holds small sets in memory"),
    ],
)
def test_settings_of_other_tasks_are_refused(tmp_path, settings, expected):
    with pytest.raises(ValueError, match=expected):
        config(tmp_path, **settings)


# --- losses of subnets


def test_kl_of_binary_predictions_by_hand():
    """Teacher 0.75 and 0.5, student 0.5 and 0.25: the mean of both, natural logarithms."""
    student, teacher = torch.tensor([[0.5, 0.25]]).logit(), torch.tensor([[0.75, 0.5]]).logit()
    first = 0.75 * np.log(0.75 / 0.5) + 0.25 * np.log(0.25 / 0.5)
    second = 0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)
    assert float(unloaf.bce_kl_loss(student, teacher)) == pytest.approx((first + second) / 2, rel=1e-6)


def losses_by_hand(task, output, y, teacher):
    if isinstance(task, Multilabel):
        p = teacher.detach().sigmoid()
        label = F.binary_cross_entropy(output.sigmoid(), y)
        kept = p * (p / output.sigmoid()).log() + (1 - p) * ((1 - p) / (1 - output.sigmoid())).log()
        return label, kept.mean()
    return ((output - y) ** 2).mean(), ((output - teacher.detach()) ** 2).mean()


@pytest.mark.parametrize("task", [Multilabel(), Regression()], ids=["multilabel", "regression"])
@pytest.mark.parametrize("method", ["st", "st-star", "gkt", "st++"])
def test_gradients_are_those_of_separate_passes(task, method):
    """The main network by the targets; subnets by what the main network says or, of ST*, by the targets too."""
    model = tiny.network(norm=False, dropout=0.0, classes=3).double()
    x = torch.rand(4, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = torch.randint(0, 2, (4, 3), generator=torch.Generator().manual_seed(2)).double()
    settings = Config(
        task="multilabel" if isinstance(task, Multilabel) else "regression", dataset="csv", data_dir="x",
        method=method, subnet_inputs="auto" if method == "gkt" else "same", num_subnets=None if method == "gkt" else 2,
        groups=1, teacher="main" if method == "gkt" else "group",
    )  # fmt: skip
    plain = copy.deepcopy(model)
    stages, apart = find_stages(model, x), find_stages(plain, x)
    step = task.method(settings, model, stages)
    out = step.backward(x, y)
    assert len(out.subnets) == 2
    main = plain(x)
    label, _ = losses_by_hand(task, main, y, main)
    label.backward()
    for subnet in out.subnets:
        with unloaf.active_subnet(plain, apart, subnet):
            found = plain(x)
        loss = losses_by_hand(task, found, y, main)[0 if method == "st-star" else 1]
        (loss * (0.5 if method == "st++" else 1.0)).backward()
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(one.grad, other.grad, rtol=0, atol=1e-10)


def test_absolute_error_is_a_setting(tmp_path):
    task = Regression()
    criterion, _ = task.losses(config(tmp_path, "regression", regression_loss="l1"))
    assert float(criterion(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 0.0]))) == 2.0
    criterion, distance = task.losses(config(tmp_path, "regression"))
    assert float(criterion(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 0.0]))) == 5.0
    assert float(distance(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 0.0]))) == 5.0


# --- figures


def test_map_by_hand():
    """Ranked 1, 0, 1: precision 1 at recall 1/2, 2/3 at recall 1; (1 + 2/3) / 2. A label that no image has is out."""
    scores = torch.tensor([[3.0, 0.0], [2.0, 1.0], [1.0, 2.0]])
    truth = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    assert mean_average_precision(scores, truth) == pytest.approx(5 / 6, rel=1e-9)


def test_figures_of_labels_are_those_of_torchmetrics():
    metrics = pytest.importorskip("torchmetrics.classification")
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 5, generator=generator), torch.randint(0, 2, (40, 5), generator=generator)
    left_out = y.float().clone()
    left_out[33:] = NAN  # as images that do not count
    found = label_scores(nn.Identity(), [Batch(x[:20], left_out[:20]), Batch(x[20:], left_out[20:])])
    expected = metrics.MultilabelAveragePrecision(5, average="macro")(x[:33].sigmoid(), y[:33])
    assert found.map == pytest.approx(100 * float(expected), abs=1e-4)
    assert found.loss == pytest.approx(float(F.binary_cross_entropy(x[:33].sigmoid(), y[:33].float())), rel=1e-5)


def test_figures_of_numbers_are_those_of_sklearn():
    from sklearn.metrics import mean_absolute_error, mean_squared_error, r2_score

    generator = torch.Generator().manual_seed(0)
    y = 1e4 + torch.randn(40, 2, generator=generator, dtype=torch.float64)  # far from 0: squares lose digits
    x = y + 0.5 * torch.randn(40, 2, generator=generator, dtype=torch.float64)
    kept = y.clone()
    kept[35:] = NAN
    parts = [Batch(x[:16], kept[:16]), Batch(x[16:], kept[16:])]
    found = value_scores(nn.Identity(), parts, y.mean(0) + 0.1)
    assert found.mae == pytest.approx(mean_absolute_error(y[:35], x[:35]), rel=1e-9)
    assert found.loss == pytest.approx(mean_squared_error(y[:35], x[:35]), rel=1e-9)
    assert found.r2 == pytest.approx(r2_score(y[:35], x[:35]), rel=1e-9)


def test_a_column_that_does_not_vary_has_no_r2():
    x = torch.tensor([[1.0], [2.0]])
    assert np.isnan(value_scores(nn.Identity(), [Batch(x, torch.tensor([[3.0], [3.0]]))], torch.tensor([3.0])).r2)


def test_a_network_that_gives_nan_has_no_figures():
    x, y = torch.tensor([[NAN], [2.0]]), torch.tensor([[0.0], [1.0]])
    assert np.isnan(label_scores(nn.Identity(), [Batch(x, y)]).map)
    assert np.isnan(value_scores(nn.Identity(), [Batch(x, y)], torch.zeros(1)).mae)


# --- runs


def steps(training, epoch):
    return [train_step(training, batches) for batches in training.batches.epoch(epoch)]


@pytest.mark.parametrize(("task", "chief"), [("multilabel", "eval_map"), ("regression", "eval_r2")])
def test_a_run_is_trained_resumed_and_evaluated(folder, task, chief, capsys):
    settings = config(folder, task, method="st", output=str(folder / "out"), name="run", epochs=1)
    train(settings, console=console())
    words = ["train", "--resume", str(folder / "out/run"), "--epochs", "2"]
    assert main(words) == 0
    rows = list(csv.DictReader((folder / "out/run/summary.csv").read_text().splitlines()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    judged = judge_run(folder / "out/run", subnets="2", device="cpu")
    assert float(rows[-1][chief]) == pytest.approx(getattr(judged.main["val"], chief[5:]), abs=1e-9)
    assert all(row.metric is not None and row.top1 is None for row in judged.judged)
    lines = (folder / "train.csv").read_text().splitlines()
    lines[1] = "images/0.png,1,0"
    (folder / "train.csv").write_text("\n".join(lines) + "\n")
    assert main([*words[:4], "3"]) == 2  # a label was changed
    assert "1 labelled otherwise (train/images/0.png)" in capsys.readouterr().err


def console():
    from rich.console import Console

    return Console(quiet=True)


def test_labels_are_learned(folder):
    training = prepare(config(folder, method="st", epochs=20, lr=0.05, augment="none"))
    first = training.evaluate("val").main.map
    for epoch in range(1, 21):
        steps(training, epoch)
    assert training.evaluate("val").main.map > max(90.0, first)


def test_predict_and_export_know_what_they_can_do(folder, capsys, tmp_path):
    for task in ("multilabel", "regression"):
        settings = config(folder, task, method="common", output=str(folder / "out"), name=task, epochs=1)
        train(settings, console=console())
    image = str(folder / "images/0.png")
    assert main(["predict", str(folder / "out/multilabel"), image, "--device", "cpu", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["images"][0]["classes"]
    assert set(found) == {"red", "bright"}
    assert main(["predict", str(folder / "out/regression"), image, "--device", "cpu"]) == 2
    assert "unloaf predict is for classification and multilabel" in capsys.readouterr().err
    assert main(["export", str(folder / "out/regression"), "--output", str(tmp_path / "x"), "--device", "cpu"]) == 0
    assert unloaf.load_subnet(tmp_path / "x")(torch.zeros(1, 3, 8, 8)).shape == (1, 2)


def test_check_data_lists_labels_and_bad_images(folder, capsys):
    assert main(["check-data", str(folder), "--dataset", "csv"]) == 0
    out = capsys.readouterr().out
    assert "train: 32 images, 32 labels, 2 classes: red 16, bright 16" in out
    (folder / "images/3.png").write_bytes(b"no image")
    assert main(["check-data", str(folder), "--dataset", "csv", "--task", "regression"]) == 2
    out = capsys.readouterr().out
    assert "train: 32 images, 2 columns: red, bright" in out
    assert "bad: images/3.png" in out
