"""Networks of local files are built without the network, whatever the files name."""

import json
import socket

import huggingface_hub
import pytest
import timm
import torch
import transformers

import unloaf
from unloaf.models.build import build_model
from unloaf.models.offline import offline
from unloaf.release.subnet_files import save_subnet


@pytest.fixture(autouse=True)
def connections(monkeypatch):
    """What was to be reached; there is no way out in any case."""
    asked = []

    def refuse(*given, **named):
        asked.append(given)
        raise OSError("blocked")

    for place, name in ((socket, "getaddrinfo"), (socket, "create_connection"), (socket.socket, "connect")):
        monkeypatch.setattr(place, name, refuse)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)  # as at a user's, unlike in these tests
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    return asked


def described(path, **settings):
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(settings))
    return path


NAMING = {
    "backbone": ({"model_type": "upernet", "backbone": "someone/repo"}, "'someone/repo'"),
    "backbone of timm": ({"model_type": "vitmatte", "backbone": "resnet10t"}, "'resnet10t'"),
    "nested": (
        {"model_type": "upernet",
         "backbone_config": {"model_type": "timm_backbone", "backbone": "hf-hub:someone/repo"}},
        "something",
    ),
    "wrapper": ({"model_type": "timm_wrapper", "architecture": "hf-hub:someone/repo", "num_classes": 5}, "something"),
    "no timm": (
        {"model_type": "detr", "backbone": "someone/repo", "use_timm_backbone": False,
         "architectures": ["DetrForObjectDetection"]},
        "'someone/repo'",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMING)
def test_what_a_configuration_names_on_a_hub_is_refused_and_not_fetched(tmp_path, connections, name):
    settings, named = NAMING[name]
    if name == "nested":
        settings = settings | {"architectures": ["UperNetForSemanticSegmentation"]}
    with pytest.raises(ValueError, match=rf"its config.json names {named} of a hub, and nothing is fetched"):
        build_model(f"hf/{described(tmp_path / 'net', **settings)}", num_classes=4)
    assert connections == []


SMALL = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "layer_type": "basic"}


@pytest.mark.parametrize(
    "settings",
    [
        {"model_type": "resnet", "_name_or_path": "someone/repo", **SMALL},
        {"model_type": "resnet", "auto_map": {"AutoConfig": "someone/repo--evil.Config"}, **SMALL},
        {"model_type": "timm_wrapper", "architecture": "resnet10t", "num_classes": 5},
    ],
)
def test_networks_that_name_a_hub_in_passing_are_built(tmp_path, connections, settings):
    model = build_model(f"hf/{described(tmp_path / 'net', **settings)}", num_classes=4).eval()
    assert model(torch.zeros(1, 3, 32, 32)).logits.shape == (1, 4)
    assert connections == []


def test_own_weights_of_a_folder_need_no_network(tmp_path, connections):
    transformers.ResNetForImageClassification(transformers.ResNetConfig(**SMALL)).save_pretrained(tmp_path)
    build_model(f"hf/{tmp_path}", num_classes=4, pretrained=True)
    assert connections == []


def test_exported_folder_of_a_stranger_reaches_no_hub(tmp_path, connections):
    """Its description holds a config.json."""
    model = build_model(f"hf/{described(tmp_path / 'net', model_type='resnet', **SMALL)}", num_classes=4).eval()
    stages = unloaf.find_stages(model, torch.zeros(1, 3, 32, 32))
    small = unloaf.export_subnet(model, stages, unloaf.Subnet.full(stages))
    architecture = {"name": "hf/net", "num_classes": 4, "config": NAMING["backbone"][0]}
    save_subnet(tmp_path / "net", small, architecture, stages, unloaf.Subnet.full(stages))
    with pytest.raises(unloaf.CheckpointError, match="names 'someone/repo' of a hub"):
        unloaf.load_subnet(tmp_path / "net")
    assert connections == []


def test_a_class_that_cannot_be_built_from_the_settings_is_named(tmp_path):
    settings = {"model_type": "resnet", **SMALL, "hidden_act": "none-such"}
    with pytest.raises(ValueError, match=r"ResNetForImageClassification cannot be built so \(KeyError: .*none-such"):
        build_model(f"hf/{described(tmp_path / 'net', **settings)}", num_classes=4)


@pytest.mark.parametrize("pretrained", [True, False])
def test_published_weights_alone_open_the_network(monkeypatch, pretrained):
    seen = []

    def create(*given, **named):
        seen.append(huggingface_hub.is_offline_mode())
        return torch.nn.Linear(1, 1)

    monkeypatch.setattr(timm, "create_model", create)
    build_model("timm/resnet10t", num_classes=4, pretrained=pretrained)
    assert seen == [not pretrained]


@pytest.mark.parametrize("before", [True, False])
def test_what_held_before_is_put_back(monkeypatch, before):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", before)
    with pytest.raises(KeyError), offline():
        raise KeyError
    assert huggingface_hub.is_offline_mode() == before
