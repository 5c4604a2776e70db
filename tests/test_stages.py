"""Stages found in known architectures, against the depths their papers publish, and what the search leaves behind."""

import copy
import functools
import pickle

import pytest
import timm
import torch
import torchvision
from torch import nn

import unloaf
from toy_networks import Block, ToyNetwork

RESNET = {"channels": (64, 8, 16, 16)}
# name: (reduced configuration, input side, stages as (prefix of the blocks, number of the first one, depth, is the
# first one skippable), does every skippable block return x + f(x)). Depths and strides are those of the papers.
TIMM = {
    "resnet18": (RESNET, 32, [("layer1.", 0, 2, True)] + [(f"layer{i}.", 0, 2, False) for i in (2, 3, 4)], False),
    "resnet50": (RESNET, 32, [(f"layer{i + 1}.", 0, d, False) for i, d in enumerate((3, 4, 6, 3))], False),
    "resnetv2_50": (
        {"channels": (8, 16, 16, 32), "stem_chs": 8},
        32,
        [(f"stages.{i}.blocks.", 0, d, False) for i, d in enumerate((3, 4, 6, 3))],
        True,
    ),
    # 1-1-4-7: a stage of one block has nothing to skip
    "regnety_002": ({}, 32, [("s3.b", 1, 4, False), ("s4.b", 1, 7, False)], False),
    # 1-2-3-2-3-1 inverted residuals
    "mobilenetv3_small_100": (
        {},
        32,
        [(f"blocks.{i}.", 0, d, False) for i, d in ((1, 2), (2, 3), (3, 2), (4, 3))],
        True,
    ),
    # 1-2-2-3-3-4-1
    "efficientnet_b0": (
        {},
        32,
        [(f"blocks.{i}.", 0, d, False) for i, d in ((1, 2), (2, 2), (3, 3), (4, 3), (5, 4))],
        True,
    ),
    # downsampling lies outside the blocks: all are skippable
    "convnext_atto": (
        {"dims": (8, 8, 16, 16)},
        32,
        [(f"stages.{i}.blocks.", 0, d, True) for i, d in enumerate((2, 2, 6, 2))],
        True,
    ),
    "vit_tiny_patch16_224": (
        {"img_size": 32, "embed_dim": 24, "num_heads": 3},
        32,
        [("blocks.", 0, 12, True)],
        True,
    ),
    "swin_tiny_patch4_window7_224": (
        {"img_size": 32, "window_size": 2, "embed_dim": 12},
        32,
        [(f"layers.{i}.blocks.", 0, d, True) for i, d in enumerate((2, 2, 6, 2))],
        True,
    ),
    "pvt_v2_b0": ({}, 32, [(f"stages.{i}.blocks.", 0, 2, True) for i in range(4)], True),
    "mixer_s32_224": ({"img_size": 64}, 64, [("blocks.", 0, 8, True)], True),
}
TORCHVISION = {
    "resnet18": ([("layer1.", 0, 2, True)] + [(f"layer{i}.", 0, 2, False) for i in (2, 3, 4)], False),
    # one flat list; 16 | 24 24 | 40 40 40 | 48 48 | 96 96 96 channels
    "mobilenet_v3_small": ([("features.", i, d, False) for i, d in ((2, 2), (4, 3), (7, 2), (9, 3))], True),
}


@functools.cache
def timm_model(name):
    options, _, _, _ = TIMM[name]
    return timm.create_model(name, num_classes=5, **options)


@functools.cache
def timm_stages(name):
    side = TIMM[name][1]
    return unloaf.find_stages(timm_model(name), torch.randn(1, 3, side, side))


@functools.cache
def torchvision_stages(name):
    return unloaf.find_stages(torchvision.models.get_model(name, num_classes=5), torch.randn(1, 3, 32, 32))


def blocks_of(expected):
    return [tuple(f"{prefix}{first + i}" for i in range(depth)) for prefix, first, depth, _ in expected]


def flags_of(expected):
    return [(first_skippable, *(True,) * (depth - 1)) for _, _, depth, first_skippable in expected]


@pytest.mark.parametrize("name", TIMM)
def test_blocks_of_timm_models(name):
    assert [stage.blocks for stage in timm_stages(name)] == blocks_of(TIMM[name][2])


@pytest.mark.parametrize("name", TIMM)
def test_skippable_blocks_of_timm_models(name):
    assert [stage.skippable for stage in timm_stages(name)] == flags_of(TIMM[name][2])


@pytest.mark.parametrize("name", TIMM)
def test_blocks_without_an_activation_behind_the_sum_are_additive(name):
    _, _, expected, additive = TIMM[name]
    assert [s.additive for s in timm_stages(name)] == [tuple(f and additive for f in fs) for fs in flags_of(expected)]


@pytest.mark.parametrize("name", TORCHVISION)
def test_blocks_of_torchvision_models(name):
    assert [stage.blocks for stage in torchvision_stages(name)] == blocks_of(TORCHVISION[name][0])


@pytest.mark.parametrize("name", TORCHVISION)
def test_skippable_blocks_of_torchvision_models(name):
    assert [stage.skippable for stage in torchvision_stages(name)] == flags_of(TORCHVISION[name][0])


def test_stages_are_named_after_the_module_that_holds_the_blocks():
    assert [stage.name for stage in timm_stages("resnet50")] == ["layer1", "layer2", "layer3", "layer4"]


def test_stages_of_a_flat_list_have_distinct_names():
    assert len({stage.name for stage in torchvision_stages("mobilenet_v3_small")}) == 4


def test_the_shape_of_the_example_is_recorded_without_its_batch():
    assert timm_stages("resnet18")[0].input_shape == (3, 32, 32)


def vgg():
    return timm.models.vgg.VGG([8, "M", 16, "M"], num_classes=5, mlp_ratio=0.01)


def densenet():
    return torchvision.models.DenseNet(growth_rate=4, block_config=(2, 2), num_init_features=8, num_classes=5)


@pytest.mark.parametrize("build", [vgg, densenet])
def test_networks_without_residual_blocks_are_refused(build):
    with pytest.raises(unloaf.NoResidualBlocksError, match=f"{type(build()).__name__} has no residual blocks.*blocks="):
        unloaf.find_stages(build(), torch.randn(1, 3, 32, 32))


def test_no_residual_blocks_is_a_value_error():
    assert issubclass(unloaf.NoResidualBlocksError, ValueError)


@pytest.mark.parametrize("shape", [(1, 5, 32, 32), (1, 3, 0, 0), (7,)])
def test_an_example_of_the_wrong_shape_is_refused_by_its_shape(shape):
    with pytest.raises(ValueError, match=r"of shape \(" + ", ".join(map(str, shape))):
        unloaf.find_stages(timm_model("resnet18"), torch.randn(shape))


def test_an_example_of_zeros_finds_the_same_stages():
    assert unloaf.find_stages(timm_model("resnet18"), torch.zeros(1, 3, 32, 32)) == timm_stages("resnet18")


def test_an_example_of_zeros_makes_no_block_of_a_plain_module():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4, bias=False)

        def forward(self, x):
            return torch.tanh(self.inner(x))

    model = nn.Sequential(Plain(), Plain(), Block(4, 4), Block(4, 4), nn.Linear(4, 3))
    assert [stage.blocks for stage in unloaf.find_stages(model, torch.zeros(2, 4))] == [("2", "3")]


def test_zero_initialised_last_norms_with_squeeze_and_excitation_make_no_false_blocks():
    options = {"block_args": {"attn_layer": "se"}, "zero_init_last": True}
    model = timm.create_model("resnet50", num_classes=5, layers=(2, 2, 2, 2), **RESNET, **options)
    assert not model.layer1[1].bn3.weight.any()
    stages = unloaf.find_stages(model, torch.randn(1, 3, 32, 32))
    assert [stage.blocks for stage in stages] == [(f"layer{i}.0", f"layer{i}.1") for i in (1, 2, 3, 4)]


def test_a_block_that_is_called_twice_is_not_a_block():
    shared = Block(4, 4)
    with pytest.raises(unloaf.NoResidualBlocksError):
        unloaf.find_stages(nn.Sequential(shared, shared, nn.Linear(4, 3)), torch.randn(2, 4))


def test_the_encoder_layers_of_torch_are_found():
    layer = nn.TransformerEncoderLayer(16, 2, 32, norm_first=True, batch_first=True)
    model = nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)
    [stage] = unloaf.find_stages(model, torch.randn(2, 5, 16))
    assert (stage.blocks, stage.skippable) == (tuple(f"layers.{i}" for i in range(4)), (True,) * 4)


def test_in_place_blocks_are_found():
    class InPlace(Block):
        def forward(self, x):
            y = self.outer(torch.tanh(self.inner(x)))
            x += y
            return x

    stages = unloaf.find_stages(nn.Sequential(nn.Linear(4, 4), InPlace(4, 4), InPlace(4, 4)), torch.randn(2, 4))
    assert [stage.blocks for stage in stages] == [("1", "2")]


def test_a_mapping_is_passed_as_keywords():
    class Keywords(ToyNetwork):
        def forward(self, *, tokens):
            return super().forward(tokens)

    stages = unloaf.find_stages(Keywords(), {"tokens": torch.randn(2, 4)})
    assert [stage.depth for stage in stages] == [3, 3]


# --- explicit blocks


def test_explicit_blocks_are_taken_as_given():
    stages = unloaf.find_stages(ToyNetwork(), torch.randn(2, 4), blocks=[["second.1", "second.2"]])
    assert [(stage.blocks, stage.skippable) for stage in stages] == [(("second.1", "second.2"), (True, True))]


def test_explicit_blocks_that_change_the_shape_are_not_skippable():
    stages = unloaf.find_stages(ToyNetwork(), torch.randn(2, 4), blocks=[["first.0", "first.1"]])
    assert stages[0].skippable == (False, True)


def test_explicit_blocks_may_be_post_norm():
    class PostNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)

        def forward(self, x):
            return self.norm(x + self.inner(x))

    model = nn.Sequential(PostNorm(), PostNorm(), nn.Linear(4, 3))
    (stage,) = unloaf.find_stages(model, torch.randn(2, 4), blocks=[["0", "1"]])
    assert (stage.skippable, stage.additive) == ((True, True), (False, False))


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([["first.0", "third.1"]], "'third.1'.*not a module of ToyNetwork"),
        ([["first.0", ""]], "''.*not a module"),
        ([["first.1", "first.1"]], "'first.1' twice"),
        ([["first.2", "first.1"]], "'first.1' runs before 'first.2'"),
        ([["second.0", "second.1"], ["first.0", "first.1"]], "'first.0' runs before 'second.1'"),
        ([["first.1.outer", "first.1"]], "nested in each other"),
        ([["first.1"]], "two blocks or more"),
        ([["first.0", "second.0"]], "nothing of stage"),
    ],
)
def test_wrong_explicit_blocks_are_refused(blocks, message):
    with pytest.raises(ValueError, match=message):
        unloaf.find_stages(ToyNetwork(), torch.randn(2, 4), blocks=blocks)


def test_explicit_blocks_that_never_run_are_refused():
    model = ToyNetwork()
    model.spare = Block(4, 4)
    with pytest.raises(ValueError, match=r"'spare' is not called exactly once"):
        unloaf.find_stages(model, torch.randn(2, 4), blocks=[["spare", "first.1"]])


# --- the model is left as it was


def everything_about(model):
    """State bits, training flags, hooks and shadowed forwards: all that a search could leave behind."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return (
        {key: value.numpy().tobytes() for key, value in model.state_dict().items()},
        [module.training for module in model.modules()],
        [len(getattr(module, name)) for module in model.modules() for name in hooks],
        [sorted(module.__dict__) for module in model.modules()],
        [parameter.grad for parameter in model.parameters()],
    )


def mixed_modes(name):
    model = copy.deepcopy(timm_model(name)).train()
    next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)).eval()
    return model


@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (1, 5, 32, 32)], ids=["found", "refused"])
@pytest.mark.parametrize("name", ["resnet18", "mobilenetv3_small_100"])
def test_the_model_is_left_as_it_was(name, shape):
    model = mixed_modes(name)
    before = everything_about(model)
    try:
        unloaf.find_stages(model, torch.randn(shape))
    except ValueError:
        assert shape[1] == 5
    assert everything_about(model) == before


class TwoNames(Block):
    """One inner module under two names, one parameter in two modules."""

    def __init__(self):
        super().__init__(4, 4)
        self.again = self.inner
        self.tied = nn.Linear(4, 4)
        self.tied.weight = self.outer.weight

    def forward(self, x):
        return x + self.outer(torch.tanh(self.again(x))) + self.tied(x)


def test_a_module_under_two_names_keeps_its_parameters():
    model = nn.Sequential(TwoNames(), TwoNames())
    before, own = everything_about(model), [id(p) for p in model.parameters()]
    (stage,) = unloaf.find_stages(model, torch.randn(2, 4))
    assert stage.skippable == (True, True)
    assert everything_about(model) == before
    assert [id(p) for p in model.parameters()] == own


def test_no_block_keeps_a_forward_of_its_own():
    model = timm_model("resnet18")
    timm_stages("resnet18")
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_the_state_of_the_random_generator_is_left_as_it_was():
    model, example = ToyNetwork(), torch.randn(2, 4)
    before = torch.random.get_rng_state()
    unloaf.find_stages(model, example)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_a_model_under_autocast_and_in_training_mode_is_probed_in_full_precision():
    example = torch.randn(2, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        stages = unloaf.find_stages(ToyNetwork(norm=True, dropout=0.5).train(), example)
    assert [stage.depth for stage in stages] == [3, 3]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_blocks_below_the_autocast_of_the_model_itself_are_found(dtype):
    class Mixed(ToyNetwork):
        def forward(self, x):
            with torch.autocast("cpu", dtype):
                return super().forward(x)

    stages = unloaf.find_stages(Mixed(), torch.randn(2, 4))
    assert [(stage.skippable, stage.additive) for stage in stages] == [((False, True, True),) * 2] * 2


def test_stages_of_a_model_serve_its_deepcopy():
    model, x = ToyNetwork(), torch.randn(2, 4)
    stages = unloaf.find_stages(model, x)
    small, twin = unloaf.Subnet.from_depths(stages, (1, 2)), copy.deepcopy(model)
    with unloaf.active_subnet(model, stages, small):
        expected = model(x)
    with unloaf.active_subnet(twin, stages, small):
        assert torch.equal(twin(x), expected)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda stages: pickle.loads(pickle.dumps(stages))])
def test_stages_survive_copying_and_pickling(again):
    assert again(timm_stages("resnet18")) == timm_stages("resnet18")


def test_legal_depths_drop_skippable_blocks_from_the_end():
    assert unloaf.Stage("s", tuple("abcd"), (True, False, True, True)).legal_depths == (2, 3, 4)
