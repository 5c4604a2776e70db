"""From a Config to the training method it asks for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from timm.loss import BinaryCrossEntropy
from torch import Tensor, nn

from unloaf.config import Config
from unloaf.inputs import SmallerInputs, fitting_inputs
from unloaf.losses import check_two_classes, direction, direction_kl_loss, kl_loss, resolve_amplitude
from unloaf.methods.changed_inputs import InputRule
from unloaf.methods.input_rules import CroppedInputs, FlippedInputs, JitteredInputs, LargerInputs
from unloaf.methods.step import Criterion, Weight
from unloaf.methods.table import METHODS
from unloaf.methods.terms import DirectionCriterion, Distance
from unloaf.sampling import ExponentialDecaySampler, InterStageSampler, OrderedSampler, RawSampler, StochasticSampler
from unloaf.stages import NoResidualBlocksError, Stage, find_stages


def stages_for(config: Config, model: nn.Module, example: Any, *, within: str | None = None) -> tuple[Stage, ...]:
    """The stages of a network, or of a part of it; () where there are none and common training needs none."""
    try:
        return find_stages(model, example, within=within)
    except NoResidualBlocksError:
        if config.method != "common":
            raise
        return ()


def build_method(
    config: Config,
    model: nn.Module,
    stages: tuple[Stage, ...],
    *,
    steps_per_epoch: int | None = None,
    batches_per_step: int = 1,
) -> Any:
    """The method of this configuration, for this classifier; arguments as of `method_options`.

    Raises:
        ValueError: the method cannot train this model.
    """
    options = method_options(
        config, model, stages, _label_loss(config), steps_per_epoch=steps_per_epoch, batches_per_step=batches_per_step
    )
    return METHODS[config.method].factory(model, stages, **options)


def method_options(
    config: Config,
    model: nn.Module,
    stages: tuple[Stage, ...],
    criterion: Criterion,
    *,
    steps_per_epoch: int | None = None,
    batches_per_step: int = 1,
) -> dict[str, Any]:
    """What the factory of the configuration's method takes, with this loss of logits and labels.

    Optimizer steps of an epoch are needed where the subnets' weight changes over the run; of the batches whose
    gradients are added in one, each is a step to the method.
    """
    options: dict[str, Any] = {"criterion": criterion}
    if config.method != "common":
        options["seed"] = config.seed
    if config.method == "stochastic-depth":
        options["final_survival"] = config.final_survival
    if config.num_subnets_or_default:
        weight = drawn_weight(config, steps_per_epoch, batches_per_step)
        options |= {"sampler": sampler_of(config, stages), "subnet_weight": weight}
        if config.method == "st-star":
            options["check_finite"] = False  # the engine has a rule for it, which all processes must come to
        else:
            options |= _losses(config, criterion) | {"subnet_batch_fraction": config.subnet_batch_fraction}
    if config.method == "gkt":
        options |= {"groups": config.groups, "loops": config.loops, "ema": config.group_ema, "teacher": config.teacher}
    elif config.num_subnets_or_default:
        options["num_subnets"] = config.num_subnets_or_default
        options["subnet_inputs"] = _subnet_inputs(config, model, stages)
    return options


@dataclass(frozen=True)
class SubnetSchedule:
    """Weight of the subnets' loss in a step, counted from 0: a pure function, for runs that are resumed.

    >>> weight = SubnetSchedule(peak=2.0, shape="falling", interval=2, first=0, stop=8)
    >>> [round(weight(step), 2) for step in range(9)]
    [0.0, 1.92, 0.0, 1.38, 0.0, 0.62, 0.0, 0.08, 0.0]
    """

    peak: float  # the highest weight, which a constant schedule always has
    # Constant, or half a cosine from 0 to the peak (rising) or back (falling), over first to stop.
    shape: Literal["constant", "rising", "falling"]
    interval: int  # the last step of each group of so many has subnets
    first: int  # the step from which there are subnets
    stop: int  # the step from which there are none
    batches: int = 1  # calls that make up a step

    def __call__(self, call: int) -> float:
        """The weight of one call of the method."""
        step = call // self.batches
        # The last of a group, not the first: with the usual log interval, logged steps then show the subnets' losses.
        if not self.first <= step < self.stop or (step + 1) % self.interval:
            return 0.0
        if self.shape == "constant":
            return self.peak
        wave = math.cos(math.pi * (step - self.first) / (self.stop - self.first))
        return self.peak * (1 + (wave if self.shape == "falling" else -wave)) / 2


def drawn_weight(config: Config, steps_per_epoch: int | None, batches_per_step: int) -> Weight:
    """The weight of each subnet's loss, or a function from the step to it."""
    on, off = config.subnet_on_epoch, config.subnet_off_epoch
    if (config.subnet_schedule, config.subnet_interval, on, off) == ("constant", 1, 1, 0):
        return config.subnet_weight_or_default
    if steps_per_epoch is None:
        raise ValueError("the subnets' weight changes over the run: build_method needs steps_per_epoch")
    first = (on - 1) * steps_per_epoch
    stop = (min(off - 1, config.epochs) if off else config.epochs) * steps_per_epoch
    if first // config.subnet_interval == stop // config.subnet_interval:  # no last step of a group among them
        raise ValueError(
            f"subnet_interval {config.subnet_interval}: the {stop - first} steps that may train subnets end before; "
            "give a smaller one, or --method common"
        )
    return SubnetSchedule(
        peak=config.subnet_weight_or_default,
        shape=config.subnet_schedule,
        interval=config.subnet_interval,
        first=first,
        stop=stop,
        batches=batches_per_step,
    )


def sampler_of(config: Config, stages: Sequence[Stage]) -> Any:
    """The rule that draws subnets of these stages."""
    rule = config.sampler_or_default
    if rule == "exponential-decay":
        return ExponentialDecaySampler(base=config.decay_base)
    if rule == "inter-stage" and config.space:
        return InterStageSampler(_largest_depths(config.space, stages))
    rules = {"ordered": OrderedSampler, "inter-stage": InterStageSampler, "stochastic": StochasticSampler}
    return (rules | {"raw": RawSampler})[rule]()


def _largest_depths(space: Sequence[int], stages: Sequence[Stage]) -> tuple[tuple[int, ...], ...]:
    """So many depths of each stage, its largest ones: the numbers by which table II of ST++ names a space.

    >>> _largest_depths((1, 2), (Stage("a", ("a.0", "a.1"), (False, True)), Stage("b", ("b.0", "b.1"), (False, True))))
    ((2,), (1, 2))
    """
    most = [len(stage.legal_depths) for stage in stages]
    if len(space) != len(stages) or any(count > there for count, there in zip(space, most, strict=True)):
        raise ValueError(
            f"space {' '.join(map(str, space))}: the network has {len(stages)} stages with {' '.join(map(str, most))} "
            "depths; give a number for each stage, up to these"
        )
    return tuple(stage.legal_depths[-count:] for count, stage in zip(space, stages, strict=True))


def _losses(config: Config, label: Criterion) -> dict[str, Any]:
    """Options that say which losses subnets and labels have; ST++ makes its own of the settings."""
    kl, directions = config.subnet_loss_or_default == "kl", _directions(config)
    if config.method == "st++":
        main_logits = "direction" if _normalises_main_logits(config) else "raw"
        return directions | {"main_logits": main_logits, "criterion": label, "subnet_loss": kl_loss if kl else None}
    return {
        "subnet_loss": subnet_distance(config),
        "criterion": DirectionCriterion(label, **directions) if _normalises_main_logits(config) else label,
    }


def subnet_distance(config: Config) -> Distance:
    """From the logits of a subnet and its teacher to the subnet's loss."""
    return kl_loss if config.subnet_loss_or_default == "kl" else partial(direction_kl_loss, **_directions(config))


def _directions(config: Config) -> dict[str, Any]:
    return {"amplitude": config.amplitude, "eps": config.eps}


def _normalises_main_logits(config: Config) -> bool:
    """Whether the loss on labels sees directions, as in the published ST++ runs."""
    if config.method == "st-star":
        return False
    automatic = config.main_logits == "auto" and config.subnet_loss_or_default == "kl-"
    return config.main_logits == "direction" or automatic


def scaled_logits(config: Config, logits: Tensor) -> Tensor:
    """Logits as the loss on labels takes them: their direction, times the amplitude, where it sees only that.

    >>> import torch
    >>> scaled_logits(Config(method="st"), torch.tensor([[0.0, 4.0]])).tolist()
    [[0.0, 4.0]]
    """
    if config.num_subnets_or_default and _normalises_main_logits(config):
        return resolve_amplitude(config.amplitude, logits.shape[-1]) * direction(logits, eps=config.eps)
    return logits


def class_probabilities(config: Config, logits: Tensor) -> Tensor:
    """Probabilities of the classes as the loss of this configuration takes logits, (N, K) both.

    Of the direction of the logits where the loss saw only that; with binary cross-entropy each class has one of its
    own, and they do not sum to 1.

    >>> import torch
    >>> class_probabilities(Config(method="common"), torch.tensor([[0.0, 0.0, 1.0986123]]))
    tensor([[0.2000, 0.2000, 0.6000]])
    """
    logits = scaled_logits(config, logits.float())
    return logits.sigmoid() if config.bce_loss or config.task == "multilabel" else logits.softmax(-1)


def check_classes(config: Config, classes: int) -> None:
    """Raise ValueError if a loss of this configuration cannot train so few classes."""
    if config.num_subnets_or_default and (config.subnet_loss_or_default == "kl-" or _normalises_main_logits(config)):
        check_two_classes(classes, "layer_norm", config.eps)


def _label_loss(config: Config) -> Criterion:
    """From logits and labels or, with mixup, shares of classes, which are smoothed already."""
    smoothing = 0.0 if config.mixes_images else config.smoothing
    if config.bce_loss:
        return BinaryCrossEntropy(smoothing=smoothing)
    return nn.CrossEntropyLoss(label_smoothing=smoothing)


def _subnet_inputs(config: Config, model: nn.Module, stages: tuple[Stage, ...]) -> SmallerInputs | InputRule | None:
    rule = config.subnet_inputs
    if rule in ("larger", "crop", "flip", "jitter"):
        rules = {
            "larger": LargerInputs(config.max_ratio, per=config.per),
            "crop": CroppedInputs(config.min_ratio, per=config.per),
            "flip": FlippedInputs(per=config.per),
            "jitter": JitteredInputs(per=config.per),
        }
        return rules[rule]
    if config.task == "language":
        return None
    if rule == "same" or (rule == "auto" and config.method not in ("st++", "st-star")):
        return None
    inputs = SmallerInputs(min_ratio=config.min_ratio, sides=config.sides or None, per=config.per)
    shape = stages[0].input_shape if stages else None
    return fitting_inputs(model, inputs, shape) if rule == "auto" and not config.sides and shape else inputs
