"""A method as a value: how it shows itself, and its copies."""

import copy
import pickle

import pytest
import torch

import unloaf
from toy_networks import ToyNetwork


def squared(model, batch):
    return model(batch[0]).square().mean()


def halving(step):
    return 0.5**step


METHODS = {
    "common": lambda model, stages: unloaf.CommonTraining(model),
    "stochastic-depth": unloaf.StochasticDepth,
    "st": lambda model, stages: unloaf.StimulativeTraining(model, stages, subnet_weight=halving, seed=3),
    "st++": lambda model, stages: unloaf.stimulative_plus(model, stages, subnet_inputs=None, num_subnets=2),
    "gkt": unloaf.GroupKnowledgeTraining,
    "st*": lambda model, stages: unloaf.GroundTruthTraining(model, stages, squared),
}


def build(name):
    torch.manual_seed(0)
    model = ToyNetwork()
    return METHODS[name](model, unloaf.find_stages(model, torch.zeros(2, 4)))


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("common", "CommonTraining(ToyNetwork, criterion=CrossEntropyLoss())"),
        (
            "stochastic-depth",
            "StochasticDepth(ToyNetwork, stages=2, final_survival=0.8, criterion=CrossEntropyLoss(), seed=0)",
        ),
        (
            "st",
            "StimulativeTraining(ToyNetwork, stages=2, sampler=OrderedSampler(min_depths=None), num_subnets=1, "
            "subnet_loss=kl_loss, subnet_weight=halving, subnet_batch_fraction=1.0, "
            "criterion=CrossEntropyLoss(), seed=3)",
        ),
        (
            "st*",
            "GroundTruthTraining(ToyNetwork, stages=2, loss=squared, sampler=InterStageSampler(depths=None), "
            "num_subnets=1, subnet_weight=1.0, seed=0, check_finite=True)",
        ),
    ],
)
def test_a_method_shows_its_options(name, shown):
    assert repr(build(name)) == shown


def test_bound_arguments_are_shown():
    bound = "subnet_loss=partial(direction_kl_loss, amplitude='auto', norm='layer_norm', eps=1e-07)"
    assert bound in repr(build("st++"))


@pytest.mark.parametrize("again", [copy.deepcopy, lambda method: pickle.loads(pickle.dumps(method))])
@pytest.mark.parametrize("name", METHODS)
def test_a_copy_takes_the_same_steps(name, again):
    method, x, y = build(name), torch.randn(4, 4), torch.tensor([0, 2, 1, 1])
    method(x, y, lean=True).loss.backward()
    method.model.zero_grad()  # a copy of a parameter has no gradient
    twin = again(method)
    steps = [one.backward(x, y) for one in (method, twin)]
    assert steps[0].subnets == steps[1].subnets
    assert steps[0].loss == steps[1].loss
    assert all(
        torch.equal(p.grad, q.grad)
        for p, q in zip(method.model.parameters(), twin.model.parameters(), strict=True)
        if p.grad is not None
    )
