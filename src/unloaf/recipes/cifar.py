"""Recipes for CIFAR-10 and CIFAR-100, read from the files that torchvision stores in `data_dir`.

None of them has been run to its end in this project: the figures are the published ones. All train on the whole 50,000
images with random crops after padding and flips, in fp32. The papers state no protocol of validation; choose settings
with `--val-fraction 0.1`.

Flags that decide speed alone (workers, device_data, channels_last, torchcompile) are left at their defaults.

ST++ was published on ImageNet alone, and in trials its settings did badly on small images of few classes (see
docs/methods/stimulative-training-plus.md). Three of ours replace them: `eps` 1, so that short logits have short
directions, and a weight of 0.17, so that the six losses weigh one together, both found on digits; and no
input below half the side. They were not tuned on CIFAR.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Literal

from unloaf.config import Config
from unloaf.config.choices import Method
from unloaf.recipes.entry import Recipe

CifarSet = Literal["cifar10", "cifar100"]


def resnet50(*, dataset: CifarSet = "cifar100", method: Method = "common") -> Config:
    """ResNet-50; on CIFAR-100 ST is 4.53 above common training (Ye et al. 2023, section 4.3.1).

    Stated: SGD, 500 epochs, batch 64. Not stated, and usual at this batch: lr 0.05, momentum 0.9 (Nesterov), weight
    decay 5e-4, cosine. Not stated either: the stem, here a 3x3 convolution without pooling, as is usual for 32 pixels.
    """
    common = Config(
        dataset=dataset,
        data_dir=f"data/{dataset}",
        val_fraction=0.0,
        model="cifar/resnet50",
        method="common",
        epochs=500,
        batch_size=64,
        global_batch_size=64,
        opt="sgd",
        lr=0.05,
        momentum=0.9,
        weight_decay=5e-4,
        sched="cosine",
    )
    return _by_method(common, method)


def mobilenetv3(*, dataset: CifarSet = "cifar100", method: Method = "common") -> Config:
    """MobileNetV3-Large; on CIFAR-100 ST is 3.68 above common training (Ye et al. 2023, section 4.3.1).

    Stated: SGD, 500 epochs, batch 64. Not stated: large or small, and how a network that divides the side by 32 sees
    images of 32 pixels. Here the network is as on ImageNet and images are enlarged to 128 pixels; its features are then
    as large as in the usual variants for CIFAR that drop two halvings (`--img-size 32` runs too, but the last stage has
    a single pixel). The rest as for ResNet-50.
    """
    common = replace(resnet50(dataset=dataset), model="timm/mobilenetv3_large_100", img_size=128)
    return _by_method(common, method)


def small_resnet(depth: int, *, dataset: CifarSet = "cifar10", method: Method = "common") -> Config:
    """ResNet-20, 32, 56 or 110; ResNet-32 trained alone has 92.63 on CIFAR-10 (Ye et al. 2023, section 1).

    As a subnet of a commonly trained ResNet-56 the same network has 46.80; ResNet-20 has 55.28 in ResNet-32 and 23.17
    in ResNet-56. The papers state no settings for these networks. Batch 128, lr 0.1 and weight decay 1e-4 are those of
    He et al. 2016, and so is the start of ResNet-110 at lr 0.01, here the warm-up's first step. Ours: 200 epochs
    (theirs are 164) with cosine.
    """
    common = replace(
        resnet50(dataset=dataset),
        model=f"cifar/resnet{depth}",
        epochs=200,
        batch_size=128,
        global_batch_size=128,
        lr=0.1,
        weight_decay=1e-4,
        warmup_epochs=1 if depth == 110 else 0,
        warmup_lr=0.01 if depth == 110 else None,
    )
    return _by_method(common, method)


def _by_method(common: Config, method: Method) -> Config:
    """The same run by another method.

    ST: one subnet, KL of weight 1. GKT, our reading: 3 groups, 2 loops, ema 0.5, weight 1 (on digits 0.17 was better).
    Stochastic depth: 0.8 for the last block. ST++: see the head of this file.
    """
    if method == "st":
        return replace(common, method=method, num_subnets=1)
    if method == "gkt":
        return replace(common, method=method, groups=3, loops=2, group_ema=0.5, decay_base=0.5)
    if method == "stochastic-depth":
        return replace(common, method=method, final_survival=0.8)
    if method == "st++":
        return replace(common, method=method, num_subnets=6, eps=1.0, subnet_weight=0.17, min_ratio=0.5)
    return common


_METHODS: dict[str, Method] = {
    "common": "common",
    "stochastic_depth": "stochastic-depth",
    "st": "st",
    "stpp": "st++",
    "gkt": "gkt",
}
_NETWORKS: dict[str, Callable[..., Config]] = {
    "cifar100_resnet50": partial(resnet50, dataset="cifar100"),
    "cifar100_mobilenetv3": partial(mobilenetv3, dataset="cifar100"),
    "cifar10_mobilenetv3": partial(mobilenetv3, dataset="cifar10"),
    **{f"cifar10_resnet{depth}": partial(small_resnet, depth) for depth in (20, 32, 56, 110)},
}
_PUBLISHED = {
    "cifar100_resnet50_st": "common + 4.53",
    "cifar100_mobilenetv3_st": "common + 3.68",
    "cifar10_resnet32_common": "92.63",
}


def _source(network: str, method: str) -> str:
    if method == "gkt":
        return "Tang et al. 2023, abstract; our reading"
    if method in ("stpp", "stochastic_depth"):
        return "our settings"
    return "Ye et al. 2023, section 1; our settings" if "10_resnet" in network else "Ye et al. 2023, section 4.3.1"


RECIPES: dict[str, Recipe] = {
    f"{network}_{suffix}": Recipe(
        partial(build, method=method), _PUBLISHED.get(f"{network}_{suffix}", ""), _source(network, suffix)
    )
    for network, build in _NETWORKS.items()
    for suffix, method in _METHODS.items()
}
