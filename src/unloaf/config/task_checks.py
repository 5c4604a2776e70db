"""Which settings go with which task: what would be without effect is refused, not left out in silence."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING

from unloaf.own_code import is_own

if TYPE_CHECKING:
    from unloaf.config.fields import Config

_OBJECTS = ("coco", "voc")
_DATASETS: Mapping[str, tuple[str, ...]] = {
    "detection": _OBJECTS,
    "instance": ("coco",),
    "semantic": ("masks",),
    "panoptic": ("coco",),
    "pose": ("coco",),
    "language": ("text",),
}
_GROUND_TRUTH = ("common", "st-star")  # the methods of tasks without logits of classes
# Settings of classification alone: of its labels, its images, its networks and its losses.
_CLASSIFICATION = (
    "input_key", "target_key", "device_data", "crop_pct", "augment", "scale", "interpolation", "color_jitter",
    "lighting", "lighting_unit", "aa", "aug_repeats", "reprob", "remode", "mixup", "cutmix", "mixup_prob",
    "mixup_switch_prob", "mixup_off_epoch", "smoothing", "bce_loss", "width", "model_kwargs", "head_init", "drop",
    "drop_path", "fsdp", "depths",
)  # fmt: skip
# Settings of methods that teach: of every task whose network has one output that it can teach.
_TEACHING = ("subnet_batch_fraction", "groups", "loops", "group_ema", "teacher", "final_survival")
_LOGITS = ("subnet_loss", "amplitude", "eps", "main_logits")  # likewise, where that output is logits of classes
_TAUGHT = ("classification", "semantic", "multilabel", "regression", "pose", "language")
# Of a class for each image: tasks whose targets are rows of numbers have losses and files of their own.
_OF_CLASSES = (
    "input_key", "target_key", "num_classes", "mixup", "cutmix", "mixup_prob", "mixup_switch_prob", "mixup_off_epoch",
    "smoothing", "bce_loss", *_LOGITS,
)  # fmt: skip
_OF_ONE_TASK = {
    "regression_loss": "regression",
    "mask_ratio": "masked",
    "norm_pix_loss": "masked",
    "depths": "classification",
    "stuff_area": "panoptic",
}
# What a masked autoencoder has no use for: its side and its batches are one, and it has no head.
_UNMASKED = (
    "train_img_size", "head_init", "drop", "drop_path", "layer_decay", "min_ratio", "sides", "per",
    "subnet_batch_fraction",
)  # fmt: skip
COLUMNS = ("multilabel", "regression")  # the tasks whose targets are rows of numbers, by a classifier's networks
_HEIGHTS = 16  # of crops of people: multiples, at which width and heatmaps are whole
POSE_SIDES = 12  # of their widths
# Settings of language alone, and those of images, which text has no use for.
_LANGUAGE = ("seq_len", "tokenizer", "lora_rank")
_IMAGES = (
    "num_classes", "train_images", "bad_images", "max_pixels", "workers", "img_size", "train_img_size", "mean", "std",
    "hflip", "min_ratio", "sides", "per", "subnet_inputs", "recalibrate", "channels_last", "sync_bn", "dist_bn",
)  # fmt: skip
_OF_LANGUAGE_TOO = ("model_kwargs",)
_BACKBONE = ("backbone", "backbone_weights", "backbone_norms")


# What a task trains, by the name that --model takes.
MODELS: Mapping[str, tuple[str, ...]] = {
    "detection": ("faster-rcnn", "cascade-rcnn", "fcos", "atss", "retinanet"),
    "instance": ("mask-rcnn",),
    "semantic": ("semantic-fpn",),
    "panoptic": ("panoptic-fpn",),
    "pose": ("simple-baseline",),
}


def _unfit(config: Config) -> Iterator[str]:
    """What does not go with a task that is not classification, and what to give instead."""
    task = config.task
    if config.dataset not in _DATASETS[task]:
        yield f"dataset {config.dataset!r}: task {task} reads {' and '.join(_DATASETS[task])}"
    if task == "language":
        if not config.model.startswith("hf/"):
            yield (
                f"model {config.model}: task language trains networks of transformers; give --model hf/FOLDER, "
                "hf/FILE.json or a class such as hf/LlamaConfig"
            )
    elif config.model not in MODELS[task]:
        yield f"model {config.model}: task {task} trains {', '.join(MODELS[task])}; give --model"
    if task not in _TAUGHT and config.method not in _GROUND_TRUTH:
        yield (
            f"method {config.method}: task {task} has no logits of classes that it could teach; give --method "
            f"{' or '.join(_GROUND_TRUTH)}, whose subnets learn from the targets"
        )
    if task == "pose":
        yield from _unfit_sides(config)


def _unfit_sides(config: Config) -> Iterator[str]:
    """Sides at which crops of people have no heatmaps of their aspect."""
    for name in ("img_size", "train_img_size"):
        height = getattr(config, name)
        if height is not None and height % _HEIGHTS:
            yield f"{name} {height}: task pose takes heights that are multiples of {_HEIGHTS}, such as 128 or 256"
    height = config.train_img_size or config.img_size
    wrong = [side for side in config.sides if side % POSE_SIDES or (height and side > height * 3 // 4)]
    if wrong:
        yield f"sides {wrong[0]}: task pose takes widths up to that of its crops that are multiples of {POSE_SIDES}"


def _foreign(task: str) -> tuple[str, ...]:
    """Settings that this task does not read."""
    own = tuple(name for name, of in _OF_ONE_TASK.items() if of != task)
    if task == "classification":
        return (*_BACKBONE, *_LANGUAGE, *own)
    if task in COLUMNS:
        return (*_BACKBONE, *_LANGUAGE, *_OF_CLASSES, *own)
    if task == "masked":
        labels = tuple(name for name in _OF_CLASSES if name not in ("input_key", "target_key", "num_classes"))
        return (*_BACKBONE, *_LANGUAGE, *labels, *_UNMASKED, *own)
    if task == "language":
        unread = tuple(name for name in _CLASSIFICATION if name not in _OF_LANGUAGE_TOO)
        return (*unread, *_BACKBONE, *_IMAGES, *own)
    logits = () if task == "semantic" else _LOGITS
    return (*_CLASSIFICATION, *_LANGUAGE, *own, *logits, *(() if task in _TAUGHT else _TEACHING))


def _check_images(config: Config) -> None:
    """Of the tasks that train a classifier's networks on whole images."""
    if config.batch_size < 2:  # after the pooling; maps of detectors have many positions
        raise ValueError(
            f"batch_size {config.batch_size}: give at least 2; batch norm has no statistics of a single image"
        )
    if config.task == "masked":
        _check_masked(config)
    if is_own(config.model):
        changed = [name for name in ("pretrained", "drop", "drop_path") if getattr(config, name)]
        if changed:
            flags = ", ".join(f"--{name.replace('_', '-')}" for name in changed)
            raise ValueError(f"{flags}: model {config.model} decides that itself; leave it out")
    if is_own(config.dataset):
        return
    if config.dataset == "text":
        raise ValueError("dataset 'text' has no images; give --task language")
    if config.task in COLUMNS:
        if config.dataset != "csv":
            raise ValueError(
                f"dataset {config.dataset!r}: task {config.task} reads csv, or module:function of yours; give one"
            )
    elif config.dataset in _OBJECTS:
        raise ValueError(f"dataset {config.dataset!r} has boxes, no classes of images; give --task detection")
    elif config.dataset == "masks":
        raise ValueError("dataset 'masks' has classes of pixels, none of images; give --task semantic")
    elif config.dataset == "csv":
        raise ValueError("dataset 'csv' has columns of numbers; give --task multilabel or --task regression")


def _check_masked(config: Config) -> None:
    if not config.model.startswith("hf/"):
        raise ValueError(
            f"model {config.model}: task masked trains a ViT-MAE of transformers; give --model "
            "hf/ViTMAEForPreTraining, or hf/FOLDER with its config.json"
        )
    if config.method not in ("common", "st", "st-star"):
        raise ValueError(f"method {config.method}: task masked has common, st and st-star; give one of them")
    if config.subnet_inputs == "smaller":
        raise ValueError("subnet_inputs smaller: a ViT-MAE takes images of one side; leave it out")


def check_task(config: Config) -> None:
    """Raises ValueError if a setting is none of the task's."""
    defaults = {field.name: field.default for field in fields(config)}
    changed = [name for name in _foreign(config.task) if getattr(config, name) != defaults[name]]
    if changed:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in changed)
        raise ValueError(f"{flags}: without effect in task {config.task}; leave it out")
    if config.task not in ("classification", *COLUMNS) and config.subnet_inputs not in ("auto", "same", "smaller"):
        raise ValueError(
            f"subnet_inputs {config.subnet_inputs}: task {config.task} has auto, same and smaller; give one"
        )
    if config.task in ("classification", "masked", *COLUMNS):
        _check_images(config)
        return
    if faults := list(_unfit(config)):
        raise ValueError("; ".join(faults))  # all at once: the defaults are those of classification
    if config.task == "language" and config.main_logits == "direction":
        raise ValueError("main_logits direction: perplexity is of the logits as they are; give raw, or leave it out")
    if config.lora_rank is not None and (not config.pretrained or config.initial_checkpoint is not None):
        raise ValueError(
            f"lora_rank {config.lora_rank} trains changes of weights that stay as they are: give --pretrained and the "
            "folder of trained weights as --model, and no --initial-checkpoint"
        )
    if config.pretrained and config.backbone_weights is not None:
        raise ValueError("pretrained and backbone_weights both say how the backbone begins; give one of the two")
