"""Lean, one-graph and slow twin give the same gradients, for every method and sampler, on real architectures."""

from functools import partial

import pytest
import timm
import torch
import torchvision
from tests.reference import separate_passes as twin
from torch import nn

import unloaf

# Small forms of the real classes: full depth where blocks alternate or change shape, narrow and low in resolution.
MODELS = {
    "resnet": lambda: timm.create_model("resnet50", num_classes=10, layers=(2, 2, 3, 2), channels=(8, 16, 32, 64)),
    "resnetv2": lambda: timm.create_model(
        "resnetv2_50", num_classes=10, layers=(2, 2, 3, 2), channels=(16, 32, 64, 128), stem_chs=16
    ),
    "regnet": lambda: timm.create_model("regnety_002", num_classes=10),
    "mobilenetv3": lambda: timm.create_model("mobilenetv3_small_050", num_classes=10),
    "efficientnet": lambda: timm.create_model("efficientnet_b0", num_classes=10),
    "convnext": lambda: timm.create_model("convnext_atto", num_classes=10, dims=(12, 24, 48, 96)),
    "vit": lambda: timm.create_model("vit_tiny_patch16_224", num_classes=10, img_size=64, depth=4),
    "swin": lambda: timm.create_model(
        "swin_tiny_patch4_window7_224", num_classes=10, img_size=64, window_size=4, embed_dim=24, depths=(2, 2, 4, 2)
    ),
    "pvt_v2": lambda: timm.create_model("pvt_v2_b0", num_classes=10, embed_dims=(8, 16, 20, 32)),
    "mixer": lambda: timm.models.MlpMixer(num_classes=10, img_size=64, num_blocks=4, embed_dim=64),
    "torchvision resnet": lambda: torchvision.models.resnet18(num_classes=10),
}
SAMPLERS = {
    "raw": unloaf.RawSampler(),
    "stochastic": unloaf.StochasticSampler(),
    "ordered": unloaf.OrderedSampler(),
    "inter-stage": unloaf.InterStageSampler(),
    "exponential decay": unloaf.ExponentialDecaySampler(),
}
TOLERANCE = 1e-10  # of the global norm; float64 rounding is about 1e-15


@pytest.fixture(scope="module", params=MODELS)
def network(request):
    torch.manual_seed(0)
    model = MODELS[request.param]().double().train()
    for module in model.modules():  # random masks would differ between passes that compute separately
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    return model, unloaf.find_stages(model, x), x, torch.tensor([1, 7])


def gradients_of(method, x, y, mode):
    method.model.zero_grad(set_to_none=True)
    method.step = 3
    if mode == "lean":
        return method.backward(x, y).subnets
    out = method(x, y)
    out.loss.backward()
    return out.subnets


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_stimulative_training(network, sampler):
    model, stages, x, y = network
    method = unloaf.StimulativeTraining(model, stages, sampler=SAMPLERS[sampler], num_subnets=3, seed=1)
    expected = None
    for mode in ("lean", "one graph"):
        subnets = gradients_of(method, x, y, mode)
        if expected is None:
            expected = twin.stimulative(model, stages, subnets, x, y)
        assert twin.distance(model, expected) < TOLERANCE


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_group_knowledge_training(network, sampler):
    model, stages, x, y = network
    settings = {"groups": 3, "loops": 2, "ema": 0.3}
    method = unloaf.GroupKnowledgeTraining(model, stages, sampler=SAMPLERS[sampler], seed=2, **settings)
    expected = None
    for mode in ("lean", "one graph"):
        subnets = gradients_of(method, x, y, mode)
        if expected is None:
            expected = twin.group_knowledge(model, stages, subnets, x, y, **settings)
        assert twin.distance(model, expected) < TOLERANCE


@pytest.mark.parametrize("per", ["subnet", "step"])
def test_stimulative_plus(network, per):
    model, stages, x, y = network
    takes_any_size = type(model).__name__ not in ("VisionTransformer", "SwinTransformer", "MlpMixer")
    sides = unloaf.SmallerInputs(per=per, sides=(32, 48, 64) if takes_any_size else (64,))
    method = unloaf.stimulative_plus(model, stages, num_subnets=4, subnet_inputs=sides, amplitude=2.0, seed=3)
    drawn = [request.side for request in method.draw(len(x), x.shape[-1], step=3)]
    expected = None
    for mode in ("lean", "one graph"):
        subnets = gradients_of(method, x, y, mode)
        if expected is None:
            view = partial(twin.normalised, amplitude=2.0)
            # By default the subnets weigh one together.
            expected = twin.stimulative(model, stages, subnets, x, y, sides=drawn, view=view, weight=1 / 4)
        assert twin.distance(model, expected) < TOLERANCE


def test_subnets_on_a_part_of_the_batch(network):
    model, stages, x, _ = network
    x, y = torch.cat([x, x.flip(0).flip(-1), x.roll(8, -1)[:1]]), torch.tensor([1, 7, 0, 3, 4])
    settings = {"groups": 2, "loops": 2, "ema": 0.3}
    takes_any_size = type(model).__name__ not in ("VisionTransformer", "SwinTransformer", "MlpMixer")
    inputs = unloaf.SmallerInputs(per="step", sides=(48,)) if takes_any_size else None
    methods = {
        "st": unloaf.StimulativeTraining(model, stages, num_subnets=3, subnet_inputs=inputs, subnet_batch_fraction=0.6),
        "gkt": unloaf.GroupKnowledgeTraining(model, stages, subnet_batch_fraction=0.6, **settings),
    }
    for name, method in methods.items():
        assert {request.examples for request in method.draw(len(x), x.shape[-1])} == {3}
        for mode in ("lean", "one graph"):
            subnets = gradients_of(method, x, y, mode)
            if name == "st":
                sides = [48 if takes_any_size else None] * 3
                expected = twin.stimulative(model, stages, subnets, x, y, sides=sides, examples=3)
            else:
                expected = twin.group_knowledge(model, stages, subnets, x, y, examples=3, **settings)
            assert twin.distance(model, expected) < TOLERANCE


@pytest.mark.parametrize("network", ["resnet", "vit"], indirect=True)
def test_group_knowledge_training_with_the_main_network_as_teacher(network):
    model, stages, x, y = network
    settings = {"groups": 3, "loops": 2, "ema": 0.3, "teacher": "main"}
    method = unloaf.GroupKnowledgeTraining(model, stages, seed=2, **settings)
    for mode in ("lean", "one graph"):
        subnets = gradients_of(method, x, y, mode)
        assert twin.distance(model, twin.group_knowledge(model, stages, subnets, x, y, **settings)) < TOLERANCE
