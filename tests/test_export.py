"""`unloaf.export_subnet`: a subnet as an ordinary module, equal to the model running as that subnet."""

import copy
import importlib
import os
import pickle
import sys
import warnings
from dataclasses import dataclass

import pytest
import timm
import torch
import torchvision
import transformers
from torch import nn

import tiny
import unloaf
from toy_networks import ToyNetwork
from unloaf.export import block_counts, parse_subnet, without_stand_ins
from unloaf.models.build import build_model

SIDE_32, SIDE_56, SIDE_64 = (torch.randn(2, 3, side, side) for side in (32, 56, 64))
TOKENS = {"input_ids": torch.arange(14).reshape(2, 7), "use_cache": False}


def hf(kind, **settings):
    """A network of transformers from its configuration's class; its warnings about token numbers are of no interest."""
    config = getattr(transformers, kind.partition("For")[0].partition("LMHead")[0].removesuffix("Encoder") + "Config")
    return getattr(transformers, kind)(config(**settings))


SMALL = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
LLAMA = {"num_key_value_heads": 1, "vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT2 = {"n_layer": 4, "n_embd": 16, "n_head": 2, "vocab_size": 50, "bos_token_id": 1, "eos_token_id": 2}

NETWORKS = {
    "cifar/resnet20": (lambda: build_model("cifar/resnet20", num_classes=10, width=4), SIDE_32),
    "timm/resnet18": (lambda: timm.create_model("resnet18", num_classes=10), SIDE_64),
    "timm/vit": (lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=10, depth=5), SIDE_32),
    "timm/swin": (lambda: timm.create_model("swin_tiny_patch4_window7_224", img_size=56, depths=(2, 2, 4, 2)), SIDE_56),
    "timm/convnext": (lambda: timm.create_model("convnext_atto", num_classes=10), SIDE_64),
    "timm/mobilenetv3": (lambda: timm.create_model("mobilenetv3_small_050", num_classes=10), SIDE_64),
    "timm/regnety": (lambda: timm.create_model("regnety_002", num_classes=10), SIDE_64),
    "tv/resnet18": (lambda: torchvision.models.resnet18(num_classes=10), SIDE_64),
    "tv/mobilenet_v3_small": (lambda: torchvision.models.mobilenet_v3_small(num_classes=10), SIDE_64),
    "hf/vit": (lambda: hf("ViTForImageClassification", image_size=32, patch_size=8, **SMALL), SIDE_32),
    "hf/dinov2": (
        lambda: hf(
            "Dinov2ForImageClassification", image_size=32, patch_size=8, hidden_size=16, num_hidden_layers=4,
            num_attention_heads=2, mlp_ratio=2,
        ),
        SIDE_32,
    ),
    "hf/swin": (
        lambda: hf(
            "SwinForImageClassification", image_size=32, patch_size=2, embed_dim=8, depths=[2, 3], num_heads=[2, 2],
            window_size=4,
        ),
        SIDE_32,
    ),
    "hf/convnext": (
        # A fresh scale of 1e-6 adds less than float32 tells, once in many draws.
        lambda: hf(
            "ConvNextForImageClassification",
            hidden_sizes=[8, 16, 16, 16],
            depths=[2, 1, 3, 2],
            layer_scale_init_value=0.5,
        ),
        SIDE_64,
    ),
    "hf/resnet": (
        lambda: hf("ResNetForImageClassification", hidden_sizes=[8, 16], depths=[2, 3], layer_type="basic"),
        SIDE_64,
    ),
    "hf/gpt2": (lambda: hf("GPT2LMHeadModel", **GPT2), TOKENS),
    "hf/llama": (lambda: hf("LlamaForCausalLM", **SMALL, **LLAMA), TOKENS),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_advice_of_transformers():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def smallest(stages):
    return unloaf.Subnet.from_depths(stages, [stage.legal_depths[0] for stage in stages])


def without_first_skippable(stages):
    """Of each stage, so that blocks behind the gap stay."""
    return unloaf.Subnet(tuple(tuple(i != s.skippable.index(True) for i in range(s.depth)) for s in stages))


def run(model, x):
    output = model(**x) if isinstance(x, dict) else model(x)
    return getattr(output, "logits", output)


def parameters_of(model, stages, subnet):
    """Counted by name from outside: all but those below a skipped block."""
    kept = subnet.modes(stages)
    skipped = tuple(f"{path}." for stage in stages for path in stage.blocks if path not in kept)
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith(skipped))


def settled(build):
    """In eval mode, with norms unlike fresh ones: the last norm of a block of timm is zero, and skips the block."""
    model = build().eval()
    for parameter in model.parameters():
        if parameter.ndim == 1 and not parameter.any():
            nn.init.uniform_(parameter, 0.5, 1.5)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.1)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    return model


@pytest.mark.parametrize("choose", [smallest, without_first_skippable])
@pytest.mark.parametrize("name", NETWORKS)
def test_copy_equals_the_active_subnet_bit_for_bit(name, choose):
    build, x = NETWORKS[name]
    model = settled(build)
    stages = unloaf.find_stages(model, x)
    subnet = choose(stages)
    with warnings.catch_warnings():
        if (name, choose) == ("hf/swin", without_first_skippable):
            warnings.simplefilter("ignore")  # said in the test below
        small = unloaf.export_subnet(model, stages, subnet, example=x)
    with torch.no_grad():
        with unloaf.active_subnet(model, stages, subnet):
            expected = run(model, x)
        assert torch.equal(run(small, x), expected)
        assert not torch.equal(run(model, x), expected)
    assert sum(p.numel() for p in small.parameters()) == parameters_of(model, stages, subnet)
    if choose is smallest:
        assert set(small.state_dict()) < set(model.state_dict())


@pytest.mark.parametrize("choose", [smallest, without_first_skippable])
@pytest.mark.parametrize("name", [name for name in NETWORKS if name.startswith("hf/")])
def test_transformers_reload_what_they_save(name, choose, tmp_path):
    if (name, choose) == ("hf/swin", without_first_skippable):
        pytest.skip("the windows of Swin are shifted in every second block, which no configuration can change")
    build, x = NETWORKS[name]
    model = settled(build)
    stages = unloaf.find_stages(model, x)
    small = unloaf.export_subnet(model, stages, choose(stages), example=x)
    small.save_pretrained(tmp_path)
    again, report = type(small).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    again = copy.deepcopy(again).eval()  # the file is mapped, and kernels round otherwise at odd addresses
    with torch.no_grad():
        assert torch.equal(run(again, x), run(small, x))
    assert (tmp_path / "model.safetensors").stat().st_size < 4.2 * sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", ["hf/gpt2", "hf/llama"])
def test_small_language_model_generates_with_its_cache_as_without(name):
    build, _ = NETWORKS[name]
    model = build().eval()
    stages = unloaf.find_stages(model, TOKENS)
    small = unloaf.export_subnet(model, stages, without_first_skippable(stages), example=TOKENS)
    words = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    start = torch.tensor([[3, 4, 5]])
    assert torch.equal(small.generate(start, **words), small.generate(start, use_cache=False, **words))
    assert len(small.generate(start, return_dict_in_generate=True, **words).past_key_values.layers) == 3


def test_configuration_that_cannot_describe_the_subnet_is_said():
    build, x = NETWORKS["hf/swin"]
    model = build().eval()
    stages = unloaf.find_stages(model, x)
    with pytest.warns(UserWarning, match="from_pretrained would not reload"):
        unloaf.export_subnet(model, stages, without_first_skippable(stages))
    assert model.config.depths == [2, 3]


def test_copy_works_where_unloaf_is_not_installed(tmp_path):
    model = torchvision.models.resnet18().eval()
    stages = unloaf.find_stages(model, SIDE_64)
    small = unloaf.export_subnet(model, stages, smallest(stages))
    with torch.no_grad():
        torch.save((small, small(SIDE_64)), tmp_path / "small.pt")

    def read_back():
        for name in [name for name in sys.modules if name.partition(".")[0] == "unloaf"]:
            sys.modules[name] = None  # importing it raises
        again, expected = torch.load(tmp_path / "small.pt", weights_only=False)
        with torch.no_grad():
            assert torch.equal(copy.deepcopy(again)(SIDE_64), expected)
        with pytest.raises(ImportError):
            importlib.import_module("unloaf")

    _, status = os.waitpid(tiny.fork(read_back, errors=tmp_path / "errors.txt"), 0)
    assert status == 0, (tmp_path / "errors.txt").read_text()


def test_model_is_left_as_it_was():
    model = ToyNetwork().train()
    stages = unloaf.find_stages(model, torch.zeros(1, 4))
    before, modules = pickle.dumps(model.state_dict()), list(model.modules())
    small = unloaf.export_subnet(model, stages, smallest(stages))
    assert pickle.dumps(model.state_dict()) == before
    assert list(model.modules()) == modules
    assert all(module.training for module in [*model.modules(), *small.modules()])
    assert {p.data_ptr() for p in model.parameters()}.isdisjoint(p.data_ptr() for p in small.parameters())


def test_copy_shares_nothing_and_can_be_trained():
    model = ToyNetwork(norm=True)
    stages = unloaf.find_stages(model, torch.zeros(2, 4))
    small = unloaf.export_subnet(model, stages, smallest(stages))
    small(torch.randn(5, 4)).sum().backward()
    assert all(p.grad is not None for p in small.parameters())
    assert all(p.grad is None for p in model.parameters())


def test_wrapped_and_compiled_models_are_looked_through():
    model = ToyNetwork().eval()
    x = torch.randn(3, 4)
    stages = unloaf.find_stages(model, x)
    expected = unloaf.export_subnet(model, stages, smallest(stages))(x)
    unloaf.compile_blocks(model, stages, backend="eager")
    small = unloaf.export_subnet(nn.DataParallel(model), stages, smallest(stages))
    assert type(small) is ToyNetwork
    assert not any("forward" in module.__dict__ for module in small.modules())
    assert torch.equal(small(x), expected)


class Named(nn.Module):
    """Blocks as attributes; ``twice`` calls them with a second tensor."""

    def __init__(self, *, twice):
        super().__init__()
        self.twice = twice
        self.one, self.two, self.three = Pair(), Pair(), Pair()

    def forward(self, x):
        for block in (self.one, self.two, self.three):
            x = block(x, x) if self.twice else block(x)
        return x


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x, other=None):
        return x + self.inner(x)


def test_identity_takes_the_place_of_a_named_child():
    model = Named(twice=False)
    stages = unloaf.find_stages(model, torch.zeros(1, 4))
    small = unloaf.export_subnet(model, stages, unloaf.Subnet(((True, False, True),)))
    assert [type(child) for child in small.children()] == [Pair, nn.Identity, Pair]
    assert set(small.state_dict()) < set(model.state_dict())


def test_block_that_nothing_can_stand_for_is_named():
    model = Named(twice=True)
    stages = unloaf.find_stages(model, torch.zeros(1, 4))
    with pytest.raises(ValueError, match=r"without block 'two' \(Pair\): it takes or returns more than one tensor"):
        unloaf.export_subnet(model, stages, unloaf.Subnet(((True, False, True),)))


class Counting(nn.Module):
    """Scales by the position of the block, so that deleting one changes the network."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Pair(), Pair(), Pair()])

    def forward(self, x):
        for i, block in enumerate(self.blocks):
            x = block(x) * (i + 1)
        return x


def test_identity_takes_the_place_where_deleting_would_change_the_network():
    model, x = Counting(), torch.randn(2, 4)
    stages = unloaf.find_stages(model, x, blocks=[["blocks.0", "blocks.1", "blocks.2"]])
    subnet = unloaf.Subnet(((True, False, True),))
    small = unloaf.export_subnet(model, stages, subnet)
    assert [type(child) for child in small.blocks] == [Pair, nn.Identity, Pair]
    with unloaf.active_subnet(model, stages, subnet):
        assert torch.equal(model(x), small(x))


class Result:
    """An output that is neither a tensor nor a container."""

    def __init__(self, logits):
        self.logits = logits


class Scaled(nn.Module):
    """Pairs blocks with scales by position, so that the network is another one when a block is deleted."""

    def __init__(self, wrap=Result):
        super().__init__()
        self.blocks = nn.ModuleList([Pair(), Pair(), Pair()])
        self.scale, self.wrap = (1.0, 5.0, 9.0), wrap

    def forward(self, x):
        for block, scale in zip(self.blocks, self.scale, strict=False):
            x = block(x * scale) / scale
        return self.wrap(x)


@dataclass
class DataResult:
    logits: torch.Tensor


WRAPS = {
    "attribute": Result,
    "data class": DataResult,
    "inside a list": lambda x: [Result(x)],
    "one inside the other": lambda x: Result(Result(x)),
}


@pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)
def test_outputs_that_are_objects_are_compared_too(wrap):
    x = torch.randn(2, 4)
    model, plain = Scaled(wrap), Scaled(lambda x: x)
    plain.load_state_dict(model.state_dict())
    stages = unloaf.find_stages(plain, x, blocks=[["blocks.0", "blocks.1", "blocks.2"]])
    small = unloaf.export_subnet(model, stages, unloaf.Subnet(((True, False, True),)))
    small.wrap = lambda x: x
    expected = plain.blocks[2](plain.blocks[0](x) * 5 / 5 * 9) / 9  # a skipped block returns its input
    torch.testing.assert_close(small(x), expected)


class Owned(Scaled):
    """Its outputs know their network, and themselves."""

    def forward(self, x):
        result = super().forward(x)
        result.model, result.self = self, result
        return result


def test_weights_of_a_network_that_its_output_holds_are_not_compared():
    model, x = Owned(), torch.randn(2, 4)
    stages = unloaf.find_stages(Scaled(lambda x: x), x, blocks=[["blocks.0", "blocks.1", "blocks.2"]])
    small = unloaf.export_subnet(model, stages, unloaf.Subnet.from_depths(stages, (2,)))
    expected = model.blocks[1](model.blocks[0](x) * 5) / 5
    torch.testing.assert_close(small(x).logits, expected)
    assert len(small.blocks) == 2


@pytest.mark.parametrize("wrap", [lambda x: None, lambda x: [], lambda x: "logits"], ids=["None", "empty", "text"])
def test_a_model_without_output_to_compare_is_refused(wrap):
    stages = unloaf.find_stages(Scaled(lambda x: x), torch.randn(2, 4), blocks=[["blocks.0", "blocks.1", "blocks.2"]])
    with pytest.raises(ValueError, match=r"Scaled returned a \w+ without a tensor.*return the logits"):
        unloaf.export_subnet(Scaled(wrap), stages, unloaf.Subnet(((True, False, True),)))


class Random(Counting):
    """Draws in eval mode too."""

    def forward(self, x):
        return super().forward(x) + torch.rand_like(x)


@pytest.mark.parametrize("keep", [(True, True, True), (True, False, True)])
def test_a_model_that_is_random_in_eval_mode_is_refused_as_such(keep):
    stages = unloaf.find_stages(Counting(), torch.randn(2, 4), blocks=[["blocks.0", "blocks.1", "blocks.2"]])
    with pytest.raises(ValueError, match=r"Random gives other outputs for the same input in eval mode.*switch"):
        unloaf.export_subnet(Random(), stages, unloaf.Subnet((keep,)))


def test_example_is_needed_where_the_stages_know_no_shape():
    model = hf("GPT2LMHeadModel", **GPT2).eval()
    stages = unloaf.find_stages(model, TOKENS)
    with pytest.raises(ValueError, match="give export_subnet"):
        unloaf.export_subnet(model, stages, smallest(stages))


def test_tokens_are_tried_where_noise_does_not_run():
    model = hf("LlamaForCausalLM", **SMALL, **LLAMA, use_cache=False).eval()
    stages = unloaf.find_stages(model, TOKENS["input_ids"])
    small = unloaf.export_subnet(model, stages, smallest(stages))
    assert small.config.num_hidden_layers == 1


def test_raw_foreign_and_nested_subnets_are_refused():
    model, other = ToyNetwork(), ToyNetwork(depths=(2, 2))
    stages, others = (unloaf.find_stages(m, torch.zeros(1, 4)) for m in (model, other))
    raw = unloaf.Subnet(((True, True, True),) * 2, shortcut=((True, False, True), (True, True, True)))
    with pytest.raises(ValueError, match="without their skip connection"):
        unloaf.export_subnet(model, stages, raw)
    with pytest.raises(ValueError, match="another model"):
        unloaf.export_subnet(model, stages, smallest(others))
    with (
        unloaf.active_subnet(model, stages, smallest(stages)),
        pytest.raises(ValueError, match="already runs inside active_subnet"),
    ):
        unloaf.export_subnet(model, stages, unloaf.Subnet.full(stages))


def test_recalibrated_copy_is_the_recalibrated_subnet():
    model = ToyNetwork(norm=True).eval()
    stages, batches = unloaf.find_stages(model, torch.zeros(2, 4)), [torch.randn(8, 4) for _ in range(3)]
    small, whole = unloaf.export_subnet(model, stages, smallest(stages)), copy.deepcopy(model)
    unloaf.recalibrate_bn(small, batches)
    with unloaf.active_subnet(whole, stages, smallest(stages)):
        unloaf.recalibrate_bn(whole, batches)
        assert torch.equal(whole(batches[0]), small(batches[0]))


STAGES = (
    unloaf.Stage("a", ("a.0", "a.1", "a.2"), (False, True, True)),
    unloaf.Stage("b", ("b.0", "b.1"), (True, True)),
)


@pytest.mark.parametrize("text", ["3-2", "1-1", "2:101-2", "2-1:01"])
def test_text_of_a_subnet_is_read_again(text):
    assert str(parse_subnet(STAGES, text)) == text


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("3", "got 1 depths"),
        ("4,1", "keeps 4 of 3 blocks"),
        ("0,1", "at least one stays"),
        ("a,1", "one depth per stage"),
        ("2:111-1", "marks 3 blocks"),
        ("2:011-1", "changes shape"),
        ("3:1b1-1", "one depth per stage"),
        ("2:101-1-1", "blocks per stage"),
        ("", "one depth per stage"),
    ],
)
def test_text_that_names_no_subnet_is_refused(text, reason):
    with pytest.raises(ValueError, match=reason):
        parse_subnet(STAGES, text)


TIMM_FORMS = {
    "resnet26": "layers", "resnet50": "layers", "wide_resnet50_2": "layers", "seresnet18": "layers",
    "ecaresnet26t": "layers", "resnetv2_50": "layers", "res2net50_26w_4s": "layers", "convnext_atto": "depths",
    "convnextv2_atto": "depths", "vit_tiny_patch16_224": "depth", "deit_tiny_patch16_224": "depth",
    "deit3_small_patch16_224": "depth", "eva02_tiny_patch14_224": "depth", "vit_small_patch14_dinov2": "depth",
    "vit_small_patch16_dinov3": "depth", "swin_tiny_patch4_window7_224": "depths", "swinv2_tiny_window8_256": "depths",
    "swinv2_cr_tiny_ns_224": "depths", "pvt_v2_b1": "depths", "beit_base_patch16_224": "depth",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMM_FORMS)
def test_timm_builds_an_ordered_subnet_from_one_keyword(name):
    model = settled(lambda: timm.create_model(name, num_classes=5))
    side = model.pretrained_cfg["input_size"][-1]
    x = torch.randn(1, 3, side, side)
    stages = unloaf.find_stages(model, x)
    small = unloaf.export_subnet(model, stages, smallest(stages))
    kinds = {type(model.get_submodule(path)) for stage in stages for path in stage.blocks}
    dense = without_stand_ins(small, kinds)
    counts, keyword = block_counts(dense, kinds), TIMM_FORMS[name]
    twin = timm.create_model(name, num_classes=5, **{keyword: counts[0] if keyword == "depth" else counts}).eval()
    twin.load_state_dict(dense.state_dict())
    with torch.no_grad():
        assert torch.equal(twin(x), small(x))
