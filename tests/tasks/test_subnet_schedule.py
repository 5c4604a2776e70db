"""When a run trains subnets, and with what weight: by hand, over epochs, batches and resumptions."""

import json
import math
from dataclasses import replace

import pytest

import tiny
from unloaf.config import Config
from unloaf.engine.checkpoint import load_checkpoint, save_checkpoint
from unloaf.engine.checkpoint.capture import capture, restore
from unloaf.engine.loop import prepare, train_epoch
from unloaf.tasks.methods import build_method


def weights(**settings) -> list[float]:
    """The weight in each step of a run of four steps an epoch."""
    training = prepare(tiny.config(method="st", **settings), data=tiny.data(), model=tiny.network())
    return [training.method.weight_at(call) for call in range(training.config.epochs * 4)]


def test_constant_by_default():
    assert weights(subnet_weight=0.3) == [0.3] * 8


@pytest.mark.parametrize(
    ("settings", "weight"),
    [
        ({"method": "st"}, 1.0),
        ({"method": "st", "num_subnets": 3}, 1.0),
        ({"method": "st++"}, 1 / 6),
        ({"method": "st++", "num_subnets": 2}, 1 / 2),
        ({"method": "st++", "subnet_weight": 1.0}, 1.0),
        ({"method": "gkt"}, 1.0),
    ],
)
def test_by_default_the_subnets_of_stpp_weigh_one_together(settings, weight):
    training = prepare(tiny.config(**settings, subnet_inputs="same"), data=tiny.data(), model=tiny.network())
    assert training.method.subnet_weight == weight


def test_rising_and_falling_are_half_a_cosine_over_the_run():
    fall = [0.3 * (1 + math.cos(math.pi * step / 8)) / 2 for step in range(8)]
    assert weights(subnet_weight=0.3, subnet_schedule="falling") == pytest.approx(fall)
    assert weights(subnet_weight=0.3, subnet_schedule="rising") == pytest.approx([0.3 - weight for weight in fall])


def test_every_third_step():
    assert weights(subnet_interval=3) == [0, 0, 1, 0, 0, 1, 0, 0]


def test_epochs_with_subnets():
    assert weights(epochs=4, subnet_on_epoch=2, subnet_off_epoch=4) == [0] * 4 + [1] * 8 + [0] * 4
    assert weights(epochs=2, subnet_off_epoch=9) == [1] * 8


def test_a_cosine_lasts_as_long_as_there_are_subnets():
    seen = weights(epochs=3, subnet_on_epoch=2, subnet_off_epoch=3, subnet_schedule="rising")
    assert seen == pytest.approx([0] * 5 + [(1 - math.cos(math.pi * step / 4)) / 2 for step in (1, 2, 3)] + [0] * 4)


@pytest.mark.parametrize("method", ["st", "gkt"])
def test_subnets_see_the_share_of_the_batch_that_is_asked_for(method):
    training = prepare(tiny.config(method=method, subnet_batch_fraction=0.25), data=tiny.data(), model=tiny.network())
    assert {request.examples for request in training.method.draw(16, 8)} == {4}


def test_the_main_network_teaches_all_groups_if_asked_to():
    for teacher, needs in (("group", {(), (0,), (1,), (0, 3), (1, 4)}), ("main", {()})):
        training = prepare(tiny.config(method="gkt", teacher=teacher), data=tiny.data(), model=tiny.network())
        assert {request.needs for request in training.method.draw(16, 8)} == needs


@pytest.mark.parametrize("method", ["st", "gkt"])
def test_accumulated_batches_have_the_weight_of_their_step(method):
    """Two batches a step: with a count of batches, every step would have one of each kind."""
    rows = []
    settings = tiny.config(method=method, batch_size=8, grad_accum_steps=2, subnet_interval=2)
    training = prepare(settings, data=tiny.data(), model=tiny.network())
    while not training.finished:
        train_epoch(training, on_step=rows.append)
    names = {"st": ["main", "subnet0"], "gkt": ["main"] + [f"loop{i}_group{g}" for i in (0, 1) for g in (1, 2, 3)]}
    assert [list(row.terms) for row in rows] == [["main"], names[method]] * 4


def test_a_resumed_run_goes_on_with_the_schedule(tmp_path):
    settings = tiny.config(
        method="st", subnet_schedule="falling", subnet_interval=2, checkpoint_interval=1, output=str(tmp_path)
    )
    whole = tiny.run(replace(settings, name="whole")).path

    def stop(network, x) -> None:
        if network.training and network.calls == 6:
            raise KeyboardInterrupt
        network.calls += network.training

    network = tiny.network()
    network.calls, network.on_forward = 0, stop
    cut = replace(settings, name="cut")
    with pytest.raises(KeyboardInterrupt):
        tiny.run(cut, model=network)
    resumed = tiny.run(cut, resume="auto").path
    assert tiny.same(load_checkpoint(resumed / "last").weights, load_checkpoint(whole / "last").weights)
    for run in (whole, resumed):
        events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        terms = [list(event["terms"]) for event in events if event["event"] == "step"]
        assert terms == [["main"], ["main", "subnet0"]] * 4


@pytest.mark.parametrize("method", ["st", "gkt", "stochastic-depth"])
@pytest.mark.parametrize(("before", "after"), [(1, 1), (2, 1), (1, 2), (4, 1)])
def test_another_number_of_batches_a_step_leaves_the_schedule_where_it_was(tmp_path, method, before, after):
    """As another number of processes makes it with one global batch: 16 images a step in any case."""

    def begin(batches: int):
        settings = tiny.config(method=method, batch_size=16 // batches, global_batch_size=16, subnet_interval=2)
        return prepare(settings, data=tiny.data(), model=tiny.network())

    first, then, rows = begin(before), begin(after), []
    train_epoch(first)
    weights, state = capture(first)
    save_checkpoint(tmp_path / "checkpoints", first.steps_done, weights=weights, state=state)
    restore(then, load_checkpoint(tmp_path / "last"))
    assert then.method.step == 4 * after  # the batches of the four steps of the first epoch
    train_epoch(then, on_step=rows.append)
    if method != "stochastic-depth":
        assert [len(row.terms) > 1 for row in rows] == [False, True, False, True]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"subnet_on_epoch": 31}, "subnet_on_epoch 31 and subnet_off_epoch 0 leave no epoch of 30 that trains subnets"),
        ({"subnet_on_epoch": 5, "subnet_off_epoch": 5}, "subnet_on_epoch 5 and subnet_off_epoch 5 leave no epoch"),
        ({"subnet_interval": 0}, "subnet_interval 0: give at least 1"),
        ({"subnet_schedule": "up"}, "subnet_schedule 'up': give constant or rising or falling"),
    ],
)
def test_schedules_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        Config(**settings)


def test_a_method_without_a_run_has_no_schedule():
    network = tiny.network()
    with pytest.raises(ValueError, match="build_method needs steps_per_epoch"):
        build_method(Config(subnet_interval=2), network, ())


def test_a_schedule_without_a_step_that_trains_subnets_is_refused():
    assert sum(weights(epochs=2, subnet_interval=8)) == 1
    with pytest.raises(ValueError, match=r"subnet_interval 9: the 8 steps .* give a smaller one"):
        weights(epochs=2, subnet_interval=9)
    with pytest.raises(ValueError, match="subnet_interval 8: the 4 steps"):  # the 8th step is behind them
        weights(epochs=2, subnet_interval=8, subnet_off_epoch=2)
