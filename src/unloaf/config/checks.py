"""What a setting may be: its type, its range, and what does not go together."""

from __future__ import annotations

import ast
import difflib
import math
import re
import reprlib
import types
import warnings
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from unloaf.own_code import is_own
from unloaf.printable import is_unicode

if TYPE_CHECKING:
    from unloaf.config.fields import Config

_TINY = 5e-324  # the smallest positive float: "above 0" as a closed range
_BELOW_ONE = 1 - 2**-53
_LARGEST = 1.7976931348623157e308
_SHARE = (0, 1, "a probability from 0 to 1")
_ABOVE_ZERO = (_TINY, _LARGEST, "a finite number above 0")
_AT_LEAST_ZERO = (0, _LARGEST, "a finite number of at least 0")
_COUNT = (1, 10**9, "at least 1")
_RANGES: dict[str, tuple[float, float, str]] = {
    "num_classes": (2, 10**9, "at least 2 classes"),
    "val_fraction": (0, 0.5, "a share from 0 to 0.5"),
    "train_images": (2, 10**9, "at least 2 images"),
    "max_pixels": (1, 178_956_970, "from 1 to 178956970 pixels, where Pillow ends"),
    "workers": (0, 1024, "from 0 to 1024 processes"),
    "img_size": (4, 4096, "a side from 4 to 4096 pixels"),
    "train_img_size": (4, 4096, "a side from 4 to 4096 pixels"),
    "crop_pct": (0.05, 1, "a share from 0.05 to 1"),
    "seq_len": (2, 1 << 20, "from 2 to 1048576 tokens"),
    "lora_rank": (1, 4096, "a rank from 1 to 4096"),
    "mean": (0, 1, "for each channel a share from 0 to 1"),
    "std": (1e-6, 2, "for each channel a number above 0, in shares of the pixel range"),
    "scale": (1e-4, 1, "two shares above 0, up to 1"),
    "hflip": _SHARE,
    "color_jitter": (0, 10, "a strength from 0 to 10"),
    "lighting": (0, 10, "a strength from 0 to 10"),
    "aug_repeats": (1, 1000, "from 1 to 1000 times"),
    "reprob": _SHARE,
    "mixup": (0, 1000, "an alpha from 0 to 1000"),
    "cutmix": (0, 1000, "an alpha from 0 to 1000"),
    "mixup_prob": _SHARE,
    "mixup_switch_prob": _SHARE,
    "mixup_off_epoch": (0, 10**9, "an epoch, or 0 for never"),
    "smoothing": (0, _BELOW_ONE, "a number from 0 to below 1"),
    "mask_ratio": (_TINY, _BELOW_ONE, "a share above 0 and below 1"),
    "stuff_area": (0, 10**9, "at least 0 pixels"),
    "width": (1, 4096, "from 1 to 4096 channels"),
    "head_init": _ABOVE_ZERO,
    "drop": (0, _BELOW_ONE, "a rate from 0 to below 1"),
    "drop_path": (0, _BELOW_ONE, "a rate from 0 to below 1"),
    "model_ema_decay": (0, _BELOW_ONE, "a number from 0 to below 1"),
    "num_subnets": (1, 10_000, "from 1 to 10000 subnets; method common trains none"),
    "subnet_weight": (0, _LARGEST, "a finite weight of at least 0"),
    "subnet_interval": _COUNT,
    "subnet_on_epoch": (1, 10**9, "an epoch, at least 1"),
    "subnet_off_epoch": (0, 10**9, "an epoch, or 0 for never"),
    "subnet_batch_fraction": (_TINY, 1, "a share above 0, up to 1"),
    "amplitude": (_TINY, _LARGEST, "a finite number above 0, or auto"),
    "eps": _ABOVE_ZERO,
    "min_ratio": (_TINY, 1, "a share above 0, up to 1"),
    "max_ratio": (1, 4, "a multiple from 1 to 4"),
    "space": (1, 10_000, "numbers of depths, at least 1"),
    "sides": (1, 4096, "sides from 1 to 4096 pixels"),
    "groups": (1, 10_000, "at least 1"),
    "loops": (1, 10_000, "at least 1"),
    "group_ema": (0, _BELOW_ONE, "a number from 0 to below 1"),
    "decay_base": (_TINY, 1, "a number above 0, up to 1"),
    "final_survival": (_TINY, 1, "a probability above 0, up to 1"),
    "epochs": _COUNT,
    "batch_size": _COUNT,
    "grad_accum_steps": _COUNT,
    "global_batch_size": (2, 10**12, "at least 2"),
    "lr": _ABOVE_ZERO,
    "momentum": (0, _BELOW_ONE, "a number from 0 to below 1"),
    "weight_decay": _AT_LEAST_ZERO,
    "layer_decay": (_TINY, 1, "a factor above 0, up to 1"),
    "clip_grad": _ABOVE_ZERO,
    "min_lr": _AT_LEAST_ZERO,
    "warmup_epochs": (0, 10**9, "at least 0"),
    "warmup_lr": _AT_LEAST_ZERO,
    "decay_epochs": _ABOVE_ZERO,
    "decay_milestones": (1, 10**9, "epochs of at least 1"),
    "decay_rate": _ABOVE_ZERO,
    "seed": (0, 2**32 - 1, "an integer from 0 to 2**32 - 1, as NumPy takes it"),
    "log_interval": _COUNT,
    "eval_interval": _COUNT,
    "eval_subnets": (0, 10_000, "from 0 to 10000 subnets"),
    "recalibrate": (2, 10**9, "at least 2 images"),
    "checkpoint_interval": _COUNT,
    "checkpoint_hist": (2, 10**6, "at least 2: the newest may turn out to be damaged"),
}


_DEVICE = re.compile(r"auto|cpu|mps|(cuda|xpu|npu)(:[0-9]{1,3})?")


def check_device(name: str) -> None:
    """Raises ValueError if this is no name of a device; whether there is one, only torch knows."""
    if not _DEVICE.fullmatch(name):
        close = difflib.get_close_matches(name.partition(":")[0], ["auto", "cpu", "cuda", "mps"], n=1)
        hint = "cuda" if name.partition(":")[0].lower() in ("gpu", "nvidia") else close[0] if close else None
        raise ValueError(
            f"device {brief(name)}: give auto, cpu, cuda, cuda:1 or mps" + (f"; did you mean {hint}?" if hint else "")
        )


_hints = cache(get_type_hints)  # read from texts, 70 of them: most of the time of the list of recipes


def check_types(config: Config) -> None:
    """Raises ValueError if a value is not of its field's type."""
    for name, hint in _hints(type(config)).items():
        value = getattr(config, name)
        _check_type(name, value, hint)
        if isinstance(value, str):
            _check_text(name, value)
            _check_path(name, value)
        elif isinstance(value, tuple):
            for text in value:
                if isinstance(text, str):
                    _check_text(name, text)


def check_ranges(config: Config) -> None:
    """Raises ValueError if a number is out of range."""
    for name, (low, high, meaning) in _RANGES.items():
        value = getattr(config, name)
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and number != "auto" and not low <= number <= high:
                most = f", at most {high:g}" if "at least" in meaning and high < number and high < _LARGEST else ""
                raise ValueError(f"{name} {brief(number)}: give {meaning}{most}")


def check_together(config: Config) -> None:
    """Raises ValueError if settings contradict each other."""
    check_device(config.device)
    if config.warmup_epochs >= config.epochs:
        raise ValueError(
            f"warmup_epochs {config.warmup_epochs} leaves none of the {config.epochs} epochs; "
            f"give at most {config.epochs - 1}, by --warmup-epochs"
        )
    if config.subnet_on_epoch > config.epochs or 0 < config.subnet_off_epoch <= config.subnet_on_epoch:
        raise ValueError(
            f"subnet_on_epoch {config.subnet_on_epoch} and subnet_off_epoch {config.subnet_off_epoch} leave no epoch "
            f"of {config.epochs} that trains subnets; give an on-epoch up to {config.epochs} and below the off-epoch"
        )
    if config.dataset not in ("digits", "text") and config.data_dir is None and not is_own(config.dataset):
        raise ValueError(f"dataset {config.dataset!r} is read from files: give --data-dir (digits needs none)")
    if config.scale[0] > config.scale[1]:
        raise ValueError(f"scale {config.scale[0]} {config.scale[1]}: give the smaller share first")
    if config.global_batch_size is not None and config.grad_accum_steps > 1:
        raise ValueError("global_batch_size sets grad_accum_steps; give one of the two")
    if config.mixes_images and config.batch_size % 2:
        raise ValueError(f"batch_size {config.batch_size}: mixup and cutmix pair images; give an even number")
    if config.partial_weights and config.initial_checkpoint is None:
        raise ValueError("partial_weights is about --initial-checkpoint; give both, or leave it out")
    if config.model_kwargs:
        keyword_arguments("model_kwargs", config.model_kwargs)
    if config.device_data:
        _check_device_data(config)
    if config.sched == "wsd" and config.decay_epochs > config.epochs - config.warmup_epochs:
        left = config.epochs - config.warmup_epochs
        raise ValueError(
            f"decay_epochs {config.decay_epochs:g}: --sched wsd has {left} epochs after those of --warmup-epochs; give "
            f"--decay-epochs {left} at most, or a share of them such as 0.2"
        )
    if config.subnet_inputs not in ("auto", "same") and config.method not in ("st", "st++", "st-star"):
        kind = "smaller" if config.subnet_inputs == "smaller" else "other"
        raise ValueError(
            f"subnet_inputs {config.subnet_inputs}: method {config.method} gives its subnets no {kind} images; leave "
            "it out, or give --method st, st++ or st-star"
        )
    if config.depths is not None and not re.fullmatch("[0-9]{1,4}([-,][0-9]{1,4})*", config.depths):
        raise ValueError(f"depths {brief(config.depths)}: give a number for each stage, as in 3-3-5-3")
    if config.head_init is not None and config.pretrained:
        raise ValueError("head_init redraws the classifier that pretrained has learned; give one of the two")
    if config.fsdp:
        _check_fsdp(config)
    if config.aa is not None:
        _check_augmentation(config.aa)


def _check_fsdp(config: Config) -> None:
    if config.model_ema:
        raise ValueError("model_ema keeps a whole copy of the weights, which fsdp shards; give one of the two")
    if config.clip_grad is not None and config.clip_mode == "agc":
        raise ValueError("clip_mode agc looks at whole weights, which fsdp shards; give --clip-mode norm or value")


def _check_device_data(config: Config) -> None:
    if config.dataset in ("imagefolder", "hf", "webdataset", "csv"):
        raise ValueError(f"device_data holds small sets in memory; dataset {config.dataset!r} is read image by image")
    per_image = {"aa": config.aa, "color_jitter": config.color_jitter, "lighting": config.lighting}
    used = [f"--{name.replace('_', '-')}" for name, value in per_image.items() if value]
    if used or config.augment == "resized-crop" or config.reprob:
        used += ["--reprob"] * bool(config.reprob) + ["--augment resized-crop"] * (config.augment == "resized-crop")
        raise ValueError(f"device_data augments in batches, which {', '.join(used)} cannot; give --workers instead")
    if config.workers:
        raise ValueError(f"workers {config.workers}: with device_data there is nothing to read; leave --workers out")


def keyword_arguments(setting: str, words: Sequence[str]) -> dict[str, Any]:
    """Words of the form name=value as a mapping, values read as Python literals, else as text (timm's `ParseKwargs`).

    Raises:
        ValueError: a word has no name, a name comes twice, or a value is none of number, text, True, False, list.
    """
    found: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or not name.isidentifier() or name in found:
            fault = "comes twice" if name in found else "is not of the form name=value"
            raise ValueError(f"{setting} {brief(word)} {fault}; give each argument once, as in depth=9")
        if text.lower() in _OF_OTHER_LANGUAGES and text not in ("True", "False"):
            raise ValueError(f"{setting} {brief(word)}: write True or False, as in Python; for None leave it out")
        found[name] = _literal(text)
        if not _is_plain(found[name]):
            raise ValueError(f"{setting} {brief(word)}: give a number, a text, True, False or a list of those")
    return found


# timm would take "false" for a text, which is true, and leaves None out.
_OF_OTHER_LANGUAGES = ("true", "false", "none", "null")


def _literal(text: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what Python thinks of 1if, which is a text here
            return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def _is_plain(value: Any) -> bool:
    """Whether JSON has it: arguments are written into the description of an exported subnet."""
    if isinstance(value, (list, tuple)):
        return all(_is_plain(entry) for entry in value)
    return isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value))


_AUGMENTATIONS = ("original", "originalr", "v0", "v0r", "3a", "trivial", "uniform")


def _check_augmentation(aa: str) -> None:
    if aa not in _AUGMENTATIONS and aa.partition("-")[0] not in ("rand", "augmix"):
        raise ValueError(f"aa {aa!r}: give {', '.join(_AUGMENTATIONS)}, or one like rand-m9-mstd0.5")


def _check_type(name: str, value: Any, hint: Any) -> None:
    options = _options(hint)
    if str in options and _literals(hint) and isinstance(value, str) and not is_own(value):
        options = tuple(option for option in options if option is not str)  # beside its names, functions alone
    if any(_has_type(value, option) for option in options):
        return
    allowed = ", ".join(_describe(option) for option in options)
    advice = "; in YAML write 1.0e-3, not 1e-3, which YAML reads as text" if _is_number(value) else ""
    close = difflib.get_close_matches(str(value), _literals(hint), n=1) if isinstance(value, str) else []
    raise ValueError(f"{name} {brief(value)}: give {allowed}" + (f"; did you mean {close[0]}?" if close else advice))


def _check_text(name: str, value: str) -> None:
    """Texts become lines of args.yaml: what cannot be one is refused before training."""
    if any(ord(letter) < 32 or ord(letter) == 127 for letter in value) or not is_unicode(value):
        raise ValueError(f"{name} {brief(value)}: give a text without control characters, in Unicode")


def _check_path(name: str, value: str) -> None:
    """Most texts become file names or parts of them."""
    if len(value) > 4000 or any(len(part.encode()) > 255 for part in value.split("/")):
        raise ValueError(f"{name} {brief(value)}: too long for a path; give at most 255 bytes between two slashes")


def brief(value: Any) -> str:
    """The value as it is written in Python, at most some 100 letters of it: YAML aliases make 7 MB of 400 bytes."""
    if isinstance(value, int) and abs(value) >= 10**40:  # Python writes no integer of more than 4,300 digits
        return f"an integer of {math.ceil(abs(value).bit_length() * math.log10(2))} digits"
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxother = 2, 100, 100
    return short.repr(value)


def _options(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _literals(hint: Any) -> list[Any]:
    return [value for option in _options(hint) if get_origin(option) is Literal for value in get_args(option)]


def _has_type(value: Any, option: Any) -> bool:
    if get_origin(option) is tuple:
        return isinstance(value, tuple) and _holds(value, get_args(option))
    if get_origin(option) is Literal:
        return isinstance(value, str) and value in get_args(option)
    if option is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if option is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, option)


def _holds(values: tuple[Any, ...], kinds: tuple[Any, ...]) -> bool:
    if kinds[-1:] == (Ellipsis,):
        return all(_has_type(value, kinds[0]) for value in values)
    return len(values) == len(kinds) and all(_has_type(value, kind) for value, kind in zip(values, kinds, strict=True))


def _describe(option: Any) -> str:
    if get_origin(option) is tuple:
        kinds = get_args(option)
        kind = _describe(kinds[0])
        return f"a list, each entry {kind}" if kinds[-1:] == (Ellipsis,) else f"a list of {len(kinds)}, each {kind}"
    if get_origin(option) is Literal:
        return " or ".join(get_args(option))
    words = {int: "an integer", float: "a number", str: "a text", bool: "true or false", type(None): "nothing"}
    return words[option]


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, str) and float(value) is not None
    except ValueError:
        return False
