"""The table of methods, and that library, recipes and command line make the same of it."""

import copy
from typing import get_args

import pytest
import torch

import tiny
import unloaf
from unloaf.commands.train import parse_train
from unloaf.config import fields
from unloaf.methods.table import METHODS
from unloaf.recipes import recipe
from unloaf.tasks.methods import build_method

ON_DIGITS = {"sampler": unloaf.OrderedSampler(), "subnet_inputs": unloaf.SmallerInputs(min_ratio=0.75), "eps": 1.0}


def test_every_method_has_a_flag_and_looks_of_its_own():
    assert tuple(METHODS) == get_args(fields.Method)
    assert len({method.label for method in METHODS.values()}) == len({m.colour for m in METHODS.values()}) == 6


@pytest.mark.parametrize(
    ("words", "config", "options"),
    [
        ("--method st++", fields.Config(method="st++"), {}),
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
