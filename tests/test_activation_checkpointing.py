"""Blocks that keep their inputs only: the same gradients, less memory, and nothing is computed for a shared block."""

import copy
import weakref

import pytest
import timm
import torch
from torch import nn

import unloaf
from unloaf.models.build import build_model

METHODS = {
    "common": lambda model, stages: unloaf.CommonTraining(model),
    "stochastic depth": lambda model, stages: unloaf.StochasticDepth(model, stages, final_survival=0.3),
    "st": lambda model, stages: unloaf.StimulativeTraining(
        model, stages, num_subnets=4, sampler=unloaf.InterStageSampler()
    ),
    "st++": lambda model, stages: unloaf.stimulative_plus(
        model, stages, num_subnets=3, subnet_inputs=unloaf.SmallerInputs(sides=(24, 32))
    ),
    "gkt": lambda model, stages: unloaf.GroupKnowledgeTraining(model, stages),
}
NETWORKS = {
    "resnet": (lambda: build_model("cifar/resnet14", num_classes=5, width=4), 32),
    "vit": (
        lambda: timm.create_model(
            "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, num_heads=2, depth=4, num_classes=5,
            dynamic_img_size=True, proj_drop_rate=0.2, drop_path_rate=0.2,
        ),
        32,
    ),
    "swin": (
        lambda: timm.create_model(
            "swin_tiny_patch4_window7_224", img_size=32, window_size=4, embed_dim=8, depths=(2, 2), num_heads=(1, 2),
            num_classes=5,
        ),
        32,
    ),
}  # fmt: skip


def twins(name):
    build, side = NETWORKS[name]
    torch.manual_seed(0)
    model = build().double().train()
    x = torch.randn(4, 3, side, side, dtype=torch.float64)
    stages = unloaf.find_stages(model, x[:1])
    checkpointed = copy.deepcopy(model)
    unloaf.checkpoint_blocks(checkpointed, stages)
    return model, checkpointed, stages, x, torch.arange(4)


def step(method, x, y, *, lean):
    torch.manual_seed(1)  # dropout and drop path
    if lean:
        method.backward(x, y)
    else:
        method(x, y).loss.backward()


@pytest.mark.parametrize("lean", [True, False], ids=["lean", "one graph"])
@pytest.mark.parametrize(
    ("network", "name"),
    [(network, name) for network in NETWORKS for name in METHODS if (network, name) != ("swin", "st++")],  # one size
)
def test_gradients_and_statistics_are_those_without(network, name, lean):
    plain, checkpointed, stages, x, y = twins(network)
    for model in (plain, checkpointed):
        step(METHODS[name](model, stages), x, y, lean=lean)
    pairs = [(p.grad, q.grad) for p, q in zip(plain.parameters(), checkpointed.parameters(), strict=True)]
    assert any(p is not None and p.abs().max() > 0 for p, _ in pairs)
    for p, q in pairs:
        assert (p is None) == (q is None)
        assert p is None or (p - q).norm() <= 1e-12 * max(1, p.norm())
    assert all(torch.equal(a, b) for a, b in zip(plain.buffers(), checkpointed.buffers(), strict=True))


def alive_after_forward(model, x, y):
    """How many outputs of convolutions are kept when the forward pass of a step is done."""
    outputs = []
    hooks = [
        module.register_forward_hook(lambda _, args, out: outputs.append(weakref.ref(out)))
        for module in model.modules()
        if isinstance(module, nn.Conv2d)
    ]
    out = unloaf.CommonTraining(model)(x, y)
    alive = sum(ref() is not None for ref in outputs)
    for hook in hooks:
        hook.remove()
    assert out.loss.requires_grad
    return alive


def test_what_is_inside_a_block_is_not_kept():
    plain, checkpointed, stages, x, y = twins("resnet")
    blocks = sum(stage.depth for stage in stages)
    assert alive_after_forward(plain, x, y) >= 2 * blocks  # two convolutions in a block
    assert alive_after_forward(checkpointed, x, y) <= 1  # the stem's


def test_a_block_is_computed_twice_for_each_application_and_not_for_a_shared_one():
    _, model, stages, x, y = twins("resnet")
    calls = []
    block = model.get_submodule(stages[0].blocks[0])
    next(block.children()).register_forward_hook(lambda *args: calls.append(1))
    # Six subnets, all of which begin with the first block: applied once, recomputed once.
    unloaf.StimulativeTraining(model, stages, num_subnets=6).backward(x, y)
    assert len(calls) == 2


def test_a_copy_runs_on_its_own_parameters():
    _, model, _, x, y = twins("resnet")
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    unloaf.CommonTraining(copied).backward(x, y)
    assert all(p.grad.abs().max() > 0 for p in copied.parameters() if p.ndim > 1)
    assert all(p.grad is None for p in model.parameters())


def test_asking_twice_is_asking_once():
    _, model, stages, _, _ = twins("resnet")
    forwards = [model.get_submodule(path).forward.__func__ for path in stages[0].blocks]
    unloaf.checkpoint_blocks(model, stages)
    assert [model.get_submodule(path).forward.__func__ for path in stages[0].blocks] == forwards


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_compiled_blocks_are_recomputed_too():
    plain, model, stages, x, y = twins("resnet")
    model = copy.deepcopy(plain)
    unloaf.compile_blocks(model, stages, backend="eager")
    unloaf.checkpoint_blocks(model, stages)
    for net in (plain, model):
        METHODS["st"](net, stages).backward(x, y)
    for p, q in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(plain.buffers(), model.buffers(), strict=True))


def test_an_exported_subnet_has_no_trace_of_it():
    _, model, stages, x, _ = twins("resnet")
    subnet = unloaf.Subnet.from_depths(stages, (1, 2, 1))
    small = unloaf.export_subnet(model.eval(), stages, subnet, example=x)
    assert not any("forward" in module.__dict__ for module in small.modules())


def test_compiling_afterwards_is_refused():
    _, model, stages, _, _ = twins("resnet")
    with pytest.raises(ValueError, match="call compile_blocks first, then checkpoint_blocks"):
        unloaf.compile_blocks(model, stages, backend="eager")


def test_a_forward_that_something_else_put_there_is_not_lost():
    model, _, stages, _, _ = twins("resnet")
    block = model.get_submodule(stages[1].blocks[1])
    block.forward = lambda x: x
    with pytest.raises(ValueError, match=rf"forward of block '{stages[1].blocks[1]}' was replaced by a function"):
        unloaf.checkpoint_blocks(model, stages)
    assert not any("forward" in model.get_submodule(path).__dict__ for path in stages[0].blocks)
