"""A loss that is not finite, and float16 that overflows: nothing of the run is spoiled."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor

import tiny
from unloaf.commands import main as cli
from unloaf.engine.checkpoint import load_checkpoint
from unloaf.engine.checkpoint.capture import capture
from unloaf.engine.loop import Training, prepare, train_epoch, train_step
from unloaf.engine.run import train
from unloaf.errors import NonFiniteLossError, NonFiniteWeightsError


def begin(**settings: Any) -> Training:
    return prepare(tiny.config(**settings), data=tiny.data(), model=tiny.network())


def spoiled(loss: Callable[..., Tensor], call: int, value: float) -> Callable[..., Tensor]:
    """The loss, times a bad value in its so-many-th call."""
    calls = 0

    def spoil(*args: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return loss(*args) * (value if calls == call else 1)

    return spoil


def everything(training: Training) -> dict[str, Any]:
    return copy.deepcopy({
        "model": training.model.state_dict(),
        "optimizer": training.optimizer.optimizer.state_dict(),
        "method": training.method.state_dict(),
        "position": {name: at for name, at in vars(training.position).items() if name != "seconds"},
        "average": training.average.state_dict() if training.average else None,
    })  # fmt: skip


def train_until(training: Training, step: int) -> dict[str, Any]:
    """Trains; what there was after so many steps."""
    kept: dict[str, Any] = {}
    train_epoch(training, on_step=lambda row: kept.update(everything(training)) if row.step == step else None)
    return kept


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("method", "loss", "call", "term"),
    [
        ("common", "criterion", 3, "main"),
        ("stochastic-depth", "criterion", 3, "main"),
        ("st", "criterion", 3, "main"),
        ("st", "subnet_loss", 3, "subnet0"),
        ("st++", "subnet_loss", 15, r"subnet\d"),
        ("gkt", "subnet_loss", 14, "loop0_group2"),
        ("st-star", "loss", 5, "main"),
        ("st-star", "loss", 6, "subnet0"),
    ],
)
def test_run_is_as_after_the_last_finite_step(method, loss, call, term, value):
    settings = {"method": method, "model_ema": True, "model_ema_decay": 0.9}
    before = train_until(begin(**settings), 2)
    training = begin(**settings)
    setattr(training.method, loss, spoiled(getattr(training.method, loss), call, value))
    with pytest.raises(NonFiniteLossError, match=f"{term} is not finite in step 3 "):
        train_epoch(training)
    assert tiny.same(everything(training), before)
    assert all(parameter.grad is None for parameter in training.model.parameters())


def test_every_bad_term_is_named():
    training = begin(method="st")
    training.method.criterion = training.method.subnet_loss = lambda *args: args[0].sum() * float("nan")
    with pytest.raises(NonFiniteLossError, match=r"main, subnet0 is not finite in step 1 \(epoch 1\)") as raised:
        train_epoch(training)
    assert raised.value.terms.keys() == {"main", "subnet0"}


def poison(*steps: int) -> tiny.TinyNetwork:
    """A network whose predictions are NaN in these training passes."""
    network, passes = tiny.network(), 0

    def count(model: tiny.TinyNetwork, x: Tensor) -> None:
        nonlocal passes
        passes += model.training

    def spoil(head: torch.nn.Module, args: Any, out: Tensor) -> Tensor:
        return out * float("nan") if network.training and passes in steps else out

    network.on_forward = count
    network.head.register_forward_hook(spoil)
    return network


def command(monkeypatch: pytest.MonkeyPatch, network: tiny.TinyNetwork, *words: str) -> int:
    monkeypatch.setattr("unloaf.engine.run.train", partial(train, data=tiny.data(), model=network))
    usual = ["--device", "cpu", "-b", "16", "--log-interval", "1", "--epochs", "1", "--method", "common"]
    return cli.main(["train", *usual, "--name", "run", *words])


def test_command_exits_3_and_leaves_the_last_finite_weights(tmp_path, monkeypatch, capsys):
    finite = train_until(begin(method="common", lr=0.1, epochs=1), 2)
    assert command(monkeypatch, poison(3), "--output", str(tmp_path)) == 3
    checkpoint = load_checkpoint(tmp_path / "run" / "last")
    assert checkpoint.step == 2
    assert tiny.same(checkpoint.weights["model"], dict(finite["model"]))
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("unloaf: error: main is not finite in step 3 (epoch 1); the weights are those of the step ")


def test_command_goes_on_with_on_nan_skip_and_says_so(tmp_path, monkeypatch, capsys):
    assert command(monkeypatch, poison(2, 3), "--output", str(tmp_path), "--on-nan", "skip") == 0
    position = load_checkpoint(tmp_path / "run" / "last").state["position"]
    assert (position["skipped"], position["updates"]) == (2, 2)
    assert "step 2 left out" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["common", "st", "st++", "gkt"])
def test_left_out_step_leaves_its_mark_nowhere(method):
    """The steps after it are those of a run in which nothing was computed for it, its draws counted."""
    training = begin(method=method, on_nan="skip", model_ema=True, epochs=1, dataset="digits")
    training.method.criterion = spoiled(training.method.criterion, 2, float("nan"))
    row = train_epoch(training)
    twin = begin(method=method, model_ema=True, epochs=1)

    def jump_over_the_second(step: Any) -> None:
        if step.step == 1:
            twin.position.step += 1
            twin.position.skipped += 1
            twin.method.step += 1
            next(batches)

    batches = twin.batches.epoch(1)
    object.__setattr__(twin.batches, "epoch", lambda epoch, start: batches)
    train_epoch(twin, on_step=jump_over_the_second)
    got, expected = everything(training), everything(twin)
    for name in ("model", "average", "optimizer", "method"):
        assert tiny.same(got[name], expected[name]), name
    assert (training.position.skipped, training.position.updates, row.steps) == (1, 3, 4)


def test_train_loss_is_the_mean_over_the_steps_that_were_made():
    training, made = begin(method="common", on_nan="skip"), []
    training.method.criterion = spoiled(training.method.criterion, 2, float("nan"))
    row = train_epoch(training, on_step=lambda step: made.append(step.loss) if step.made else None)
    assert row.train_loss == pytest.approx(sum(made) / 3)


@pytest.mark.parametrize("notice", [lambda training, batch: capture(training), train_step], ids=["saving", "next step"])
def test_weights_that_a_gradient_spoiled_are_named_and_not_saved(notice):
    training = begin(method="common")
    loss = training.method.criterion
    # The root's slope at 0 is infinite, and infinity times 0 is no number.
    training.method.criterion = lambda logits, y: loss(logits, y) + (logits - logits).square().sum().sqrt()
    batches = list(training.batches.epoch(1))
    train_step(training, batches[0])
    with pytest.raises(NonFiniteWeightsError, match=r"is not finite after step 1: a gradient was not"):
        notice(training, batches[1])


def test_metrics_of_a_step_that_is_left_out_can_be_read(tmp_path, monkeypatch):
    command(monkeypatch, poison(2), "--output", str(tmp_path), "--on-nan", "skip")

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=refuse)


def scaled(training: Training, scale: float) -> Training:
    """The run with a loss scale, as float16 has it on an accelerator."""
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)
    training.accelerator.scaler = scaler
    optimizer = AcceleratedOptimizer(training.optimizer.optimizer, scaler=scaler)
    return replace(training, optimizer=optimizer)


@pytest.mark.parametrize("method", ["common", "stochastic-depth", "st", "st++", "gkt"])
def test_all_terms_share_the_loss_scale(method):
    """A power of two, so that scaling and unscaling lose no bit: the weights are those without it."""
    plain, training = begin(method=method, grad_accum_steps=2), scaled(begin(method=method, grad_accum_steps=2), 1024.0)
    train_epoch(plain)
    train_epoch(training)
    assert tiny.same(dict(training.model.state_dict()), dict(plain.model.state_dict()))


def test_a_scaled_step_is_made_after_another_loop_of_the_process_that_accumulated():
    """accelerate has one state for all loops of a process."""
    plain, training = begin(), scaled(begin(), 1024.0)
    training.accelerator.sync_gradients = False
    train_epoch(plain)
    train_epoch(training)
    assert tiny.same(dict(training.model.state_dict()), dict(plain.model.state_dict()))


def test_reported_losses_are_without_the_scale():
    losses: list[list[float]] = [[], []]
    for training, seen in zip((begin(), scaled(begin(), 1024.0)), losses, strict=True):
        train_epoch(training, on_step=lambda row, seen=seen: seen.append(row.loss))
    assert losses[0] == losses[1]


def overflowing(training: Training) -> Training:
    """The run with a loss scale of 1024 under which the gradients of the first step are infinite."""
    bias = training.model.get_parameter("head.bias")
    bias.register_hook(lambda gradient: gradient * (float("inf") if training.position.step == 0 else 1))
    return scaled(training, 1024.0)


def test_overflow_is_counted_and_moves_neither_schedule_nor_average():
    training = overflowing(begin(model_ema=True, model_ema_decay=0.5))
    before, made, rates = tiny.weights(training.average.module), [], []

    def look(row: Any) -> None:
        made.append(row.made)
        rates.append(row.lr)
        if row.step == 1:
            assert tiny.same(tiny.weights(training.average.module), before)
            assert (training.position.updates, training.position.skipped) == (0, 1)

    train_epoch(training, on_step=look)
    assert made == [False, True, True, True]
    assert rates[1] == rates[0] > rates[2]
    assert (training.position.updates, training.position.skipped) == (3, 1)
    assert training.accelerator.scaler.get_scale() == 512


def test_overflow_leaves_weights_and_optimizer():
    training = overflowing(begin())
    parameters = {name: parameter.detach().clone() for name, parameter in training.model.named_parameters()}

    def look(row: Any) -> None:
        if row.step == 1:
            assert tiny.same({name: p.detach() for name, p in training.model.named_parameters()}, parameters)
            assert not training.optimizer.optimizer.state_dict()["state"]

    train_epoch(training, on_step=look)


def always(value: float, *, until: int = 10**9) -> Callable[..., Tensor]:
    """A criterion that is not finite in its first calls."""
    calls = 0

    def loss(logits: Tensor, target: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return torch.nn.functional.cross_entropy(logits, target) * (value if calls <= until else 1)

    return loss


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_epoch_without_a_step_ends_the_run_where_steps_are_left_out(value):
    training = begin(method="common", on_nan="skip")
    before = tiny.weights(training.model)
    training.method.criterion = always(value)
    with pytest.raises(NonFiniteLossError, match=r"^epoch 1: a loss was not finite in each of its 4 steps, so none"):
        train_epoch(training)
    assert tiny.same(tiny.weights(training.model), before)


def test_epoch_of_one_step_goes_on_where_steps_are_left_out():
    training = begin(method="common", on_nan="skip")
    training.method.criterion = always(float("nan"), until=3)
    row = train_epoch(training)
    assert training.position.epoch == 2
    assert 0 < row.train_loss < 10


def test_later_epoch_without_a_step_ends_the_run_as_well():
    training = begin(method="common", on_nan="skip")
    train_epoch(training)
    training.method.criterion = always(float("nan"))
    with pytest.raises(NonFiniteLossError, match=r"^epoch 2: a loss was not finite in each of its 4 steps"):
        train_epoch(training)
