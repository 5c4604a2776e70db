"""Where a run computes: kernels that repeat, norms and weights that several devices share, what env.json names."""

import json
import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from timm.models import create_model
from torch import nn

import tiny
from unloaf.config import Config
from unloaf.engine import devices
from unloaf.engine.devices import find_devices, share_model, usable_device
from unloaf.engine.loop import prepare
from unloaf.environment import hardware


@pytest.fixture
def kernels(monkeypatch):
    """torch as it is without --deterministic, and again after the test."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("asked", [True, False])
def test_deterministic_reaches_torch_cudnn_and_cublas(kernels, asked):
    prepare(tiny.config(deterministic=asked), data=tiny.data(), model=tiny.network())
    assert torch.are_deterministic_algorithms_enabled() is asked
    assert torch.backends.cudnn.benchmark is not asked
    assert os.environ.get("CUBLAS_WORKSPACE_CONFIG") == (":4096:8" if asked else None)


def test_deterministic_leaves_a_workspace_that_was_chosen(kernels, monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    prepare(tiny.config(deterministic=True), data=tiny.data(), model=tiny.network())
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_a_deterministic_run_on_a_cpu_is_the_usual_one(kernels, tmp_path):
    def last(**settings: Any) -> dict[str, torch.Tensor]:
        network = tiny.network()
        tiny.run(tiny.config(output=str(tmp_path), epochs=1, **settings), model=network)
        return tiny.weights(network)

    assert tiny.same(last(name="usual"), last(name="repeatable", deterministic=True))


def two_processes() -> Any:
    """What share_model needs of an Accelerator, without a process group: the model comes back as it is."""
    return SimpleNamespace(
        device=torch.device("cpu"),
        num_processes=2,
        prepare_model=lambda model: model,
        unwrap_model=lambda model, keep_fp32_wrapper: model,
    )


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "resnet18"])
def test_synchronised_norms_compute_what_the_norms_before_did(name):
    """timm's have an activation inside, which torch's own conversion takes away; with random statistics it is seen."""
    torch.manual_seed(0)
    model, images = create_model(name, num_classes=3).eval(), torch.randn(2, 3, 64, 64)
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    with torch.no_grad():
        expected = model(images)
        shared = share_model(two_processes(), tiny.config(sync_bn=True), model)
        found = shared(images)
    assert sum(isinstance(module, nn.SyncBatchNorm) for module in shared.modules()) > 10
    assert not any(isinstance(module, nn.BatchNorm2d) for module in shared.modules())
    assert torch.equal(found, expected)


def test_sharded_weights_with_batch_norm_judge_no_subnets():
    with pytest.raises(ValueError, match=r"^eval_subnets 2: .* copy of the network, which fsdp shards; leave it out"):
        share_model(two_processes(), tiny.config(fsdp=True, eval_subnets=2), tiny.network())


def test_hardware_is_that_of_the_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "a fast GPU")
    assert hardware(torch.device("cpu")).endswith(" cores")
    assert hardware(torch.device("mps")).endswith(" cores")
    assert hardware(torch.device("cuda", 1)) == hardware() == "a fast GPU"


def test_a_run_asks_for_the_hardware_of_its_own_device(tmp_path, monkeypatch):
    monkeypatch.setattr("unloaf.environment.hardware", str)
    path = tiny.run(tiny.config(output=str(tmp_path), epochs=1)).path
    assert json.loads((path / "env.json").read_text())["hardware"] == "cpu"


# A device by its name.


@pytest.fixture
def two_gpus(monkeypatch):
    """torch as on a machine with two CUDA devices; holds the numbers that were made the current one."""
    chosen: list[int] = []
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "set_device_index", chosen.append)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return chosen


@pytest.mark.parametrize(
    ("name", "device", "current"),
    [
        ("auto", "cuda", []),
        ("cpu", "cpu", []),
        ("cuda", "cuda", []),
        ("cuda:0", "cuda:0", [0]),
        ("cuda:1", "cuda:1", [1]),
    ],
)
def test_devices_that_are_there_are_taken_by_their_names(two_gpus, name, device, current):
    assert (str(usable_device(name)), two_gpus) == (device, current)


def test_devices_that_are_not_there_are_told_with_those_that_are(two_gpus, monkeypatch):
    with pytest.raises(ValueError, match=r"device cuda:2: there are 2 here, cuda:0 to cuda:1$"):
        usable_device("cuda:2")
    with pytest.raises(ValueError, match=r"device mps: the accelerator is cuda .* give --device cuda, or leave it out"):
        usable_device("mps")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"of several processes each takes its own; give --device cuda$"):
        usable_device("cuda:1")


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_a_machine_without_an_accelerator_says_so():
    with pytest.raises(
        ValueError, match=r"^device cuda: there is no accelerator .* give --device cpu, or leave it out"
    ):
        find_devices(Config(device="cuda"))


def test_accelerate_is_given_the_numbered_device(two_gpus, monkeypatch):
    seen = []

    def accelerator(**kwargs: Any):
        seen.append(os.environ.get("ACCELERATE_TORCH_DEVICE"))
        return SimpleNamespace(device=torch.device(seen[-1] or "cuda"), num_processes=1)

    monkeypatch.setattr(devices, "Accelerator", accelerator)
    assert find_devices(Config(device="cuda:1")).device == torch.device("cuda:1")
    assert find_devices(Config(device="cuda")).device == torch.device("cuda")
    assert seen == ["cuda:1", None]
    monkeypatch.setattr(devices, "Accelerator", lambda **kwargs: SimpleNamespace(device=torch.device("cuda:0")))
    with pytest.raises(ValueError, match="device cuda:1: this process computes on cuda:0 already"):
        find_devices(Config(device="cuda:1"))


@pytest.mark.parametrize(
    ("device", "there", "cpu"), [("auto", False, True), ("auto", True, False), ("cpu", True, True)]
)
def test_accelerate_is_told_where_there_is_no_accelerator(monkeypatch, device, there, cpu):
    """Of several processes without one, accelerate else asks for a GPU for each."""
    asked = {}

    def accelerator(**settings: Any) -> Any:
        asked.update(settings)
        return SimpleNamespace(device=torch.device("cpu"), num_processes=1)

    monkeypatch.setattr(devices, "Accelerator", accelerator)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: there)
    find_devices(tiny.config(device=device))
    assert asked["cpu"] is cpu
