"""Buffers that passes move, whatever they are: subnet passes begin as the main pass did and leave what it left."""

import copy
import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
from tests.reference.separate_passes import logits_of_subnet
from torch import nn
from torch.nn.utils import parametrizations

import unloaf

WIDTH = 4
# Of the global norm; float64 rounding is about 1e-15, but timm's EvoNorm takes the variance in float32.
TOLERANCE = {"EvoNorm": 1e-7}


class Renorm(nn.BatchNorm1d):
    """Batch renormalisation (Ioffe 2017): in training mode it reads the statistics that it moves."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        mean, var = x.mean(0), x.var(0, unbiased=False)
        r, d = (var / self.running_var).sqrt().detach(), ((mean - self.running_mean) / self.running_var.sqrt()).detach()
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var, self.momentum)
        return self.weight * ((x - mean) / (var + self.eps).sqrt() * r + d) + self.bias


class Assigned(nn.Module):
    """A norm that puts new statistics in the place of the old ones, and reads them."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(WIDTH))

    def forward(self, x):
        if self.training:
            self.scale = 0.5 * self.scale + 0.5 * x.detach().std(0)
        return x / self.scale


class Counted(nn.Module):
    """What it does depends on how many passes there were."""

    def __init__(self):
        super().__init__()
        self.register_buffer("passes", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        self.passes += 1
        return x * (1 + 1 / self.passes)


class Grown(nn.Module):
    """A table that is built where an input needs it, as transformers do; an attribute tells how large it is."""

    def __init__(self):
        super().__init__()
        self.register_buffer("table", torch.zeros(1))
        self.known = 1

    def forward(self, x):
        if self.known < x.shape[-1]:
            self.known = x.shape[-1]
            self.register_buffer("table", torch.arange(self.known).to(x))
        return x + self.table


def linear(wrap):
    return lambda: wrap(nn.Linear(WIDTH, WIDTH))


KINDS = {
    "batch norm": lambda: nn.BatchNorm1d(WIDTH),
    "EvoNorm": lambda: nn.Sequential(nn.Unflatten(1, (WIDTH, 1, 1)), timm.layers.EvoNorm2dB0(WIDTH), nn.Flatten()),
    "batch renormalisation": lambda: Renorm(WIDTH),
    "spectral_norm": linear(parametrizations.spectral_norm),
    "spectral_norm, hook": linear(nn.utils.spectral_norm),
    "fake quantisation": lambda: torch.ao.quantization.FakeQuantize(torch.ao.quantization.MovingAverageMinMaxObserver),
    "assigned": Assigned,
    "counted": Counted,
    "grown": Grown,
}


class Block(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.before, self.inside = nn.Linear(WIDTH, WIDTH), kind()
        self.behind = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x + self.behind(torch.tanh(self.inside(self.before(x))))


def case(kind):
    """A network of four blocks with a module of the kind in front, whose buffers have moved before."""
    torch.manual_seed(0)
    model = nn.Sequential(KINDS[kind](), *(Block(KINDS[kind]) for _ in range(4)), nn.Linear(WIDTH, 3)).double()
    with torch.no_grad():
        model(torch.randn(8, WIDTH).double())
    x, y = torch.randn(8, WIDTH).double(), torch.randint(3, (8,))
    stages = unloaf.find_stages(model, x, blocks=[["1", "2", "3", "4"]])
    subnets = [unloaf.Subnet((keep,)) for keep in ((True, True, False, True), (False, True, True, True))]
    return model, stages, x, y, subnets


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def separate(model, stages, x, y, subnets):
    """Gradients of passes of which each has a copy of the model to itself, and the buffers after the main one."""
    copies = [copy.deepcopy(model) for _ in range(1 + len(subnets))]
    main = copies[0](x)
    F.cross_entropy(main, y).backward()
    for one, subnet in zip(copies[1:], subnets, strict=True):
        student = logits_of_subnet(one, stages, subnet, x)
        F.kl_div(
            student.log_softmax(-1), main.detach().log_softmax(-1), reduction="batchmean", log_target=True
        ).backward()
    total = 0
    for one in copies:
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in one.parameters()]
        total = total + torch.cat([grad.flatten() for grad in grads])
    return total, dict(copies[0].named_buffers())


def step(model, stages, x, y, subnets, form):
    method = unloaf.StimulativeTraining(model, stages)
    if form == "lean":
        method.backward(x, y, subnets=subnets)
    else:
        method(x, y, subnets=subnets).loss.backward()


def equal_buffers(model, known):
    mine = dict(model.named_buffers())
    return mine.keys() == known.keys() and all(torch.equal(mine[name], known[name]) for name in mine)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["lean", "one graph", "checkpointed"])
def test_gradients_and_buffers_are_those_of_separate_passes(kind, form):
    model, stages, x, y, subnets = case(kind)
    expected, buffers = separate(model, stages, x, y, subnets)
    if form == "checkpointed":
        unloaf.checkpoint_blocks(model, stages)
    step(model, stages, x, y, subnets, "one graph" if form == "one graph" else "lean")
    assert equal_buffers(model, buffers)
    assert (gradients(model) - expected).norm() <= TOLERANCE.get(kind, 1e-10) * expected.norm()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "grown"])
@pytest.mark.parametrize("form", ["lean", "one graph"])
def test_a_failed_step_puts_all_buffers_back(kind, form):
    model, stages, x, y, subnets = case(kind)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    method = unloaf.StimulativeTraining(model, stages, subnet_loss=lambda student, teacher: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        method.backward(x, y, subnets=subnets) if form == "lean" else method(x, y, subnets=subnets)
    assert equal_buffers(model, before)


@pytest.mark.parametrize("kind", KINDS)
def test_find_stages_moves_no_buffer(kind):
    model, stages, x, _, _ = case(kind)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    unloaf.find_stages(model, x, blocks=[stage.blocks for stage in stages])
    assert kind == "grown" or equal_buffers(model, before)


# --- statistics that are re-estimated


class Tensorflow(nn.Module):
    """A norm whose momentum is the weight of the old average."""

    def __init__(self, momentum=0.99):
        super().__init__()
        self.momentum = momentum
        self.register_buffer("running_mean", torch.zeros(WIDTH))
        self.register_buffer("running_var", torch.ones(WIDTH))

    def forward(self, x):
        if not self.training:
            return (x - self.running_mean) / (self.running_var + 1e-5).sqrt()
        mean, var = x.mean(0), x.var(0)
        with torch.no_grad():
            self.running_mean.mul_(self.momentum).add_((1 - self.momentum) * mean)
            self.running_var.mul_(self.momentum).add_((1 - self.momentum) * var)
        return (x - mean) / (var + 1e-5).sqrt()


def test_a_norm_whose_momentum_weighs_the_past_is_averaged():
    norm, data = Tensorflow(), [torch.randn(8, WIDTH) + i for i in range(3)]
    assert unloaf.recalibrate_bn(nn.Sequential(norm), data) == 3
    torch.testing.assert_close(norm.running_mean, torch.stack([x.mean(0) for x in data]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([x.var(0) for x in data]).mean(0))
    assert norm.momentum == 0.99


def test_evonorm_is_averaged():
    norm, data = timm.layers.EvoNorm2dB0(WIDTH), [torch.randn(4, WIDTH, 3, 3) * (i + 1) for i in range(3)]
    assert unloaf.recalibrate_bn(nn.Sequential(norm), data) == 3
    expected = torch.stack([x.transpose(0, 1).flatten(1).var(1) for x in data]).mean(0)
    torch.testing.assert_close(norm.running_var, expected)


def test_renormalisation_is_averaged():
    norm, data = Renorm(WIDTH), [torch.randn(8, WIDTH) + i for i in range(3)]
    unloaf.recalibrate_bn(nn.Sequential(norm), data)
    torch.testing.assert_close(norm.running_mean, torch.stack([x.mean(0) for x in data]).mean(0))


def test_evaluate_subnets_re_estimates_the_statistics_of_evonorm():
    model, stages, x, y, subnets = case("EvoNorm")
    [row] = unloaf.evaluate_subnets(model, stages, [(x, y)], subnets=subnets[:1], calibration=[x])
    with unloaf.active_subnet(model, stages, subnets[0]):
        unloaf.recalibrate_bn(model, [x])
        [again] = unloaf.evaluate_subnets(nn.Sequential(model), [], [(x, y)], subnets=[unloaf.Subnet(())])
    assert row.loss == again.loss
    assert row.loss != unloaf.evaluate_subnets(case("EvoNorm")[0], stages, [(x, y)], subnets=subnets[:1])[0].loss


class Fixed(Tensorflow):
    """Its share of the past is written into the code."""

    def __init__(self):
        super().__init__()
        del self.momentum

    def forward(self, x):
        self.momentum = 0.9
        try:
            return super().forward(x)
        finally:
            del self.momentum


class Frozen(Fixed):
    """Statistics of a network trained elsewhere, as in detection."""

    def forward(self, x):
        return (x - self.running_mean) / (self.running_var + 1e-5).sqrt()


def test_statistics_that_cannot_be_re_estimated_are_named():
    model = nn.Sequential(nn.BatchNorm1d(WIDTH), Fixed())
    with pytest.warns(UserWarning, match=r"not re-estimated: 1 \(Fixed\)"):
        unloaf.recalibrate_bn(model, [torch.randn(8, WIDTH) + 5])
    assert torch.equal(model[1].running_mean, torch.zeros(WIDTH))
    assert not torch.equal(model[0].running_mean, torch.zeros(WIDTH))


def test_frozen_statistics_are_no_matter():
    model = nn.Sequential(nn.BatchNorm1d(WIDTH), Frozen())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert unloaf.recalibrate_bn(model, [torch.randn(8, WIDTH)]) == 1
