"""Random numbers in models: passes draw what separate ones would, each begun with the random state of the main pass."""

import copy
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import unloaf
from toy_networks import Block

WIDTH = 6


class Noisy(nn.Module):
    """Draws in its own forward what a subclass says: before, between and behind the blocks."""

    def __init__(self, dropout):
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Dropout(dropout))
        self.layers = nn.ModuleList(Block(WIDTH, WIDTH, dropout=dropout) for _ in range(4))
        self.between, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)

    def forward(self, x):
        x = self.stem(self.drawn(x))
        for i, layer in enumerate(self.layers):
            x = layer(self.drawn(x) if i % 2 else x)
        return self.head(self.drawn(self.between(self.drawn(x))))


class Masks(Noisy):
    def drawn(self, x):
        return x * (torch.rand_like(x) > 0.3)


class Noise(Noisy):
    def drawn(self, x):
        return x + torch.randn_like(x)


class Orders(Noisy):
    def drawn(self, x):
        return x[:, torch.randperm(WIDTH)]


class Behind(Noisy):
    """Draws behind the last module alone, as timm's models with ``drop_rate`` do."""

    def drawn(self, x):
        return x

    def forward(self, x):
        return F.dropout(super().forward(x), 0.5, self.training)


class Python(Noisy):
    def drawn(self, x):
        return x * random.random()


KINDS = {"masks": Masks, "noise": Noise, "orders": Orders, "behind": Behind, "python": Python}


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def case(kind, dropout):
    torch.manual_seed(0)
    random.seed(0)
    model = KINDS[kind](dropout).double()
    x, y = torch.randn(8, WIDTH).double(), torch.randint(3, (8,))
    stages = unloaf.find_stages(model, x)
    assert stages[0].depth == 4
    subnets = [unloaf.Subnet((keep,)) for keep in ((True, True, True, False), (True, False, True, True))]
    subnets.append(unloaf.Subnet.from_depths(stages, (2,)))
    return model, stages, x, y, subnets


def begin():
    torch.manual_seed(7)
    random.seed(7)


@pytest.mark.parametrize("dropout", [0.0, 0.4], ids=["no dropout", "dropout"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["lean", "one graph", "checkpointed"])
def test_gradients_are_those_of_separate_passes_from_the_same_random_state(kind, dropout, form):
    model, stages, x, y, subnets = case(kind, dropout)
    separate = copy.deepcopy(model)
    begin()
    main = separate(x)
    F.cross_entropy(main, y).backward()
    after = torch.get_rng_state(), random.getstate()
    for subnet in subnets:
        begin()
        with unloaf.active_subnet(separate, stages, subnet):  # a skipped block does not run, and so does not draw
            unloaf.kl_loss(separate(x), main.detach()).backward()
    if form == "checkpointed":
        unloaf.checkpoint_blocks(model, stages)
    method = unloaf.StimulativeTraining(model, stages)
    begin()
    if form == "one graph":
        method(x, y, subnets=subnets).loss.backward()
    else:
        method.backward(x, y, subnets=subnets)
    assert (gradients(model) - gradients(separate)).norm() <= 1e-10 * gradients(separate).norm()
    # The next step draws again, from where the main pass has left off.
    assert torch.equal(torch.get_rng_state(), after[0])
    assert random.getstate() == after[1]


@pytest.mark.parametrize("form", ["lean", "one graph"])
def test_passes_of_a_model_that_draws_in_modules_alone_draw_for_themselves(form):
    class Plain(Noisy):
        def drawn(self, x):
            return x

    KINDS["plain"] = Plain
    try:
        model, stages, x, y, _ = case("plain", 0.4)
    finally:
        del KINDS["plain"]
    masks = []
    model.layers[3].dropout.register_forward_hook(lambda module, args, output: masks.append(output == 0))
    subnet = unloaf.Subnet((((True, False, True, True)),))
    method = unloaf.StimulativeTraining(model, stages)
    method.backward(x, y, subnets=[subnet]) if form == "lean" else method(x, y, subnets=[subnet])
    main, student = masks
    assert not torch.equal(main, student)
