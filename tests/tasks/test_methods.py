"""The table of methods, and that library, recipes and command line make the same of it."""

import copy
from typing import get_args

import pytest
import torch

import tiny
import unloaf
from unloaf.commands.train import parse_train
from unloaf.config import Config, choices
from unloaf.engine.setup import prepare
from unloaf.methods.table import METHODS
from unloaf.recipes import recipe
from unloaf.tasks.methods import build_method, sampler_of

ON_DIGITS = {"sampler": unloaf.OrderedSampler(), "subnet_inputs": unloaf.SmallerInputs(min_ratio=0.75), "eps": 1.0}


def test_every_method_has_a_flag_and_looks_of_its_own():
    assert tuple(METHODS) == get_args(choices.Method)
    assert len({method.label for method in METHODS.values()}) == len({m.colour for m in METHODS.values()}) == 6


@pytest.mark.parametrize(
    ("words", "config", "options"),
    [
        ("--method st++", Config(method="st++"), {}),
        ("--recipe imagenet_resnet50_a1", recipe("imagenet_resnet50_a1"), {"subnet_weight": 1.0}),
        ("--recipe digits_stpp", recipe("digits_stpp"), {"subnet_weight": 0.17, **ON_DIGITS}),
    ],
)
def test_st_plus_plus_is_one_thing_in_library_recipes_and_command_line(words, config, options):
    model = tiny.network(dropout=0.0).double()
    x, y = torch.randn(4, 1, 16, 16, dtype=torch.float64), torch.tensor([0, 1, 2, 0])

    def gradients(build):
        trained = copy.deepcopy(model)
        build(trained, unloaf.find_stages(trained, x)).backward(x, y)
        return [p.grad for p in trained.parameters()]

    expected = gradients(lambda *where: unloaf.stimulative_plus(*where, **options))
    assert tiny.same(gradients(lambda *where: build_method(config, *where)), expected)
    assert tiny.same(gradients(lambda *where: build_method(parse_train(words.split())[0], *where)), expected)


def test_a_space_names_the_largest_depths_of_each_stage():
    """Table II of ST++ writes the space of a ResNet-50 as numbers of depths: 1, 2, 4, 1."""

    def stage(name, depth):
        return unloaf.Stage(name, tuple(f"{name}.{i}" for i in range(depth)), (False, *(True,) * (depth - 1)))

    stages = [stage(name, depth) for name, depth in zip("abcd", (3, 4, 6, 3), strict=True)]
    sampler = sampler_of(Config(method="st++", space=(1, 2, 4, 1)), stages)
    assert sampler.space(stages) == ((3,), (3, 4), (3, 4, 5, 6), (3,))
    for space in ((1, 2, 4), (1, 2, 7, 1)):
        with pytest.raises(ValueError, match=r"the network has 4 stages with 3 4 6 3 depths"):
            sampler_of(Config(method="st++", space=space), stages)


def test_depths_train_a_subnet_as_a_network_of_its_own():
    given = {"model": "cifar/resnet14", "width": 2, "method": "common", "device": "cpu", "batch_size": 64}
    small, named = prepare(Config(**given, depths="1-1-1")), prepare(Config(**given | {"model": "cifar/resnet8"}))
    assert [(k, v.shape) for k, v in small.model.state_dict().items()] == [
        (k, v.shape) for k, v in named.model.state_dict().items()
    ]
    with pytest.raises(ValueError, match="depths"):
        prepare(Config(**given, depths="1-1"))
