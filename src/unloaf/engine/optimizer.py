"""How weights follow gradients: optimizer, learning rate, clipping, moving average; all of it timm's."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Mapping
from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_class, get_optimizer_info, list_optimizers
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, dispatch_clip_grad
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from unloaf.config import Config
from unloaf.files.state_tree import split_state

# The default is that of SGD with momentum; LARS and similar ones scale their steps themselves.
_LIKE_SGD = re.compile(r"c?(sgd|momentum|nesterov|n?lar[sc]|fusedsgd|bnbsgd).*")
_FINE_TUNING = 0.1  # what remains of a usual learning rate where a network starts from trained weights
_OF_SGD = 0.1


def build_optimizer(config: Config, model: nn.Module) -> Optimizer:
    """The optimizer of this configuration.

    Raises:
        ValueError: timm has no optimizer of this name, it takes no such setting, or a run cannot use it.
    """
    names: list[str] = [str(known) for known in list_optimizers()]
    name = config.opt.lower()
    if name not in names:
        close = difflib.get_close_matches(name, names, n=3)
        raise ValueError(f"opt {config.opt!r}: give {' or '.join(close) if close else 'sgd, adamw, lamb or another'}")
    if get_optimizer_info(name).second_order:
        raise ValueError(f"opt {config.opt}: needs second derivatives, which no step here keeps; give adamw or another")
    if config.layer_decay is not None and not hasattr(model, "group_matcher"):
        raise ValueError(f"layer_decay {config.layer_decay}: this model does not name its layers; give a timm/ model")
    if name == "sgd" and config.momentum == 0:
        name = "momentum"  # timm's plain SGD: Nesterov's needs a momentum
    more: dict[str, Any] = {}
    try:
        if _fuses(config, name, next(model.parameters()).device):
            more["fused"] = True
        optimizer = create_optimizer_v2(
            model,
            opt=name,
            lr=config.lr,
            weight_decay=config.weight_decay,
            momentum=config.momentum,
            filter_bias_and_bn=not config.norm_decay,
            layer_decay=config.layer_decay,
            **more,
        )
    except (AssertionError, AttributeError, ImportError, TypeError, ValueError) as error:
        raise ValueError(f"opt {config.opt}: {error or 'cannot be built for this model'}") from error
    _check_kept(config, optimizer)
    return optimizer


def _check_kept(config: Config, optimizer: Optimizer) -> None:
    """Now, not when the first epoch is trained and cannot be saved."""
    try:
        split_state(optimizer.state_dict())
    except ValueError as error:
        reason = str(error).partition(";")[0]
        raise ValueError(f"opt {config.opt} cannot be kept in a checkpoint; {reason}; give another") from error


def _fuses(config: Config, name: str, device: torch.device) -> bool:
    """Whether torch updates all weights in one kernel.

    Not on a CPU, where there is less to gain and the bits would change; not in float16, where accelerate could not tell
    any more which steps overflowed.
    """
    if device.type == "cpu" or config.fsdp or (config.amp and config.amp_dtype == "float16"):
        return False
    return get_optimizer_class(name, bind_defaults=False) in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)


def load_optimizer(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """``optimizer.load_state_dict``, for a state that was saved on another device or in another memory format.

    The choice of kernel stays the optimizer's own, and its tensors get the strides of their weights, which fused
    kernels rely on: CUDA's refuse others, the CPU's give wrong weights.
    """
    own = [group.get("fused") for group in optimizer.param_groups]
    groups = [
        saved | {"fused": fused} if "fused" in saved else saved
        for saved, fused in zip(state["param_groups"], own, strict=True)
    ]
    optimizer.load_state_dict({**state, "param_groups": groups})
    for parameter, kept in optimizer.state.items():
        for name, value in kept.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape and value.stride() != parameter.stride():
                kept[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def build_schedule(config: Config, optimizer: Optimizer, *, steps_per_epoch: int) -> Any:
    """Timm's schedule: ``step_update(n)`` sets the learning rate after n optimizer steps, a pure function of n.

    Schedules with an end fall to ``min_lr`` in the last step, after a warm-up that is not part of their curve; the
    epochs of step and multistep count from the beginning of the run.
    """
    staircase = config.sched in ("constant", "step", "multistep")
    schedule: Any
    schedule, _ = create_scheduler_v2(
        optimizer,
        sched=config.sched,
        num_epochs=config.epochs if staircase else config.epochs - config.warmup_epochs,
        decay_epochs=config.decay_epochs,
        decay_milestones=list(config.decay_milestones),
        decay_rate=config.decay_rate,
        min_lr=config.min_lr,
        warmup_lr=0.01 * config.lr if config.warmup_lr is None else config.warmup_lr,
        warmup_epochs=config.warmup_epochs,
        warmup_prefix=not staircase,
        step_on_epochs=False,
        updates_per_epoch=steps_per_epoch,
    )
    if config.sched == "multistep":
        schedule.decay_t = [step + 1 for step in schedule.decay_t]  # timm looks one step ahead (bisect of t + 1)
    return schedule


def build_average(config: Config, model: nn.Module) -> Any | None:
    """The moving average of the weights, a copy of the model; None when it is not asked for."""
    if not config.model_ema:
        return None
    return ModelEmaV3(model, decay=config.model_ema_decay, use_warmup=config.model_ema_warmup)


def clip_gradients(config: Config, accelerator: Any, model: nn.Module) -> None:
    """Clips as configured, after the loss scale was taken out of the gradients."""
    if config.clip_grad is None:
        return
    accelerator.unscale_gradients()
    parameters = [parameter for parameter in model.parameters() if parameter.grad is not None]
    dispatch_clip_grad(parameters, config.clip_grad, mode=config.clip_mode)


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
