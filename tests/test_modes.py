"""What switching to eval mode and back leaves behind: nothing, also in models whose ``train`` does something."""

import copy

import pytest
import torch
from torch import nn

import unloaf
from toy_networks import ToyNetwork
from unloaf.stages import evaluating


class Merging(nn.Linear):
    """LoRA as loralib writes it: merged into the weight in eval mode, un-merged in training mode."""

    def __init__(self, width):
        super().__init__(width, width)
        self.weight.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(2, width))
        self.up = nn.Parameter(torch.randn(width, 2))
        self.merged = False

    def train(self, mode=True):
        nn.Module.train(self, mode)
        if mode == self.merged:
            self.weight.data += (-1 if mode else 1) * (self.up @ self.down).data
            self.merged = not mode
        return self

    def forward(self, x):
        y = super().forward(x)
        return y if self.merged else y + x @ self.down.T @ self.up.T


class Held(nn.Module):
    """The layer inside another module, which does the merging for it."""

    def __init__(self, width):
        super().__init__()
        self.layer, self.merged = nn.Linear(width, width), False
        self.layer.weight.requires_grad_(False)
        self.down, self.up = nn.Parameter(torch.randn(2, width)), nn.Parameter(torch.randn(width, 2))

    train = Merging.train

    @property
    def weight(self):
        return self.layer.weight

    def forward(self, x):
        y = self.layer(x)
        return y if self.merged else y + x @ self.down.T @ self.up.T


class Block(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.f = kind(6)

    def forward(self, x):
        return x + torch.tanh(self.f(x))


KINDS = {"itself": Merging, "what it holds": Held}


def network(kind):
    torch.manual_seed(0)
    return nn.Sequential(*(Block(kind) for _ in range(4)), nn.BatchNorm1d(6), nn.Linear(6, 3))


def weights(model):
    return [model[i].f.weight.clone() for i in range(4)]


def lora_gradients(model, stages, x, y):
    model.zero_grad()
    unloaf.StimulativeTraining(model, stages).backward(x, y)
    return [p.grad for block in model[:4] for p in (block.f.down, block.f.up)]


ACTIONS = {
    "find_stages": lambda model, stages, x, y: unloaf.find_stages(model, x),
    "evaluate_subnets": lambda model, stages, x, y: unloaf.evaluate_subnets(model, stages, [(x, y)], subnets=2),
    "recalibrate_bn": lambda model, stages, x, y: unloaf.recalibrate_bn(model, [x]),
    "export_subnet": lambda model, stages, x, y: unloaf.export_subnet(
        model, stages, unloaf.Subnet.from_depths(stages, (2,)), example=x
    ),
}


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("action", ACTIONS.values(), ids=ACTIONS)
def test_layers_that_merge_in_eval_mode_train_on_as_before(action, kind):
    model, x, y = network(kind), torch.randn(8, 6), torch.randint(3, (8,))
    stages = unloaf.find_stages(copy.deepcopy(model).eval(), x)  # of a copy that stays merged
    before, expected = weights(model), lora_gradients(copy.deepcopy(model), stages, x, y)
    action(model, stages, x, y)
    assert all(block.f.training and not block.f.merged for block in model[:4])
    assert all(map(torch.equal, weights(model), before))
    for grad, known in zip(lora_gradients(model, stages, x, y), expected, strict=True):
        assert grad is not None
        assert grad.any()
        torch.testing.assert_close(grad, known)


@pytest.mark.parametrize("action", ACTIONS.values(), ids=ACTIONS)
def test_a_model_of_mixed_modes_keeps_each_of_them(action):
    model, x, y = network(Merging), torch.randn(8, 6), torch.randint(3, (8,))
    stages = unloaf.find_stages(copy.deepcopy(model), x)
    model[1].f.eval()  # merged, in a model that trains
    model[4].eval()  # a frozen norm
    before = {name: (module.training, getattr(module, "merged", None)) for name, module in model.named_modules()}
    known = weights(model)
    action(model, stages, x, y)
    after = {name: (module.training, getattr(module, "merged", None)) for name, module in model.named_modules()}
    assert after == before
    assert all(map(torch.equal, weights(model), known))


def test_layers_merged_by_hand_stay_what_they_say():
    # Whether a merged layer in training mode stays merged is its own affair; weight and flag must agree.
    model = network(Merging)
    base = weights(model)
    model.eval()
    for module in model.modules():
        module.training = True
    with evaluating(model):
        pass
    for block, weight in zip(model[:4], base, strict=True):
        expected = weight + block.f.up @ block.f.down if block.f.merged else weight
        torch.testing.assert_close(block.f.weight, expected)


def test_a_train_that_freezes_a_part_is_not_applied_to_what_the_user_has_set():
    class Frozen(nn.Sequential):
        def train(self, mode=True):
            super().train(mode)
            self[0].eval()
            return self

    model = Frozen(nn.BatchNorm1d(2), nn.Linear(2, 2))
    model[0].train()
    with evaluating(model):
        assert not any(module.training for module in model.modules())
    assert all(module.training for module in model.modules())


def test_modes_are_put_back_after_an_exception():
    model = network(Merging)
    before = weights(model)
    with pytest.raises(ZeroDivisionError), evaluating(model):
        raise ZeroDivisionError
    assert all(block.f.training and not block.f.merged for block in model[:4])
    assert all(map(torch.equal, weights(model), before))


def test_observers_do_not_move_while_a_model_is_judged():
    model = ToyNetwork()
    model.first[1].inner = nn.Sequential(torch.ao.quantization.FakeQuantize(), model.first[1].inner)
    x, y = torch.randn(8, 4), torch.randint(3, (8,))
    model(x)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    stages = unloaf.find_stages(model, 10 * x)
    unloaf.evaluate_subnets(model, stages, [(10 * x, y)], subnets=2)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_weights_of_a_model_of_transformers_are_not_copied(monkeypatch):
    """It has a `train` of its own, which changes none of them; copies would cost more than a token does."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    config.vocab_size = 16
    model, copied, clone = transformers.LlamaForCausalLM(config), set(), torch.Tensor.clone

    def noted(tensor, **options):
        copied.add(tensor.data_ptr())
        return clone(tensor, **options)

    monkeypatch.setattr(torch.Tensor, "clone", noted)
    with evaluating(model):
        assert not model.lm_head.training
    assert model.lm_head.training
    assert not copied & {weight.data_ptr() for weight in model.parameters()}
