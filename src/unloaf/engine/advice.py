"""What a beginner should be told before a run: a default that does not go with what was chosen beside it."""

from __future__ import annotations

import inspect
import re

from timm.optim import get_optimizer_class
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from unloaf.config import Config

# The default is that of SGD with momentum; LARS and its kind scale their steps themselves.
_LIKE_SGD = re.compile(r"c?(sgd|momentum|nesterov|n?lar[sc]|fusedsgd|bnbsgd).*")
_FINE_TUNING = 0.1  # what remains of a usual learning rate where a network starts from trained weights
_OF_SGD = 0.1


def learning_rate_advice(config: Config, model: nn.Module) -> list[str]:
    """A warning where the learning rate is the default and the optimizer or the network is usually given another.

    What is usual for an optimizer is the default value of its own class.

    >>> learning_rate_advice(Config(opt="adamw"), nn.Linear(2, 2))
    ['warning: lr 0.1 is the default, for sgd and random weights; adamw usually takes 0.001: give --lr']
    """
    if config.lr != Config.lr:
        return []
    own, why = _usual(config.opt.lower()), ""
    if own is None:  # like SGD
        if _has_layer_norm_alone(model):
            usual = 1e-3 * (_FINE_TUNING if _starts_trained(config) else 1)
            why = f"networks with layer norm usually take --opt adamw --lr {usual:g}"
        elif _starts_trained(config):
            why = f"fine-tuning usually takes {_OF_SGD * _FINE_TUNING:g}: give --lr"
    elif own < _OF_SGD:
        usual = own * (_FINE_TUNING if _starts_trained(config) else 1)
        why = f"{config.opt} usually takes {usual:g}{' in fine-tuning' * _starts_trained(config)}: give --lr"
    return [f"warning: lr {config.lr:g} is the default, for sgd and random weights; {why}"] if why else []


def _usual(name: str) -> float | None:
    """The learning rate that an optimizer's class has by default; None for those like SGD and those without one."""
    if _LIKE_SGD.fullmatch(name):
        return None
    try:
        default = inspect.signature(get_optimizer_class(name, bind_defaults=False)).parameters["lr"].default
    except (ValueError, TypeError, KeyError, ImportError):
        return None
    return float(default) if isinstance(default, (int, float)) else None


def _starts_trained(config: Config) -> bool:
    return config.pretrained or config.initial_checkpoint is not None


def _has_layer_norm_alone(model: nn.Module) -> bool:
    """As transformers and ConvNeXt have it."""
    modules = list(model.modules())
    return any(isinstance(m, nn.LayerNorm) for m in modules) and not any(isinstance(m, _BatchNorm) for m in modules)
