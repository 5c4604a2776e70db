"""Recipes for ImageNet (ILSVRC 2012), read from the class folders `train` and `val` of `data_dir`.

None of them has been run to its end in this project: the figures, top-1 in percent, are the published ones. They are
those of the last epoch, which in the logs of A1 and A2 is the best one as well (80.496 and 80.968). The published runs
had two A100 of 80 GB and took 1.12 to 1.17 s a step, 2,503 steps an epoch: 6.8 days for A1.

What the paper does not state of ResNet-50's training is taken from the published script (Sunshine-Ye/NIPS22-ST):
Nesterov momentum, colour jitter 0.4, a network whose norms all start at 1, which is torchvision's, and a classifier
that starts at N(0, 0.01) with a bias of 0. Lighting is the script's too, though the paper states PCA lighting 0.1: the
script adds it in grey levels to pixels up to 255, one level at most, and the figures were reached with that. For
lighting as published (Krizhevsky et al. 2012) add `--lighting-unit range`. The script normalises over 256 images on
each of two devices; here it is over `batch_size`, 64, which fits everywhere: `-b 256` on two devices gives the
script's.

Flags that decide speed alone (workers, channels_last, torchcompile) are left at their defaults.
"""

from __future__ import annotations

from dataclasses import replace

from unloaf.config import Config
from unloaf.recipes.entry import Recipe


def resnet50_common() -> Config:
    """Common training of ResNet-50: 76.70 (Ye et al. 2023, table III), the baseline of every ResNet-50 recipe here.

    Table V: 200 epochs, batch 512, SGD with momentum, lr 0.2, cosine, weight decay 1e-4 on all parameters, no warm-up,
    no label smoothing, fp32; randomly resized crop, flip, colour jitter, PCA lighting. Train crop 224 and validation
    resize 256 are those before table III changes them.
    """
    return Config(
        dataset="imagefolder",
        data_dir="data/imagenet",
        img_size=224,
        crop_pct=224 / 256,
        color_jitter=0.4,
        lighting=0.1,
        lighting_unit="level",
        model="tv/resnet50",
        head_init=0.01,
        method="common",
        epochs=200,
        batch_size=64,
        global_batch_size=512,
        opt="sgd",
        lr=0.2,
        momentum=0.9,
        weight_decay=1e-4,
        sched="cosine",
    )


def resnet50_stochastic_depth() -> Config:
    """Stochastic depth with the baseline's settings.

    Published: 77.53 in table IV, which collects other papers' figures under their own settings. The final survival is
    not stated there: 0.8.
    """
    return replace(resnet50_common(), method="stochastic-depth", final_survival=0.8)


def resnet50_st() -> Config:
    """ST: 77.56 (table III). One ordered subnet per step, KL of weight 1; the rest is the baseline's."""
    return replace(resnet50_common(), method="st", num_subnets=1)


def resnet50_klminus() -> Config:
    """ST with KL- and six subnets: 78.53 (table III).

    Layer-norm directions, the cross-entropy on them too, as in the published script. Its amplitude of 1 is what "auto"
    gives for 1,000 classes.
    """
    return replace(resnet50_st(), num_subnets=6, subnet_loss="kl-")


def resnet50_smaller() -> Config:
    """ST with random smaller inputs, every side from 96 to 224 pixels: 78.56 (table III)."""
    return replace(resnet50_st(), subnet_inputs="smaller", min_ratio=0.43)


def resnet50_klminus_smaller() -> Config:
    """ST with KL-, six subnets and random smaller inputs: 79.83 (table III)."""
    return replace(resnet50_klminus(), subnet_inputs="smaller", min_ratio=0.43)


def resnet50_val240() -> Config:
    """The same, validation images resized to 240 before the crop of 224: 79.91 (table III)."""
    return replace(resnet50_klminus_smaller(), crop_pct=224 / 240)


def resnet50_crop200() -> Config:
    """The same, trained on crops of 200 pixels, subnets on 86 to 200: 80.04 (table III)."""
    return replace(resnet50_val240(), train_img_size=200)


def resnet50_a1() -> Config:
    """ST++ A1, the same with inter-stage sampling: 80.50 (tables III to V).

    Depths 3, 3-4, 3-6 and 3 in the four stages, the best row of table II. With `--epochs 50` it is above the common
    training's 200 epochs in figure 9, which prints no figure.
    """
    return replace(resnet50_crop200(), method="st++", sampler="inter-stage", subnet_weight=1.0)


def resnet50_a2() -> Config:
    """ST++ A2, which is A1 with UniformAugment for 400 epochs: 80.97 (tables III to V).

    UniformAugment is that of the script, see `unloaf.data.uniform`.
    """
    return replace(resnet50_a1(), aa="uniform", epochs=400)


def resnet50_gkt() -> Config:
    """GKT with the baseline's settings; the available text, the abstract, states neither settings nor figures.

    Three groups, two loops, ema 0.5, weight 1, depths with probability proportional to 0.5**(d-k): our reading. On
    digits a weight of 0.17 was better, see `unloaf.recipes.digits`.
    """
    return replace(resnet50_common(), method="gkt", groups=3, loops=2, group_ema=0.5, decay_base=0.5)


def resnet101_common() -> Config:
    """Common training of ResNet-101; the baseline's figure is in a drawing (Ye et al. 2023, figure 8).

    Section 4.3.1: SGD, 100 epochs, batch 512. Not stated: all else, taken from ResNet-50.
    """
    return replace(resnet50_common(), model="tv/resnet101", epochs=100)


def resnet101_st() -> Config:
    """ST on ResNet-101; settings as in `resnet101_common`."""
    return replace(resnet101_common(), method="st", num_subnets=1)


def deit_common() -> Config:
    """Common training of DeiT-S with DeiT's recipe, a baseline of ours for the transformers here.

    From the column DeiT of table V in Ye et al. 2023: 300 epochs, batch 1024, AdamW, lr 1e-3, cosine, weight decay
    0.05, 5 epochs of warm-up, label smoothing 0.1, stochastic depth 0.1, repeated augmentation, RandAugment 9/0.5,
    mixup 0.8, cutmix 1, erasing 0.25, mixed precision. From DeiT's code (facebookresearch/deit): three repeats, bicubic
    resizing, lr from 1e-6 and to 1e-5, no weight decay on norms and biases, no colour jitter beside RandAugment.

    Departures: bfloat16 instead of float16, and no average of the weights.
    """
    return Config(
        dataset="imagefolder",
        data_dir="data/imagenet",
        img_size=224,
        interpolation="bicubic",
        aa="rand-m9-mstd0.5-inc1",
        aug_repeats=3,
        reprob=0.25,
        mixup=0.8,
        cutmix=1.0,
        smoothing=0.1,
        model="timm/deit_small_patch16_224",
        drop_path=0.1,
        method="common",
        epochs=300,
        batch_size=64,
        global_batch_size=1024,
        opt="adamw",
        lr=1e-3,
        weight_decay=0.05,
        norm_decay=False,
        min_lr=1e-5,
        warmup_epochs=5,
        warmup_lr=1e-6,
        amp=True,
    )


def deit_st() -> Config:
    """ST on DeiT-S; not published. One subnet, KL of weight 1; the rest is DeiT's."""
    return replace(deit_common(), method="st", num_subnets=1)


def vit_common() -> Config:
    """Common training of a vision transformer; the baseline's figure is in a drawing (figure 8).

    Section 4.3.1: AdamW, 100 epochs, batch 2048. Not stated: which transformer, ViT-S/16 here because it trains from
    ImageNet alone; learning rate, 2e-3, DeiT's scaled to the batch; all else, DeiT's, as in `deit_common`.
    """
    return replace(
        deit_common(),
        model="timm/vit_small_patch16_224",
        epochs=100,
        global_batch_size=2048,
        lr=2e-3,
    )


def vit_st() -> Config:
    """ST on a vision transformer: 1.76 above common training (section 4.3.1); settings as in `vit_common`."""
    return replace(vit_common(), method="st", num_subnets=1)


def swin_common() -> Config:
    """Common training of Swin-T; the paper shows Swin's stages (figure 7) and trains none.

    Settings of Swin's own code: DeiT's without repeated augmentation, 20 epochs of warm-up from 1e-6, lr 1e-3 for batch
    1024, stochastic depth 0.2, gradients clipped at norm 5.
    """
    return replace(
        deit_common(),
        model="timm/swin_tiny_patch4_window7_224",
        aug_repeats=1,
        drop_path=0.2,
        warmup_epochs=20,
        clip_grad=5.0,
    )


def swin_st() -> Config:
    """ST on Swin-T; not published. Settings as in `swin_common`."""
    return replace(swin_common(), method="st", num_subnets=1)


def pvt_common() -> Config:
    """Common training of PVT-v2-B2; the paper shows PVT's stages (figure 7) and trains none.

    B2 of the second version has the stages 3-4-6-3 of PVT-Small, which timm lacks. Settings of its own code: DeiT's
    without repeated augmentation, stochastic depth 0.1.
    """
    return replace(deit_common(), model="timm/pvt_v2_b2", aug_repeats=1)


def pvt_st() -> Config:
    """ST on PVT-v2-B2; not published. Settings as in `pvt_common`."""
    return replace(pvt_common(), method="st", num_subnets=1)


_TABLE_3 = "Ye et al. 2023, table III"
_TABLE_4 = "Ye et al. 2023, table IV, other settings"
_SECTION_4 = "Ye et al. 2023, section 4.3.1"
_STAGES = "Ye et al. 2023, figure 7; settings of the network's own code"

RECIPES: dict[str, Recipe] = {
    "imagenet_resnet50_common": Recipe(resnet50_common, "76.70", _TABLE_3),
    "imagenet_resnet50_stochastic_depth": Recipe(resnet50_stochastic_depth, "77.53", _TABLE_4),
    "imagenet_resnet50_st": Recipe(resnet50_st, "77.56", _TABLE_3),
    "imagenet_resnet50_klminus": Recipe(resnet50_klminus, "78.53", _TABLE_3),
    "imagenet_resnet50_smaller": Recipe(resnet50_smaller, "78.56", _TABLE_3),
    "imagenet_resnet50_klminus_smaller": Recipe(resnet50_klminus_smaller, "79.83", _TABLE_3),
    "imagenet_resnet50_val240": Recipe(resnet50_val240, "79.91", _TABLE_3),
    "imagenet_resnet50_crop200": Recipe(resnet50_crop200, "80.04", _TABLE_3),
    "imagenet_resnet50_a1": Recipe(resnet50_a1, "80.50", _TABLE_3),
    "imagenet_resnet50_a2": Recipe(resnet50_a2, "80.97", _TABLE_3),
    "imagenet_resnet50_gkt": Recipe(resnet50_gkt, "", "Tang et al. 2023, abstract; our reading"),
    "imagenet_resnet101_common": Recipe(resnet101_common, "", _SECTION_4),
    "imagenet_resnet101_st": Recipe(resnet101_st, "", _SECTION_4),
    "imagenet_vit_common": Recipe(vit_common, "", _SECTION_4),
    "imagenet_vit_st": Recipe(vit_st, "common + 1.76", _SECTION_4),
    "imagenet_deit_common": Recipe(deit_common, "", "Ye et al. 2023, table V, column DeiT"),
    "imagenet_deit_st": Recipe(deit_st, "", "Ye et al. 2023, table V, column DeiT"),
    "imagenet_swin_common": Recipe(swin_common, "", _STAGES),
    "imagenet_swin_st": Recipe(swin_st, "", _STAGES),
    "imagenet_pvt_common": Recipe(pvt_common, "", _STAGES),
    "imagenet_pvt_st": Recipe(pvt_st, "", _STAGES),
}
