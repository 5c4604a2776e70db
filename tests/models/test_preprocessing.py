"""How images become inputs where a run starts from weights."""

import json
import shutil
from dataclasses import replace

import numpy
import pytest
import timm
import torch
import transformers
import yaml
from PIL import Image
from safetensors.torch import save_file

import mask_files
import tiny
from unloaf.config import Config, load_config
from unloaf.data import EvalBatches, load_data
from unloaf.engine.run import train
from unloaf.models import preprocessing
from unloaf.models.build import build_model
from unloaf.models.preprocessing import with_colours_of_backbone, with_preprocessing
from unloaf.runs.judge import judge_run

HALF, IMAGENET = (0.5, 0.5, 0.5), ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@pytest.fixture
def folders(tmp_path):
    """Two classes of four noisy images, 24 x 30."""
    numbers = numpy.random.default_rng(0)
    for split in ("train", "val"):
        for index in range(8):
            path = tmp_path / "images" / split / "ab"[index % 2] / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            blocks = numbers.integers(0, 256, (4, 5, 3), dtype=numpy.uint8)
            Image.fromarray(blocks.repeat(6, 0).repeat(6, 1)).save(path)
    return tmp_path / "images"


def settings(folders, **changes):
    small = {"img_size": 16, "batch_size": 4, "epochs": 1, "method": "common", "device": "cpu", "augment": "none"}
    return Config(**{"dataset": "imagefolder", "data_dir": str(folders), **small, **changes})


# Published: of timm the model cards of augreg and of resnet50.a1_in1k, of torchvision IMAGENET1K_V2 and IMAGENET1K_V1.
@pytest.mark.parametrize(
    ("model", "mean", "std", "interpolation", "crop"),
    [
        ("timm/vit_tiny_patch16_224", HALF, HALF, "bicubic", 0.9),
        ("timm/resnet50", *IMAGENET, "bicubic", 0.95),
        ("tv/resnet50", *IMAGENET, "bilinear", 224 / 232),
        ("tv/swin_v2_t", *IMAGENET, "bicubic", 256 / 260),
        ("cifar/resnet20", *IMAGENET, "bilinear", 0.875),  # nobody says, so as for a random start
    ],
)
def test_inputs_are_those_that_the_published_weights_expect(folders, model, mean, std, interpolation, crop):
    config, _ = with_preprocessing(settings(folders, model=model, pretrained=True))
    assert (config.mean, config.std, config.interpolation) == (mean, std, interpolation)
    assert config.crop_pct == pytest.approx(crop)


def test_random_start_has_the_inputs_it_always_had(folders):
    config, source = with_preprocessing(settings(folders, model="timm/vit_tiny_patch16_224"))
    assert (config.mean, config.std, config.interpolation, config.crop_pct, source) == (
        *IMAGENET,
        "bilinear",
        0.875,
        "",
    )


def test_set_in_memory_has_those_of_its_training_images_at_a_random_start():
    assert with_preprocessing(Config()) == (Config(), "")


def test_images_in_memory_are_fed_as_the_weights_expect():
    """Grey ones: timm's three channels are one here."""
    config, _ = with_preprocessing(Config(model="timm/vit_tiny_patch16_224", pretrained=True))
    assert (config.mean, config.std) == ((0.5,), (0.5,))
    data = load_data(config)
    black, white = torch.zeros(1, 1, 8, 8, dtype=torch.uint8), torch.full((1, 1, 8, 8), 255, dtype=torch.uint8)
    assert (data.normalise(black).unique().item(), data.normalise(white).unique().item()) == (-1.0, 1.0)


def test_grey_images_have_the_average_of_the_colours():
    config, _ = with_preprocessing(Config(model="timm/resnet50", pretrained=True))
    assert (*config.mean, *config.std) == pytest.approx(((0.485 + 0.456 + 0.406) / 3, (0.229 + 0.224 + 0.225) / 3))


def test_inputs_are_those_of_timm(folders):
    """Expected is timm's own transform; its resizing rounds to whole numbers as ours does."""
    config, _ = with_preprocessing(settings(folders, model="timm/vit_tiny_patch16_224", pretrained=True))
    batch = next(iter(EvalBatches((data := load_data(config)).val, data, config, device=torch.device("cpu"))))
    published = timm.data.resolve_data_config(
        {"img_size": 16}, pretrained_cfg=timm.get_pretrained_cfg("vit_tiny_patch16_224").to_dict()
    )
    transform = timm.data.create_transform(**published)
    expected = torch.stack([transform(Image.open(folders / "val" / name)) for name in ("a/0.png", "a/2.png")])
    torch.testing.assert_close(batch.x[:2], expected, atol=1e-5, rtol=0)


def test_what_is_given_stays(folders):
    given = {"mean": (0.1, 0.2, 0.3), "std": (0.4,), "interpolation": "bilinear", "crop_pct": 0.8}
    config, source = with_preprocessing(settings(folders, model="timm/vit_tiny_patch16_224", pretrained=True, **given))
    assert (config.mean, config.std, config.interpolation, config.crop_pct) == (
        (0.1, 0.2, 0.3),
        (0.4,) * 3,
        "bilinear",
        0.8,
    )
    assert source == ""


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"mean": (0.5, 0.5)}, "mean 0.5 0.5: give one number, or 3, one for each channel"),
        ({"std": (0.0,)}, "std 0.0: give for each channel a number above 0"),
        ({"mean": (123.7,)}, "mean 123.7: give for each channel a share from 0 to 1"),
    ],
)
def test_numbers_that_are_none_are_refused(folders, given, words):
    with pytest.raises(ValueError, match=words):
        with_preprocessing(settings(folders, **given))


def vit_folder(path, **changes):
    config = transformers.ViTConfig(
        image_size=16, patch_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8
    )
    transformers.ViTForImageClassification(config).save_pretrained(path)
    transformers.ViTImageProcessor(**changes).save_pretrained(path)
    return path


@pytest.mark.parametrize("start", ["pretrained", "initial_checkpoint"])
def test_folder_of_transformers_says_what_it_expects(folders, tmp_path, start):
    folder = vit_folder(tmp_path / "vit", image_mean=[0.1, 0.2, 0.3], image_std=[0.5, 0.6, 0.7], resample=3)
    begins = {"pretrained": True} if start == "pretrained" else {"initial_checkpoint": str(folder)}
    config, source = with_preprocessing(settings(folders, model=f"hf/{folder}", **begins))
    assert (config.mean, config.std) == ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7))
    assert (config.interpolation, config.crop_pct) == ("bicubic", 1.0)
    assert source == "as preprocessor_config.json of vit says"


def test_folder_of_timm_says_what_it_expects(folders, tmp_path):
    model = timm.create_model("resnet10t", num_classes=2)
    described = {"pretrained_cfg": {"mean": [0.3] * 3, "std": [0.2] * 3, "interpolation": "bicubic", "crop_pct": 0.8}}
    timm.models.save_for_hf(model, str(tmp_path / "net"), model_config=described, safe_serialization=True)
    config, _ = with_preprocessing(settings(folders, model="timm/resnet10t", initial_checkpoint=str(tmp_path / "net")))
    assert (config.mean, config.std, config.crop_pct) == ((0.3,) * 3, (0.2,) * 3, 0.8)


@pytest.fixture
def finetuned(folders, tmp_path):
    """A run that began with weights of timm's ViT, which expects a mean of 0.5."""
    words = ("patch_size=8", "embed_dim=12", "depth=1", "num_heads=2")
    config = settings(
        folders, model="timm/vit_tiny_patch16_224", model_kwargs=words, initial_checkpoint=str(tmp_path / "start.pth"),
        output=str(tmp_path), name="run", epochs=2,
    )  # fmt: skip
    model = build_model(config.model, num_classes=7, img_size=16, model_kwargs=config.model_arguments)
    torch.save(model.state_dict(), tmp_path / "start.pth")
    train(config, console=tiny.quiet())
    return config, tmp_path / "run"


def test_run_records_its_inputs_and_looks_nothing_up_again(finetuned, monkeypatch):
    config, run = finetuned
    recorded = yaml.safe_load((run / "args.yaml").read_text())
    assert [recorded[name] for name in ("mean", "std", "interpolation", "crop_pct")] == [
        [0.5] * 3,
        [0.5] * 3,
        "bicubic",
        0.9,
    ]
    line = (
        "inputs: mean 0.5, 0.5, 0.5, std 0.5, 0.5, 0.5, bicubic, crop_pct 0.9, as timm's vit_tiny_patch16_224 expects"
    )
    assert line in (run / "log.txt").read_text()

    def looked_up(*given):
        raise AssertionError(given)

    monkeypatch.setattr(preprocessing, "_expected_by", looked_up)
    before = judge_run(run, device="cpu").main["val"]
    assert train(config, resume="auto", console=tiny.quiet()).test == before
    assert train(load_config(run / "args.yaml"), resume=str(run), console=tiny.quiet()).test == before


def test_a_run_that_starts_from_a_run_has_its_inputs(finetuned, tmp_path):
    config, run = finetuned
    source = replace(config, initial_checkpoint=str(run), model="cifar/resnet20")
    filled, said = with_preprocessing(source)
    assert (filled.mean, filled.interpolation, filled.crop_pct) == ((0.5,) * 3, "bicubic", 0.9)
    assert "model.safetensors was trained" in said
    copy = shutil.copy(run / "last" / "model.safetensors", tmp_path / "alone.safetensors")
    assert with_preprocessing(replace(source, initial_checkpoint=str(copy)))[0].std == (0.5,) * 3


def test_other_inputs_are_another_run(finetuned):
    config, _ = finetuned
    with pytest.raises(ValueError, match=r"was begun with mean \(0.5, 0.5, 0.5\) \(now \(0.2, 0.2, 0.2\)\)"):
        train(replace(config, mean=(0.2, 0.2, 0.2)), resume="auto", console=tiny.quiet())


def test_run_of_an_older_version_is_judged_with_the_inputs_it_was_trained_with(finetuned, monkeypatch):
    """It had no settings mean and std, and ImageNet's in any case."""
    _, run = finetuned
    entries = yaml.safe_load((run / "args.yaml").read_text())
    (run / "args.yaml").write_text(yaml.safe_dump({k: v for k, v in entries.items() if k not in ("mean", "std")}))
    seen = []
    monkeypatch.setattr("unloaf.runs.opened.check_settings", lambda *given: None)
    real = load_data

    def load(config):
        seen.append(real(config))
        return seen[-1]

    monkeypatch.setattr("unloaf.tasks.classification.load_data", load)
    judge_run(run, device="cpu")
    assert seen[0].mean == pytest.approx([255 * value for value in IMAGENET[0]])


@pytest.mark.parametrize(
    "text", ["[", '{"image_mean": "grey", "image_std": [1]}', '{"image_mean": [0.5], "image_std": 3}']
)
def test_description_that_is_none_is_named(folders, tmp_path, text):
    save_file({"weight": torch.ones(2, 2)}, tmp_path / "model.safetensors")
    (tmp_path / "preprocessor_config.json").write_text(text)
    with pytest.raises(ValueError, match=r"preprocessor_config.json") as caught:
        with_preprocessing(settings(folders, initial_checkpoint=str(tmp_path)))
    assert "\n" not in str(caught.value)


# --- of a backbone

RED = ((0.7, 0.2, 0.1), (0.3, 0.2, 0.1))
_RED = {"mean": list(RED[0]), "std": list(RED[1]), "interpolation": "bilinear", "crop_pct": 1.0}


def header(place):
    """A run's weights, as `unloaf train` leaves them."""
    save_file({"w": torch.zeros(1)}, place / "model.safetensors", {"unloaf_preprocessing": json.dumps(_RED)})
    return {"backbone_weights": str(place)}


def exported(place):
    """A folder that timm reads."""
    save_file({"w": torch.zeros(1)}, place / "model.safetensors")
    (place / "config.json").write_text(json.dumps({"architecture": "resnet18", "pretrained_cfg": _RED}))
    return {"backbone": str(place)}


def whole(place):
    """A segmenter that is trained on; what its backbone began from does not matter then."""
    return {"initial_checkpoint": header(place)["backbone_weights"], "backbone": "timm/resnet18"}


def silent(place):
    """A file without a word, so as timm says."""
    save_file({"w": torch.zeros(1)}, place / "model.safetensors")
    return {"backbone": "vit_tiny_patch16_224", "backbone_weights": str(place)}


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        (header, RED),
        (exported, RED),
        (whole, RED),
        (silent, (HALF, HALF)),
        (lambda place: {"backbone": "timm/vit_tiny_patch16_224", "pretrained": True}, (HALF, HALF)),
        (lambda place: header(place) | {"mean": (0.5,) * 3}, (HALF, RED[1])),
        (lambda place: {}, ((), ())),
    ],
)
@pytest.mark.parametrize("task", ["semantic", "detection", "pose", "panoptic"])
def test_images_are_fed_as_the_weights_of_the_backbone_expect(tmp_path, task, start, expected):
    models = {"semantic": "semantic-fpn", "detection": "fcos", "pose": "simple-baseline", "panoptic": "panoptic-fpn"}
    dataset = "masks" if task == "semantic" else "coco"
    usual = {"task": task, "model": models[task], "dataset": dataset, "data_dir": "x", "method": "common"}
    config, source = with_colours_of_backbone(Config(**usual, img_size=64, **start(tmp_path)))
    assert (config.mean, config.std) == expected
    assert bool(source) == (expected in (RED, (HALF, HALF)))


def test_a_backbone_of_a_run_is_fed_as_that_run_was(tmp_path):
    """Also when the run goes on, and its start is gone."""
    start = tmp_path / "start.safetensors"
    save_file(timm.create_model("resnet18").state_dict(), start, {"unloaf_preprocessing": json.dumps(_RED)})
    mask_files.masked(tmp_path / "set")
    usual = {"task": "semantic", "dataset": "masks", "data_dir": str(tmp_path / "set"), "model": "semantic-fpn"}
    usual |= {"backbone": "timm/resnet18", "num_classes": 3, "img_size": 32, "batch_size": 2, "method": "common"}
    given = Config(**usual, epochs=1, device="cpu", backbone_weights=str(start), output=str(tmp_path), name="run")
    run = train(given, console=tiny.quiet()).path
    assert "inputs: mean 0.7, 0.2, 0.1, std 0.3, 0.2, 0.1" in (run / "log.txt").read_text(encoding="utf-8")
    start.unlink()
    train(replace(given, epochs=2), console=tiny.quiet(), resume="auto")
    again = load_config(run / "args.yaml")
    assert (again.mean, again.std) == RED
