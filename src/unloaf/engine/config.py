"""Config: everything that decides a training run, as one frozen value.

Imports no torch: a wrong configuration is answered before anything heavy is loaded.
"""

from __future__ import annotations

import dataclasses
import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro
import yaml

Dataset = Literal["digits", "cifar10", "cifar100", "fashion_mnist"]
Method = Literal["common", "stochastic-depth", "st", "st++", "gkt"]
Sampler = Literal["auto", "ordered", "inter-stage", "exponential-decay", "stochastic"]


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

    dataset: Dataset = "digits"
    """Image set; digits ships with scikit-learn, the others are read from --data-dir."""
    data_dir: str | None = None
    """Folder that holds the files of the image set, as torchvision stores them."""
    val_fraction: float = 0.1
    """Share of the training images held out for validation, up to 0.5; 0 for none. Digits has a fixed split."""
    augment: Literal["auto", "none"] = "auto"
    """auto: random crop after padding, and flips where a mirrored image keeps its class."""
    img_size: int | None = None
    """Side in pixels to which images are resized; default: their own side."""

    model: str = "cifar/resnet20"
    """cifar/resnet{20,32,56,110,...}, cifar/resnet18, cifar/resnet50, timm/NAME or tv/NAME."""
    width: int = 16
    """Channels of the first stage of cifar/resnet{6n+2}; ignored by every other model."""
    pretrained: bool = False
    """Start from the published weights (needs the network once)."""

    method: Method = "st"
    """How the network is trained."""
    num_subnets: int | None = None
    """Subnets per step; default 1 for st, 6 for st++. gkt runs groups x loops."""
    subnet_weight: float = 1.0
    """Weight of the subnets' loss."""
    sampler: Sampler = "auto"
    """How subnets are drawn; auto: ordered for st, inter-stage for st++, exponential-decay for gkt."""
    subnet_loss: Literal["auto", "kl", "kl-"] = "auto"
    """auto: kl- (KL without magnitude) for st++, kl otherwise."""
    amplitude: float | Literal["auto"] = "auto"
    """Scale of the directions in kl-; auto lets the softmax reach 0.999 at any number of classes."""
    eps: float = 1e-7
    """kl-: added to the variance of the logits; larger values tame the gradients of small logits."""
    main_logits: Literal["auto", "raw", "direction"] = "auto"
    """What the cross-entropy of st, st++ and gkt sees; auto: the direction with kl-, raw otherwise."""
    subnet_inputs: Literal["auto", "same", "smaller"] = "auto"
    """auto: randomly smaller images for st++, the same images otherwise."""
    min_ratio: float = 0.43
    """Smallest side of the smaller images, as a share of the full side."""
    per: Literal["subnet", "step"] = "subnet"
    """Draw one side for each subnet, or one for all subnets of a step (cheaper)."""
    groups: int = 3
    """gkt: groups of subnets, each drawn inside the one before."""
    loops: int = 2
    """gkt: passes over the groups in a step."""
    ema: float = 0.5
    """gkt: how much of a group's old knowledge stays, in [0, 1)."""
    decay_base: float = 0.5
    """exponential-decay: a depth k of d is drawn in proportion to base**(d-k)."""
    final_survival: float = 0.8
    """stochastic-depth: survival probability of the last block."""

    epochs: int = 30
    """Passes over the training images."""
    batch_size: Annotated[int, tyro.conf.arg(aliases=["-b"])] = 128
    """Images per step on each device."""
    opt: Literal["sgd", "adamw"] = "sgd"
    """Optimizer; sgd is with Nesterov momentum."""
    lr: float = 0.1
    """Highest learning rate."""
    momentum: float = 0.9
    """Momentum of sgd."""
    weight_decay: float = 5e-4
    """Weight decay."""
    sched: Literal["cosine", "constant"] = "cosine"
    """Learning rate after the warm-up; cosine falls to 0 step by step."""
    warmup_epochs: int = 0
    """Epochs in which the learning rate rises linearly from 1 % of --lr."""
    seed: int = 0
    """Seed of the weights, the order and crops of the images and the drawn subnets."""
    device: Literal["auto", "cpu"] = "auto"
    """auto takes an accelerator when there is one."""

    output: str = "output/train"
    """Folder in which the run folder is made."""
    name: str | None = None
    """Name of the run folder; default: time-model-method."""
    log_interval: int = 50
    """Steps between two lines of metrics.jsonl."""

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            _check_type(name, getattr(self, name), hint)
        for name, (low, high, meaning) in _RANGES.items():
            value = getattr(self, name)
            if value is not None and value != "auto" and not low <= value <= high:
                raise ValueError(f"{name} {value}: give {meaning}")
        if self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"warmup_epochs {self.warmup_epochs} leaves none of the {self.epochs} epochs; "
                f"give at most {self.epochs - 1}"
            )
        if self.dataset != "digits" and self.data_dir is None:
            raise ValueError(f"dataset {self.dataset!r} is read from files: give --data-dir (digits needs none)")

    @property
    def num_subnets_or_default(self) -> int:
        """Subnets that one step trains, the main network not counted."""
        if self.method == "gkt":
            return self.groups * self.loops
        defaults = {"common": 0, "stochastic-depth": 0, "st": 1, "st++": 6}
        default = defaults[self.method]
        return default if self.num_subnets is None or default == 0 else self.num_subnets


_TINY = 5e-324  # the smallest positive float: "above 0" as a closed range
_BELOW_ONE = 1 - 2**-53
_LARGEST = 1.7976931348623157e308
_RANGES: dict[str, tuple[float, float, str]] = {
    "val_fraction": (0, 0.5, "a share from 0 to 0.5"),
    "img_size": (4, 4096, "a side from 4 to 4096 pixels"),
    "width": (1, 4096, "from 1 to 4096 channels"),
    "num_subnets": (1, 10_000, "from 1 to 10000 subnets; method common trains none"),
    "subnet_weight": (0, _LARGEST, "a finite weight of at least 0"),
    "amplitude": (_TINY, _LARGEST, "a finite number above 0, or auto"),
    "eps": (_TINY, _LARGEST, "a finite number above 0"),
    "min_ratio": (_TINY, 1, "a share above 0, up to 1"),
    "groups": (1, 10_000, "at least 1"),
    "loops": (1, 10_000, "at least 1"),
    "ema": (0, _BELOW_ONE, "a number from 0 to below 1"),
    "decay_base": (_TINY, 1, "a number above 0, up to 1"),
    "final_survival": (_TINY, 1, "a probability above 0, up to 1"),
    "epochs": (1, 10**9, "at least 1"),
    "batch_size": (2, 10**9, "at least 2; batch norm has no statistics of a single image"),
    "lr": (_TINY, _LARGEST, "a finite number above 0"),
    "momentum": (0, _BELOW_ONE, "a number from 0 to below 1"),
    "weight_decay": (0, _LARGEST, "a finite number of at least 0"),
    "warmup_epochs": (0, 10**9, "at least 0"),
    "seed": (0, 2**63 - 1, "an integer from 0 to 2**63 - 1"),
    "log_interval": (1, 10**9, "at least 1"),
}


def _check_type(name: str, value: Any, hint: Any) -> None:
    if any(_has_type(value, option) for option in _options(hint)):
        return
    allowed = ", ".join(_describe(option) for option in _options(hint))
    advice = "; in YAML write 1.0e-3, not 1e-3, which YAML reads as text" if _is_number(value) else ""
    close = difflib.get_close_matches(str(value), [str(a) for a in _literals(hint)], n=1)
    raise ValueError(f"{name} {value!r}: give {allowed}" + (f"; did you mean {close[0]}?" if close else advice))


def _options(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, type(int | str)) else (hint,)


def _literals(hint: Any) -> list[Any]:
    return [value for option in _options(hint) if get_origin(option) is Literal for value in get_args(option)]


def _has_type(value: Any, option: Any) -> bool:
    if get_origin(option) is Literal:
        return isinstance(value, str) and value in get_args(option)
    if option is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if option is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, option)


def _describe(option: Any) -> str:
    if get_origin(option) is Literal:
        return " or ".join(get_args(option))
    words = {int: "an integer", float: "a number", str: "a text", bool: "true or false", type(None): "nothing"}
    return words[option]


def _is_number(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return isinstance(value, str)


def load_config(path: str | Path) -> Config:
    """Reads a configuration from a YAML file such as a run folder's `args.yaml`.

    Args:
        path: a YAML mapping from field names to values; fields left out keep their default.

    Raises:
        ValueError: the file cannot be read, is no mapping, or holds an unknown or illegal entry.
    """
    try:
        entries = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot read the configuration {path}: {error}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(entries, dict):
        raise ValueError(f"{path}: give lines of the form 'epochs: 30', not {type(entries).__name__}")
    return _from_entries(entries, source=str(path))


def _from_entries(entries: dict[Any, Any], *, source: str) -> Config:
    known = [field.name for field in dataclasses.fields(Config)]
    for key in entries:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known)}"
            raise ValueError(f"{source}: unknown entry {key!r}; {hint}")
    try:
        return Config(**entries)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def dump_config(config: Config) -> str:
    """The configuration as YAML that `load_config` reads back to an equal value.

    >>> print(dump_config(Config(lr=1e-3))[:31])
    dataset: digits
    data_dir: null
    """
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True)
