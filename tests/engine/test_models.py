"""Networks by name."""

import pytest
import torch

import unloaf
from unloaf.engine.models import build_model


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "millions"),
    # He et al. 2016, table 6.
    [("cifar/resnet20", 0.27), ("cifar/resnet32", 0.46), ("cifar/resnet56", 0.85), ("cifar/resnet110", 1.7)],
)
def test_cifar_resnets_have_the_published_size(name, millions):
    assert parameters(build_model(name, num_classes=10)) / 1e6 == pytest.approx(millions, abs=0.03 * millions)


# The sizes of kuangliu/pytorch-cifar.
@pytest.mark.parametrize(("name", "count"), [("cifar/resnet18", 11_173_962), ("cifar/resnet50", 23_520_842)])
def test_resnets_with_cifar_stem_have_the_known_size(name, count):
    model = build_model(name, num_classes=10)
    assert parameters(model) == count
    # No pooling in the stem: 32 pixels are 4 after three halvings.
    shapes = []
    model.layer4.register_forward_hook(lambda module, args, out: shapes.append(out.shape[-1]))
    model.eval()(torch.zeros(1, 3, 32, 32))
    assert shapes == [4]


@pytest.mark.parametrize(("name", "depths"), [("cifar/resnet20", [3, 3, 3]), ("cifar/resnet18", [2, 2, 2, 2])])
def test_stages_of_cifar_resnets_are_found(name, depths):
    stages = unloaf.find_stages(build_model(name, num_classes=10), torch.zeros(2, 3, 32, 32))
    assert [stage.depth for stage in stages] == depths


def test_depth_6n_plus_2_has_6n_plus_1_convolutions():
    model = build_model("cifar/resnet38", num_classes=10, in_chans=1, width=8)
    convolutions = [module for module in model.modules() if isinstance(module, torch.nn.Conv2d)]
    assert len(convolutions) == 37
    assert model(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize(
    ("name", "kwargs", "shape"),
    [
        ("timm/resnet10t", {"in_chans": 1}, (2, 1, 32, 32)),
        ("resnet10t", {}, (2, 3, 32, 32)),
        ("timm/vit_tiny_patch16_224", {"img_size": 32}, (2, 3, 32, 32)),
        ("tv/resnet18", {}, (2, 3, 32, 32)),
    ],
)
def test_timm_and_torchvision_models(name, kwargs, shape):
    model = build_model(name, num_classes=7, **kwargs).eval()
    assert model(torch.zeros(shape)).shape == (2, 7)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet18", "give cifar/resnet18 or timm/resnet18 or tv/resnet18"),
        ("timm/resnet5O", "did you mean timm/resnet50"),
        ("restnet20", "did you mean cifar/resnet20"),
        ("cifar/resnet21", "no such cifar model"),
        ("cifar/resnet2", "6n \\+ 2 layers, not 2; give 8 or 14"),
        ("nothing-like-it", "give cifar/NAME, timm/NAME, tv/NAME or hf/NAME"),
        ("hub/resnet18", "no such model"),
    ],
)
def test_unknown_or_ambiguous_name_is_answered(name, message):
    with pytest.raises(ValueError, match=message):
        build_model(name, num_classes=10)


def test_torchvision_model_refuses_grey_images():
    with pytest.raises(ValueError, match="takes images of 3 channels, not 1; give a timm/ or cifar/ model"):
        build_model("tv/resnet18", num_classes=10, in_chans=1)
