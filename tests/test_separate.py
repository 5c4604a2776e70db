"""The slow reference, and the forms that do the same faster: equal gradients, losses and buffers."""

import copy
import inspect

import pytest
import torch
from tests.reference import separate_passes as twin
from torch.nn import functional as F

import unloaf
from toy_networks import ToyNetwork
from unloaf.passes import Losses, SubnetPass, lean_backward, separate_backward

FORMS = {
    "lean": lambda method, x, y: method.backward(x, y),
    "one graph": lambda method, x, y: gone_backward(method(x, y)),
    "deferred": lambda method, x, y: gone_backward(method(x, y, lean=True)),
}
METHODS = {
    "st": lambda *at: unloaf.StimulativeTraining(*at, num_subnets=3, sampler=unloaf.StochasticSampler()),
    "st++": lambda *at: unloaf.stimulative_plus(*at, num_subnets=3, subnet_inputs=None, subnet_batch_fraction=0.5),
    "gkt": lambda *at: unloaf.GroupKnowledgeTraining(*at, groups=2, loops=2),
    "st*": lambda *at: unloaf.GroundTruthTraining(*at, lambda net, batch: F.cross_entropy(net(batch[0]), batch[1])),
}


def gone_backward(out):
    out.loss.backward()
    return out


def network():
    torch.manual_seed(0)
    model = ToyNetwork(norm=True).double()
    x = torch.randn(6, 4, dtype=torch.float64)
    return model, unloaf.find_stages(model, x), x, torch.tensor([0, 1, 2, 0, 2, 1])


def flat(tensors):
    return torch.cat([torch.as_tensor(tensor, dtype=torch.float64).flatten() for tensor in tensors])


def equal(found, expected):
    return (found - expected).norm() <= 1e-12 * expected.norm()


@pytest.mark.parametrize("kind", METHODS)
def test_all_forms_do_what_separate_passes_do(kind):
    model, stages, x, y = network()
    slow = copy.deepcopy(model)
    expected = METHODS[kind](slow, stages).step_in(separate_backward, x, y)
    for form in FORMS.values():
        fast = copy.deepcopy(model)
        out = form(METHODS[kind](fast, stages), x, y)
        assert out.subnets == expected.subnets
        assert equal(flat(out.terms.values()), flat(expected.terms.values()))
        assert equal(flat(p.grad for p in fast.parameters()), flat(p.grad for p in slow.parameters()))
        assert all(map(torch.equal, fast.buffers(), slow.buffers()))


def test_the_reference_is_right():
    model, stages, x, y = network()
    out = METHODS["st"](model, stages).step_in(separate_backward, x, y)
    assert twin.distance(model, twin.stimulative(model, stages, out.subnets, x, y)) < 1e-12


def test_a_loss_may_read_what_comes_later():
    model, stages, x, _ = network()
    subnets = [unloaf.Subnet.from_depths(stages, depths) for depths in [(2, 3), (1, 3), (2, 1)]]
    passes = [SubnetPass(subnet, needs=((index - 1) % 3,)) for index, subnet in enumerate(subnets)]
    losses = Losses(lambda main: main.square().mean(), lambda i, z, main, known: (z - known[i - 1]).square().sum())
    found = []
    for form in (separate_backward, lean_backward):
        one = copy.deepcopy(model)
        terms = form(one, stages, x, passes, losses, scale=0.5)
        found.append(flat([*terms.subnet_losses, *(p.grad for p in one.parameters())]))
    assert equal(*found)


@pytest.mark.parametrize("form", [separate_backward, lean_backward])
def test_a_loss_of_subnets_is_asked_for_where_one_is_run(form):
    model, stages, x, _ = network()
    losses = Losses(lambda main: main.square().mean())
    assert form(model, stages, x, [], losses).subnet_losses == []
    with pytest.raises(ValueError, match=r"losses\.subnet is None; give a loss for it, or run no subnet"):
        form(model, stages, x, [SubnetPass(unloaf.Subnet.full(stages))], losses)


def test_the_reference_is_short():
    assert len(inspect.getsource(separate_backward).splitlines()) <= 30
