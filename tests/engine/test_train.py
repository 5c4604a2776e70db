"""The training loop and its record, on a network small enough for a second."""

import csv
import io
import json
from dataclasses import replace

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file

from unloaf.engine.checkpoint import save_weights
from unloaf.engine.config import Config, load_config
from unloaf.engine.data import load_data
from unloaf.engine.errors import NonFiniteLossError
from unloaf.engine.fit import evaluate, fit, one_thread, prepare, train_epoch
from unloaf.engine.record import RunFolder
from unloaf.engine.train import train

TINY = Config(model="cifar/resnet14", width=4, epochs=1, batch_size=256, min_ratio=0.75, device="cpu")
METHODS = ["common", "stochastic-depth", "st", "st++", "gkt"]


@pytest.fixture(autouse=True, scope="module")
def single_thread():
    """Passes this small are not faster with two."""
    with one_thread():
        yield


@pytest.fixture(scope="module")
def digits():
    return load_data("digits")


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def plain_console():
    return Console(file=io.StringIO(), force_terminal=False)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_leaves_a_complete_run_folder(tmp_path, method):
    result = train(replace(TINY, method=method, output=str(tmp_path), name="run"), console=plain_console())
    assert result.path == tmp_path / "run"
    files = {"args.yaml", "env.json", "summary.csv", "metrics.jsonl", "log.txt", "model.safetensors"}
    assert {path.name for path in result.path.iterdir()} == files
    [row] = csv.DictReader((result.path / "summary.csv").read_text().splitlines())
    assert list(row) == ["epoch", "time", "train_loss", "eval_loss", "eval_top1", "eval_top5", "lr"]
    assert 0 <= float(row["eval_top1"]) <= float(row["eval_top5"]) <= 100
    events = [json.loads(line)["event"] for line in (result.path / "metrics.jsonl").read_text().splitlines()]
    assert events == ["epoch", "result"]


def test_saved_weights_give_the_reported_accuracy(tmp_path, digits):
    result = train(replace(TINY, output=str(tmp_path)), console=plain_console())
    training = prepare(TINY, data=digits)
    training.model.load_state_dict(load_file(result.path / "model.safetensors"))
    assert training.evaluate("test") == result.test


@pytest.mark.parametrize("method", METHODS)
def test_same_seed_gives_the_same_weights(digits, method):
    config = replace(TINY, method=method)
    first = weights(fit(config, data=digits).model)
    torch.rand(5)
    assert same(first, weights(fit(config, data=digits).model))


def test_another_seed_gives_other_weights(digits):
    assert not same(
        weights(prepare(TINY, data=digits).model), weights(prepare(replace(TINY, seed=1), data=digits).model)
    )


def test_methods_start_from_the_same_weights(digits):
    starts = [weights(prepare(replace(TINY, method=method), data=digits).model) for method in METHODS]
    assert all(same(starts[0], start) for start in starts)


def test_args_yaml_reproduces_the_run(tmp_path, digits):
    console = plain_console()
    first = train(replace(TINY, method="gkt", seed=5, output=str(tmp_path), name="a"), console=console)
    again = load_config(first.path / "args.yaml")
    second = train(replace(again, name="b"), console=console)
    names = [result.path / "model.safetensors" for result in (first, second)]
    assert same(*map(load_file, names))


def test_existing_run_folder_is_refused(tmp_path):
    config = replace(TINY, output=str(tmp_path), name="run")
    RunFolder(config)
    with pytest.raises(ValueError, match=r"run folder .*run exists; give another --name"):
        RunFolder(config)


def test_unwritable_output_is_refused(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"cannot make the run folder .*; give another --output"):
        RunFolder(replace(TINY, output=str(tmp_path / "file" / "below")))


def test_learning_rate_rises_linearly_and_falls_as_a_cosine(digits):
    config = replace(TINY, method="common", epochs=3, warmup_epochs=1, lr=0.4)
    seen = []
    training = fit(config, data=digits, on_step=lambda row: seen.append(row.lr))
    assert training.steps_per_epoch == 3  # 897 images, 256 to a step
    rise = [0.004, 0.4 * (0.01 + 0.99 / 3), 0.4 * (0.01 + 2 * 0.99 / 3)]
    fall = [0.4 * 0.5 * (1 + torch.tensor(step * torch.pi / 6).cos().item()) for step in range(6)]
    assert seen == pytest.approx(rise + fall, rel=1e-6)


def test_loss_that_is_not_finite_stops_before_the_step(digits):
    training = prepare(replace(TINY, method="common"), data=digits)
    training.method.criterion = lambda logits, y: logits.sum() * float("nan")
    before = weights(training.model)
    with pytest.raises(NonFiniteLossError, match="main is not finite in step 1 "):
        train_epoch(training, 1)
    parameters = dict(training.model.named_parameters())
    assert all(torch.equal(before[name], parameters[name]) for name in parameters)


def test_accuracy_by_hand():
    scores = torch.tensor([[3.0, 2.0, 1.0, 0, 0, 0], [0, 1, 2, 3, 4, 5], [5.0, 4, 3, 2, 1, 0]])
    labels = torch.tensor([0, 0, 1])  # first; last of six; second
    batches = [(scores[:2], labels[:2]), (scores[2:], labels[2:])]
    result = evaluate(torch.nn.Identity(), batches, criterion=lambda logits, y: (3.0 - y).mean())
    assert (result.top1, result.top5) == pytest.approx((100 / 3, 200 / 3))
    assert result.loss == pytest.approx((3 + 3 + 2) / 3)


def test_evaluation_puts_the_mode_back(digits):
    training = prepare(TINY, data=digits)
    training.model.train()
    training.evaluate("val")
    assert training.model.training


def test_weights_are_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    model = torch.nn.Linear(2, 2)
    save_weights(model, path)
    old = path.read_bytes()

    def no_space(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", no_space)
    with pytest.raises(OSError, match="No space left"):
        save_weights(torch.nn.Linear(2, 2), path)
    assert path.read_bytes() == old
    assert [file.name for file in tmp_path.iterdir()] == ["model.safetensors"]


def test_environment_names_versions_and_hardware(tmp_path):
    folder = RunFolder(replace(TINY, output=str(tmp_path)))
    env = json.loads((folder.path / "env.json").read_text())
    assert env["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert env["hardware"]
    assert yaml.safe_load((folder.path / "args.yaml").read_text())["model"] == "cifar/resnet14"
