"""Weights that a training begins with."""

import argparse
import pickle
import zipfile
from collections import OrderedDict
from typing import Any

import pytest
import timm
import torch
import torchvision
import transformers
from safetensors.torch import save_file
from torch import nn

import tiny
import unloaf
from unloaf.errors import CheckpointError
from unloaf.models.cifar import CifarResNet
from unloaf.models.initial_weights import load_initial_weights
from unloaf.release.subnet_files import save_subnet

VIT: dict[str, Any] = {"patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 3}


def vit(side, classes=5, **settings):
    return timm.create_model("vit_tiny_patch16_224", img_size=side, num_classes=classes, **(VIT | settings)).eval()


def swin(side, window):
    settings: dict[str, Any] = {
        "embed_dim": 8,
        "depths": (2, 2),
        "num_heads": (1, 2),
        "num_classes": 5,
        "patch_size": 2,
    }
    return timm.create_model("swin_tiny_patch4_window7_224", img_size=side, window_size=window, **settings).eval()


def cifar(depth=8, channels=3, classes=5, width=8):
    torch.manual_seed(depth + channels + classes)
    return CifarResNet(depth, num_classes=classes, in_chans=channels, width=width).eval()


def saved(model, path):
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path)
    return path


def levit(classes):
    """A head of two parts."""
    sizes: dict[str, Any] = {
        "hidden_sizes": (16, 16, 16),
        "num_attention_heads": (1, 1, 1),
        "depths": (1, 1, 1),
        "key_dim": (4, 4, 4),
    }
    return transformers.LevitConfig(**sizes, **{"num_labels": classes})


@pytest.fixture
def file(tmp_path):
    return tmp_path / "model.safetensors"


WRAPPINGS = {
    "names alone": (".pth", lambda state: state),
    "DistributedDataParallel": (".pt", lambda state: {f"module.{name}": value for name, value in state.items()}),
    "torch.compile of that": (
        ".bin",
        lambda state: {f"_orig_mod.module.{name}": value for name, value in state.items()},
    ),
    "Lightning": (
        ".ckpt",
        lambda state: {"state_dict": {f"model.{name}": value for name, value in state.items()}, "epoch": 3},
    ),
    "torchvision's references": (".pth", lambda state: {"model": state, "args": argparse.Namespace(lr=0.1)}),
    "timm": (
        ".pth.tar",
        lambda state: {
            "state_dict": {name: torch.zeros_like(value) for name, value in state.items()},
            "state_dict_ema": OrderedDict((f"module.{name}", value) for name, value in state.items()),
            "arch": "resnet8",
        },
    ),
}


@pytest.mark.parametrize("name", WRAPPINGS)
def test_weights_are_found_as_training_scripts_save_them(tmp_path, name):
    suffix, wrap = WRAPPINGS[name]
    old, new = cifar(), cifar(classes=5, channels=3)
    nn.init.normal_(new.conv1.weight)
    torch.save(wrap(old.state_dict()), tmp_path / f"weights{suffix}")
    lines = load_initial_weights(new, tmp_path / f"weights{suffix}")
    assert tiny.same(tiny.weights(new), tiny.weights(old))
    floats = sum(value.is_floating_point() for value in old.state_dict().values())
    assert lines[0].endswith(f": loaded {floats} of {floats} tensors")
    assert any("its state_dict_ema was taken" in line for line in lines) == (name == "timm")


def test_names_that_begin_like_a_wrapper_stay(tmp_path):
    """As those of causal models of transformers, which have a module `model` of their own."""
    old, new = (nn.ModuleDict({"model": nn.Linear(3, 2), "lm_head": nn.Linear(2, 2)}) for _ in range(2))
    torch.save({f"module.{name}": value for name, value in old.state_dict().items()}, tmp_path / "weights.pt")
    load_initial_weights(new, tmp_path / "weights.pt")
    assert tiny.same(tiny.weights(new), tiny.weights(old))


def test_files_of_a_model_of_transformers_without_its_head_are_a_start(file):
    """Their names lack the word that the model with a head puts before them."""
    settings: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    old = transformers.ResNetModel(transformers.ResNetConfig(**settings))
    new = transformers.ResNetForImageClassification(transformers.ResNetConfig(**settings))
    lines = load_initial_weights(new, saved(old, file))
    assert tiny.same(tiny.weights(new.resnet), tiny.weights(old))
    assert lines[-1] == "stay as they are drawn: classifier.1.weight, classifier.1.bias"


def test_two_tensors_of_one_name_are_refused(tmp_path):
    state = cifar().state_dict()
    torch.save(state | {"module.conv1.weight": state["conv1.weight"]}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"'module.conv1.weight' and another of its tensors are both 'conv1.weight'"):
        load_initial_weights(cifar(), tmp_path / "weights.pt")


@pytest.mark.filterwarnings("ignore::UserWarning")  # timm's, of torch, in what is compared with
@pytest.mark.parametrize(
    ("old", "new", "table"),
    [
        (lambda: vit(32), lambda: vit(64), "pos_embed"),
        (lambda: vit(64), lambda: vit(32, classes=7), "pos_embed"),
        (lambda: vit(32), lambda: vit(16, patch_size=4), "patch_embed.proj.weight"),
        (lambda: swin(16, 4), lambda: swin(32, 8), "layers.0.blocks.0.attn.relative_position_bias_table"),
    ],
)
def test_tables_of_positions_are_resampled_as_timm_does(file, old, new, table):
    """Expected is what timm makes of the same file when it takes it for published weights."""
    source, model = old(), new()
    saved(source, file)
    lines = load_initial_weights(model, file)
    overlay = {"file": str(file), "custom_load": False, "num_classes": 5, "input_size": (3, 32, 32)}
    kept = dict(VIT)
    if "swin" in model.pretrained_cfg["architecture"]:
        kept = {"embed_dim": 8, "depths": (2, 2), "num_heads": (1, 2), "patch_size": 2, "window_size": 8}
    side = model.patch_embed.img_size[0]
    kept["patch_size"] = model.patch_embed.patch_size[0]
    expected = timm.create_model(
        model.pretrained_cfg["architecture"], pretrained=True, pretrained_cfg_overlay=overlay, img_size=side,
        num_classes=model.num_classes, **kept,
    ).state_dict()  # fmt: skip
    got = model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in got.items() if not name.startswith("head"))
    assert any(f"resampled {table} from " in line for line in lines)


def test_table_of_positions_of_transformers_is_resampled(file):
    """By hand: the class token's stays, the others are a picture of 4 x 4 that becomes one of 8 x 8."""
    settings: dict[str, Any] = {
        "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "patch_size": 4,
    }  # fmt: skip
    small, large = (
        transformers.ViTForImageClassification(transformers.ViTConfig(image_size=side, **settings)) for side in (16, 32)
    )
    old = nn.init.normal_(small.vit.embeddings.position_embeddings).detach()
    load_initial_weights(large, saved(small, file))
    picture = old[:, 1:].reshape(1, 4, 4, 8).permute(0, 3, 1, 2)
    picture = nn.functional.interpolate(picture, size=8, mode="bicubic", antialias=True)
    expected = torch.cat([old[:, :1], picture.permute(0, 2, 3, 1).reshape(1, 64, 8)], dim=1)
    torch.testing.assert_close(large.vit.embeddings.position_embeddings.detach(), expected)


@pytest.mark.parametrize("build", [cifar, lambda channels: timm.create_model("resnet10t", in_chans=channels).eval()])
@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1)])
def test_first_convolution_takes_other_channels(file, build, before, after):
    """A grey image and the same one in three equal channels have the same logits."""
    old, new = build(channels=before), build(channels=after)
    saved(old, file)
    lines = load_initial_weights(new, file)
    grey = torch.randn(2, 1, 32, 32)
    torch.testing.assert_close(
        new(grey.expand(2, after, 32, 32)), old(grey.expand(2, before, 32, 32)), rtol=1e-4, atol=1e-5
    )
    assert any("adapted conv1" in line and f"from {before} to {after} channels" in line for line in lines)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (lambda: cifar(8), lambda: cifar(20), r"fits 37 of .*missing there: layer1.1.conv1.weight, .* and \d+ more"),
        (lambda: cifar(20), lambda: cifar(8), r"fits 37 of .*only there: layer1.1.bn1.bias, .* and \d+ more"),
        (lambda: cifar(width=8), lambda: cifar(width=4), r"none of its|of another shape: conv1"),
        (lambda: vit(32), lambda: vit(32, mlp_ratio=2), r"mlp.fc1.weight \(96x24 there, 48x24 here\)"),
        (lambda: vit(32, qkv_bias=False), lambda: vit(32), r"missing there: blocks.0.attn.qkv.bias"),
    ],
)
def test_weights_of_another_architecture_are_refused(file, old, new, words):
    model = new()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    saved(old(), file)
    with pytest.raises(ValueError, match=rf"initial_checkpoint .*model.safetensors: .*{words}"):
        load_initial_weights(model, file)
    assert tiny.same(tiny.weights(model), before)


def test_a_part_is_taken_where_that_is_asked_for(file):
    model, old = cifar(20), cifar(8)
    first, second = "layer1.0.conv1.weight", "layer1.1.conv1.weight"
    before = model.state_dict()[second].clone()
    lines = load_initial_weights(model, saved(old, file), partial=True)
    assert torch.equal(model.state_dict()[first], old.state_dict()[first])
    assert torch.equal(model.state_dict()[second], before)
    assert "stay as they are drawn: layer1.1.conv1.weight" in lines[1]


@pytest.mark.parametrize(
    ("build", "head"),
    [
        (lambda classes: cifar(classes=classes), "linear|fc|head"),
        (lambda classes: vit(32, classes), "head"),
        (lambda classes: timm.create_model("deit_tiny_distilled_patch16_224", num_classes=classes, **VIT), "head"),
        (lambda classes: torchvision.models.squeezenet1_0(num_classes=classes), "classifier"),
        (lambda classes: transformers.LevitForImageClassificationWithTeacher(levit(classes)), "classifier"),
    ],
)
def test_head_of_other_classes_stays_and_is_named(file, build, head):
    old, new = build(3), build(4)
    lines = load_initial_weights(new, saved(old, file))
    left = {name for name, value in new.state_dict().items() if value.shape != old.state_dict()[name].shape}
    assert left
    rest = {name: value for name, value in new.state_dict().items() if name not in left}
    assert all(torch.equal(value, old.state_dict()[name]) for name, value in rest.items())
    [named] = [line for line in lines if line.startswith("stay as they are drawn: ")]
    assert all(name in named for name in left)


def test_weights_without_a_head_and_without_counters_are_a_start(file):
    """As self-supervised training leaves them, and as old versions of torch wrote batch norm."""
    state = {name: value for name, value in cifar().state_dict().items() if "num_batches" not in name}
    head = [name for name in state if name.startswith(("fc.", "linear.", "head."))]
    save_file({name: value for name, value in state.items() if name not in head}, file)
    lines = load_initial_weights(cifar(classes=7), file)
    assert lines[-1] == f"stay as they are drawn: {', '.join(head)}"


def test_tied_weights_are_written_once(file):
    config = transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=11)
    old, new = transformers.GPT2LMHeadModel(config), transformers.GPT2LMHeadModel(config)
    save_file({name: value for name, value in old.state_dict().items() if name != "lm_head.weight"}, file)
    load_initial_weights(new, file)
    assert torch.equal(new.lm_head.weight, old.transformer.wte.weight)


class Trap:
    """A pickle that would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pickles_are_not_run(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    torch.save({"state_dict": cifar().state_dict(), "extra": Trap(tmp_path / "canary")}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"weights.pth: it calls for .*open, which is no weight and is not loaded"):
        load_initial_weights(cifar(), tmp_path / "weights.pth")
    assert not (tmp_path / "canary").exists()


def test_whole_pickled_model_is_named(tmp_path):
    torch.save(cifar(), tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"calls for .*CifarResNet, .*save model.state_dict\(\)"):
        load_initial_weights(cifar(), tmp_path / "model.pth")


def test_compressed_archives_are_not_unpacked(tmp_path):
    """20 MB of zeros in 20 KB; torch.load would take it."""
    torch.save({"weight": torch.zeros(5_000_000)}, tmp_path / "plain.pth")
    with (
        zipfile.ZipFile(tmp_path / "plain.pth") as plain,
        zipfile.ZipFile(tmp_path / "small.pth", "w", zipfile.ZIP_DEFLATED) as small,
    ):
        for name in plain.namelist():
            small.writestr(name, plain.read(name))
    assert (tmp_path / "small.pth").stat().st_size < 40_000
    with pytest.raises(
        ValueError, match=r"small.pth: its entry .* is compressed or encrypted, which torch.save never does"
    ):
        load_initial_weights(cifar(), tmp_path / "small.pth")


def archive(path):
    with zipfile.ZipFile(path, "w") as opened:
        opened.writestr("word/document.xml", "<xml/>")


WRONG = {
    "text": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"),
    "empty": lambda path: path.write_bytes(b""),
    "html": lambda path: path.write_text("<!DOCTYPE html><html>" + "x" * 400),
    "document": archive,
    "pickle": lambda path: path.write_bytes(pickle.dumps([1, 2, 3])),
    "cut off": lambda path: path.write_bytes(path.with_name("whole.pth").read_bytes()[:3000]),
    "numbers": lambda path: torch.save({"epoch": 3, "lr": [0.1]}, path),
    "one tensor": lambda path: torch.save(torch.zeros(3), path),
}


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_files_of_another_kind_are_named(tmp_path, kind, suffix):
    torch.save(cifar().state_dict(), tmp_path / "whole.pth")
    WRONG[kind](tmp_path / f"file{suffix}")
    with pytest.raises(ValueError, match=rf"initial_checkpoint .*file{suffix}: (is no|holds no|is not what)") as caught:
        load_initial_weights(cifar(), tmp_path / f"file{suffix}")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


def test_folder_without_weights_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"has none of model.safetensors, .*; give a run, an exported folder, or"):
        load_initial_weights(cifar(), tmp_path)


@pytest.fixture
def exported(tmp_path):
    """A subnet as `unloaf export` writes it, and the network of the same blocks."""
    model, x = cifar(20, channels=3), torch.zeros(2, 3, 8, 8)
    stages = unloaf.find_stages(model, x)
    subnet = unloaf.Subnet.from_depths(stages, (1, 1, 1))
    small = unloaf.export_subnet(model, stages, subnet)
    save_subnet(tmp_path, small, {"name": "cifar/resnet20", "num_classes": 5, "width": 8}, stages, subnet)
    return tmp_path, small


def test_exported_folder_is_a_start(exported):
    folder, small = exported
    model = cifar(8, classes=7)
    load_initial_weights(model, folder)
    assert torch.equal(model.state_dict()["conv1.weight"], small.state_dict()["conv1.weight"])


def test_damaged_exported_folder_is_no_start(exported):
    file = exported[0] / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"SHA-256 is not the one in subnet.json"):
        load_initial_weights(cifar(8), exported[0])


def test_log_says_what_was_taken(tmp_path):
    torch.save(tiny.network(classes=7).state_dict(), tmp_path / "seven.pth")
    config = tiny.config(output=str(tmp_path), epochs=1, initial_checkpoint=str(tmp_path / "seven.pth"))
    log = (tiny.run(config).path / "log.txt").read_text()
    count = sum(value.is_floating_point() for value in tiny.network().state_dict().values())
    assert f"seven.pth: loaded {count - 2} of {count} tensors\n" in log
    assert "stay as they are drawn: head.weight (7x4 there, 3x4 here), head.bias (7 there, 3 here)\n" in log


def test_integers_are_no_weights(file):
    model = cifar()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    state["conv1.weight"] = (20 * state["conv1.weight"]).round().to(torch.int8)
    save_file(state, file)
    with pytest.raises(ValueError, match=r"more than the classifier differs.*conv1\.weight"):
        load_initial_weights(cifar(), file)
