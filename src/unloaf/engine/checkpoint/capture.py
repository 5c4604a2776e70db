"""A run as weights and state, and back.

Order and augmentation of the images, dropout and draws are pure functions of (seed, position), so that a checkpoint
needs no state of a random generator or a data worker.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from unloaf.engine.checkpoint.progress import steps_per_epoch
from unloaf.engine.checkpoint.store import Checkpoint
from unloaf.engine.devices import gather_statistics, put_statistics, shared_statistics
from unloaf.engine.optimizer import load_optimizer
from unloaf.engine.setup import Training, check_weights
from unloaf.errors import CheckpointError
from unloaf.files.tensors import load_strictly
from unloaf.stages import inner_module

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def capture(training: Training) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """Weights and state of a run between two steps, copied to the CPU; to be called by every process.

    Raises:
        NonFiniteWeightsError: there is nothing worth to be kept.
    """
    check_weights(training)
    where, average = training.accelerator, training.average
    state: dict[str, Any] = {
        "position": asdict(training.position) | {"steps_per_epoch": training.steps_per_epoch},
        "method": training.method.state_dict(),
        "statistics": gather_statistics(where, training.model),
        "average_statistics": gather_statistics(where, average.module) if average else None,
        "scaler": where.scaler.state_dict() if where.scaler else None,
    }
    models = [training.model] if average is None else [training.model, average.module]
    with shared_statistics(where, training.config, *models):
        if training.config.fsdp:
            # Copied again: torch hands out what lies on the CPU already as it is.
            weights = {"model": _copied(get_model_state_dict(training.model, options=_WHOLE))}
            optimizer = get_optimizer_state_dict(training.model, training.optimizer.optimizer, options=_WHOLE)
            state["optimizer"] = _copied(optimizer)
        else:
            names = ("model", "model_ema")
            weights = {
                name: _copied(inner_module(model).state_dict()) for name, model in zip(names, models, strict=False)
            }
            state["optimizer"] = _copied(training.optimizer.optimizer.state_dict())
    return weights, state


def _copied(value: Any) -> Any:
    """The same structure with tensors of its own on the CPU: training continues while they are written."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _copied(entry) for key, entry in value.items()}
    if isinstance(value, tuple):  # not as a list: some of timm's optimizers (kron) insist on their tuples
        entries = [_copied(entry) for entry in value]
        return type(value)(*entries) if hasattr(value, "_fields") else tuple(entries)
    return [_copied(entry) for entry in value] if isinstance(value, list) else value


def restore(training: Training, checkpoint: Checkpoint) -> None:
    """Puts a run where its checkpoint was taken.

    Raises:
        CheckpointError: the checkpoint is of another network, optimizer or method.
    """
    state, config = checkpoint.state, training.config
    try:
        if config.fsdp:
            set_model_state_dict(training.model, dict(checkpoint.weights["model"]), options=_WHOLE)
            set_optimizer_state_dict(training.model, training.optimizer.optimizer, state["optimizer"], options=_WHOLE)
        else:
            load_strictly(inner_module(training.model), checkpoint.weights["model"])
            load_optimizer(training.optimizer.optimizer, state["optimizer"])
        if training.average is not None:
            load_strictly(training.average.module, checkpoint.weights["model_ema"])
            put_statistics(training.accelerator, training.average.module, state["average_statistics"])
        put_statistics(training.accelerator, training.model, state["statistics"])
        training.method.load_state_dict(state["method"])
        if training.accelerator.scaler is not None:
            training.accelerator.scaler.load_state_dict(state["scaler"])
        _restore_position(training, checkpoint)
        # Equal to what was saved, unless an epoch has other steps now, or a step another number of batches.
        world = training.accelerator.num_processes
        training.method.step = training.steps_by_epochs * config.accumulation(world)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{checkpoint.path} does not fit this run: {reason}") from error
    training.schedule.step_update(training.position.updates)


def _restore_position(training: Training, checkpoint: Checkpoint) -> None:
    saved = {"steps": checkpoint.step, **checkpoint.state["position"]}  # unloaf 0.1 kept the sum in the number alone
    saved.setdefault("best", saved.get("best_top1"))  # its name while there was classification alone
    for name in asdict(training.position):
        setattr(training.position, name, saved[name])
    before, now = steps_per_epoch(saved, checkpoint.step), training.steps_per_epoch
    if before is None:
        training.position.step = min(training.position.step, now)
    elif before != now:
        training.position.change_steps_per_epoch(before, now)
