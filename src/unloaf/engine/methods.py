"""From a Config to the training method it asks for."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from timm.loss import BinaryCrossEntropy
from torch import Tensor, nn

from unloaf.engine.config import Config
from unloaf.inputs import SmallerInputs
from unloaf.losses import direction_kl_loss, kl_loss
from unloaf.methods import (
    CommonTraining,
    GroupKnowledgeTraining,
    StimulativeTraining,
    StochasticDepth,
)
from unloaf.methods.step import Criterion
from unloaf.methods.stimulative import DirectionCriterion
from unloaf.sampling import ExponentialDecaySampler, InterStageSampler, OrderedSampler, StochasticSampler
from unloaf.stages import Stage

_DEFAULT_SAMPLER = {"st": "ordered", "st++": "inter-stage", "gkt": "exponential-decay"}


def build_method(config: Config, model: nn.Module, stages: tuple[Stage, ...]) -> Any:
    """The method of this configuration, for this model.

    Args:
        config: names the method and its settings.
        model: the network to train.
        stages: where its residual blocks are; not used by common training.

    Raises:
        ValueError: the method cannot train this model.
    """
    if config.method == "common":
        return CommonTraining(model, criterion=_label_loss(config))
    if config.method == "stochastic-depth":
        survival = config.final_survival
        return StochasticDepth(model, stages, final_survival=survival, criterion=_label_loss(config), seed=config.seed)
    settings: dict[str, Any] = {
        "sampler": _sampler(config),
        "subnet_loss": _subnet_loss(config),
        "subnet_weight": config.subnet_weight,
        "criterion": _criterion(config),
        "seed": config.seed,
    }
    if config.method == "gkt":
        return GroupKnowledgeTraining(
            model, stages, groups=config.groups, loops=config.loops, ema=config.ema, **settings
        )
    return StimulativeTraining(
        model,
        stages,
        num_subnets=config.num_subnets_or_default,
        subnet_inputs=_subnet_inputs(config),
        **settings,
    )


def _sampler(config: Config) -> Any:
    rule = _DEFAULT_SAMPLER[config.method] if config.sampler == "auto" else config.sampler
    if rule == "exponential-decay":
        return ExponentialDecaySampler(base=config.decay_base)
    return {"ordered": OrderedSampler, "inter-stage": InterStageSampler, "stochastic": StochasticSampler}[rule]()


def _without_magnitude(config: Config) -> bool:
    return config.subnet_loss == "kl-" or (config.subnet_loss == "auto" and config.method == "st++")


def _subnet_loss(config: Config) -> Callable[[Tensor, Tensor], Tensor]:
    if not _without_magnitude(config):
        return kl_loss
    return partial(direction_kl_loss, amplitude=config.amplitude, eps=config.eps)


def _criterion(config: Config) -> Criterion:
    """The loss on labels; of the normalised logits with KL-, as in the published ST++ runs."""
    normalised = config.main_logits == "direction" or (config.main_logits == "auto" and _without_magnitude(config))
    loss = _label_loss(config)
    return DirectionCriterion(loss, config.amplitude, eps=config.eps) if normalised else loss


def _label_loss(config: Config) -> Criterion:
    """From logits and labels or, with mixup, shares of classes, which are smoothed already."""
    smoothing = 0.0 if config.mixes_images else config.smoothing
    if config.bce_loss:
        return BinaryCrossEntropy(smoothing=smoothing)
    return nn.CrossEntropyLoss(label_smoothing=smoothing)


def _subnet_inputs(config: Config) -> SmallerInputs | None:
    rule = config.subnet_inputs
    if rule == "auto":
        rule = "smaller" if config.method == "st++" else "same"
    if rule == "same":
        return None
    return SmallerInputs(min_ratio=config.min_ratio, sides=config.sides or None, per=config.per)
