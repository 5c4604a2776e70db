"""Networks by name."""

import json
from dataclasses import replace

import pytest
import torch
import torchvision
import transformers
from safetensors.torch import load_file

import tiny
import unloaf
from unloaf.config import Config
from unloaf.engine.setup import prepare
from unloaf.models.build import build_model, draw_head
from unloaf.models.hf import example_of


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


def test_timm_model_takes_arguments_of_its_class():
    """Parameters by hand: patches, class token, positions, blocks of 12 d^2 + 13 d, last norm, head."""
    arguments = {"patch_size": 4, "embed_dim": 64, "depth": 5, "num_heads": 2}
    model = build_model("timm/vit_tiny_patch16_224", num_classes=7, img_size=16, model_kwargs=arguments)
    assert model(torch.zeros(2, 3, 16, 16)).shape == (2, 7)
    patches, positions, blocks = 64 * 48 + 64, 64 + 17 * 64, 5 * (12 * 64**2 + 13 * 64)
    assert parameters(model) == patches + positions + blocks + 2 * 64 + 7 * 65


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("timm/vit_tiny_patch16_224", {"img_size": 16}, "model_kwargs img_size: give --img-size instead"),
        ("timm/vit_tiny_patch16_224", {"checkpoint_path": "x.pth"}, "checkpoint_path: give --initial-checkpoint"),
        ("timm/vit_tiny_patch16_224", {"pretrained_cfg": "x"}, "pretrained_cfg: give arguments of the model's class"),
        ("timm/vit_tiny_patch16_224", {"layers": 3}, "unexpected keyword argument 'layers'"),
        ("timm/vit_tiny_patch16_224", {"num_heads": 0}, "cannot be built with num_heads=0: ZeroDivisionError: "),
        (
            "timm/vit_tiny_patch16_224",
            {"norm_layer": "none-such"},
            "with norm_layer='none-such': KeyError: 'none-such'",
        ),
        ("timm/vit_tiny_patch16_224", {"pretrained": True}, "model_kwargs pretrained: give --pretrained instead"),
        ("timm/vit_tiny_patch16_224", {"init_values": None}, "init_values: timm ignores None; leave it out"),
        ("cifar/resnet20", {"depth": 3}, "takes no depth; give a timm/ model, or leave out --model-kwargs"),
    ],
)
def test_arguments_that_a_model_does_not_take_are_refused(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        build_model(name, num_classes=7, model_kwargs=arguments)


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
        ("retinanet", "is no classifier: --task detection trains it; here give its backbone"),
    ],
)
def test_unknown_or_ambiguous_name_is_answered(name, message):
    with pytest.raises(ValueError, match=message):
        build_model(name, num_classes=10)


def test_torchvision_model_refuses_grey_images():
    with pytest.raises(ValueError, match="takes images of 3 channels, not 1; give a timm/ or cifar/ model"):
        build_model("tv/resnet18", num_classes=10, in_chans=1)


@pytest.fixture
def folder(tmp_path):
    """A small network of transformers, with its weights."""
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 3], layer_type="basic")
    torch.manual_seed(0)
    transformers.ResNetForImageClassification(config).save_pretrained(tmp_path)
    return tmp_path


def test_folder_of_transformers(folder):
    model = build_model(f"hf/{folder}", num_classes=7, in_chans=1)
    assert type(model).__name__ == "ResNetForImageClassification"
    assert model(torch.zeros(2, 1, 32, 32)).logits.shape == (2, 7)
    stages = unloaf.find_stages(model, torch.zeros(1, 1, 32, 32))
    assert stages[-1].depth == 3


def test_weights_of_a_folder_are_loaded_where_asked_for(folder):
    saved = load_file(folder / "model.safetensors")
    name = next(name for name in saved if name.endswith("0.layer.0.convolution.weight"))
    kept = build_model(f"hf/{folder}", num_classes=7, pretrained=True).state_dict()[name]
    fresh = build_model(f"hf/{folder}", num_classes=7).state_dict()[name]
    assert torch.equal(kept, saved[name])
    assert not torch.equal(fresh, saved[name])


def test_class_of_transformers():
    model = build_model("hf/ResNetForImageClassification", num_classes=10)
    assert list(model.config.depths) == [3, 4, 6, 3]
    assert model.classifier[1].out_features == 10


def test_tokens_are_the_example_of_a_language_model():
    config = transformers.GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=11)
    model = transformers.GPT2LMHeadModel(config).eval()
    example = example_of(model)
    assert model(**example).logits.shape == (1, 16, 11)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("hf/no/such/folder", "no/such/folder has no config.json"),
        ("hf/RestNetConfig", "did you mean hf/ResNetConfig"),
        ("hf/LlamaConfig", "parameters with its default values; give a folder with a smaller config.json"),
    ],
)
def test_what_transformers_does_not_have_is_answered(name, message):
    with pytest.raises(ValueError, match=message):
        build_model(name, num_classes=10)


@pytest.mark.parametrize("text", ["{", '{"model_type": "nothing_like_it"}', "[]"])
def test_damaged_configuration_is_named(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="cannot be read"):
        build_model(f"hf/{tmp_path}", num_classes=10)


def test_code_of_a_folder_is_not_run(folder):
    settings = json.loads((folder / "config.json").read_text())
    auto = {"AutoConfig": "evil.Config", "AutoModelForImageClassification": "evil.Net"}
    (folder / "config.json").write_text(json.dumps(settings | {"auto_map": auto, "model_type": "evil"}))
    (folder / "evil.py").write_text("raise SystemExit('was run')")
    with pytest.raises(ValueError, match="cannot be read"):
        build_model(f"hf/{folder}", num_classes=10)


def test_function_is_no_name_of_a_model():
    with pytest.raises(ValueError, match="no such model"):
        build_model("torchvision.models:resnet18", num_classes=10)


@pytest.mark.parametrize(
    ("name", "path"),
    [("cifar/resnet8", "fc"), ("tv/mobilenet_v3_small", "classifier.3"), ("timm/vit_tiny_patch16_224", "head")],
)
def test_the_classifier_is_drawn_anew(name, path):
    torch.manual_seed(0)
    model = build_model(name, num_classes=200)
    others = {key: value.clone() for key, value in model.state_dict().items() if not key.startswith(f"{path}.")}
    draw_head(model, num_classes=200, std=0.01)
    head = model.get_submodule(path)
    # 64 x 200 draws or more: the spread is within 3 %, the mean within 5 standard errors of 0.01 / 113.
    assert head.weight.std().item() == pytest.approx(0.01, rel=0.03)
    assert abs(head.weight.mean().item()) < 5 * 0.01 / 113
    assert head.bias.tolist() == [0.0] * 200
    assert all(torch.equal(model.state_dict()[key], value) for key, value in others.items())


def test_a_run_begins_with_that_classifier(tmp_path):
    config = Config(model="cifar/resnet14", width=4, head_init=0.5, device="cpu", output=str(tmp_path))
    head = prepare(config).model.fc
    assert head.bias.tolist() == [0.0] * 10
    assert 0.4 < head.weight.std().item() < 0.6  # by default at most 1/4, the side of torch's uniform draw
    assert prepare(replace(config, head_init=None)).model.fc.weight.abs().max() <= 0.25


def test_a_model_without_such_a_layer_is_refused():
    with pytest.raises(ValueError, match=r"^head_init 0.01: no linear layer of the model has 7 outputs; leave it out$"):
        draw_head(build_model("cifar/resnet8", num_classes=10), num_classes=7, std=0.01)


def test_a_learned_classifier_is_not_drawn_anew():
    with pytest.raises(ValueError, match=r"^head_init redraws the classifier that pretrained has learned"):
        Config(model="tv/resnet50", pretrained=True, head_init=0.01)


# Auxiliary heads


@pytest.mark.parametrize(("name", "side"), [("tv/googlenet", 32), ("tv/inception_v3", 80)])
def test_every_weight_of_networks_with_auxiliary_heads_is_trained(name, side):
    model = build_model(name, num_classes=5)
    unloaf.CommonTraining(model).backward(torch.randn(2, 3, side, side), torch.tensor([1, 3]))
    assert [name for name, weight in model.named_parameters() if weight.grad is None] == []
    assert not any("aux" in name.lower() for name, _ in model.named_modules())


def test_published_weights_come_without_auxiliary_heads_too(monkeypatch):
    given = {}

    def get(name, **settings):
        given.update(settings)
        return torch.nn.Sequential(torch.nn.Linear(1, 1000))

    monkeypatch.setattr(torchvision.models, "get_model", get)
    build_model("tv/googlenet", num_classes=5, pretrained=True)
    assert given == {"weights": "DEFAULT", "aux_logits": False}


def test_run_says_that_heads_are_left_out(monkeypatch):
    monkeypatch.setattr("unloaf.tasks.classification.build_model", lambda name, **settings: tiny.network())
    lines = prepare(tiny.config(model="tv/googlenet", method="common"), data=tiny.data()).opening
    assert "tv/googlenet is built without its auxiliary heads, which no loss here would train" in lines


@pytest.mark.parametrize("reason", ["cannot find the requested files in the local cache", "timed out"])
def test_published_weights_that_cannot_be_fetched_are_bad_input_and_told_in_a_line(monkeypatch, reason):
    def fail(*args, **kwargs):
        raise OSError(f"{reason}\nmore of it")

    monkeypatch.setattr("timm.create_model", fail)
    with pytest.raises(
        ValueError, match=f"^model timm/resnet18: its published weights cannot be fetched .*{reason}"
    ) as e:
        build_model("timm/resnet18", num_classes=3, pretrained=True)
    assert str(e.value).endswith(
        "give --initial-checkpoint FILE with weights on this machine, or leave --pretrained out"
    )
    assert "\n" not in str(e.value)
