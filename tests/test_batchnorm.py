"""Running statistics: re-estimated as plain averages, left alone by subnet passes."""

import contextlib
import copy
from collections import UserDict

import pytest
import timm
import torch
from torch import nn

import unloaf
from toy_networks import ToyNetwork
from unloaf.batchnorm import Statistics


def batches(count=3, shape=(4, 2)):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) * (i + 1) + i for i in range(count)]


def statistics(model):
    return {key: value.clone() for key, value in model.state_dict().items() if "running" in key or "tracked" in key}


def equal(one, another):
    return one.keys() == another.keys() and all(torch.equal(one[key], another[key]) for key in one)


# --- recalibrate_bn


def test_means_are_averages_of_batch_means():
    norm, data = nn.BatchNorm1d(2), batches()
    unloaf.recalibrate_bn(nn.Sequential(norm), data)
    torch.testing.assert_close(norm.running_mean, torch.stack([x.mean(0) for x in data]).mean(0))


def test_variances_are_averages_of_unbiased_batch_variances():
    norm, data = nn.BatchNorm1d(2), batches()
    unloaf.recalibrate_bn(nn.Sequential(norm), data)
    torch.testing.assert_close(norm.running_var, torch.stack([x.var(0, unbiased=True) for x in data]).mean(0))


def weighted(values, sizes):
    return sum(size * value for size, value in zip(sizes, values, strict=True)) / sum(sizes)


def of_sizes(*sizes, more=()):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn((size, 2, *more), generator=generator) * (i + 1) + 3 * i for i, size in enumerate(sizes)]


RAGGED = {
    "a short last one": (nn.BatchNorm1d, of_sizes(64, 64, 2), (0,)),
    "a short first one": (nn.BatchNorm1d, of_sizes(2, 64, 64), (0,)),
    "images, one alone": (nn.BatchNorm2d, of_sizes(8, 1, 3, more=(3, 3)), (0, 2, 3)),
    "a norm of timm": (timm.layers.BatchNormAct2d, of_sizes(8, 8, 3, more=(3, 3)), (0, 2, 3)),
}


@pytest.mark.parametrize(("norm", "data", "axes"), RAGGED.values(), ids=RAGGED)
@pytest.mark.parametrize("kind", ["tensors", "mappings"])
def test_a_batch_counts_by_its_examples(norm, data, axes, kind):
    model = Named(norm(2))
    sizes = [len(x) for x in data]
    given = data if kind == "tensors" else [{"scale": torch.tensor(1.0), "pixels": x} for x in data]
    unloaf.recalibrate_bn(model, given)
    torch.testing.assert_close(model.norm.running_mean, weighted([x.mean(axes) for x in data], sizes))
    torch.testing.assert_close(model.norm.running_var, weighted([x.var(axes) for x in data], sizes))
    assert int(model.norm.num_batches_tracked) == len(data)


@pytest.mark.parametrize("momentum", [0.6, 0.9, 1.0])
def test_a_high_momentum_of_torch_means_the_new_batch(momentum):
    norm = nn.BatchNorm1d(1, affine=False, momentum=momentum)
    unloaf.recalibrate_bn(nn.Sequential(norm), [torch.zeros(8, 1), torch.full((2, 1), 10.0)])
    assert float(norm.running_mean) == 2.0  # (8 x 0 + 2 x 10) / 10


def test_tracking_instance_norms_count_examples_too():
    norm, data = nn.InstanceNorm1d(2, track_running_stats=True), of_sizes(4, 1, 3, more=(5,))
    unloaf.recalibrate_bn(nn.Sequential(norm), data)
    torch.testing.assert_close(norm.running_mean, weighted([x.mean((0, 2)) for x in data], [4, 1, 3]))


def test_equal_batches_give_the_bits_of_torchs_cumulative_average():
    norm, twin = nn.BatchNorm1d(2), nn.BatchNorm1d(2, momentum=None)
    for x in of_sizes(*[7] * 9):
        twin(x)
    unloaf.recalibrate_bn(nn.Sequential(norm), of_sizes(*[7] * 9))
    assert equal(statistics(norm), statistics(twin))


def test_earlier_statistics_are_forgotten():
    norm, data = nn.BatchNorm1d(2), batches()
    norm.running_mean.fill_(1e6)
    unloaf.recalibrate_bn(nn.Sequential(norm), data)
    assert float(norm.running_mean.max()) < 100


def test_batches_are_counted():
    norm = nn.BatchNorm1d(2)
    norm.num_batches_tracked.fill_(77)
    assert unloaf.recalibrate_bn(nn.Sequential(norm), iter(batches(5))) == 5
    assert int(norm.num_batches_tracked) == 5


def test_a_later_norm_sees_what_an_earlier_one_makes_of_the_batch():
    model, data = nn.Sequential(nn.BatchNorm1d(2), nn.Tanh(), nn.BatchNorm1d(2)), batches()
    unloaf.recalibrate_bn(model, data)
    seen = [torch.tanh((x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-5).sqrt()).mean(0) for x in data]
    torch.testing.assert_close(model[2].running_mean, torch.stack(seen).mean(0))


def test_dropout_is_off():
    model = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm1d(2)).train()
    data = batches()
    unloaf.recalibrate_bn(model, data)
    torch.testing.assert_close(model[1].running_mean, torch.stack([x.mean(0) for x in data]).mean(0))


def test_tuples_of_a_loader_are_unpacked():
    one, another = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    unloaf.recalibrate_bn(nn.Sequential(one), batches())
    unloaf.recalibrate_bn(nn.Sequential(another), [(x, torch.zeros(4)) for x in batches()])
    assert torch.equal(one.running_mean, another.running_mean)


class Named(nn.Module):
    """Takes its input by name, as models of transformers do."""

    def __init__(self, norm):
        super().__init__()
        self.norm = norm

    def forward(self, pixels, scale=1.0):
        return self.norm(pixels * scale)


@pytest.mark.parametrize("kind", [dict, UserDict])
def test_mappings_are_keyword_arguments(kind):
    one, another = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    unloaf.recalibrate_bn(one, batches())
    unloaf.recalibrate_bn(Named(another), [kind(pixels=x) for x in batches()])
    assert torch.equal(one.running_mean, another.running_mean)


def test_tracking_instance_norms_are_re_estimated_too():
    norm, data = nn.InstanceNorm1d(2, track_running_stats=True), batches(shape=(4, 2, 5))
    unloaf.recalibrate_bn(nn.Sequential(norm), data)
    torch.testing.assert_close(norm.running_mean, torch.stack([x.mean((0, 2)) for x in data]).mean(0))


def test_inside_a_subnet_its_own_activations_count():
    model = ToyNetwork(norm=True)
    x = torch.randn(8, 4)
    stages = unloaf.find_stages(model, x)
    with unloaf.active_subnet(model, stages, unloaf.Subnet(((True, False, True), (True, True, True)))):
        unloaf.recalibrate_bn(model, [x])
    norm = copy.deepcopy(model.first[0]).train()
    torch.testing.assert_close(model.first[2].norm.running_mean, model.first[2].inner(norm(x)).mean(0))


def fails_at_second(data):
    yield data[0]
    raise ZeroDivisionError


@pytest.mark.parametrize("source", [batches, lambda: fails_at_second(batches())], ids=["done", "failed"])
def test_training_flags_and_momenta_are_restored(source):
    model = nn.Sequential(nn.BatchNorm1d(2, momentum=0.3), nn.Dropout(), nn.BatchNorm1d(2, momentum=None)).train()
    model[2].eval()
    with contextlib.suppress(ZeroDivisionError):
        unloaf.recalibrate_bn(model, source())
    assert [module.training for module in model] == [True, True, False]
    assert [model[0].momentum, model[2].momentum] == [0.3, None]


def test_no_gradient_is_computed():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    seen = []
    model.register_forward_hook(lambda _, args, out: seen.append(out.requires_grad))
    unloaf.recalibrate_bn(model, batches(1))
    assert seen == [False]


def test_parameters_are_left_alone():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    unloaf.recalibrate_bn(model, batches())
    assert all(map(torch.equal, model.parameters(), before))


@pytest.mark.parametrize("norm", [nn.LayerNorm(2), nn.BatchNorm1d(2, track_running_stats=False)])
def test_a_model_without_running_statistics_uses_no_batch(norm):
    assert unloaf.recalibrate_bn(nn.Sequential(norm), batches()) == 0


def test_no_batch_is_refused_and_changes_nothing():
    model = nn.Sequential(nn.BatchNorm1d(2))
    model(batches()[0])
    before = statistics(model)
    with pytest.raises(ValueError, match=r"no batch was given.*at least one"):
        unloaf.recalibrate_bn(model, [])
    assert equal(statistics(model), before)


# --- Statistics.frozen

NORMS = {
    "batch": (lambda: nn.BatchNorm1d(2), (4, 2)),
    "batch, cumulative": (lambda: nn.BatchNorm1d(2, momentum=None), (4, 2)),
    "timm": (lambda: timm.layers.BatchNormAct2d(2), (4, 2, 3, 3)),
    "instance": (lambda: nn.InstanceNorm1d(2, track_running_stats=True), (4, 2, 5)),
}


@pytest.mark.parametrize("name", NORMS)
def test_frozen_statistics_stay_bit_equal(name):
    build, shape = NORMS[name]
    norm = build().train()
    norm(torch.randn(shape))
    before = statistics(norm)
    with Statistics(norm).frozen():
        norm(torch.randn(shape))
    assert equal(statistics(norm), before)


@pytest.mark.parametrize("name", NORMS)
def test_frozen_passes_use_the_statistics_of_the_batch(name):
    build, shape = NORMS[name]
    norm, x = build().train(), torch.randn(shape) * 3 + 5
    with Statistics(norm).frozen():
        frozen = norm(x)
    torch.testing.assert_close(frozen, build().train()(x), rtol=0, atol=0)


def test_frozen_passes_in_eval_mode_use_running_statistics():
    norm = nn.BatchNorm1d(2).eval()
    with Statistics(norm).frozen():
        y = norm(torch.full((4, 2), 5.0))
    torch.testing.assert_close(y, torch.full((4, 2), 5.0 / (1 + 1e-5) ** 0.5))


@pytest.mark.parametrize("name", NORMS)
def test_statistics_move_again_after_an_exception(name):
    build, shape = NORMS[name]
    norm = build().train()
    before = statistics(norm), copy.copy(norm.__dict__)
    with pytest.raises(ZeroDivisionError), Statistics(norm).frozen():
        raise ZeroDivisionError
    assert norm.__dict__ == before[1]
    norm(torch.randn(shape) + 5)
    assert not equal(statistics(norm), before[0])


# --- a training run


def small_resnet():
    torch.manual_seed(0)
    options = {"channels": (64, 8, 8, 8), "zero_init_last": False}
    return timm.create_model("resnet18", num_classes=5, layers=(2, 3, 2, 1), **options)


@pytest.fixture
def _one_thread():
    """Threads that wait for each other on a busy machine make these many small operations ten times slower."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize("one_graph", [False, True], ids=["lean", "one graph"])
def test_running_statistics_after_20_steps_are_those_of_the_main_passes_alone(one_graph):
    model, twin = small_resnet(), small_resnet()
    stages = unloaf.find_stages(model, torch.randn(2, 3, 16, 16))
    method = unloaf.stimulative_plus(model, stages, num_subnets=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(20):
        x, y = torch.randn(4, 3, 16, 16), torch.randint(5, (4,))
        with torch.no_grad():  # the twin sees the weights of this step, and its main pass alone
            for mine, theirs in zip(twin.parameters(), model.parameters(), strict=True):
                mine.copy_(theirs)
            twin.train()(x)
        optimizer.zero_grad()
        if one_graph:
            method(x, y).loss.backward()
        else:
            method.backward(x, y)
        optimizer.step()
    assert int(model.bn1.num_batches_tracked) == 20
    assert equal(statistics(model), statistics(twin))
