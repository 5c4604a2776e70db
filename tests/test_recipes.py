"""Recipes: their names, their settings, and whether their networks exist."""

import subprocess
import sys

import pytest
import torch

import unloaf
from unloaf.config import dump_config, load_config
from unloaf.losses import direction_kl_loss
from unloaf.models.build import build_model
from unloaf.recipes import RECIPES, recipe, recipe_names

METHODS = ("common", "stochastic_depth", "st", "stpp", "gkt")
RESNET50 = (*("a1", "a2", "common", "stochastic_depth", "st", "gkt"),
            *("klminus", "smaller", "klminus_smaller", "val240", "crop200"))  # fmt: skip


def test_names_are_complete():
    expected = {f"{family}_{method}" for method in METHODS for family in (
        "digits", "cifar100_resnet50", "cifar100_mobilenetv3", "cifar10_mobilenetv3",
        "cifar10_resnet20", "cifar10_resnet32", "cifar10_resnet56", "cifar10_resnet110",
    )}  # fmt: skip
    expected |= {f"imagenet_resnet50_{variant}" for variant in RESNET50}
    expected |= {f"imagenet_{net}_{m}" for net in ("resnet101", "vit", "deit", "swin", "pvt") for m in ("common", "st")}
    expected |= {f"coco_{opt}_{net}_{method}" for opt in ("adamw", "sgd") for method in ("common", "st_star")
                 for net in ("faster_rcnn", "cascade_rcnn", "fcos", "atss", "mask_rcnn", "panoptic_fpn")}  # fmt: skip
    expected |= {f"coco_adam_simple_baseline_{method}" for method in ("common", "st_star")}
    assert sorted(recipe_names()) == sorted(expected)


def test_recipe_survives_its_file(tmp_path):
    path = tmp_path / "args.yaml"
    for name in recipe_names():
        path.write_text(dump_config(recipe(name)), encoding="utf-8")
        assert load_config(path) == recipe(name), name


def test_data_folder_can_be_given():
    assert {recipe(name, data_dir="elsewhere").data_dir for name in recipe_names()} == {"elsewhere"}


@pytest.mark.parametrize("devices", [1, 2])
def test_batch_of_the_paper_divides_over_devices(devices):
    for name in recipe_names():
        config = recipe(name)
        batch = config.global_batch_size or config.batch_size
        per_device = min(config.batch_size, batch // devices)
        assert per_device * devices * (batch // (per_device * devices)) == batch, name


def test_name_says_the_method():
    suffixes = {"common": "common", "stochastic_depth": "stochastic-depth", "st": "st", "stpp": "st++", "gkt": "gkt"}
    suffixes["st_star"] = "st-star"
    for name in recipe_names():
        said = [method for suffix, method in suffixes.items() if name.endswith(f"_{suffix}")]
        assert said in ([recipe(name).method], []), name
        assert said or name.startswith("imagenet_resnet50_"), name


def test_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match="no such recipe; did you mean imagenet_resnet50_a1"):
        recipe("imagenet_resnet_a1")


def test_very_unknown_name_is_answered_with_where_they_are_listed():
    with pytest.raises(ValueError, match=r"no such recipe; `unloaf recipes` lists them$"):
        recipe("?")


def test_lookup_needs_no_torch():
    script = "import sys; from unloaf.recipes import recipe; recipe('digits_st'); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout == "False\n"


# By hand from Ye et al. 2023: tables III and V, section 4.3.1, and the sides of table I.
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "imagenet_resnet50_common",
            {"epochs": 200, "global_batch_size": 512, "opt": "sgd", "momentum": 0.9, "lr": 0.2, "sched": "cosine",
             "min_lr": 0.0, "weight_decay": 1e-4, "norm_decay": True, "warmup_epochs": 0, "smoothing": 0.0,
             "amp": False, "hflip": 0.5, "color_jitter": 0.4, "lighting": 0.1, "aa": None, "mixup": 0.0, "cutmix": 0.0,
             "reprob": 0.0, "img_size": 224, "train_img_size": None, "crop_pct": 224 / 256, "method": "common"},
        ),
        (
            "imagenet_resnet50_a1",
            {"epochs": 200, "global_batch_size": 512, "lr": 0.2, "weight_decay": 1e-4, "warmup_epochs": 0,
             "train_img_size": 200, "img_size": 224, "crop_pct": 224 / 240, "color_jitter": 0.4, "lighting": 0.1,
             "lighting_unit": "level", "head_init": 0.01, "aa": None,
             "method": "st++", "num_subnets_or_default": 6, "subnet_loss": "kl-",
             "main_logits": "auto",
             "sampler": "inter-stage", "subnet_inputs": "smaller", "subnet_weight": 1.0, "per": "subnet"},
        ),
        (
            "imagenet_resnet50_a2",
            {"epochs": 400, "global_batch_size": 512, "lr": 0.2, "aa": "uniform", "train_img_size": 200,
             "method": "st++", "color_jitter": 0.4, "lighting": 0.1},
        ),
        (
            "cifar100_resnet50_st",
            {"dataset": "cifar100", "epochs": 500, "global_batch_size": 64, "opt": "sgd", "method": "st",
             "num_subnets_or_default": 1, "subnet_weight_or_default": 1.0, "sampler": "auto", "subnet_loss": "auto"},
        ),
        (
            "cifar10_mobilenetv3_common",
            {"dataset": "cifar10", "epochs": 500, "global_batch_size": 64, "opt": "sgd", "method": "common"},
        ),
        ("imagenet_resnet101_st", {"head_init": 0.01, "lighting_unit": "level"}),
        ("imagenet_resnet101_st", {"epochs": 100, "global_batch_size": 512, "opt": "sgd", "method": "st"}),
        ("imagenet_vit_st", {"epochs": 100, "global_batch_size": 2048, "opt": "adamw", "method": "st"}),
        (
            "imagenet_deit_common",
            {"head_init": None, "lighting": 0.0},
        ),
        (
            "imagenet_deit_common",
            {"epochs": 300, "global_batch_size": 1024, "opt": "adamw", "lr": 1e-3, "weight_decay": 0.05, "amp": True,
             "warmup_epochs": 5, "smoothing": 0.1, "drop_path": 0.1, "mixup": 0.8, "cutmix": 1.0, "reprob": 0.25},
        ),
    ],
)  # fmt: skip
def test_settings_are_the_published_ones(name, expected):
    config = recipe(name)
    assert {key: getattr(config, key) for key in expected} == expected


# By hand from Ye et al. 2023, table XIII, where weight decay is a dash and the only optimizer Adam.
@pytest.mark.parametrize("method", ["common", "st-star"])
def test_settings_of_pose_are_the_published_ones(method):
    config = recipe(f"coco_adam_simple_baseline_{method.replace('-', '_')}")
    found = (config.task, config.method, config.opt, config.lr, config.weight_decay, config.img_size, config.backbone)
    assert found == ("pose", method, "adam", 5e-4, 0, 256, "timm/resnet50")


@pytest.mark.parametrize(("name", "smallest", "largest"), [("smaller", 96, 224), ("a1", 86, 200), ("a2", 86, 200)])
def test_subnets_draw_every_side_of_the_paper(name, smallest, largest):
    config = recipe(f"imagenet_resnet50_{name}")
    sides = unloaf.SmallerInputs(min_ratio=config.min_ratio, sides=config.sides or None).candidates(largest)
    assert (sides[0], sides[-1], len(sides)) == (smallest, largest, largest - smallest + 1)
    assert (config.train_img_size or config.img_size) == largest


def test_automatic_amplitude_is_the_published_one_on_imagenet():
    student, teacher = torch.randn(2, 4, 1000)
    assert recipe("imagenet_resnet50_a1").amplitude == "auto"
    assert direction_kl_loss(student, teacher, amplitude="auto") == direction_kl_loss(student, teacher, amplitude=1.0)


@pytest.mark.parametrize(
    ("worse", "better"),
    [("common", "st"), ("st", "klminus"), ("st", "smaller"), ("smaller", "klminus_smaller"), ("a1", "a2"),
     ("klminus_smaller", "val240"), ("val240", "crop200"), ("crop200", "a1")],
)  # fmt: skip
def test_published_figures_rise_as_in_table_3(worse, better):
    figures = [float(RECIPES[f"imagenet_resnet50_{variant}"].published) for variant in (worse, better)]
    assert figures[0] < figures[1]


# Depths from the networks' papers; a stage of MobileNetV3 with a single block has nothing to skip.
DEPTHS = {
    "cifar/resnet26": (4, 4, 4),
    "cifar/resnet20": (3, 3, 3),
    "cifar/resnet32": (5, 5, 5),
    "cifar/resnet56": (9, 9, 9),
    "cifar/resnet110": (18, 18, 18),
    "cifar/resnet50": (3, 4, 6, 3),
    "tv/resnet50": (3, 4, 6, 3),
    "tv/resnet101": (3, 4, 23, 3),
    "timm/mobilenetv3_large_100": (2, 3, 4, 2, 3),
    "timm/vit_small_patch16_224": (12,),
    "timm/deit_small_patch16_224": (12,),
    "timm/swin_tiny_patch4_window7_224": (2, 2, 6, 2),
    "timm/pvt_v2_b2": (3, 4, 6, 3),
}
SLOW = (
    *("tv/resnet101", "timm/vit_small_patch16_224"),
    *("timm/deit_small_patch16_224", "timm/swin_tiny_patch4_window7_224"),
)


def test_depths_are_given_for_every_model():
    configs = [recipe(name) for name in recipe_names()]
    assert {config.model for config in configs if config.task == "classification"} == set(DEPTHS)


@pytest.mark.parametrize(
    "model", [pytest.param(model, marks=pytest.mark.slow) if model in SLOW else model for model in DEPTHS]
)
def test_stages_of_the_network_are_found(model):
    config = next(recipe(name) for name in recipe_names() if recipe(name).model == model)
    # Small images for networks that take any.
    small = {"cifar/resnet50": 16, "tv/resnet50": 64, "tv/resnet101": 64, "timm/pvt_v2_b2": 64}
    size = small.get(model, config.img_size)
    network = build_model(model, num_classes=10, img_size=size)
    stages = unloaf.find_stages(network, torch.zeros(2, 3, size or 32, size or 32))
    assert tuple(stage.depth for stage in stages) == DEPTHS[model]


@pytest.mark.parametrize("model", SLOW)
def test_large_network_can_be_built(model):
    with torch.device("meta"):
        network = build_model(model, num_classes=1000, img_size=224)
    # Millions of parameters, as the networks' papers and timm's tables state them.
    millions = {"tv/resnet101": 44.5, "timm/swin_tiny_patch4_window7_224": 28.3}.get(model, 22.1)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)
