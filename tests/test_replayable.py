"""Models that hand on more than their modules return: told, and trained by passes that share nothing."""

import copy
import random
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import unloaf

WIDTH = 6


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.f, self.seen = nn.Linear(WIDTH, WIDTH), None

    def forward(self, x, collected=None):
        h = torch.tanh(self.f(x))
        self.seen = h
        if collected is not None:
            collected.append(h)
        return x + h


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = Block()
        self.layers, self.head = nn.ModuleList(Block() for _ in range(4)), nn.Linear(WIDTH, 3)

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


class ByList(Network):
    def forward(self, x):
        collected = [torch.zeros_like(x)]
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x, collected)
        return self.head(x + sum(collected))


class ByAttribute(Network):
    """The head reads what the last block has left on itself: of a skipped one, what the pass before has."""

    def forward(self, x):
        for layer in self.layers:
            layer.seen = None
        y = self.stem(x)
        for layer in self.layers:
            y = layer(y)
        left = [layer.seen for layer in self.layers if layer.seen is not None]
        return self.head(y + (sum(left) if left else 0))


class ByStem(Network):
    """What is left over comes from a module outside the blocks."""

    def forward(self, x):
        self.stem.seen = None
        y = self.stem(x)
        left = self.stem.seen
        for layer in self.layers:
            y = layer(y)
        return self.head(y if left is None else y + left)


class ByHook(Network):
    def __init__(self):
        super().__init__()
        self.kept = []
        for layer in self.layers:
            layer.f.register_forward_hook(self.keep)

    def keep(self, module, args, output):
        self.kept.append(output)

    def forward(self, x):
        self.kept.clear()
        y = super().forward(x)
        return y + self.head(sum(self.kept)) if self.kept else y


IMPURE = {"list": ByList, "attribute": ByAttribute, "stem": ByStem, "hook": ByHook}


def case(kind):
    torch.manual_seed(0)
    return kind().double(), torch.randn(8, WIDTH).double(), torch.randint(3, (8,))


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("kind", IMPURE.values(), ids=IMPURE)
@pytest.mark.parametrize("form", ["lean", "one graph"])
def test_gradients_are_those_of_separate_passes(kind, form):
    model, x, y = case(kind)
    with pytest.warns(UserWarning, match=f"{kind.__name__} hands on more than its modules return"):
        stages = unloaf.find_stages(model, x, blocks=[[f"layers.{i}" for i in range(4)]])
    separate = kind().double()
    separate.load_state_dict(model.state_dict())
    subnets = [unloaf.Subnet((keep,)) for keep in ((True, False, True, True), (True, True, True, False))]
    main = separate(x)
    F.cross_entropy(main, y).backward()
    for subnet in subnets:
        with unloaf.active_subnet(separate, stages, subnet):
            unloaf.kl_loss(separate(x), main.detach()).backward()
    method = unloaf.StimulativeTraining(model, stages)
    if form == "lean":
        method.backward(x, y, subnets=subnets)
    else:
        method(x, y, subnets=subnets).loss.backward()
    assert (gradients(model) - gradients(separate)).norm() <= 1e-10 * gradients(separate).norm()


class Counting(Network):
    """The output depends on how many passes there were."""

    passes = 0

    def forward(self, x):
        self.passes += 1
        return super().forward(x) * self.passes


def test_an_output_that_depends_on_the_passes_before_is_told():
    model, x, _ = case(Counting)
    with pytest.warns(UserWarning, match="Counting hands on more"):
        assert not unloaf.find_stages(model, x)[0].replayable


class Random(Network):
    def forward(self, x):
        return super().forward(x + torch.randn_like(x) * random.random())


class Unread(ByList):
    """Collects, but nobody reads it."""

    def forward(self, x):
        return Network.forward(self, x)


@pytest.mark.parametrize("kind", [Network, Random, Unread])
def test_models_that_only_draw_or_only_keep_share_their_passes(kind):
    model, x, _ = case(kind)
    before = torch.get_rng_state(), random.getstate()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert all(stage.replayable for stage in unloaf.find_stages(model, x))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


class InTraining(ByList):
    """Limit: what happens in training mode alone is not seen."""

    def forward(self, x):
        return super().forward(x) if self.training else Network.forward(self, x)


def test_side_effects_in_training_mode_alone_are_not_seen():
    model, x, _ = case(InTraining)
    assert unloaf.find_stages(model, x)[0].replayable


def test_passes_of_stages_that_are_said_to_be_pure_are_shared():
    # Limit: stages written by hand are taken at their word.
    model, x, y = case(Network)
    runs = []
    model.layers[0].f.register_forward_hook(lambda *_: runs.append(1))
    stages = (unloaf.Stage("layers", tuple(f"layers.{i}" for i in range(4)), (True,) * 4),)
    method = unloaf.StimulativeTraining(copy.copy(model), stages)
    method.backward(x, y, subnets=[unloaf.Subnet.from_depths(stages, (3,))])
    assert len(runs) == 1


def test_passes_of_stages_that_are_not_replayable_run_each_block():
    model, x, y = case(Network)
    runs = []
    model.layers[0].f.register_forward_hook(lambda *_: runs.append(1))
    stages = (unloaf.Stage("layers", tuple(f"layers.{i}" for i in range(4)), (True,) * 4, replayable=False),)
    unloaf.StimulativeTraining(model, stages).backward(x, y, subnets=[unloaf.Subnet.from_depths(stages, (3,))])
    assert len(runs) == 2
