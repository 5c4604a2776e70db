"""Optimizer, schedule, clipping, accumulation and moving average, by hand."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from timm.optim import list_optimizers

import tiny
from unloaf.engine import optimizer
from unloaf.engine.checkpoint import load_checkpoint, save_checkpoint
from unloaf.engine.checkpoint.capture import capture, restore
from unloaf.engine.loop import Training, prepare, train_epoch
from unloaf.models.build import build_model


def begin(model: torch.nn.Module | None = None, **settings: Any) -> Training:
    return prepare(tiny.config(**settings), data=tiny.data(), model=model or tiny.network())


def rates(**settings: Any) -> list[float]:
    """The learning rate of each step of a run."""
    training, seen = begin(method="common", lr=0.4, **settings), []
    while not training.finished:
        train_epoch(training, on_step=lambda row: seen.append(row.lr))
    return seen


def test_cosine_after_a_linear_warm_up_from_one_percent():
    rise = [0.4 * (0.01 + 0.99 * step / 4) for step in range(4)]
    fall = [0.4 * 0.5 * (1 + math.cos(math.pi * step / 8)) for step in range(8)]
    assert rates(epochs=3, warmup_epochs=1) == pytest.approx(rise + fall, rel=1e-6)


def test_cosine_without_a_warm_up_ends_at_min_lr():
    training = begin(method="common", lr=0.4, min_lr=0.1, epochs=1)
    train_epoch(training)
    assert training.optimizer.param_groups[0]["lr"] == pytest.approx(0.1)


def test_constant_schedule():
    assert rates(epochs=2, sched="constant") == [0.4] * 8


def test_step_schedule_counts_epochs_from_the_beginning_of_the_run():
    seen = rates(epochs=5, sched="step", decay_epochs=2)
    assert seen == pytest.approx([0.4] * 8 + [0.04] * 8 + [0.004] * 4)


def test_multistep_schedule_decays_at_its_milestones():
    seen = rates(epochs=4, sched="multistep", decay_milestones=(1, 3), decay_rate=0.5)
    assert seen == pytest.approx([0.4] * 4 + [0.2] * 8 + [0.1] * 4)


def test_warm_up_of_a_staircase_is_part_of_its_epochs():
    seen = rates(epochs=3, sched="multistep", decay_milestones=(2,), warmup_epochs=1, warmup_lr=0.2)
    assert seen == pytest.approx([0.2, 0.25, 0.3, 0.35] + [0.4] * 4 + [0.04] * 4)


@pytest.mark.parametrize("method", ["common", "st"])
def test_accumulated_batches_give_the_gradient_of_the_bigger_batch(method):
    """Without batch norm, dropout and the subnets' terms: each batch draws subnets of its own."""
    sides = [{"batch_size": 16, "grad_accum_steps": 2}, {"batch_size": 32}, {"batch_size": 16, "global_batch_size": 32}]
    parameters = []
    for side in sides:
        training = begin(tiny.network(norm=False, dropout=0.0), method=method, epochs=1, subnet_weight=0.0, **side)
        train_epoch(training)
        parameters.append(torch.cat([parameter.detach().flatten() for parameter in training.model.parameters()]))
    # float32 sums in another order, over two steps
    torch.testing.assert_close(parameters[0], parameters[1], rtol=1e-5, atol=1e-6)
    assert torch.equal(parameters[0], parameters[2])


def first_step(**settings: Any) -> torch.Tensor:
    """The first step of plain SGD with learning rate 1: the gradient as it was used."""
    training = begin(method="common", opt="momentum", momentum=0.0, weight_decay=0.0, lr=1.0, **settings)
    before = [parameter.detach().clone() for parameter in training.model.parameters()]
    used: list[torch.Tensor] = []

    def look(step: Any) -> None:
        if step.step == 1:
            after = training.model.parameters()
            used.extend((old - new.detach()).flatten() for old, new in zip(before, after, strict=True))

    train_epoch(training, on_step=look)
    return torch.cat(used)


def test_clipping_the_norm_makes_it_that_long():
    free, clipped = first_step(), first_step(clip_grad=0.01)
    assert free.norm() > 0.01
    torch.testing.assert_close(clipped, free * 0.01 / free.norm(), rtol=1e-3, atol=1e-7)  # differences of weights


def test_clipping_values_cuts_each():
    free, clipped = first_step(), first_step(clip_grad=0.001, clip_mode="value")
    torch.testing.assert_close(clipped, free.clamp(-0.001, 0.001), rtol=1e-3, atol=1e-7)


def test_adaptive_clipping_bounds_each_unit_by_its_weights():
    """Brock et al. 2021: |gradient of a unit| <= factor * max(|weights of the unit|, 0.001)."""
    training = begin(method="common", opt="momentum", momentum=0.0, weight_decay=0.0, lr=1.0, clip_grad=0.01,
                     clip_mode="agc", sched="constant")  # fmt: skip
    before, seen = training.model.head.weight.detach().clone(), []
    train_epoch(training, on_step=lambda row: seen.append(training.model.head.weight.detach().clone()))
    step = (before - seen[0]).norm(dim=1)
    assert (step <= 0.01 * before.norm(dim=1).clamp(min=1e-3) * 1.001).all()
    assert (step > 0).all()


def test_clipping_norm_leaves_short_gradients():
    assert torch.equal(first_step(clip_grad=1e6), first_step())


def test_moving_average_by_hand():
    """The first update copies the weights, as in timm; each later one moves half the way to them."""
    training = begin(method="common", model_ema=True, model_ema_decay=0.5, epochs=1)
    weight, average = training.model.head.weight, training.average.module.head.weight
    seen: list[torch.Tensor] = []
    averages: list[torch.Tensor] = []

    def look(row: Any) -> None:
        seen.append(weight.detach().clone())
        averages.append(average.clone())

    train_epoch(training, on_step=look)
    by_hand = [seen[0], (seen[0] + seen[1]) / 2, seen[0] / 4 + seen[1] / 4 + seen[2] / 2]
    for got, expected in zip(averages, by_hand, strict=False):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)  # roundings


def test_moving_average_is_judged_and_saved(tmp_path):
    config = tiny.config(output=str(tmp_path), name="run", epochs=1, model_ema=True, model_ema_decay=0.5)
    path = tiny.run(config).path
    weights = load_checkpoint(path / "last").weights
    assert weights["model"].keys() == weights["model_ema"].keys()
    assert not tiny.same(weights["model"], weights["model_ema"])
    assert "ema_top1" in (path / "summary.csv").read_text().splitlines()[0]


def decays(training: Training) -> dict[str, float]:
    names = {id(parameter): name for name, parameter in training.model.named_parameters()}
    return {
        names[id(p)]: group["weight_decay"] for group in training.optimizer.param_groups for p in group["params"]
    }  # fmt: skip


def test_norms_and_biases_decay_by_default():
    assert set(decays(begin(weight_decay=0.1)).values()) == {0.1}


def test_without_norm_decay_only_matrices_do():
    found = decays(begin(weight_decay=0.1, norm_decay=False))
    assert found.keys() == dict(tiny.network().named_parameters()).keys()
    for name, parameter in tiny.network().named_parameters():
        assert found[name] == (0.1 if parameter.ndim > 1 else 0.0), name


def test_unknown_optimizer_is_told_with_close_ones():
    with pytest.raises(ValueError, match=r"opt 'adamww': give adamw"):
        begin(opt="adamww")


def test_plain_sgd_without_momentum():
    training = begin(momentum=0.0, opt="sgd")
    assert training.optimizer.param_groups[0]["momentum"] == 0
    train_epoch(training)


def test_sgd_is_with_nesterov_momentum():
    assert begin(opt="sgd").optimizer.param_groups[0]["nesterov"]


def test_layer_decay_gives_the_layers_below_smaller_rates():
    """The last layer learns with lr, each one below with a factor of it (Clark et al. 2020, ELECTRA)."""
    model = build_model("timm/resnet18", num_classes=3, in_chans=1)
    training = begin(model, method="common", lr=0.1, layer_decay=0.5, sched="constant")
    scales = {id(p): g["lr_scale"] for g in training.optimizer.param_groups for p in g["params"]}
    head, stem = model.get_parameter("fc.weight"), model.get_parameter("conv1.weight")
    above = sorted(set(scales.values()), reverse=True)
    assert scales[id(head)] == 1.0
    assert scales[id(stem)] == above[-1]
    assert above == pytest.approx([0.5**n for n in range(len(above))])
    assert all(g["lr"] == pytest.approx(0.1 * g["lr_scale"]) for g in training.optimizer.param_groups)


def test_layer_decay_that_has_no_effect_is_refused():
    with pytest.raises(ValueError, match="layer_decay"):
        begin(layer_decay=0.5)


@pytest.mark.parametrize(("opt", "fused"), [("sgd", True), ("momentum", True), ("adamw", True), ("lamb", False)])
def test_on_an_accelerator_torchs_optimizers_update_all_weights_at_once(monkeypatch, opt, fused):
    def weights() -> torch.Tensor:
        training = begin(method="common", opt=opt, lr=0.01)
        assert training.optimizer.param_groups[0].get("fused") is (True if fused and chosen else None)
        train_epoch(training)
        return torch.cat([parameter.detach().flatten() for parameter in training.model.parameters()])

    chosen = False
    expected, decide = weights(), optimizer._fuses
    # The choice of an accelerator, made on this machine's CPU, which has the kernels too.
    monkeypatch.setattr(optimizer, "_fuses", lambda config, name, device: decide(config, name, torch.device("cuda")))
    chosen = True
    torch.testing.assert_close(weights(), expected, rtol=1e-4, atol=1e-5)


def test_float16_is_not_fused_because_its_overflows_must_be_noticed():
    settings = tiny.config(method="common", amp=True, amp_dtype="float16")
    assert not optimizer._fuses(settings, "sgd", torch.device("cuda"))
    assert optimizer._fuses(tiny.config(method="common", amp=True), "sgd", torch.device("cuda"))


@pytest.mark.parametrize("opt", ["sgd", "adamw", "lamb"])
@pytest.mark.parametrize("fused", [None, True])
def test_a_resumed_optimizer_keeps_its_kernel_and_the_strides_of_its_weights(opt, fused):
    """Checkpoints hold contiguous tensors; fused kernels take others for what they are not."""
    training = begin(method="common", opt=opt, channels_last=True)
    train_epoch(training)
    inner = training.optimizer.optimizer
    state = _contiguous(inner.state_dict())
    if "fused" not in state["param_groups"][0]:
        fused = None
    for group in state["param_groups"]:
        group.update({"fused": fused} if "fused" in group else {})  # as another device chose it
    fresh = begin(method="common", opt=opt, channels_last=True).optimizer.optimizer
    optimizer.load_optimizer(fresh, state)
    assert fresh.param_groups[0].get("fused") is None
    compared = 0
    for parameter, expected in zip(fresh.param_groups[0]["params"], inner.param_groups[0]["params"], strict=True):
        for name, value in fresh.state[parameter].items():
            if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                assert value.stride() == parameter.stride()
                assert torch.equal(value, inner.state[expected][name])
                compared += value.ndim == 4 and not value.is_contiguous()
    assert compared > 0


# What optimizers keep


class Pair(NamedTuple):
    first: torch.Tensor
    second: int


def test_captured_state_keeps_its_kinds_and_shares_no_memory():
    training = begin(method="common")
    weight, tensor = training.model.stem.weight, torch.ones(2)
    training.optimizer.optimizer.state[weight] = {"tuple": (tensor, 1), "list": [tensor, 1], "pair": Pair(tensor, 1)}
    _, state = capture(training)
    [kept] = state["optimizer"]["state"].values()
    assert {name: type(value) for name, value in kept.items()} == {"tuple": tuple, "list": list, "pair": Pair}
    tensor.zero_()
    assert all(torch.equal(value[0], torch.ones(2)) and value[1] == 1 for value in kept.values())


def test_optimizer_whose_state_no_checkpoint_holds_is_refused_before_training():
    with pytest.raises(ValueError, match=r"^opt adafactorbv cannot be kept in a checkpoint; .*dtype; give another"):
        begin(opt="adafactorbv")


def test_optimizer_of_second_derivatives_is_refused_by_name():
    with pytest.raises(ValueError, match=r"^opt adahessian: needs second derivatives"):
        begin(opt="adahessian")


def resumed_differs(opt: str, folder: Path) -> bool:
    """Whether a run that is saved after an epoch and continues elsewhere ends with other weights."""
    settings = {"method": "common", "opt": opt, "lr": 1e-3}
    whole, rest = begin(**settings), begin(**settings)
    train_epoch(whole)
    weights, state = capture(whole)
    save_checkpoint(folder / "checkpoints", whole.steps_done, weights=weights, state=state)
    restore(rest, load_checkpoint(folder / "last"))
    train_epoch(whole)
    train_epoch(rest)
    return not tiny.same(tiny.weights(whole.model), tiny.weights(rest.model))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of timm's optimizers, about torch's
def test_every_optimizer_that_is_accepted_resumes_to_the_bit(tmp_path):
    accepted, different = 0, []
    for opt in list_optimizers():
        try:
            begin(opt=opt)
        except ValueError:
            continue
        accepted += 1
        different += [opt] if resumed_differs(opt, tmp_path / opt) else []
    assert accepted > 50
    assert different == []


def _contiguous(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.contiguous().clone()
    if isinstance(value, dict):
        return {key: _contiguous(entry) for key, entry in value.items()}
    return [_contiguous(entry) for entry in value] if isinstance(value, (list, tuple)) else value
