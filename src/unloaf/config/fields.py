"""The settings of a run, their defaults and what they mean."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal

import tyro

from unloaf.config.checks import check_ranges, check_together, check_types, keyword_arguments
from unloaf.config.choices import Dataset, Method, Sampler, Schedule, SubnetInputs, Task, Tracker
from unloaf.config.task_checks import check_task


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """One training run. Flag names are timm's where timm has the flag.

    Raises:
        ValueError: a value is not allowed; the message names the value, what is
            allowed and what to do.

    >>> Config(method="st", epochs=2).num_subnets_or_default
    1
    >>> Config(epochs=0)
    Traceback (most recent call last):
    ValueError: epochs 0: give at least 1
    """

    # The first option of each group, and the group's title in the help.
    option_groups = (
        ("task", "task and data"),
        ("img_size", "augmentation"),
        ("model", "model"),
        ("method", "method"),
        ("epochs", "optimizer"),
        ("eval_interval", "evaluation"),
        ("seed", "run"),
    )

    task: Task = "classification"
    """What the network learns: a class of an image, several labels, numbers, hidden patches, boxes of objects, boxes
    and masks, classes of pixels, things and stuff together, joints of people, or the next token of a text."""
    dataset: Dataset | str = "digits"
    """Image set, or text; digits ships with scikit-learn, text has a default, the others are read from --data-dir. Or
    a function of yours, module:function, that returns one; it needs --run-own-code."""
    data_dir: str | None = None
    """Folder of the image set: torchvision's files, class folders, a saved Hugging Face data set, tar shards, the
    layout of COCO or VOC, images and masks, or text: a file, a folder of files, or a data set that `datasets` saved."""
    train_split: str = "train"
    """Folder, split, shard prefix or list of the training images, for sets of files."""
    val_split: str | None = None
    """The same for validation; default: val, validation or test, whichever there is."""
    input_key: str = "image"
    """Column of the images, for hf."""
    target_key: str = "label"
    """Column of the labels, for hf."""
    num_classes: int | None = None
    """Classes that the labels must have; default: what the image set says. masks: ids from there on are void."""
    val_fraction: float = 0.1
    """Share of the training images held out for validation, up to 0.5; 0 for none. Digits has a fixed split, and where
    there are validation images nothing is held out."""
    train_images: int | None = None
    """Train on N of the training images, the same share of each class, always the same ones. Validation images are
    held out before. pose: people."""
    bad_images: Literal["stop", "skip"] = "stop"
    """At an image that cannot be read: stop, or take its neighbour and stop above 1 %."""
    max_pixels: int = 89_478_485
    """Files: width x height above which an image is not decoded but bad; it takes some 8 bytes a pixel."""
    workers: Annotated[int, tyro.conf.arg(aliases=["-j"])] = 0
    """Processes that read and augment images, on each device; 0 reads in the training process."""
    device_data: bool = False
    """Hold the images on the device as uint8 and augment them there in batches; for sets that fit."""

    seq_len: int = 256
    """language: tokens of a sequence, into which texts are packed."""
    tokenizer: Literal["auto", "byte", "model"] = "auto"
    """language: what a token is, a byte or what the model's folder says; auto: the latter where it says so."""
    img_size: int | None = None
    """Side in pixels of the images; default: their own side, 224 for files. timm's --input-size 3 224 224 does the
    same. detection, instance, panoptic: their shorter side, the longer one up to 1.67 times that; default 800.
    semantic: that of the crops that are trained on, default 512; whole images are evaluated, at their own size. pose:
    height of the crops of people, a multiple of 16, default 256; their width is 3/4 of it."""
    train_img_size: int | None = None
    """Side of the training images, where it differs from that of validation."""
    crop_pct: float | None = None
    """Files: validation images are resized to img_size / crop_pct and cropped in the centre; default: as the weights
    expect that the run starts from, 0.875 otherwise."""
    mean: tuple[float, ...] = ()
    """Mean of each channel, which is subtracted, as a share of the pixel range; default: as the weights expect that the
    run starts from, otherwise ImageNet's for files, and for sets in memory that of the training images."""
    std: tuple[float, ...] = ()
    """Standard deviation of each channel, which is divided by; default: like --mean."""
    augment: Literal["auto", "none", "pad-crop", "resized-crop"] = "auto"
    """auto: a random crop after padding for small images held in memory, a randomly resized crop for files; both with
    flips where a mirrored image keeps its class."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Area of a randomly resized crop, as shares of the image."""
    interpolation: Literal["auto", "bilinear", "bicubic", "random"] = "auto"
    """How images are resized; random: one of the two for each training image; auto: as the weights expect that the run
    starts from, bilinear otherwise."""
    hflip: float = 0.5
    """Probability of a mirrored image."""
    color_jitter: float = 0.0
    """Strength of random brightness, contrast and saturation."""
    lighting: float = 0.0
    """Strength of PCA lighting: a random shift along the principal colours (Krizhevsky et al. 2012)."""
    lighting_unit: Literal["range", "level"] = "range"
    """Unit of that shift: shares of the pixel range, as published, or grey levels, as in the script of ST++: one at
    most."""
    aa: str | None = None
    """Automatic augmentation: one like rand-m9-mstd0.5 (timm), original, v0 (AutoAugment), trivial, uniform."""
    aug_repeats: int = 1
    """Repeated augmentation: each image of an epoch comes this many times, fewer images take part."""
    reprob: float = 0.0
    """Probability of random erasing."""
    remode: Literal["const", "rand", "pixel"] = "pixel"
    """What fills an erased part: zeros, one colour, or a colour for each pixel."""
    mixup: float = 0.0
    """Alpha of mixup; 0 is off."""
    cutmix: float = 0.0
    """Alpha of cutmix; 0 is off."""
    mixup_prob: float = 1.0
    """Probability of mixup or cutmix."""
    mixup_switch_prob: float = 0.5
    """Probability of cutmix where both are on."""
    mixup_off_epoch: int = 0
    """Epoch from which there is no mixup and no cutmix, only the label smoothing; 0 for never."""
    smoothing: float = 0.0
    """Label smoothing."""
    bce_loss: bool = False
    """Binary cross-entropy for each class instead of the softmax's."""
    mask_ratio: float = 0.75
    """masked: share of an image's patches that is hidden."""
    norm_pix_loss: bool = False
    """masked: normalise the pixels of each patch before they are compared."""
    regression_loss: Literal["mse", "l1"] = "mse"
    """regression: the loss on the targets, mean squared or absolute error."""

    model: str = "cifar/resnet20"
    """cifar/resnet{20,32,56,110,...}, cifar/resnet18, cifar/resnet50, timm/NAME, tv/NAME or hf/NAME, or, with
    --run-own-code, module:function of yours; for detection faster-rcnn, cascade-rcnn, fcos, atss or retinanet, for
    instance mask-rcnn, for semantic semantic-fpn, for panoptic panoptic-fpn, for pose simple-baseline; for language
    hf/FOLDER, hf/FILE.json, hf/FILE.gguf, hf/CLASS."""
    stuff_area: int = 4096
    """panoptic: least pixels of a predicted region of stuff, in the image as it came; small images need fewer."""
    backbone: str = "timm/resnet50"
    """All tasks but classification: the timm network below pyramid and heads, whose subnets are trained, or a folder
    of an export in timm's form, with its weights."""
    backbone_weights: str | None = None
    """Likewise: start the backbone from the classifier of this run, exported folder or file."""
    backbone_norms: Literal["auto", "frozen", "batch"] = "auto"
    """Likewise: keep the backbone's batch norms as they are, or train them; auto: frozen where it starts from trained
    weights."""
    width: int = 16
    """Channels of the first stage of cifar/resnet{6n+2}; ignored by every other model."""
    model_kwargs: tuple[str, ...] = ()
    """Further arguments of a timm model, such as patch_size=4 depth=9, or of your function; entries of the config.json
    of an hf/ model, such as hidden_size=128."""
    pretrained: bool = False
    """Start from the published weights (needs the internet once); of hf/FOLDER, from those that lie there."""
    initial_checkpoint: str | None = None
    """Start from the weights of this run, exported folder or file (.safetensors, .pth, .pt, .pth.tar, .bin); a
    classifier of other classes is left as it is. A run that continues from a checkpoint does not read it."""
    partial_weights: bool = False
    """Let --initial-checkpoint fill a part of the model, and leave what does not fit random."""
    lora_rank: int | None = None
    """language: train low-rank changes of the linear layers alone (LoRA, by peft); with --pretrained."""
    depths: str | None = None
    """Train a subnet as a network of its own, by its depths as in 1-1-1: the blocks beyond are not there."""
    head_init: float | None = None
    """Standard deviation of the classifier's first weights, with biases of 0; default: what the model has. Not with
    --pretrained."""
    drop: float = 0.0
    """Dropout before the head; timm models."""
    drop_path: float = 0.0
    """Rate of the model's own stochastic depth, per image; timm models."""
    model_ema: bool = False
    """Keep an exponential moving average of the weights and evaluate it too."""
    model_ema_decay: float = 0.9998
    """Decay of the average, per step."""
    model_ema_warmup: bool = False
    """Let the decay rise from 0 in the first steps."""

    method: Method = "st"
    """How the network is trained."""
    num_subnets: int | None = None
    """Subnets per step; default 1 for st and st-star, 6 for st++. gkt runs groups x loops."""
    subnet_weight: float | None = None
    """Weight of each subnet's loss; default 1, for st++ 1 / num_subnets, one for all together."""
    subnet_schedule: Literal["constant", "rising", "falling"] = "constant"
    """How that weight changes over the epochs that train subnets: not at all, or as a cosine from 0 up or down to 0."""
    subnet_interval: int = 1
    """Train subnets in every N-th step only; the others are steps of common training, at its cost."""
    subnet_on_epoch: int = 1
    """First epoch that trains subnets."""
    subnet_off_epoch: int = 0
    """Epoch from which no subnets are trained; 0 for never."""
    subnet_batch_fraction: float = 1.0
    """Share of each batch, its first images and at least two, that subnets are trained on; below 1 they share nothing
    with the main network, so it is cheaper only where they share little, as with smaller images."""
    sampler: Sampler = "auto"
    """How subnets are drawn; auto: ordered for st, inter-stage for st++ and st-star, exponential-decay for gkt."""
    space: tuple[int, ...] = ()
    """inter-stage: how many depths of each stage are drawn, its largest ones, as in 1 2 4 1; default: see the docs."""
    subnet_loss: Literal["auto", "kl", "kl-"] = "auto"
    """auto: kl- (KL without magnitude) for st++, kl otherwise."""
    amplitude: float | Literal["auto"] = "auto"
    """Scale of the directions in kl-; auto lets the softmax reach 0.999 at any number of classes."""
    eps: float = 1e-7
    """kl-: added to the variance of the logits; larger values tame the gradients of small logits."""
    main_logits: Literal["auto", "raw", "direction"] = "auto"
    """What the cross-entropy of st, st++ and gkt sees; auto: the direction with kl-, raw otherwise."""
    subnet_inputs: SubnetInputs = "auto"
    """st, st++, st-star: what subnets see; auto: for st++ and st-star randomly smaller images, of the sides that the
    network takes (the same images, with a warning, if it takes no smaller ones), the same images otherwise. larger,
    crop (randomly cropped, at the same side), flip and jitter (contrast and brightness) are there to be compared."""
    min_ratio: float = 0.43
    """Smallest side of the smaller images, or of the part that crop keeps, as a share of the full side."""
    max_ratio: float = 1.5
    """--subnet-inputs larger: the largest side, as a multiple of the full side."""
    sides: tuple[int, ...] = ()
    """Sides in pixels that the smaller images may have; default: all that --min-ratio allows. pose: widths, multiples
    of 12."""
    per: Literal["subnet", "step"] = "subnet"
    """Draw one side for each subnet, or one for all subnets of a step (cheaper)."""
    groups: int = 3
    """gkt: groups of subnets, each drawn inside the one before."""
    loops: int = 2
    """gkt: passes over the groups in a step."""
    group_ema: float = 0.5
    """gkt: how much of a group's old knowledge stays, in [0, 1); without effect with --teacher main."""
    teacher: Literal["group", "main"] = "group"
    """gkt: who teaches a subnet, the group above it or the main network."""
    decay_base: float = 0.5
    """exponential-decay: a depth k of d is drawn in proportion to base**(d-k)."""
    final_survival: float = 0.8
    """stochastic-depth: survival probability of the last block."""

    epochs: int = 30
    """Passes over the training images."""
    batch_size: Annotated[int, tyro.conf.arg(aliases=["-b"])] = 128
    """Images per device in a forward pass."""
    grad_accum_steps: int = 1
    """Batches whose gradients are added before the optimizer steps."""
    global_batch_size: int | None = None
    """Images per optimizer step over all devices; sets grad_accum_steps."""
    opt: str = "sgd"
    """Optimizer, by timm's name; sgd is with Nesterov momentum, momentum without."""
    lr: float = 0.1
    """Highest learning rate."""
    momentum: float = 0.9
    """Momentum, for the optimizers that have it."""
    weight_decay: float = 5e-4
    """Weight decay."""
    norm_decay: bool = True
    """Weight decay also on biases and the parameters of norms."""
    layer_decay: float | None = None
    """Learning rate of each layer relative to the one above it, for fine-tuning; timm models."""
    clip_grad: float | None = None
    """Clip gradients at this norm (or value, with --clip-mode)."""
    clip_mode: Literal["norm", "value", "agc"] = "norm"
    """Clip the norm of all gradients, each value, or each unit's norm relative to its weights (agc)."""
    sched: Schedule = "cosine"
    """Learning rate after the warm-up, as in timm; updated in every step."""
    min_lr: float = 0.0
    """Learning rate at the end of cosine, poly, tanh and wsd."""
    warmup_epochs: int = 0
    """Epochs in which the learning rate rises linearly from --warmup-lr."""
    warmup_lr: float | None = None
    """Learning rate of the first step of the warm-up; default: 1 % of --lr."""
    decay_epochs: float = 30
    """step: epochs between two decays; wsd: epochs, or the share, of the decay at the end."""
    decay_milestones: tuple[int, ...] = (90, 180, 270)
    """multistep: epochs of the decays."""
    decay_rate: Annotated[float, tyro.conf.arg(aliases=["--dr"])] = 0.1
    """step and multistep: factor of a decay; poly: the power."""

    eval_interval: int = 1
    """Epochs between two evaluations; the last epoch always has one."""
    eval_subnets: int = 0
    """Subnets evaluated beside the main network in an evaluation; 0 for none."""
    recalibrate: int = 2048
    """Training images from which the batch-norm statistics of an evaluated subnet are estimated."""

    seed: int = 0
    """Seed of the weights, the order and augmentation of the images and the drawn subnets."""
    device: str = "auto"
    """auto takes an accelerator when there is one; or cpu, cuda, cuda:1, mps."""
    amp: bool = False
    """Mixed precision."""
    amp_dtype: Literal["bfloat16", "float16"] = "bfloat16"
    """Type of mixed precision; float16 comes with a loss scale."""
    channels_last: bool = False
    """Keep images and weights in channels-last memory format."""
    torchcompile: bool = False
    """Compile each residual block."""
    grad_checkpointing: bool = False
    """Keep only the inputs of residual blocks for the backward pass and compute the rest once more: less memory."""
    deterministic: bool = False
    """Only kernels that give the same bits every time, some slower; CPU runs repeat without it."""
    sync_bn: bool = False
    """Normalise over the images of all devices."""
    dist_bn: Literal["reduce", "broadcast"] = "reduce"
    """Batch-norm statistics with which several devices are evaluated: their mean, or the first device's."""
    fsdp: bool = False
    """Shard the weights over the devices (FSDP2) instead of copying them."""

    output: str = "output/train"
    """Folder in which the run folder is made."""
    name: Annotated[str | None, tyro.conf.arg(aliases=["--experiment"])] = None
    """Name of the run folder; default: time-model-method."""
    log_interval: int = 50
    """Steps between two lines of metrics.jsonl and of the log."""
    checkpoint_interval: int | None = None
    """Optimizer steps between two checkpoints; default: one at the end of each epoch."""
    checkpoint_hist: int = 2
    """Checkpoints that are kept, at least 2; the best one is kept besides."""
    on_nan: Literal["stop", "skip"] = "stop"
    """At a loss that is not finite: stop, or leave the step out."""
    trackers: tuple[Tracker, ...] = ()
    """Also send metrics to these, through accelerate."""

    def __post_init__(self) -> None:
        check_types(self)
        check_ranges(self)
        check_together(self)
        check_task(self)

    @property
    def num_subnets_or_default(self) -> int:
        """Subnets that one step trains, the main network not counted."""
        if self.method == "gkt":
            return self.groups * self.loops
        defaults = {"common": 0, "stochastic-depth": 0, "st": 1, "st++": 6, "st-star": 1}
        default = defaults[self.method]
        return default if self.num_subnets is None or default == 0 else self.num_subnets

    @property
    def subnet_weight_or_default(self) -> float:
        """Weight of each subnet's loss.

        >>> Config(method="st++", num_subnets=4).subnet_weight_or_default
        0.25
        """
        if self.subnet_weight is not None:
            return self.subnet_weight
        return 1 / self.num_subnets_or_default if self.method == "st++" else 1.0

    @property
    def sampler_or_default(self) -> str:
        """How subnets are drawn by a method that draws them.

        >>> Config(method="gkt").sampler_or_default
        'exponential-decay'
        """
        defaults = {"st++": "inter-stage", "st-star": "inter-stage", "gkt": "exponential-decay"}
        return defaults.get(self.method, "ordered") if self.sampler == "auto" else self.sampler

    @property
    def subnet_loss_or_default(self) -> str:
        """The loss of subnets: kl, or kl- (KL without magnitude).

        >>> Config(method="st++").subnet_loss_or_default
        'kl-'
        """
        return ("kl-" if self.method == "st++" else "kl") if self.subnet_loss == "auto" else self.subnet_loss

    @property
    def model_arguments(self) -> dict[str, Any]:
        """`model_kwargs` by name, values read as Python literals.

        >>> Config(model="timm/resnet10t", model_kwargs=("stem_width=16", "act_layer=silu")).model_arguments
        {'stem_width': 16, 'act_layer': 'silu'}
        """
        return keyword_arguments("model_kwargs", self.model_kwargs)

    def accumulation(self, devices: int) -> int:
        """Batches per optimizer step on each of so many devices.

        Raises:
            ValueError: the global batch size is no multiple of what the devices take at once.
        """
        if self.global_batch_size is None:
            return self.grad_accum_steps
        at_once = self.batch_size * devices
        if self.global_batch_size % at_once:
            raise ValueError(
                f"global_batch_size {self.global_batch_size}: give a multiple of {at_once}, "
                f"the {self.batch_size} images of --batch-size on {devices} device(s)"
            )
        return self.global_batch_size // at_once

    @property
    def mixes_images(self) -> bool:
        """Whether mixup or cutmix is on, so that targets are shares of classes."""
        return self.mixup_prob > 0 and (self.mixup > 0 or self.cutmix > 0)
