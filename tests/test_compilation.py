"""Blocks compiled one by one: the same gradients, and few graphs."""

import contextlib
import copy
import functools
from types import MethodType

import pytest
import torch

import unloaf
from unloaf.models.build import build_model

# torch looks at the gradients of activations while it traces, and warns about that itself.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
SIDES = (16, 24, 32)


@pytest.fixture
def counted():
    """A backend that runs graphs as they are, and the list of those it was given."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    return backend, graphs


@pytest.fixture
def network():
    torch.manual_seed(0)
    model = build_model("cifar/resnet20", num_classes=10, width=4).double()
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    return model, unloaf.find_stages(model, x), x, torch.arange(4)


def gradients(model):
    """Zero where a parameter took no part."""
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
    return torch.cat([grad.flatten() for grad in grads])


def plus(model, stages):
    inputs = unloaf.SmallerInputs(sides=SIDES)
    return unloaf.stimulative_plus(model, stages, num_subnets=3, subnet_inputs=inputs, sampler=unloaf.OrderedSampler())


def test_compiled_gradients_are_the_eager_ones(network, counted):
    model, stages, x, y = network
    eager = copy.deepcopy(model)
    unloaf.compile_blocks(model, stages, backend=counted[0])
    methods = plus(model, stages), plus(eager, stages)
    for _ in range(5):
        for method in methods:
            method.backward(x, y)
    expected = gradients(eager)
    assert (gradients(model) - expected).norm() < 1e-10 * expected.norm()
    assert len(counted[1]) > 0


def test_graphs_are_bounded_by_shapes_and_sizes_over_50_steps(network, counted):
    model, stages, x, y = network
    backend, graphs = counted
    unloaf.compile_blocks(model, stages, backend=backend)
    method = plus(model, stages)
    for _ in range(50):
        method.backward(x, y)
    shapes = 5  # an equal and two shape-changing kinds of block: 4, 4 to 8, 8, 8 to 16, 16 channels
    assert len(graphs) <= shapes * len(SIDES)
    before = len(graphs)
    for _ in range(10):
        method.backward(x, y)
    assert len(graphs) == before


def test_copy_of_a_compiled_model_runs_on_its_own_parameters(network, counted):
    model, stages, x, _ = network
    unloaf.compile_blocks(model, stages, backend=counted[0])
    copied = copy.deepcopy(model).eval()
    before = copied(x)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(copied(x), before)
    assert not torch.equal(model.eval()(x), before)


def test_where_the_compiler_fails_blocks_run_as_they_are_and_it_is_said_once(network):
    model, stages, x, y = network
    eager = copy.deepcopy(model)
    calls = []

    def broken(graph, inputs):
        calls.append(graph)
        raise OSError("no compiler here")

    torch._dynamo.reset()
    unloaf.compile_blocks(model, stages, backend=broken)
    with pytest.warns(UserWarning, match=r"blocks of class \w+ run without torch.compile.*no compiler here") as told:
        plus(model, stages).backward(x, y)
    assert len(told) == len(calls) == 1  # one class of blocks, and not for each block or pass
    plus(eager, stages).backward(x, y)
    assert torch.equal(gradients(model), gradients(eager))
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), eager.buffers(), strict=True))


REPLACEMENTS = {
    "as accelerate does": lambda block: functools.partial(lambda old, *args: old(*args) + 1, block.forward),
    "by a method": lambda block: MethodType(lambda self, x: type(self).forward(self, x) + 1, block),
}


@pytest.mark.parametrize("replace", REPLACEMENTS.values(), ids=REPLACEMENTS)
def test_a_forward_that_something_else_replaced_is_not_thrown_away(network, counted, replace):
    model, stages, x, _ = network
    path = stages[1].blocks[1]
    block = model.get_submodule(path)
    block.forward = replace(block)
    expected = model.eval()(x)
    with pytest.raises(ValueError, match=rf"forward of block '{path}' was replaced.*call compile_blocks again"):
        unloaf.compile_blocks(model, stages, backend=counted[0])
    assert torch.equal(model(x), expected)
    assert [b for b in model.modules() if "forward" in b.__dict__] == [block]


def test_blocks_may_be_compiled_anew(network, counted):
    model, stages, x, _ = network
    unloaf.compile_blocks(model, stages, backend="eager")
    unloaf.compile_blocks(model, stages, backend=counted[0])
    model(x)
    assert len(counted[1]) > 0


def test_an_error_of_the_block_itself_is_not_the_compilers(network, counted):
    model, stages, x, _ = network
    unloaf.compile_blocks(model, stages, backend=counted[0])
    with pytest.raises(RuntimeError, match="channels"):
        model.get_submodule(stages[1].blocks[1])(x)


def as_wrapper(model):
    return torch.compile(model, backend="eager")


def in_place(model):
    model.compile(backend="eager")
    return model


def block_by_block(model):
    for block in model.layer2:
        block.compile(backend="eager")
    return model


@pytest.mark.parametrize("compiled", [as_wrapper, in_place, block_by_block])
@pytest.mark.parametrize("method", [unloaf.StimulativeTraining, unloaf.StochasticDepth])
def test_what_torch_compiled_as_a_whole_trains_to_the_same_gradients(network, compiled, method):
    model, stages, x, y = network
    torch._dynamo.reset()
    eager, subnet = copy.deepcopy(model), unloaf.Subnet.from_depths(stages, (2, 1, 3))
    method(eager, stages).backward(x, y, subnets=[subnet])
    wrapped = compiled(model)
    told = pytest.warns(UserWarning, match=r"not used.*unloaf\.compile_blocks\(model, stages\)")
    with told if method is unloaf.StimulativeTraining else contextlib.nullcontext():
        trained = method(wrapped, stages)
    trained.backward(x, y, subnets=[subnet])
    assert (gradients(model) - gradients(eager)).norm() < 1e-10 * gradients(eager).norm()
    wrapped.eval()
    eager.eval()
    with unloaf.active_subnet(wrapped, stages, subnet), unloaf.active_subnet(eager, stages, subnet):
        assert torch.allclose(wrapped(x), eager(x))


@pytest.mark.parametrize("build", [unloaf.StimulativeTraining, unloaf.GroupKnowledgeTraining, unloaf.stimulative_plus])
def test_a_bypassed_compilation_is_told_where_the_method_is_made_and_compiled_blocks_are_none(network, build):
    model, stages, x, y = network
    unloaf.compile_blocks(model, stages, backend="eager")
    method = build(model, stages)  # warnings are errors
    wrapped = torch.compile(model, backend="eager")
    with pytest.warns(UserWarning, match="what torch.compile made of the model is not used") as told:
        build(wrapped, stages)
    assert len(told) == 1
    method.backward(x, y)


def test_common_training_runs_a_compiled_model_compiled(network, counted):
    model, _, x, y = network
    unloaf.CommonTraining(torch.compile(model, backend=counted[0])).backward(x, y)
    assert len(counted[1]) > 0


def test_a_wrapper_around_a_compiled_model_is_refused(network):
    model, stages, x, y = network
    with pytest.warns(UserWarning, match="not used"):
        method = unloaf.StimulativeTraining(torch.nn.DataParallel(torch.compile(model, backend="eager")), stages)
    with pytest.raises(ValueError, match="DataParallel holds a compiled model"):
        method.backward(x, y)
