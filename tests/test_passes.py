import collections
import gc
import weakref

import pytest
import timm
import torch
from tests.reference import separate_passes as twin
from torch import nn
from torch.utils.checkpoint import checkpoint

import unloaf
from unloaf.passes import Losses, SubnetPass, lean_backward, one_graph


class Block(nn.Module):
    """x + f(x), counting how often it really computes."""

    def __init__(self, width, count):
        super().__init__()
        self.f = nn.Linear(width, width)
        self.count = count

    def forward(self, x):
        self.count[id(self)] += 1
        return x + torch.tanh(self.f(x))


class Chain(nn.Module):
    """Stem, two stages of three blocks with a shape change between them, head."""

    def __init__(self):
        super().__init__()
        self.count = collections.Counter()
        self.stem = nn.Linear(5, 4)
        self.first = nn.Sequential(*(Block(4, self.count) for _ in range(3)))
        self.between = nn.Linear(4, 6)
        self.second = nn.Sequential(*(Block(6, self.count) for _ in range(3)))
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.second(self.between(self.first(self.stem(x)))))


def number_of_nodes(stages, subnets):
    """Distinct prefixes of the sequences of kept blocks, the main network's among them: the nodes of the trie."""
    kept = [list(subnet.modes(stages)) for subnet in [unloaf.Subnet.full(stages), *subnets]]
    return len({tuple(sequence[:i]) for sequence in kept for i in range(1, len(sequence) + 1)})


@pytest.fixture
def chain():
    model = Chain().double()
    x, y = torch.randn(4, 5).double(), torch.tensor([0, 1, 2, 0])
    stages = unloaf.find_stages(model, x)
    model.count.clear()
    return model, stages, x, y


@pytest.mark.parametrize(
    "sampler", [unloaf.OrderedSampler(), unloaf.StochasticSampler()], ids=["ordered", "stochastic"]
)
@pytest.mark.parametrize("mode", ["lean", "one graph"])
@pytest.mark.parametrize("seed", range(5))
def test_block_applications_are_the_nodes_of_the_trie(chain, sampler, mode, seed):
    model, stages, x, y = chain
    method = unloaf.StimulativeTraining(model, stages, sampler=sampler, num_subnets=6, seed=seed)
    out = method.backward(x, y) if mode == "lean" else method(x, y)
    assert sum(model.count.values()) == number_of_nodes(stages, out.subnets)


@pytest.mark.parametrize("mode", ["lean", "one graph"])
def test_subnets_on_a_part_of_the_batch_share_with_each_other_alone(chain, mode):
    model, stages, x, y = chain
    subnets = [unloaf.Subnet.from_depths(stages, depths) for depths in [(2, 3), (2, 2), (1, 3)]]
    method = unloaf.StimulativeTraining(model, stages, subnet_batch_fraction=0.5)
    _ = method.backward(x, y, subnets) if mode == "lean" else method(x, y, subnets)
    # The main network; then on half the batch 2-3, whose blocks are all of 2-2, and the second stage of 1-3.
    assert sum(model.count.values()) == 6 + 5 + 3


@pytest.mark.parametrize(("fraction", "size", "examples"), [(0.01, 8, 2), (0.5, 3, 2), (0.6, 5, 3), (0.5, 2, None)])
def test_a_part_of_the_batch_has_two_examples_at_least(chain, fraction, size, examples):
    model, stages, _, _ = chain
    method = unloaf.StimulativeTraining(model, stages, subnet_batch_fraction=fraction)
    assert [request.examples for request in method.draw(size)] == [examples]


def test_a_nested_chain_is_a_path_of_the_trie(chain):
    model, stages, x, y = chain
    subnets = [unloaf.Subnet.from_depths(stages, depths) for depths in [(2, 3), (2, 2), (2, 1)]]
    unloaf.StimulativeTraining(model, stages).backward(x, y, subnets)
    assert sum(model.count.values()) == 6 + 3  # the main network, then the second stage once, on another input


def test_a_subnet_drawn_twice_runs_once(chain):
    model, stages, x, y = chain
    subnet = unloaf.Subnet.from_depths(stages, (1, 3))
    out = unloaf.StimulativeTraining(model, stages).backward(x, y, [subnet, subnet])
    assert sum(model.count.values()) == 6 + 3
    assert out.terms["subnet0"] == out.terms["subnet1"]


def test_the_main_network_as_a_subnet_costs_nothing(chain):
    model, stages, x, y = chain
    out = unloaf.StimulativeTraining(model, stages).backward(x, y, [unloaf.Subnet.full(stages)])
    assert (sum(model.count.values()), float(out.terms["subnet0"])) == (6, 0.0)


def test_ordered_subnets_of_a_vit_run_no_block():
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=10, depth=6)
    x, y = torch.randn(2, 3, 32, 32), torch.tensor([0, 1])
    stages = unloaf.find_stages(model, x)
    calls = collections.Counter()
    for path in stages[0].blocks:
        block = model.get_submodule(path)

        def counted(x, forward=block.forward, path=path):
            calls[path] += 1
            return forward(x)

        block.forward = counted
    subnets = [unloaf.Subnet.from_depths(stages, (depth,)) for depth in (1, 2, 3, 4, 5, 6)]
    unloaf.StimulativeTraining(model, stages).backward(x, y, subnets)
    assert calls == dict.fromkeys(stages[0].blocks, 1)


def test_nothing_is_left_on_the_model_after_a_step(chain):
    model, stages, x, y = chain
    unloaf.StimulativeTraining(model, stages, num_subnets=3).backward(x, y)
    assert not any("forward" in module.__dict__ or module._forward_hooks for module in model.modules())


def test_nothing_is_left_after_a_step_that_failed(chain):
    model, stages, x, y = chain
    model.head.weight.grad = marker = torch.ones_like(model.head.weight)

    def refuse(student, teacher):
        raise RuntimeError("no loss today")

    method = unloaf.StimulativeTraining(model, stages, num_subnets=3, subnet_loss=refuse)
    with pytest.raises(RuntimeError, match="no loss today"):
        method.backward(x, y)
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["head.weight"]
    assert model.head.weight.grad is marker
    assert marker.eq(1).all()
    assert method.step == 0


class InPlaceHead(Chain):
    """A head that overwrites the last block's output, and a second stage that overwrites its first block's input."""

    def forward(self, x):
        x = torch.relu_(self.stem(x))
        x = self.between(self.first(x))
        return self.head(torch.relu_(self.second(x)))


class FeatureReader(Chain):
    """The head reads features of both stages, as feature pyramids do."""

    def __init__(self):
        super().__init__()
        self.skip = nn.Linear(4, 3)

    def forward(self, x):
        first = self.first(self.stem(x))
        return self.head(self.second(self.between(first))) + self.skip(torch.sin(first))


@pytest.mark.parametrize("kind", [Chain, InPlaceHead, FeatureReader])
@pytest.mark.parametrize("mode", ["lean", "one graph"])
@pytest.mark.parametrize("seed", range(3))
def test_gradients_equal_separate_passes_on_unusual_models(kind, mode, seed):
    model = kind().double()
    x, y = torch.randn(4, 5).double(), torch.tensor([0, 1, 2, 0])
    stages = unloaf.find_stages(model, x)
    method = unloaf.StimulativeTraining(
        model, stages, sampler=unloaf.StochasticSampler(), num_subnets=5, seed=seed, subnet_weight=0.7
    )
    out = method.backward(x, y) if mode == "lean" else method(x, y)
    if mode == "one graph":
        out.loss.backward()
    assert twin.distance(model, twin.stimulative(model, stages, out.subnets, x, y, weight=0.7)) < 1e-12


class OneActivation(nn.Module):
    """One activation module for all: inside the blocks or the stem, and between the calls of these."""

    def __init__(self, where):
        super().__init__()
        self.act = nn.Tanh()
        self.stem = nn.Sequential(nn.Linear(5, 4), self.act, nn.Linear(4, 4)) if where == "stem" else nn.Linear(5, 4)
        self.blocks = nn.Sequential(*(Inverted(4, self.act if where == "blocks" else nn.Tanh()) for _ in range(4)))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.act(self.blocks(self.act(self.stem(x)))))


class Inverted(nn.Module):
    def __init__(self, width, act):
        super().__init__()
        self.f, self.act, self.g = nn.Linear(width, 2 * width), act, nn.Linear(2 * width, width)

    def forward(self, x):
        return x + self.g(self.act(self.f(x)))


@pytest.mark.parametrize("where", ["blocks", "stem"])
@pytest.mark.parametrize("mode", ["lean", "one graph"])
def test_a_module_inside_and_between_blocks(where, mode):
    model, (x, y) = OneActivation(where).double(), (torch.randn(4, 5).double(), torch.tensor([0, 1, 2, 0]))
    stages = unloaf.find_stages(model, x)
    subnets = [unloaf.Subnet(((False, True, True, True),)), *(unloaf.Subnet.from_depths(stages, (k,)) for k in (2, 1))]
    method = unloaf.StimulativeTraining(model, stages)
    if mode == "lean":
        method.backward(x, y, subnets=subnets)
    else:
        method(x, y, subnets=subnets).loss.backward()
    assert twin.distance(model, twin.stimulative(model, stages, subnets, x, y)) < 1e-12


class Checkpointing(Chain):
    """A model that checkpoints activations itself: its stages as wholes, or block by block."""

    def __init__(self, whole=True, reentrant=False):
        super().__init__()
        self.whole, self.reentrant = whole, reentrant

    def forward(self, x):
        x = self.stem(x)
        for stage, behind in [(self.first, self.between), (self.second, self.head)]:
            for part in [stage] if self.whole else stage:
                x = checkpoint(part, x, use_reentrant=self.reentrant)
            x = behind(x)
        return x


def checkpointing(**how):
    x, y = torch.randn(4, 5).double(), torch.tensor([0, 1, 2, 0])
    plain = Chain().double()
    model = Checkpointing(**how).double()
    model.load_state_dict(plain.state_dict())
    stages = unloaf.find_stages(plain, x)
    return model, plain, stages, [unloaf.Subnet.from_depths(stages, depths) for depths in [(2, 3), (1, 1)]], x, y


@pytest.mark.parametrize(
    ("how", "mode"),
    [
        ({"whole": True}, "lean"),
        ({"whole": True}, "one graph"),
        ({"whole": False}, "lean"),
        ({"whole": False, "reentrant": True}, "lean"),
        ({"whole": False, "reentrant": True}, "one graph"),
    ],
    ids=str,
)
def test_a_model_that_checkpoints_itself_is_refused_where_it_would_compute_other_blocks(how, mode):
    model, _, stages, subnets, x, y = checkpointing(**how)
    method = unloaf.StimulativeTraining(model, stages)
    with pytest.raises(ValueError, match=r"Checkpointing checkpoints activations itself.*unloaf\.checkpoint_blocks"):
        method.backward(x, y, subnets=subnets) if mode == "lean" else method(x, y, subnets=subnets)


def test_a_model_that_checkpoints_each_block_alone_has_the_same_gradients_in_one_graph():
    model, plain, stages, subnets, x, y = checkpointing(whole=False)
    unloaf.StimulativeTraining(model, stages)(x, y, subnets=subnets).loss.backward()
    assert twin.distance(model, twin.stimulative(plain, stages, subnets, x, y)) < 1e-12


def test_stochastic_depth_computes_the_blocks_of_the_subnet_anew():
    model, plain, stages, _, x, y = checkpointing(whole=True)
    subnet = unloaf.Subnet(((False, True, True), (True, False, True)))
    unloaf.StochasticDepth(model, stages).backward(x, y, subnets=[subnet])
    loss = nn.functional.cross_entropy(twin.logits_of_subnet(plain, stages, subnet, x), y)
    assert twin.distance(model, twin.total([twin.gradients(plain, loss)])) < 1e-12


@pytest.mark.parametrize("mode", ["lean", "one graph"])
def test_modules_without_gradients_are_replayed_if_they_are_frozen(chain, mode):
    model, stages, x, y = chain

    class Frozen(Chain):
        def forward(self, x):
            with torch.no_grad():
                x = self.stem(x)
            return self.head(self.second(self.between(self.first(x))))

    model = Frozen().double()
    method, subnets = unloaf.StimulativeTraining(model, stages), [unloaf.Subnet.from_depths(stages, (1, 2))]
    with pytest.raises(ValueError, match="requires_grad_"):
        method(x, y, subnets=subnets)
    model.stem.requires_grad_(False)
    if mode == "lean":
        method.backward(x, y, subnets=subnets)
    else:
        method(x, y, subnets=subnets).loss.backward()
    held, expected = model.stem.weight.grad, twin.stimulative(model.requires_grad_(), stages, subnets, x, y)
    assert held is None
    assert twin.distance(model, expected) < 1e-12


def test_gradients_add_to_those_there_and_scale(chain):
    model, stages, x, y = chain
    method = unloaf.StimulativeTraining(model, stages)
    subnets = [unloaf.Subnet.from_depths(stages, (1, 2))]
    method.backward(x, y, subnets, loss_scale=0.25)
    method.backward(x, y, subnets, loss_scale=torch.tensor(0.75))
    assert twin.distance(model, twin.stimulative(model, stages, subnets, x, y)) < 1e-12


def test_frozen_parameters_get_no_gradient(chain):
    model, stages, x, y = chain
    model.stem.requires_grad_(False)
    model.first.requires_grad_(False)
    unloaf.StimulativeTraining(model, stages, num_subnets=4, sampler=unloaf.StochasticSampler()).backward(x, y)
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert without == {name for name, _ in model.named_parameters() if name.startswith(("stem", "first"))}


def test_a_mapping_of_inputs_and_an_output_with_logits():
    class Wrapped(Chain):
        def forward(self, features, scale):
            return collections.namedtuple("Output", "logits")(super().forward(features * scale))

    model = Wrapped().double()
    batch = {"features": torch.randn(4, 5).double(), "scale": torch.tensor(2.0).double()}
    stages = unloaf.find_stages(model, batch)
    method = unloaf.StimulativeTraining(model, stages, num_subnets=2)
    out = method.backward(batch, torch.tensor([0, 1, 2, 0]))
    passes = [SubnetPass(subnet) for subnet in out.subnets]
    step = one_graph(model, stages, batch, passes, Losses(lambda main: main, lambda index, logits, *_: logits))
    torch.testing.assert_close(step.main_loss, out.logits)
    assert step.subnet_losses[0].shape == (4, 3)


def test_a_loss_may_wait_for_logits_that_come_later_in_depth_first_order(chain):
    model, stages, x, _ = chain
    subnets = [unloaf.Subnet.from_depths(stages, depths) for depths in [(2, 3), (1, 3), (2, 1)]]
    passes = [SubnetPass(subnets[0], needs=(1,)), SubnetPass(subnets[1], needs=(2,)), SubnetPass(subnets[2])]
    teachers = {0: 1, 1: 2, 2: 2}

    def loss(index, student, main, known):
        return unloaf.kl_loss(student, known[teachers[index]])

    step = lean_backward(model, stages, x, passes, Losses(lambda z: z.square().mean(), loss))
    logits = [twin.logits_of_subnet(model, stages, subnet, x) for subnet in subnets]
    expected = [twin.kl(logits[i], logits[teachers[i]].detach()) for i in range(3)]
    torch.testing.assert_close(torch.stack(step.subnet_losses), torch.stack(expected).detach())
    grads = twin.total([twin.gradients(model, loss) for loss in [model(x).square().mean(), *expected[:2]]])
    assert twin.distance(model, grads) < 1e-12


@pytest.mark.parametrize("mode", ["lean", "one graph"])
def test_activations_are_freed_without_the_garbage_collector(chain, mode):
    model, stages, x, y = chain
    outputs = []
    for path in ("stem", *stages[0].blocks, *stages[1].blocks):
        module = model.get_submodule(path)
        module.register_forward_hook(lambda module, args, output: outputs.append(weakref.ref(output)))
    method = unloaf.StimulativeTraining(model, stages, num_subnets=4, sampler=unloaf.StochasticSampler())
    gc.disable()
    try:
        if mode == "lean":
            method.backward(x, y)
        else:
            method(x, y).loss.backward()
        assert outputs
        assert not [ref for ref in outputs if ref() is not None]
    finally:
        gc.enable()


def test_a_hook_that_masks_gradients_sees_the_sum(chain):
    model, stages, x, y = chain
    weight = model.second[0].f.weight
    seen = []
    weight.register_hook(lambda grad: seen.append(1) or grad * 0)
    unloaf.StimulativeTraining(model, stages).backward(x, y, [unloaf.Subnet.from_depths(stages, (1, 3))])
    assert len(seen) == 1
    assert not weight.grad.any()


def test_a_hook_after_accumulation_runs_once_on_the_whole_gradient(chain):
    model, stages, x, y = chain
    weight, seen = model.second[0].f.weight, []
    weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    subnets = [unloaf.Subnet.from_depths(stages, (1, 3))]
    unloaf.StimulativeTraining(model, stages).backward(x, y, subnets)
    expected = twin.stimulative(model, stages, subnets, x, y)["second.0.f.weight"]
    assert len(seen) == 1
    torch.testing.assert_close(seen[0], expected)
