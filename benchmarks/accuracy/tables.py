"""What the study trains: its tables, row by row. The baseline is always the first row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import product
from types import MappingProxyType
from typing import Any

from unloaf.config import Config
from unloaf.methods.table import METHODS as OF_LIBRARY
from unloaf.recipes import recipe

Settings = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of a table: settings beside the table's own, trained once for each seed.

    `tuned` names a method of the table's trials, whose best settings come first. `costs_as` makes the number of epochs
    that at which the run costs as much as the most expensive run of those rows. `backbone` names a row of the table's
    backbones, from whose run of the same seed the backbone begins. Rows of a lower `tier` are trained first, in all
    seeds.
    """

    label: str
    settings: Settings = field(default_factory=dict)
    tuned: str | None = None
    costs_as: tuple[str, ...] = ()
    backbone: str | None = None
    tier: int = 1


@dataclass(frozen=True, kw_only=True)
class Table:
    """Runs that are compared, on `split`; `subnets` are depths, a number to draw, or None for all ordered ones.

    `costed`: rows have costs though none is at the cost of another.

    `trials` is the table of trials from which `Row.tuned` takes settings; in such a table `Row.tuned` says whose trial
    a row is. `backbones` is the table of classifiers that rows begin from; it is trained before, on other images.
    """

    name: str
    title: str
    about: str
    common: Settings
    rows: tuple[Row, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    split: str = "test"
    subnets: int | tuple[str, ...] | None = None
    trials: str | None = None
    backbones: str | None = None
    costed: bool = False

    def row(self, label: str) -> Row:
        """The row of this label."""
        return next(row for row in self.rows if row.label == label)


# Which settings a method takes is decided by one seed, on validation images.
TRIALS = partial(Table, seeds=(0,), split="val", subnets=8)

# --- what is compared


def trial_rows(
    lrs: tuple[float, float], decays: tuple[float, float], methods: Mapping[str, Settings], *, fourth: bool = False
) -> tuple[Row, ...]:
    """Three trials for each method: the usual settings, the other learning rate, another value of its own setting.

    A fourth one has the other weight decay, which is the own setting of common training: there both are the other.
    """
    own = {"common": ("weight_decay", decays), "stochastic-depth": ("final_survival", (0.8, 0.5))}
    rows = []
    for method, settings in methods.items():
        weight = settings.get("subnet_weight", WEIGHTS.get(method))
        name, values = own.get(method, ("subnet_weight", (weight, 0.5)))
        trials = [{"lr": lrs[0], name: values[0]}, {"lr": lrs[1], name: values[0]}, {"lr": lrs[0], name: values[1]}]
        if fourth:
            trials.append({"lr": lrs[method == "common"], name: values[0], "weight_decay": decays[1]})
        for trial in trials:
            words = [method, *(f"{key} {value:g}" for key, value in trial.items())]
            rows.append(Row(label=", ".join(words), tuned=method, settings=dict(settings) | trial))
    return tuple(rows)


ST: dict[str, Any] = {"method": "st"}
# ST whose subnets have no weight is common training, here with the cross-entropy of ST++.
NORMALISED: dict[str, Any] = {"method": "st", "subnet_weight": 0.0, "main_logits": "direction", "eps": 1.0}
KL_MINUS: dict[str, Any] = {"subnet_loss": "kl-", "eps": 1.0}
# Away from ImageNet: eps tames the directions of small logits, and six losses weigh about one together.
STPP: dict[str, Any] = {"method": "st++", "eps": 1.0, "min_ratio": 0.5, "per": "step"}
# ST*, whose subnets learn from the labels, is for fine-tuning in other tasks.
_FLAGS = tuple(flag for flag in OF_LIBRARY if flag != "st-star")
METHODS: dict[str, dict[str, Any]] = {flag: {"method": flag} for flag in _FLAGS} | {"st++": STPP}
# A ViT has one stage, and one size of input.
VIT_METHODS = METHODS | {"st++": STPP | {"sampler": "ordered", "subnet_inputs": "same"}}
# Of each subnet, so that those of a step weigh about one together; 0.5 is the other value that trials try.
WEIGHTS = {"st": 1.0, "st++": 0.17, "gkt": 0.17}

HEADLINE = (
    *(Row(label=method.label, tuned=flag) for flag, method in OF_LIBRARY.items() if flag in _FLAGS),
    Row(label="common training, cost of ST", tuned="common", costs_as=("ST",)),
    Row(label="common training, cost of the most expensive", tuned="common", costs_as=("ST", "ST++", "GKT")),
)
# On validation images one subnet gained nearly as much as six, and ordered sampling, which also draws the small ones,
# repaired the subnets: the table of ST++ part by part.
_ONE_SUBNET = {"num_subnets": 1, "subnet_weight": 1.0}
_ONE_ORDERED = _ONE_SUBNET | {"sampler": "ordered"}
_MIXUP = {"mixup": 1.0}
ONE_SUBNET = (
    Row(label="ST++, 1 subnet", tuned="st++", settings=_ONE_SUBNET),
    Row(label="ST++, 1 subnet, ordered", tuned="st++", settings=_ONE_ORDERED),
    Row(
        label="common training, cost of ST++, 1 subnet",
        tuned="common",
        costs_as=("ST++, 1 subnet", "ST++, 1 subnet, ordered"),
    ),
)


def changed_rows(
    method: str, changes: Mapping[str, Settings], also: Settings = MappingProxyType({}), *, tier: int = 1
) -> list[Row]:
    """A method with one change in each row; `also` holds for all that do not say otherwise."""
    plain = Row(label=method, tuned=method.lower(), settings=also, tier=tier)
    return [replace(plain, label=f"{method}, {what}", settings={**also, **new}) for what, new in changes.items()]


# What did well on validation images beside one subnet: six drawn among all depths, and the loss of ST++ in GKT.
ALSO_GOOD = (
    *changed_rows("ST++", {"ordered": {"sampler": "ordered"}}, tier=2),
    *changed_rows("GKT", {"KL-": KL_MINUS}, tier=2),
)


def when_trained(half: int) -> dict[str, dict[str, Any]]:
    """Subnets that count or run in a part of the training only. `half` is the middle epoch."""
    return {
        "weight falling": {"subnet_schedule": "falling"},
        "weight rising": {"subnet_schedule": "rising"},
        "second half only": {"subnet_on_epoch": half + 1},
        "first half only": {"subnet_off_epoch": half + 1},
    }


def combinations(half: int) -> tuple[Row, ...]:
    """Ours: parts of ST++ alone, subnets in a part of the steps, GKT with KL-. `half` is the middle epoch."""
    parts: dict[str, dict[str, Any]] = {
        "smaller inputs": {"subnet_inputs": "smaller", "min_ratio": 0.5},
        "inter-stage": {"sampler": "inter-stage"},
        "KL-": KL_MINUS,
        "KL-, 6 subnets": KL_MINUS | {"num_subnets": 6, "subnet_weight": 0.17},
    }
    return (
        *ALSO_GOOD,
        *changed_rows("ST", {"every 2nd step": {"subnet_interval": 2}} | when_trained(half), tier=2),
        Row(label="common training on normalised logits", tuned="common", settings=NORMALISED, tier=2),
        *changed_rows("ST", parts, tier=3),
        *changed_rows("ST++", {"a side for each subnet": {"per": "subnet"}}, tier=3),
    )


# The best of ST++ on validation images. It costs so much that common training gets a row of its own, and so does mixup,
# as good a remedy for overfitting.
THE_PAPERS: dict[str, Any] = {"subnet_weight": 1.0, "eps": 1e-7, "min_ratio": 0.43, "per": "subnet"}
_EQUAL_COST: dict[str, Any] = {"tuned": "common", "costs_as": ("ST++, the paper's settings",), "tier": 2}
AS_PUBLISHED = (
    *changed_rows("ST++", {"amplitude 3": {"amplitude": 3.0}, "the paper's settings": THE_PAPERS}, tier=2),
    Row(label="common training, cost of ST++, the paper's settings", **_EQUAL_COST),
    Row(label="mixup 1, cost of ST++, the paper's settings", settings={"mixup": 1.0}, **_EQUAL_COST),
)


# --- one factor at a time: parts of ST++ taken away or made cheaper, and what our readings of the papers are worth

# Six subnets weigh about one together. Not the weight of the trials, so that fewer subnets can be given the same sum.
_ONE = {"subnet_weight": 0.17}
_STPP_CHANGED: dict[str, dict[str, Any]] = {
    "2 subnets": {"num_subnets": 2, "subnet_weight": 0.5},
    "1 subnet": _ONE_SUBNET,
    "every 2nd step": {"subnet_interval": 2},
    "half the batch": {"subnet_batch_fraction": 0.5},
    "the main network's inputs": {"subnet_inputs": "same"},
    "KL": {"subnet_loss": "kl", "main_logits": "raw"},
    "ordered sampling": {"sampler": "ordered"},
    "a side for each subnet": {"per": "subnet"},
    "cross-entropy on raw logits": {"main_logits": "raw"},
    "eps 1e-7": {"eps": 1e-7},
    "amplitude 3": {"amplitude": 3.0},
    "1 subnet, ordered": _ONE_ORDERED,
    "1 subnet, ordered, weight 3": _ONE_ORDERED | {"subnet_weight": 3.0},
    "1 subnet, ordered, weight 6": _ONE_ORDERED | {"subnet_weight": 6.0},
    "1 subnet, ordered, eps 1e-7, from 43 %": _ONE_ORDERED | {"eps": 1e-7, "min_ratio": 0.43},
    "weight 1": {"subnet_weight": 1.0},
    "the paper's settings": THE_PAPERS,
    "the paper's settings, ordered": THE_PAPERS | {"sampler": "ordered"},
}
_ST_CHANGED: dict[str, dict[str, Any]] = {
    "2 subnets": {"num_subnets": 2},
    "3 subnets": {"num_subnets": 3},
    "stochastic sampling": {"sampler": "stochastic"},
    "inter-stage sampling": {"sampler": "inter-stage"},
    "exponential decay": {"sampler": "exponential-decay"},
}
_GKT_CHANGED: dict[str, dict[str, Any]] = {
    "the main network as teacher": {"teacher": "main"},
    "ordered sampling": {"sampler": "ordered"},
    "1 loop": {"loops": 1, "subnet_weight": 0.34},
    "weight 1": {"subnet_weight": 1.0},
    "decay base 1": {"decay_base": 1.0},
    "ema 0": {"group_ema": 0.0},
    "KL-": KL_MINUS,
    "2 groups": {"groups": 2, "subnet_weight": 0.25},
    "decay base 0.25": {"decay_base": 0.25},
    "ema 0.9": {"group_ema": 0.9},
}


def stpp_rows(half: int) -> tuple[Row, ...]:
    """ST++ with one part taken away, made cheaper or read in another way; common training at the cost of some.

    `half` is the middle epoch.
    """
    common = partial(Row, tuned="common")
    cheaper = ("ST++, 1 subnet", "ST++, 2 subnets", "ST++")
    return (
        common(label="common training"),
        Row(label="ST++", tuned="st++", settings=_ONE),
        *changed_rows("ST++", _STPP_CHANGED, _ONE),
        *(common(label=f"common training, cost of {row}", costs_as=(row,)) for row in cheaper),
        *changed_rows("ST++", when_trained(half), _ONE, tier=2),
    )


def sides_rows() -> tuple[Row, ...]:
    """ST++ whose six subnets see any side, sides of a short list, or one for all of a step."""
    each = {"per": "subnet"}
    drawn: dict[str, dict[str, Any]] = {
        "any side from 8 to 16 px": each,
        "8, 10, 12, 14 or 16 px": each | {"sides": (8, 10, 12, 14, 16)},
        "8, 12 or 16 px": each | {"sides": (8, 12, 16)},
        "one side a step": {},
    }
    return (Row(label="common training", tuned="common"), *changed_rows("ST++", drawn, _ONE))


def reading_rows() -> tuple[Row, ...]:
    """ST and GKT, each with one setting changed."""
    return (
        Row(label="common training", tuned="common"),
        Row(label="ST", tuned="st"),
        *changed_rows("ST", _ST_CHANGED),
        Row(label="GKT", tuned="gkt", settings=_ONE),
        *changed_rows("GKT", _GKT_CHANGED, _ONE),
    )


# --- CIFAR-100 on two CPU cores

CPU: dict[str, Any] = {
    "dataset": "cifar100", "train_images": 10_000, "img_size": 16, "model": "cifar/resnet20", "batch_size": 64,
    "epochs": 30, "warmup_epochs": 1, "device_data": True, "amp": True, "channels_last": True, "device": "cpu",
    "eval_interval": 1000,
}  # fmt: skip
_SMALL = (
    "CIFAR-100 shrunk to 16 px, 10,000 training images, ResNet-20 of width 16, batch 64, SGD with cosine, bfloat16, "
    "2 CPU cores"
)

CPU_FEW = CPU | {"train_images": 2_500, "epochs": 80}
_FEW = _SMALL.replace("10,000", "2,500")
CPU_VIT: dict[str, Any] = {
    "dataset": "cifar100", "train_images": 2_500, "img_size": 16, "model": "timm/vit_tiny_patch16_224",
    "model_kwargs": ("patch_size=4", "embed_dim=64", "depth=8", "num_heads=2"), "opt": "adamw", "weight_decay": 0.05,
    "batch_size": 64, "epochs": 80, "warmup_epochs": 5, "device_data": True, "device": "cpu", "eval_interval": 1000,
}  # fmt: skip
CPU_VIT_METHODS = ("common", "stochastic-depth", "st")
_SMALL_VIT = (
    "CIFAR-100 shrunk to 16 px, 2,500 training images, ViT of 8 blocks, 64 channels and patches of 4 px, batch 64, "
    "AdamW with cosine, 2 CPU cores"
)
CPU_MOBILENET: dict[str, Any] = {
    "dataset": "cifar100", "train_images": 2_500, "img_size": 64, "model": "timm/mobilenetv3_small_050",
    "batch_size": 64, "epochs": 80, "warmup_epochs": 1, "device_data": True, "channels_last": True, "device": "cpu",
    "eval_interval": 1000,
}  # fmt: skip
CPU_MOBILENET_METHODS = {name: METHODS[name] for name in ("common", "stochastic-depth", "st")} | {
    "st++": STPP | _ONE_ORDERED,
}
_SMALL_MOBILENET = (
    "CIFAR-100 enlarged to 64 px, 2,500 training images, MobileNetV3-Small of width 0.5, batch 64, SGD with cosine, "
    "2 CPU cores"
)

# --- other tasks on two CPU cores

# Stages of 1, 1, 4 and 7 blocks: subnets are depths of the last two. The settings are usual ones, none was tuned.
CAMVID: dict[str, Any] = {
    "task": "semantic", "dataset": "masks", "num_classes": 11, "model": "semantic-fpn", "backbone": "timm/regnetx_002",
    "img_size": 64, "batch_size": 8, "opt": "adamw", "lr": 5e-4, "weight_decay": 0.05, "epochs": 10, "device": "cpu",
    "channels_last": True, "recalibrate": 128, "eval_interval": 1000,
}  # fmt: skip


def fine_tuning_rows() -> tuple[Row, ...]:
    """ST*, whose subnets learn from the ground truth on smaller inputs, beside common training and ST."""
    return (
        Row(label="common training", settings={"method": "common"}),
        Row(label="ST*", settings={"method": "st-star"}),
        Row(label="common training, cost of ST*", settings={"method": "common"}, costs_as=("ST*",)),
        Row(label="ST", settings={"method": "st"}, tier=2),
    )


# Classifiers for backbones, and what is fine-tuned on them: the paper's R50-base, R50-ST and R50-ST*.
BACKBONES: dict[str, Any] = {
    "dataset": "cifar100", "train_images": 10_000, "img_size": 64, "model": "timm/regnetx_002", "batch_size": 64,
    "lr": 0.1, "epochs": 8, "warmup_epochs": 1, "device_data": True, "channels_last": True, "device": "cpu",
    "eval_interval": 1000,
}  # fmt: skip


def backbone_rows() -> tuple[Row, ...]:
    """The same network by common training and by ST."""
    return (
        Row(label="common training", settings={"method": "common"}),
        Row(label="ST", settings={"method": "st"}),
    )


def transfer_rows() -> tuple[Row, ...]:
    """Common training and ST* from a backbone of common training and from one of ST."""
    return tuple(
        Row(label=f"{method} on a backbone of {backbone}", settings={"method": flag}, backbone=backbone)
        for backbone in ("common training", "ST")
        for method, flag in (("common training", "common"), ("ST*", "st-star"))
    )


LSP: dict[str, Any] = {
    "task": "pose", "dataset": "coco", "model": "simple-baseline", "backbone": "timm/resnet18", "img_size": 64,
    "batch_size": 16, "opt": "adam", "lr": 1e-3, "weight_decay": 0.0, "epochs": 8, "device": "cpu",
    "channels_last": True, "recalibrate": 128, "eval_interval": 1000,
}  # fmt: skip


# --- loafing


def loafing_rows(depths: Mapping[str, int]) -> tuple[Row, ...]:
    """Networks with subnets inside, and the networks that these subnets are, trained alone."""
    plus = Row(label="ST++", tuned="st++", settings={"sampler": "ordered"})
    return (
        *(row for row in HEADLINE if row.label in ("common training", "ST", "GKT")),
        plus,
        *(
            Row(label=f"alone {subnet}", tuned="common", settings={"model": f"cifar/resnet{depth}"})
            for subnet, depth in depths.items()
        ),
    )


CPU_ALONE = {"1-1-1": 8, "2-2-2": 14, "3-3-3": 20, "4-4-4": 26}
GPU_ALONE = {"1-1-1": 8, "2-2-2": 14, "3-3-3": 20, "5-5-5": 32, "7-7-7": 44}

# CIFAR-10 as the published figures have it: all images at 32 px. The settings are the usual ones, the same for all
# rows, none was tuned. ST++ takes one ordered subnet, as the tables above suggest.
CIFAR10: dict[str, Any] = {
    "dataset": "cifar10", "val_fraction": 0.0, "model": "cifar/resnet32", "batch_size": 128, "epochs": 40,
    "warmup_epochs": 1, "device_data": True, "amp": True, "channels_last": True, "device": "cpu", "eval_interval": 1000,
}  # fmt: skip
# Three depths of each stage, and the subnets that are networks of He et al.
CIFAR10_SUBNETS = (*("-".join(map(str, depths)) for depths in product((1, 3, 5), repeat=3)), "2-2-2", "4-4-4")


def cifar10_rows() -> tuple[Row, ...]:
    """A ResNet-32 by each method and at the cost of ST, and the networks inside it trained alone.

    The first tier is the table of the published figure: a ResNet-20 inside a ResNet-32, and alone.
    """
    alone = {"3-3-3": 20, "1-1-1": 8, "2-2-2": 14, "4-4-4": 26}
    return (
        Row(label="common training", settings=METHODS["common"]),
        Row(label="ST", settings=ST),
        Row(label="ST++, 1 subnet, ordered", settings=STPP | _ONE_ORDERED),
        Row(label="GKT", settings=METHODS["gkt"] | {"subnet_weight": WEIGHTS["gkt"]}),
        Row(label="common training, cost of ST", settings=METHODS["common"], costs_as=("ST",), tier=2),
        *(
            Row(
                label=f"alone {subnet}",
                settings=METHODS["common"] | {"model": f"cifar/resnet{depth}"},
                tier=1 if depth == 20 else 2,
            )
            for subnet, depth in alone.items()
        ),
    )


# --- digits, with the settings of the recipes, which were chosen on validation images with equal numbers of tries

_DIGITS: dict[str, Any] = {
    "dataset": "digits", "model": "cifar/resnet26", "width": 8, "epochs": 25, "batch_size": 64, "warmup_epochs": 2,
    "device": "cpu", "eval_interval": 1000,
}  # fmt: skip
_DIGITS_BY_METHOD: dict[str, dict[str, Any]] = {
    OF_LIBRARY[config.method].label: {
        name: value
        for name, value in asdict(config).items()
        if name not in _DIGITS and value != getattr(Config(), name)
    }
    for config in (recipe(f"digits_{name}") for name in ("common", "stochastic_depth", "st", "stpp", "gkt"))
}


def digits_rows() -> tuple[Row, ...]:
    """The headline rows with the settings of `unloaf.recipes.digits`."""
    return tuple(replace(row, tuned=None, settings=_DIGITS_BY_METHOD[row.label.partition(",")[0]]) for row in HEADLINE)


def few_classes_rows() -> tuple[Row, ...]:
    """ST++ on ten classes, with the `eps` and weights of the paper and ours, at two learning rates."""
    rows = [Row(label="common training", settings=_DIGITS_BY_METHOD["common training"])]
    for lr in (0.05, 0.1):
        for changed in ({}, {"eps": 1e-7}, {"subnet_weight": 1.0}, {"eps": 1e-7, "subnet_weight": 1.0}):
            settings = _DIGITS_BY_METHOD["ST++"] | {"lr": lr} | changed
            label = f"ST++, lr {lr:g}, eps {settings['eps']:g}, subnet_weight {settings['subnet_weight']:g}"
            rows.append(Row(label=label, settings=settings))
    return tuple(rows)


# --- CIFAR-100 on a GPU

GPU: dict[str, Any] = {
    "dataset": "cifar100", "batch_size": 64, "epochs": 200, "device_data": True, "amp": True, "channels_last": True,
    "torchcompile": True, "eval_interval": 1000,
}  # fmt: skip
# What half an hour of a GPU may be enough for.
QUICK: dict[str, Any] = GPU | {
    "model": "cifar/resnet18", "batch_size": 256, "epochs": 30, "warmup_epochs": 2, "torchcompile": False,
}  # fmt: skip
_ADAMW = {"opt": "adamw", "weight_decay": 0.05, "warmup_epochs": 10, "batch_size": 128}
NETWORKS: dict[str, dict[str, Any]] = {
    "resnet18": {"model": "cifar/resnet18"},
    "resnet50": {"model": "cifar/resnet50"},
    "resnet56": {"model": "cifar/resnet56"},
    "mobilenetv3": {"model": "timm/mobilenetv3_large_100", "img_size": 128},
    "vit": {"model": "timm/vit_tiny_patch16_224", "model_kwargs": ("patch_size=4",)} | _ADAMW,
}


# One size of input, and ordered sampling anyway.
_NOT_FOR_A_VIT = ("ST, smaller inputs", "ST++, a side for each subnet", "ST++, ordered")


def gpu_tables(network: str) -> tuple[Table, Table]:
    """The table of a network and the trials that give its settings."""
    settings, vit = GPU | NETWORKS[network], network == "vit"
    methods = VIT_METHODS if vit else METHODS
    lrs, decays = ((1e-3, 5e-4), (0.05, 0.1)) if vit else ((0.1, 0.05), (5e-4, 1e-3))
    trials = TRIALS(
        name=f"cifar100-gpu-{network}-trials",
        title=f"Trials for {settings['model']} on CIFAR-100",
        about="the same number of trials for each method, 30 epochs, evaluated on 5,000 validation images",
        common=settings | {"epochs": 30},
        rows=trial_rows(lrs, decays, methods),
    )
    headline = HEADLINE + ONE_SUBNET + combinations(settings["epochs"] // 2)
    if vit:
        headline = tuple(row for row in headline if row.label not in _NOT_FOR_A_VIT)
    table = Table(
        name=f"cifar100-gpu-{network}",
        title=f"{settings['model']} on CIFAR-100",
        about=f"CIFAR-100, 45,000 training images, {settings['epochs']} epochs, bf16, blocks compiled",
        common=settings,
        rows=headline,
        subnets=30,
        trials=trials.name,
    )
    return trials, table


def one_factor_tables(device: str, **settings: Any) -> tuple[Table, Table]:
    """ST++ part by part, and the readings of ST and GKT."""
    both = partial(Table, split="val", subnets=8, **settings)
    return (
        both(name=f"parts-{device}", title="ST++ part by part", rows=stpp_rows(settings["common"]["epochs"] // 2)),
        both(name=f"readings-{device}", title="Our readings, one factor at a time", rows=reading_rows()),
    )


_ALL = [
    TRIALS(
        name="cifar100-cpu-trials", title="Trials for the table above",
        about=f"{_SMALL}; 8 epochs, one seed, evaluated on 5,000 validation images",
        common=CPU | {"epochs": 8}, rows=trial_rows((0.1, 0.05), (5e-4, 1e-3), METHODS),
    ),
    Table(
        name="cifar100-cpu", title="CIFAR-100, as large as two CPU cores allow",
        about=f"{_SMALL.replace('10,000', '5,000')}; 40 epochs",
        common=CPU | {"train_images": 5_000, "epochs": 40},
        rows=HEADLINE + ONE_SUBNET + combinations(20), trials="cifar100-cpu-trials",
    ),
    TRIALS(
        name="cifar100-cpu-few-trials", title="Trials with fewer images",
        about=f"{_FEW}; 40 epochs, one seed, evaluated on 5,000 validation images",
        common=CPU_FEW | {"epochs": 40}, rows=trial_rows((0.1, 0.05), (5e-4, 1e-3), METHODS, fourth=True),
    ),
    Table(
        name="cifar100-cpu-few", title="CIFAR-100, fewer images and twice the epochs", about=f"{_FEW}; 80 epochs",
        common=CPU_FEW, rows=HEADLINE + ONE_SUBNET + ALSO_GOOD + AS_PUBLISHED, trials="cifar100-cpu-few-trials",
    ),
    Table(
        name="baselines-cpu", title="Common training, more regularised",
        about=f"{_FEW}; epochs at which each row costs as much as 80 of ST++, evaluated on 5,000 validation images",
        common=CPU_FEW | {"epochs": 189},
        rows=(
            Row(label="common training", tuned="common"),
            Row(label="weight decay 2e-3", tuned="common", settings={"weight_decay": 2e-3}),
            Row(label="label smoothing 0.1", tuned="common", settings={"smoothing": 0.1}),
            Row(label="mixup 1", tuned="common", settings=_MIXUP),
            Row(label="ST++", tuned="st++", settings={"epochs": 80}),
            Row(label="ST++, mixup 1", tuned="st++", settings={"epochs": 80} | _MIXUP),
            Row(label="ST++, 1 subnet, ordered", tuned="st++", settings=_ONE_ORDERED | {"epochs": 126}),
            Row(
                label="ST++, 1 subnet, ordered, mixup 1", tuned="st++",
                settings=_ONE_ORDERED | {"epochs": 126} | _MIXUP,
            ),
            Row(label="ST, mixup 1", tuned="st", settings={"epochs": 139} | _MIXUP),
            Row(label="stochastic depth, mixup 1", tuned="stochastic-depth", settings={"epochs": 200} | _MIXUP),
        ),
        split="val", subnets=8, trials="cifar100-cpu-few-trials",
    ),
    *one_factor_tables(
        "cpu", about=f"{_FEW}; 80 epochs, evaluated on 5,000 validation images",
        common=CPU_FEW, seeds=(0, 1), trials="cifar100-cpu-few-trials",
    ),
    Table(
        name="sides-cpu", title="Which sides smaller inputs have",
        about=f"{_FEW.replace('bfloat16', 'float32')}; 20 epochs, evaluated on 5,000 validation images",
        common=CPU_FEW | {"amp": False, "epochs": 20}, rows=sides_rows(),
        split="val", subnets=8, trials="cifar100-cpu-few-trials", costed=True,
    ),
    TRIALS(
        name="cifar100-cpu-vit-trials", title="Trials for the ViT", subnets=None,
        about=f"{_SMALL_VIT}; 40 epochs, one seed, evaluated on 5,000 validation images",
        common=CPU_VIT | {"epochs": 40},
        rows=trial_rows((1e-3, 5e-4), (0.05, 0.1), {name: METHODS[name] for name in CPU_VIT_METHODS}, fourth=True),
    ),
    Table(
        name="cifar100-cpu-vit", title="A small ViT on CIFAR-100, as large as two CPU cores allow",
        about=f"{_SMALL_VIT}; 80 epochs", common=CPU_VIT,
        rows=tuple(row for row in HEADLINE if row.tuned in CPU_VIT_METHODS and "most expensive" not in row.label),
        trials="cifar100-cpu-vit-trials",
    ),
    TRIALS(
        name="cifar100-cpu-mobilenetv3-trials", title="Trials for MobileNetV3",
        about=f"{_SMALL_MOBILENET}; 40 epochs, one seed, evaluated on 5,000 validation images",
        common=CPU_MOBILENET | {"epochs": 40},
        rows=trial_rows((0.1, 0.05), (5e-4, 1e-3), CPU_MOBILENET_METHODS, fourth=True),
    ),
    Table(
        name="cifar100-cpu-mobilenetv3", title="A small MobileNetV3 on CIFAR-100, as large as two CPU cores allow",
        about=f"{_SMALL_MOBILENET}; 80 epochs", common=CPU_MOBILENET,
        rows=(
            *HEADLINE[:3],
            Row(label="ST++, 1 subnet, ordered", tuned="st++"),
            replace(HEADLINE[-1], costs_as=("ST", "ST++, 1 subnet, ordered")),
        ),
        trials="cifar100-cpu-mobilenetv3-trials",
    ),
    Table(
        name="digits", title="Digits",
        about="897 training images of 8x8 pixels, ResNet-26 of width 8, 25 epochs; settings of unloaf.recipes.digits",
        common=_DIGITS, rows=digits_rows(), seeds=tuple(range(10)),
    ),
    Table(
        name="few-classes-cpu", title="KL- on ten classes",
        about="Digits, ResNet-26 of width 8, 25 epochs; settings of unloaf.recipes.digits but for those named, "
        "evaluated on 300 validation images",
        common=_DIGITS, rows=few_classes_rows(), split="val",
    ),
    Table(
        name="loafing-cpu", title="Loafing",
        about="CIFAR-100 shrunk to 16 px, 10,000 training images, ResNet-32 of width 8, 20 epochs, bfloat16, 2 CPU "
        "cores; settings chosen by the trials with ResNet-20",
        common=CPU | {"model": "cifar/resnet32", "width": 8, "epochs": 20}, rows=loafing_rows(CPU_ALONE),
        seeds=(0, 1), subnets=("5-5-5", *CPU_ALONE), trials="cifar100-cpu-trials",
    ),
    Table(
        name="loafing-cifar10", title="Loafing on CIFAR-10",
        about="All 50,000 training images of CIFAR-10 at 32 px, padded, cropped and mirrored, ResNet-32 of width 16, "
        "batch 128, SGD with cosine, 40 epochs, bfloat16, one CPU core; no setting was tuned",
        common=CIFAR10, rows=cifar10_rows(), subnets=CIFAR10_SUBNETS,
    ),
    Table(
        name="camvid-cpu", title="Semantic segmentation of CamVid",
        about="CamVid in SegNet's split, 367 training images of 240x180, semantic FPN on a RegNetX-200MF of random "
        "weights, crops of 64 px, batch 8, AdamW with cosine, 10 epochs, one CPU core; no setting was tuned; subnets "
        "1-1, 2-3 and 3-5 of 4-7",
        common=CAMVID, rows=fine_tuning_rows(), subnets=("1-1", "2-3", "3-5", "4-7"),
    ),
    Table(
        name="backbones-cpu", title="Backbones: RegNetX-200MF on CIFAR-100",
        about="CIFAR-100 at 64 px, 10,000 training images, RegNetX-200MF, batch 64, SGD with cosine, 8 epochs, one "
        "CPU core; no setting was tuned; subnets 1-1, 2-3 and 3-5 of 4-7",
        common=BACKBONES, rows=backbone_rows(), subnets=("1-1", "2-3", "3-5", "4-7"), costed=True,
    ),
    Table(
        name="camvid-transfer-cpu", title="Semantic segmentation of CamVid on backbones that were trained before",
        about="CamVid as above, 5 epochs, from the backbone of the same seed in the table of backbones, whose batch "
        "norms stay as they are; subnet 1-1 of 4-7",
        common=CAMVID | {"epochs": 5}, rows=transfer_rows(), subnets=("1-1", "4-7"),
        backbones="backbones-cpu",
    ),
    Table(
        name="lsp-cpu", title="Pose of Leeds Sports",
        about="Leeds Sports Pose, 1,100 training people of 14 joints, SimpleBaseline on a ResNet-18 of random weights, "
        "crops of 64 x 48 px, batch 16, Adam with cosine, 8 epochs, one CPU core; no setting was tuned; subnets "
        "1-1-1-1 and 1-2-1-2 of 2-2-2-2",
        common=LSP, rows=fine_tuning_rows(), subnets=("1-1-1-1", "1-2-1-2", "2-2-2-2"),
    ),
    TRIALS(
        name="cifar100-gpu-quick-trials", title="Trials for ResNet-18 in 30 epochs", subnets=4,
        about="8 epochs, one seed, evaluated on 5,000 validation images",
        common=QUICK | {"epochs": 8}, rows=trial_rows((0.2, 0.1), (5e-4, 1e-3), METHODS),
    ),
    Table(
        name="cifar100-gpu-quick", title="ResNet-18 on CIFAR-100, 30 epochs",
        about="CIFAR-100, 45,000 training images, ResNet-18 with a stem for small images, batch 256, 30 epochs, bf16",
        common=QUICK, rows=HEADLINE + ONE_SUBNET + combinations(15), trials="cifar100-gpu-quick-trials",
    ),
    *(table for network in NETWORKS for table in gpu_tables(network)),
    Table(
        name="loafing-gpu", title="Loafing of ResNet-56",
        about="CIFAR-100, 45,000 training images, 200 epochs, bf16", common=GPU | NETWORKS["resnet56"],
        rows=loafing_rows(GPU_ALONE), subnets=("9-9-9", *GPU_ALONE), trials="cifar100-gpu-resnet56-trials",
    ),
    *one_factor_tables(
        "gpu",
        about="CIFAR-100, 45,000 training images, ResNet-18, 60 epochs, bf16, evaluated on 5,000 validation images",
        common=GPU | NETWORKS["resnet18"] | {"epochs": 60}, trials="cifar100-gpu-resnet18-trials",
    ),
]  # fmt: skip
TABLES: dict[str, Table] = {table.name: table for table in _ALL}
# One word for all that a machine with a GPU has to train; the networks in the order of what they tell for their cost.
GROUPS: dict[str, tuple[str, ...]] = {
    "cifar100-gpu": tuple(f"cifar100-gpu-{network}" for network in NETWORKS),
    "gpu": (
        "cifar100-gpu-quick", *(f"cifar100-gpu-{network}" for network in NETWORKS), "loafing-gpu", "parts-gpu",
        "readings-gpu",
    ),
    "cpu": (
        "digits", "cifar100-cpu", "cifar100-cpu-few", "baselines-cpu", "parts-cpu", "sides-cpu",
        "cifar100-cpu-vit", "cifar100-cpu-mobilenetv3", "few-classes-cpu", "loafing-cpu", "loafing-cifar10",
        "readings-cpu", "camvid-cpu", "backbones-cpu", "camvid-transfer-cpu", "lsp-cpu",
    ),
}  # fmt: skip
