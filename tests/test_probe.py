"""What is a residual block and what is none: activations, scales and gates; weights that are normalised."""

import functools

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import unloaf

CHANNELS = 6


def stages_of(*modules):
    return [
        (s.blocks, s.skippable) for s in unloaf.find_stages(nn.Sequential(*modules), torch.zeros(1, CHANNELS, 8, 8))
    ]


def convolution():
    return nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)


# --- modules that are the identity or a relu once their parameters are zero


class LeakyRelu(nn.Module):
    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.full((CHANNELS, 1, 1), 0.25))

    def forward(self, x):
        return torch.where(x > 0, x, self.slope * x)


class Modulation(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale, self.shift = (nn.Parameter(torch.zeros(CHANNELS, 1, 1)) for _ in range(2))

    def forward(self, x):
        return x * (1 + self.scale) + self.shift


class Funnel(nn.Module):
    """FReLU (Ma et al. 2020): max(x, T(x))."""

    def __init__(self, norm):
        super().__init__()
        self.condition = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS, bias=not norm)
        self.norm = nn.BatchNorm2d(CHANNELS) if norm else nn.Identity()

    def forward(self, x):
        return torch.maximum(x, self.norm(self.condition(x)))


class Excitation(nn.Module):
    """A gate from all positions that multiplies: where the input is zero it adds nothing."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(CHANNELS, CHANNELS)

    def forward(self, x):
        return x * 2 * torch.sigmoid(self.fc(x.mean((2, 3)))[:, :, None, None])


class Position(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(1, CHANNELS, 8, 8))

    def forward(self, x):
        return x + self.table


NONE = {
    "leaky relu": LeakyRelu,
    "PReLU of timm": lambda: timm.layers.create_act_layer("prelu", num_parameters=CHANNELS),
    "scale and shift": Modulation,
    "FReLU": functools.partial(Funnel, norm=False),
    "FReLU with a norm": functools.partial(Funnel, norm=True),
    "excitation": Excitation,
    "position": Position,
}


@pytest.mark.parametrize("kind", NONE.values(), ids=NONE)
def test_a_plain_network_with_learnable_activations_has_no_blocks(kind):
    torch.manual_seed(0)
    with pytest.raises(unloaf.NoResidualBlocksError):
        stages_of(*(m for _ in range(3) for m in (convolution(), kind())))


def test_the_stem_of_a_resnet_with_prelu_is_no_stage():
    narrow = {"layers": (2, 2, 2, 2), "channels": (8, 8, 8, 8), "stem_width": 8}
    model = timm.create_model("resnet50d", num_classes=5, act_layer="prelu", **narrow)
    names = [stage.name for stage in unloaf.find_stages(model, torch.zeros(1, 3, 32, 32))]
    assert names == ["layer1", "layer2", "layer3", "layer4"]


# --- blocks all the same


class Residual(nn.Module):
    def __init__(self, branch, *, relu=False):
        super().__init__()
        self.branch, self.relu = branch, relu

    def forward(self, x):
        y = x + self.branch(x)
        return F.relu(y) if self.relu else y


def zeroed(module):
    nn.init.zeros_(module.weight)
    return module


def depthwise():
    return nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS, bias=False)


BLOCKS = {
    "fresh, its last convolution zero": lambda: Residual(
        nn.Sequential(convolution(), nn.ReLU(), zeroed(convolution()))
    ),
    "relu behind a branch that ends in a relu": lambda: Residual(nn.Sequential(convolution(), nn.ReLU()), relu=True),
    "relu behind a branch without biases": lambda: Residual(
        nn.Sequential(depthwise(), nn.ReLU(), depthwise()), relu=True
    ),
    "relu behind a deep branch that ends in a relu": lambda: Residual(
        nn.Sequential(*(m for _ in range(4) for m in (convolution(), nn.BatchNorm2d(CHANNELS), nn.ReLU()))), relu=True
    ),
    "pixel by pixel": lambda: Residual(nn.Conv2d(CHANNELS, CHANNELS, 1)),
    "channel by channel": lambda: Residual(depthwise()),
}


@pytest.mark.parametrize("kind", BLOCKS.values(), ids=BLOCKS)
def test_blocks_that_mix_little_are_blocks(kind):
    torch.manual_seed(0)
    assert stages_of(kind(), kind()) == [(("0", "1"), (True, True))]


def test_a_depthwise_block_is_one_on_a_single_pixel_too():
    model = nn.Sequential(*(Residual(depthwise()) for _ in range(2)), nn.Flatten())
    [stage] = unloaf.find_stages(model, torch.zeros(1, CHANNELS, 1, 1))
    assert stage.blocks == ("0", "1")


def test_a_block_of_one_number_is_a_block():
    model = nn.Sequential(*(Residual(nn.Linear(1, 1)) for _ in range(2)))
    [stage] = unloaf.find_stages(model, torch.zeros(3, 1))
    assert stage.blocks == ("0", "1")


# --- weights that are computed from parameters


class Scaled(nn.Module):
    """A parametrization with a parameter: the weight is added to, as LoRA does."""

    def __init__(self, layer):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.zeros(CHANNELS, 1)), nn.Parameter(torch.randn(1, CHANNELS * 9))

    def forward(self, weight):
        return weight + (self.up @ self.down).view_as(weight)


class Positive(nn.Module):
    def forward(self, weight):
        return F.softplus(weight)


class DoRA(nn.Module):
    """Magnitudes times directions, as peft computes them (Liu et al. 2024, equation 5)."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer
        self.down, self.up = nn.Parameter(torch.randn(2, CHANNELS * 9)), nn.Parameter(torch.zeros(CHANNELS, 2))
        self.magnitude = nn.Parameter(layer.weight.detach().flatten(1).norm(dim=1))

    def forward(self, x):
        weight = self.layer.weight + (self.up @ self.down).view_as(self.layer.weight)
        scale = self.magnitude / weight.flatten(1).norm(dim=1)
        return F.conv2d(x, weight * scale[:, None, None, None], self.layer.bias, padding=1)


def registered(kind):
    def wrap(layer):
        parametrize.register_parametrization(layer, "weight", kind())
        return layer

    return wrap


def old(name):
    def wrap(layer):
        return getattr(nn.utils, name)(layer)

    return wrap


WRAPS = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "weight_norm, hook": old("weight_norm"),
    "spectral_norm, hook": old("spectral_norm"),
    "softplus": registered(Positive),
    "added": registered(lambda: Scaled(None)),
    "DoRA": DoRA,
}


def block(wrap):
    return Residual(nn.Sequential(wrap(convolution()), nn.ReLU(), wrap(convolution())))


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("wrapped", [(0, 1, 2, 3), (2, 3), (1,)], ids=["all", "the last two", "the second"])
@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_blocks_of_weights_that_are_computed_are_found(wrap, wrapped):
    torch.manual_seed(0)
    model = nn.Sequential(*(block(wrap if i in wrapped else lambda layer: layer) for i in range(4)))
    x = torch.randn(2, CHANNELS, 8, 8)
    before, state = model.eval()(x), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    [stage] = unloaf.find_stages(model, torch.zeros(1, CHANNELS, 8, 8))
    assert (stage.blocks, stage.skippable) == (("0", "1", "2", "3"), (True,) * 4)
    assert torch.equal(model(x), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


class Inline(nn.Module):
    """A block that divides its weight by its norm in its own forward."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(CHANNELS, CHANNELS, 1, 1))

    def forward(self, x):
        return x + F.conv2d(x, self.weight / self.weight.norm())


def test_blocks_with_frozen_norms_are_found():
    """Torchvision's FrozenBatchNorm2d keeps scale and shift as buffers; detectors are fine-tuned with it."""
    model = torchvision.models.resnet18(norm_layer=torchvision.ops.FrozenBatchNorm2d)
    for module in model.modules():
        if isinstance(module, torchvision.ops.FrozenBatchNorm2d):
            module.bias.normal_()
            module.running_mean.normal_()
    assert [len(stage.blocks) for stage in unloaf.find_stages(model, torch.zeros(1, 3, 64, 64))] == [2, 2, 2, 2]


def test_a_block_that_cannot_be_probed_is_named():
    with pytest.raises(unloaf.NoResidualBlocksError, match=r"0 \(Inline\), 1 \(Inline\) cannot be probed.*NaN"):
        stages_of(Inline(), Inline())


def test_blocks_that_cannot_be_probed_beside_others_are_named():
    plain = block(lambda layer: layer)
    with pytest.warns(UserWarning, match=r"may be missing.*2 \(Inline\), 3 \(Inline\) cannot be probed.*name all"):
        found = stages_of(plain, block(lambda layer: layer), Inline(), Inline())
    assert found == [(("0", "1"), (True, True))]


def test_a_block_that_cannot_be_probed_can_be_named():
    model = nn.Sequential(Inline(), Inline())
    [stage] = unloaf.find_stages(model, torch.zeros(1, CHANNELS, 8, 8), blocks=[["0", "1"]])
    assert stage.skippable == (True, True)
