"""`unloaf.release`: a subnet of a trained run as files that need no run folder."""

import copy
import hashlib
import io
import json
import sys
import warnings
from types import SimpleNamespace
from typing import ClassVar

import pytest
import timm
import torch
import transformers
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file

import unloaf
from unloaf.config import Config
from unloaf.data.augment import evaluation_transform
from unloaf.engine.run import train
from unloaf.models.build import build_model
from unloaf.release.exports import export_elastic, export_run
from unloaf.release.formats import timm_config
from unloaf.release.libraries import describe_for_transformers, describe_images_for_transformers
from unloaf.release.subnet_files import save_subnet
from unloaf.runs.judge import judge_run
from unloaf.runs.opened import open_trained

CPU = {"device": "cpu"}


def train_run(folder, name, **settings):
    tiny = {"width": 4, "batch_size": 64, "epochs": 1, "device": "cpu"}
    config = Config(**(tiny | {"output": str(folder), "name": name} | settings))
    return train(config, console=Console(file=io.StringIO())).path


@pytest.fixture(scope="module")
def cifar(tmp_path_factory):
    """A ResNet-14 after two epochs, with a moving average; nobody writes to it."""
    ema = {"model_ema": True, "model_ema_decay": 0.9}
    return train_run(tmp_path_factory.mktemp("runs"), "cifar", model="cifar/resnet14", epochs=2, **ema)


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    return train_run(tmp_path_factory.mktemp("runs"), "resnet", model="timm/resnet18", img_size=32)


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return train_run(tmp_path_factory.mktemp("runs"), "vit", model="timm/vit_tiny_patch16_224", img_size=32, lr=0.01)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A run on image files, judged on the centre of 16 of 20 pixels, resized bicubically."""
    root = tmp_path_factory.mktemp("images")
    for number in range(16):
        path = root / ("train", "val")[number // 8] / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (24, 24), (16 * number, 0, 0)).save(path)
    look = {"img_size": 16, "crop_pct": 0.8, "interpolation": "bicubic"}
    data = {"dataset": "imagefolder", "data_dir": str(root), "batch_size": 4}
    return train_run(tmp_path_factory.mktemp("runs"), "files", model="timm/resnet18", **look, **data)


def images(batch, side):
    return torch.randn(batch, 1, side, side)


def test_state_dict_is_reloaded_by_one_call_and_has_the_judged_accuracy(cifar, tmp_path):
    result = export_run(cifar, depths="1,2,1", output=tmp_path / "small", **CPU)
    assert sorted(result.files) == ["README.md", "model.safetensors", "subnet.json"]
    [judged] = [
        row for row in judge_run(cifar, subnets="all", split="val", device="cpu").subnets if str(row.subnet) == "1-2-1"
    ]
    assert (result.metrics["val"].top1, result.params) == (judged.top1, judged.params)
    assert result.gmacs == judged.gmacs
    again = unloaf.load_subnet(tmp_path / "small")
    assert not again.training
    assert set(again.state_dict()) == set(load_file(tmp_path / "small" / "model.safetensors"))
    assert result.difference == 0


def test_reloaded_network_is_the_subnet_of_the_checkpoint(cifar, tmp_path):
    """Rebuilt from outside: the checkpoint's tensors by name, no statistics re-estimated."""
    export_run(cifar, depths="1,2,1", output=tmp_path / "small", recalibrate=0, **CPU)
    tensors = load_file(cifar / "last" / "model.safetensors")
    small = load_file(tmp_path / "small" / "model.safetensors")
    assert {name for name in tensors if not name.startswith(("layer1.1.", "layer3.1."))} == set(small)
    assert all(torch.equal(tensors[name], small[name]) for name in small)


def test_statistics_are_those_of_so_many_training_images(cifar, tmp_path):
    few, more = (export_run(cifar, depths="1,2,1", output=tmp_path / str(n), recalibrate=n, **CPU) for n in (64, 256))
    a, b = (load_file(result.folder / "model.safetensors") for result in (few, more))
    different = {name for name in a if not torch.equal(a[name], b[name])}
    assert different
    assert {name.rpartition(".")[2] for name in different} == {"running_mean", "running_var", "num_batches_tracked"}
    assert "re-estimated on 64 training images" in (few.folder / "README.md").read_text()


def test_main_network_keeps_its_statistics_and_default_place(cifar, tmp_path):
    result = export_run(cifar, **CPU)
    assert result.folder == cifar / "export" / "2-2-2-state_dict"
    assert result.metrics["test"] == judge_run(cifar, device="cpu").main["test"]
    with pytest.raises(ValueError, match="exists already"):
        export_run(cifar, **CPU)


def test_moving_average_and_best_checkpoint(cifar, tmp_path):
    result = export_run(cifar, depths="2,2,2", ema=True, checkpoint="best", output=tmp_path / "average", **CPU)
    average = load_file(cifar / "model_best" / "model_ema.safetensors")
    assert all(
        torch.equal(average[name], tensor) for name, tensor in unloaf.load_subnet(result.folder).state_dict().items()
    )


def test_chosen_blocks_leave_too(cifar, tmp_path):
    result = export_run(cifar, depths="2-1:10-2", output=tmp_path / "small", **CPU)
    assert result.subnet == "2-1-2"


def test_card_says_what_it_is_and_how_it_is_loaded(cifar, tmp_path):
    result = export_run(cifar, depths="1,2,1", output=tmp_path / "small", **CPU)
    card = (result.folder / "README.md").read_text()
    for part in (
        f"{result.metrics['test'].top1:.2f} %", f"{result.metrics['val'].top5:.2f} %", f"{result.params:,}",
        f"{result.gmacs:.4g}", "| method | st |", "| epochs | 2 |", f"torch {torch.__version__.partition('+')[0]}",
        'unloaf.load_subnet("FOLDER")', "digits",
    ):  # fmt: skip
        assert part in card
    assert str(tmp_path) not in card
    assert result.subnet == "1-2-1"


def test_card_of_the_main_network_does_not_call_it_a_part_of_itself(cifar, tmp_path):
    card = (export_run(cifar, output=tmp_path / "whole", **CPU).folder / "README.md").read_text()
    assert "The main network, 2-2-2, of cifar/resnet14, trained on digits for 2 epochs by the method `st`." in card
    assert "without" not in card


def test_card_says_that_a_run_began_with_other_weights_and_not_where_they_lay(cifar, tmp_path):
    started = train_run(tmp_path, "started", model="cifar/resnet14", initial_checkpoint=str(cifar))
    cards = [
        (export(started, output=tmp_path / export.__name__, **CPU).folder / "README.md").read_text()
        for export in (export_run, export_elastic)
    ]
    cards += [(export_run(cifar, output=tmp_path / "fresh", **CPU).folder / "README.md").read_text()]
    assert ["not from random weights but from others (`initial_checkpoint`)" in card for card in cards] == [
        True,
        True,
        False,
    ]
    assert str(cifar) not in "".join(cards)


def test_preprocessing_of_image_files_is_that_of_the_evaluation(files, tmp_path):
    folder = export_run(files, output=tmp_path / "small", **CPU).folder
    described = json.loads((folder / "subnet.json").read_text())["preprocessing"]
    assert described | {"mean": 0, "std": 0} == {
        "input_size": [3, 16, 16], "mean": 0, "std": 0, "interpolation": "bicubic", "crop_pct": 0.8,
        "crop_mode": "center",
    }  # fmt: skip
    text = "resized so that its shorter side has 20 pixels (bicubic interpolation), and the centre is cut out"
    assert text in (folder / "README.md").read_text()


def test_every_form_holds_how_images_become_inputs(files, tmp_path):
    mean = [0.485, 0.456, 0.406]
    program = export_run(files, format="pt2", output=tmp_path / "pt2", **CPU).folder / "model.pt2"
    torch.export.load(program, extra_files=(found := {"preprocessing.json": ""}))
    assert json.loads(found["preprocessing.json"])["mean"] == pytest.approx(mean)
    onnxruntime = pytest.importorskip("onnxruntime")
    model = export_run(files, format="onnx", output=tmp_path / "onnx", **CPU).folder / "model.onnx"
    texts = onnxruntime.InferenceSession(model).get_modelmeta().custom_metadata_map
    assert json.loads(texts["preprocessing"])["crop_pct"] == 0.8


def test_image_processor_of_transformers_makes_the_inputs_of_the_evaluation(files, tmp_path):
    """Its resampling rounds otherwise at some pixels: by a step of 1/255 of the range, here divided by the spread."""
    opened = open_trained(files, **CPU)
    describe_images_for_transformers(tmp_path, opened.preprocessing)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(0, 256, (3, 10, 7), generator=generator, dtype=torch.uint8)
    picture = Image.fromarray(blocks.repeat_interleave(6, 1).repeat_interleave(6, 2).permute(1, 2, 0).numpy())
    pixels = evaluation_transform(opened.training.data, opened.config)(picture)
    ours = opened.training.data.normalise(pixels[None])
    theirs = processor(picture, return_tensors="pt")["pixel_values"]
    assert theirs.shape == ours.shape == (1, 3, 16, 16)
    assert (theirs - ours).abs().max() < 2.1 / 255 / 0.224


def test_card_of_images_in_memory_speaks_of_no_crop(cifar, tmp_path):
    folder = export_run(cifar, depths="1,1,1", output=tmp_path / "small", **CPU).folder
    assert "the centre" not in (folder / "README.md").read_text()


def test_timm_prepares_images_as_the_run_did(files, tmp_path):
    folder = export_run(files, format="timm", output=tmp_path / "small", **CPU).folder
    model = timm.create_model(f"local-dir:{folder}", pretrained=True)
    for use_test_size in (False, True):
        found = timm.data.resolve_model_data_config(model, use_test_size=use_test_size)
        assert (found["crop_pct"], found["crop_mode"], found["interpolation"]) == (0.8, "center", "bicubic")
        assert found["input_size"] == (3, 16, 16)


def test_crop_of_the_published_model_is_replaced(resnet):
    """timm's configuration of a name may say that its images are squashed, or cut otherwise in a test."""
    described = timm_config(open_trained(resnet, **CPU))["pretrained_cfg"]
    assert [described[name] for name in ("crop_pct", "test_crop_pct", "crop_mode")] == [1.0, 1.0, "center"]


@pytest.fixture(scope="module")
def narrow_vit(tmp_path_factory):
    words = ("patch_size=8", "embed_dim=48", "depth=4", "num_heads=3")
    settings = {"model": "timm/vit_tiny_patch16_224", "img_size": 32, "model_kwargs": words}
    return train_run(tmp_path_factory.mktemp("runs"), "narrow-vit", **settings)


@pytest.mark.parametrize(
    ("run", "depths", "arguments"),
    [("resnet", "1,2,1,1", "layers"), ("vit", "3", "depth"), ("narrow_vit", "3", "depth")],
)
def test_timm_alone_reloads_its_form(run, depths, arguments, tmp_path, request):
    result = export_run(request.getfixturevalue(run), depths=depths, format="timm", output=tmp_path / "small", **CPU)
    config = json.loads((result.folder / "config.json").read_text())
    assert arguments in config["model_args"]
    assert len(config["label_names"]) == 10
    assert "license" not in config["pretrained_cfg"] or config["pretrained_cfg"]["license"] is None
    settings = {name: value for name, value in config["model_args"].items() if name != "global_pool"}
    named = timm.create_model(config["architecture"], **settings).eval()
    named.load_state_dict(load_file(result.folder / "model.safetensors"), strict=True)
    described = timm.create_model(f"local-dir:{result.folder}", pretrained=True).eval()
    plain = export_run(request.getfixturevalue(run), depths=depths, output=tmp_path / "plain", **CPU)
    x = images(3, 32)
    with torch.no_grad():
        expected = unloaf.load_subnet(plain.folder)(x)
        assert torch.equal(named(x), expected)
        assert torch.equal(described(x), expected)


def test_timm_form_of_other_networks_is_refused_and_leaves_nothing(cifar, tmp_path):
    with pytest.raises(ValueError, match="take --format state_dict"):
        export_run(cifar, depths="1,2,1", format="timm", output=tmp_path / "small", **CPU)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("run", "depths"), [("cifar", "1,2,1"), ("vit", "2")])
def test_torch_export_gives_the_same_logits_for_any_batch(run, depths, tmp_path, request):
    path = request.getfixturevalue(run)
    result = export_run(path, depths=depths, format="pt2", output=tmp_path / "small", **CPU)
    program = torch.export.load(result.folder / "model.pt2").module()
    network = unloaf.load_subnet(export_run(path, depths=depths, output=tmp_path / "plain", **CPU).folder)
    side = 8 if run == "cifar" else 32
    with torch.no_grad():
        for batch in (1, 5):
            x = images(batch, side)
            assert torch.equal(program(x), network(x))


@pytest.mark.parametrize(("run", "depths"), [("cifar", "1,2,1"), ("vit", "2")])
def test_onnx_gives_the_same_logits_for_any_batch(run, depths, tmp_path, request):
    import onnxruntime

    path = request.getfixturevalue(run)
    result = export_run(path, depths=depths, format="onnx", output=tmp_path / "small", **CPU)
    session = onnxruntime.InferenceSession(result.folder / "model.onnx")
    network = unloaf.load_subnet(export_run(path, depths=depths, output=tmp_path / "plain", **CPU).folder)
    side = 8 if run == "cifar" else 32
    with torch.no_grad():
        for batch in (1, 5):
            x = images(batch, side)
            [logits] = session.run(["logits"], {"images": x.numpy()})
            # float32 in another order of adding; relative to the largest logit.
            expected = network(x)
            assert (torch.from_numpy(logits) - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())


@pytest.mark.parametrize(
    ("format", "name"),
    [
        ("state_dict", "model.safetensors"),
        pytest.param("onnx", "model.onnx", marks=pytest.mark.slow),
        pytest.param("pt2", "model.pt2", marks=pytest.mark.slow),
    ],
)
def test_files_shrink_with_the_network(vit, format, name, tmp_path):
    """A block of ViT-Ti has 444,864 parameters; what a graph says of a block is at most a twentieth of that."""
    small, whole = (
        export_run(vit, depths=depths, format=format, output=tmp_path / depths, **CPU).files[name]
        for depths in ("3", "12")
    )
    assert whole - small == pytest.approx(9 * 444_864 * 4, rel=0.05)


def test_missing_packages_are_named(cifar, monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None if name == "onnxscript" else True)
    with pytest.raises(ValueError, match=r"needs onnxscript; install the extra onnx"):
        export_run(cifar, depths="1,1,1", format="onnx", output=tmp_path / "small")


def test_what_an_exporter_refuses_is_said_in_a_line(cifar, monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        try:
            raise NotImplementedError("no rule for\naten.foo.default")
        except NotImplementedError as error:
            raise RuntimeError("pages") from error

    monkeypatch.setattr(torch.onnx, "export", refuse)
    with pytest.raises(ValueError, match=r"NotImplementedError: no rule for aten\.foo\.default\); take another"):
        export_run(cifar, depths="1,1,1", format="onnx", output=tmp_path / "small", **CPU)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"depths": "1,2"}, "got 2 depths"),
        ({"depths": "9,2,1"}, "keeps 9 of 2 blocks"),
        ({"format": "torchscript"}, "give state_dict, timm, pt2, onnx"),
        ({"recalibrate": 1}, "at least 2 images"),
        ({"recalibrate": -5}, "at least 2 images"),
    ],
)
def test_bad_arguments_leave_nothing(cifar, arguments, reason, tmp_path):
    with pytest.raises(ValueError, match=reason):
        export_run(cifar, output=tmp_path / "small", **arguments, **CPU)
    assert not list(tmp_path.iterdir())


def test_no_run_and_no_average(cifar, resnet, tmp_path):
    with pytest.raises(ValueError, match="is not a run"):
        export_run(tmp_path)
    with pytest.raises(ValueError, match="no moving average"):
        export_run(resnet, ema=True, output=tmp_path / "x", **CPU)


def test_damaged_and_foreign_files_are_refused(cifar, tmp_path):
    folder = export_run(cifar, depths="1,2,1", output=tmp_path / "small", **CPU).folder
    weights, description = folder / "model.safetensors", folder / "subnet.json"
    good, text = weights.read_bytes(), description.read_text()
    weights.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(unloaf.CheckpointError, match="SHA-256"):
        unloaf.load_subnet(folder)
    weights.write_bytes(good)
    for broken in (text[:-40], text.replace("cifar/resnet14", "cifar/resnet20000"), text.replace("[\n", "{", 1)):
        description.write_text(broken)
        with pytest.raises(unloaf.CheckpointError, match=r"subnet\.json"):
            unloaf.load_subnet(folder)
    # Nobody is asked for published weights, not even where the description says so.
    description.write_text(text.replace('"name": "cifar', '"pretrained": true, "name": "cifar'))
    assert isinstance(unloaf.load_subnet(folder), torch.nn.Module)
    description.write_text(text.replace("unloaf subnet", "something else"))
    with pytest.raises(ValueError, match="describes no subnet"):
        unloaf.load_subnet(folder)
    description.unlink()
    with pytest.raises(ValueError, match=r"has no subnet\.json"):
        unloaf.load_subnet(folder)


def test_description_of_another_network_does_not_load(cifar, tmp_path):
    folder = export_run(cifar, depths="1,2,1", output=tmp_path / "small", **CPU).folder
    other = json.loads((folder / "subnet.json").read_text())
    other["architecture"]["width"] = 8
    (folder / "subnet.json").write_text(json.dumps(other))
    with pytest.raises(unloaf.CheckpointError, match="size mismatch"):
        unloaf.load_subnet(folder)


@pytest.mark.parametrize(
    ("name", "size", "reason"),
    [
        ("timm/mvitv2_tiny", {"img_size": 32}, "its blocks return tuples, whose forms are in the JSON"),
        ("tv/mnasnet1_0", {}, "it asks for the version of its weights, which no file holds"),
    ],
)
def test_networks_with_needs_of_their_own_are_reloaded(name, size, reason, tmp_path):
    settings = {"name": name, "num_classes": 5, **size}
    model, x = build_model(**settings).eval(), torch.randn(2, 3, 32, 32)
    stages = unloaf.find_stages(model, x)
    subnet = unloaf.Subnet.from_depths(stages, [stage.legal_depths[0] for stage in stages])
    small = unloaf.export_subnet(model, stages, subnet)
    save_subnet(tmp_path, small, settings, stages, subnet)
    with torch.no_grad():
        assert torch.equal(unloaf.load_subnet(tmp_path)(x), small(x)), reason


def test_header_of_a_damaged_file_is_not_believed(tmp_path):
    """Its SHA-256 is right, as if the description had been written for it."""
    settings = {"name": "cifar/resnet14", "num_classes": 10, "width": 2}
    model = build_model(**settings).eval()
    stages = unloaf.find_stages(model, torch.randn(1, 3, 32, 32))
    save_subnet(tmp_path, model, settings, stages, unloaf.Subnet.full(stages))
    weights, description = tmp_path / "model.safetensors", tmp_path / "subnet.json"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    weights.write_bytes((2**40).to_bytes(8, "little") + weights.read_bytes()[8:])
    other = hashlib.sha256(weights.read_bytes()).hexdigest()
    description.write_text(description.read_text().replace(digest, other))
    with pytest.raises(unloaf.CheckpointError, match=r"declares 1,099,511,627,776 bytes.*; copy the folder or export"):
        unloaf.load_subnet(tmp_path)


class Hub:
    """Stands for huggingface_hub.HfApi; nothing is sent."""

    calls: ClassVar[list] = []

    def create_repo(self, name, **kwargs):
        """Says in whose name it was made."""
        self.calls.append(("create_repo", (name,), kwargs))
        return SimpleNamespace(repo_id=name if "/" in name else f"me/{name}")

    def __getattr__(self, name):
        return lambda *args, **kwargs: self.calls.append((name, args, kwargs))


@pytest.fixture
def hub(monkeypatch):
    """The calls that were made."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(Hub, "calls", [])
    return Hub.calls


@pytest.mark.parametrize("name", ["me/small", "small"])
def test_nothing_is_pushed_unless_asked_for(cifar, hub, tmp_path, name):
    assert export_run(cifar, depths="1,1,1", output=tmp_path / "kept", **CPU).pushed is None
    assert hub == []
    result = export_run(cifar, depths="1,1,1", output=tmp_path / "pushed", push_to_hub=name, **CPU)
    assert result.pushed == "me/small"
    assert [call for call, _, _ in hub] == ["create_repo", "upload_folder"]
    assert hub[1][2] == {"repo_id": "me/small", "folder_path": str(tmp_path / "pushed")}


def test_timm_form_is_handed_to_the_function_of_timm(vit, hub, monkeypatch, tmp_path):
    given = []
    monkeypatch.setattr(timm.models, "push_to_hf_hub", lambda *args, **kwargs: given.append((args, kwargs)))
    result = export_run(vit, depths="2", format="timm", output=tmp_path / "small", push_to_hub="vit", **CPU)
    [((model, repository), keywords)] = given
    assert (len(model.blocks), repository, result.pushed) == (2, "me/vit", "me/vit")
    # Said explicitly: what timm records by itself depends on its version.
    assert keywords["model_args"] == {"num_classes": 10, "in_chans": 1, "img_size": 32, "depth": 2}
    assert keywords["safe_serialization"] is True
    written = json.loads((tmp_path / "small" / "config.json").read_text())
    assert keywords["model_config"]["label_names"] == written["label_names"]
    assert keywords["model_config"]["pretrained_cfg"]["input_size"] == [1, 32, 32]
    [(call, _, readme)] = hub[1:]
    assert (call, readme["repo_id"], readme["path_in_repo"]) == ("upload_file", "me/vit", "README.md")


def test_failed_upload_keeps_the_files(cifar, monkeypatch, tmp_path):
    import huggingface_hub

    def fail():
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "HfApi", fail)
    with pytest.raises(ValueError, match="is written, but me/small could not be uploaded: no network"):
        export_run(cifar, depths="1,1,1", output=tmp_path / "small", push_to_hub="me/small", **CPU)
    assert (tmp_path / "small" / "subnet.json").is_file()


def test_elastic_run_has_the_judged_accuracy_of_every_subnet(cifar, tmp_path):
    result = export_elastic(cifar, output=tmp_path / "elastic", **CPU)
    judged = judge_run(cifar, subnets="all", split="val", device="cpu").subnets
    # The file holds the main network as it stands, with its running statistics.
    tops = {str(row.subnet): (row.running or row).top1 for row in judged}
    assert {row.subnet: row.metrics["val"].top1 for row in result.networks} == tops
    assert {row.subnet: row.gmacs for row in result.networks} == {str(row.subnet): row.gmacs for row in judged}
    note = f"with statistics re-estimated as its subnets': val top-1 {judged[0].top1:.2f} %"
    assert note in (result.folder / "README.md").read_text()
    weights = (cifar / "last" / "model.safetensors").stat().st_size
    assert result.files["elastic.safetensors"] - weights < 1.5 * result.statistics + 150 * 8 * 15
    model = unloaf.load_elastic(tmp_path / "elastic")
    assert model.subnets == tuple(str(row.subnet) for row in judged)


def test_elastic_subnet_is_the_one_that_is_exported_alone(cifar, tmp_path):
    export_elastic(cifar, output=tmp_path / "elastic", subnets=["1-2-1"], recalibrate=128, **CPU)
    alone = export_run(cifar, depths="1,2,1", output=tmp_path / "alone", recalibrate=128, **CPU)
    x, model = images(4, 8), unloaf.load_elastic(tmp_path / "elastic")
    with torch.no_grad():
        assert torch.equal(model(x, subnet="1-2-1"), unloaf.load_subnet(alone.folder)(x))
    with pytest.raises(ValueError, match="1-1-1 has no batch-norm statistics here"):
        model(x, subnet="1-1-1")


def test_elastic_file_says_how_many_of_the_subnets_it_stores(cifar, monkeypatch, tmp_path):
    monkeypatch.setattr("unloaf.release.exports._MOST_STORED", 3)
    result = export_elastic(cifar, output=tmp_path / "elastic", recalibrate=64, **CPU)
    assert len(result.networks) == 3
    assert result.notes == ("3 of 8 ordered subnets have statistics; --subnets chooses others.",)


def test_elastic_without_estimate_is_refused(cifar, tmp_path):
    with pytest.raises(ValueError, match="recalibrate 0"):
        export_elastic(cifar, output=tmp_path / "elastic", recalibrate=0, **CPU)
    assert not list(tmp_path.iterdir())


def test_weights_of_another_network_beside_the_description(cifar, tmp_path):
    folder = export_elastic(cifar, output=tmp_path / "elastic", subnets=2, **CPU).folder
    save_file({"a": torch.zeros(1)}, folder / "elastic.safetensors")
    with pytest.raises(unloaf.CheckpointError, match="belongs to another"):
        unloaf.load_elastic(folder)


# --- networks of transformers, whose output is an object with logits

SIZES = {
    "ViT": (
        {"image_size": 8, "patch_size": 4, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32},
        {"num_hidden_layers": 3}, {"num_hidden_layers": 2}, "2",
    ),
    "ResNet": (
        {"embedding_size": 8, "hidden_sizes": [8, 16], "layer_type": "basic"},
        {"depths": [2, 3]}, {"depths": [1, 2]}, "1,2",
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _no_advice_of_transformers():
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    """A function: the run of a network, and its subnet as transformers builds it, with the run's tensors by name."""
    runs = {}

    def trained(kind):
        config, build = (getattr(transformers, kind + end) for end in ("Config", "ForImageClassification"))
        sizes, whole, part, depths = SIZES[kind]
        if kind not in runs:
            place = tmp_path_factory.mktemp("configurations") / f"tiny-{kind}"
            config(**sizes, **whole).save_pretrained(place)
            runs[kind] = train_run(tmp_path_factory.mktemp("runs"), kind, model=f"hf/{place}", lr=0.01), place
        expected = build(config(**sizes, **part, num_channels=1, num_labels=10)).eval()
        tensors = load_file(runs[kind][0] / "last" / "model.safetensors")
        expected.load_state_dict({name: tensors[name] for name in expected.state_dict()})
        return *runs[kind], depths, expected

    return trained


@pytest.mark.parametrize("kind", SIZES)
def test_transformers_alone_reloads_the_weights_of_its_networks(kind, hf, tmp_path):
    run, _, depths, expected = hf(kind)
    result = export_run(run, depths=depths, recalibrate=0, output=tmp_path / "small", **CPU)
    files = ["README.md", "config.json", "model.safetensors", "preprocessor_config.json", "subnet.json"]
    assert sorted(result.files) == files
    again, report = type(expected).from_pretrained(result.folder, output_loading_info=True)
    assert not any(report.values())
    again = copy.deepcopy(again).eval()  # the file is mapped, and kernels round otherwise at odd addresses
    x = images(3, 8)
    with torch.no_grad():
        assert torch.equal(again(x).logits, expected(x).logits)
    assert result.params == sum(p.numel() for p in expected.parameters())
    assert f"transformers.{kind}ForImageClassification.from_pretrained" in result.loading
    assert "library_name: transformers" in (result.folder / "README.md").read_text()


@pytest.mark.parametrize("kind", SIZES)
def test_network_of_transformers_is_reloaded_where_its_configuration_is_gone(kind, hf, tmp_path):
    run, place, depths, expected = hf(kind)
    small = export_run(run, depths=depths, recalibrate=0, output=tmp_path / "small", **CPU).folder
    elastic = export_elastic(run, output=tmp_path / "elastic", subnets=[depths], recalibrate=64, **CPU).folder
    place = place.rename(place.with_name("gone"))
    try:
        again, whole = unloaf.load_subnet(small), unloaf.load_elastic(elastic)
    finally:
        place.rename(place.with_name(f"tiny-{kind}"))
    x = images(3, 8)
    with torch.no_grad():
        assert torch.equal(again(x).logits, expected(x).logits)
        if kind == "ViT":  # the other has statistics of its own by now
            assert torch.equal(whole(x, subnet=depths).logits, expected(x).logits)


@pytest.mark.parametrize("kind", SIZES)
def test_files_do_not_say_where_the_configuration_lay(kind, hf, tmp_path):
    run, place, depths, _ = hf(kind)
    export_run(run, depths=depths, output=tmp_path / "small", **CPU)
    export_elastic(run, output=tmp_path / "elastic", subnets=1, **CPU)
    texts = [path.read_text() for path in tmp_path.rglob("*.*") if path.suffix in (".json", ".md")]
    assert len(texts) == 6
    assert not any(str(place.parent) in text for text in texts)
    assert sum(f"hf/tiny-{kind}" in text for text in texts) == 4  # all but those of transformers


def test_network_of_transformers_has_the_judged_accuracy(hf, tmp_path):
    run, _, depths, _ = hf("ResNet")
    result = export_run(run, depths=depths, output=tmp_path / "small", **CPU)
    judged = {str(row.subnet): row for row in judge_run(run, subnets="all", split="val", device="cpu").subnets}
    row = judged[depths.replace(",", "-")]
    assert (result.metrics["val"].top1, result.params, result.gmacs) == (row.top1, row.params, row.gmacs)
    assert "re-estimated on" in (result.folder / "README.md").read_text()


@pytest.mark.parametrize("kind", SIZES)
def test_torch_export_of_a_network_of_transformers_returns_its_logits(kind, hf, tmp_path):
    run, _, depths, expected = hf(kind)
    result = export_run(run, depths=depths, format="pt2", recalibrate=0, output=tmp_path / "small", **CPU)
    program = torch.export.load(result.folder / "model.pt2").module()
    with torch.no_grad():
        for batch in (1, 5):
            x = images(batch, 8)
            assert torch.equal(program(x), expected(x).logits)


@pytest.mark.parametrize("kind", ["ViT", pytest.param("ResNet", marks=pytest.mark.slow)])
def test_onnx_of_a_network_of_transformers_returns_its_logits(kind, hf, tmp_path):
    import onnxruntime

    run, _, depths, expected = hf(kind)
    result = export_run(run, depths=depths, format="onnx", recalibrate=0, output=tmp_path / "small", **CPU)
    session = onnxruntime.InferenceSession(result.folder / "model.onnx")
    with torch.no_grad():
        for batch in (1, 5):
            x = images(batch, 8)
            [logits] = session.run(["logits"], {"images": x.numpy()})
            ours = expected(x).logits
            # float32 in another order of adding; relative to the largest logit.
            assert (torch.from_numpy(logits) - ours).abs().max() <= 1e-5 * max(1, ours.abs().max())


def test_missing_library_is_no_damage(hf, monkeypatch, tmp_path):
    run, _, depths, _ = hf("ViT")
    small = export_run(run, depths=depths, recalibrate=0, output=tmp_path / "small", **CPU).folder
    elastic = export_elastic(run, output=tmp_path / "elastic", subnets=1, **CPU).folder
    monkeypatch.setitem(sys.modules, "transformers", None)  # as Python does where an import is to fail
    reason = r"hf/tiny-ViT needs transformers, which is not installed; pip install transformers$"
    for load, folder, name in (unloaf.load_subnet, small, "subnet"), (unloaf.load_elastic, elastic, "elastic"):
        with pytest.raises(ValueError, match=rf"^{folder}/{name}\.json: {reason}"):
            load(folder)


def test_missing_library_of_another_family_is_named_too(vit, monkeypatch, tmp_path):
    folder = export_run(vit, depths="2", output=tmp_path / "small", **CPU).folder
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ValueError, match=r"timm/vit_tiny_patch16_224 needs timm, which is not installed"):
        unloaf.load_subnet(folder)


def test_damaged_configuration_is_told_without_the_temporary_folder(hf, tmp_path):
    run, _, depths, _ = hf("ViT")
    folder = export_run(run, depths=depths, recalibrate=0, output=tmp_path / "small", **CPU).folder
    text = (folder / "subnet.json").read_text()
    (folder / "subnet.json").write_text(text.replace('"model_type": "vit"', '"model_type": "none of them"'))
    with pytest.raises(unloaf.CheckpointError) as caught:
        unloaf.load_subnet(folder)
    assert "model hf/tiny-ViT: " in str(caught.value)
    assert "/tmp" not in str(caught.value).replace(str(tmp_path), "")


def test_timm_form_of_a_network_of_transformers_is_refused(hf, tmp_path):
    run, _, depths, _ = hf("ViT")
    with pytest.raises(ValueError, match=r"model hf/tiny-ViT is not timm's; take --format state_dict"):
        export_run(run, depths=depths, format="timm", output=tmp_path / "small", **CPU)
    assert not list(tmp_path.iterdir())


def test_no_configuration_is_left_where_it_does_not_give_the_network(tmp_path):
    """Swin shifts the windows of every second block: without the first one, no configuration has this order."""
    sizes = {"image_size": 32, "patch_size": 2, "embed_dim": 8, "num_heads": [2, 2], "window_size": 4}
    model = transformers.SwinForImageClassification(transformers.SwinConfig(**sizes, depths=[2, 3])).eval()
    x = torch.randn(2, 3, 32, 32)
    stages = unloaf.find_stages(model, x)

    def described(keep):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # export_subnet says it too
            small = unloaf.export_subnet(model, stages, unloaf.Subnet(keep), example=x)
        save_file(small.state_dict(), tmp_path / "model.safetensors", metadata={"format": "pt"})

        def same(twin):
            with torch.no_grad():
                assert torch.equal(twin(x).logits, small(x).logits)

        return describe_for_transformers(tmp_path, small, same), (tmp_path / "config.json").exists()

    assert described(((True, False), (True, True, False))) == (True, True)
    assert described(((False, True), (True, True, False))) == (False, False)
