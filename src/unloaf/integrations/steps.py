"""What every trainer asks of a method: a step of a batch, the loss of the main network alone, the state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from unloaf.methods import GroundTruthTraining, StepOutput, TrainingMethod
from unloaf.methods.terms import StepLosses, innermost
from unloaf.passes.readout import logits_of
from unloaf.stages import inner_module


class TrainerNotInstalledError(ModuleNotFoundError, ValueError):
    """An import that fails, as Python has it, for want of an extra, which is a ValueError elsewhere in this package."""


def not_installed(module: str, error: ImportError, *, extra: str) -> TrainerNotInstalledError:
    """The error of a trainer whose library is missing or broken, with what to install."""
    return TrainerNotInstalledError(
        f"unloaf.integrations.{module} needs {module}, which cannot be imported ({error}); "
        f"pip install 'unloaf[{extra}]'",
        name=module,
    )


def network_of(method: TrainingMethod, model: nn.Module | None = None) -> nn.Module:
    """The user's own network, which the trainer gets, wraps and saves.

    Raises:
        ValueError: the method is none, or trains another model than the one that is given beside it.
    """
    if not isinstance(method, TrainingMethod):
        raise ValueError(f"method is {type(method).__name__}; give a method such as unloaf.StimulativeTraining(...)")
    network = inner_module(method.model)
    if model is not None and inner_module(model) is not network:
        raise ValueError(
            f"model is another {type(model).__name__} than the one that the method was built with; give the same, or "
            "leave model out"
        )
    return network


def inputs_and_labels(method: TrainingMethod, batch: Any, *, name: str = "labels") -> tuple[Any, Any]:
    """What a method takes of a batch: a pair, or a mapping whose labels have this name; all of it for ST*.

    Raises:
        ValueError: the batch is neither.

    >>> import torch, unloaf
    >>> method = unloaf.CommonTraining(torch.nn.Linear(4, 3))
    >>> inputs_and_labels(method, {"input_ids": 1, "labels": 2})
    ({'input_ids': 1}, 2)
    """
    if isinstance(method, GroundTruthTraining):
        return batch, None
    if isinstance(batch, Mapping) and name in batch:
        return {key: value for key, value in batch.items() if key != name}, batch[name]
    if isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    found = f"with the keys {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else type(batch).__name__
    raise ValueError(
        f"the batch is {found}; {type(method).__name__} takes (inputs, labels) or a mapping with {name!r}. For labels "
        "of another form, or a loss that the model computes itself, use unloaf.GroundTruthTraining"
    )


def step_of(method: TrainingMethod, model: nn.Module, inputs: Any, labels: Any, scaler: Any = None) -> StepOutput:
    """A lean step whose gradients wait for the trainer's backward of the loss.

    Args:
        method: of the training.
        model: the network, or what the trainer has wrapped around it.
        inputs: of the batch.
        labels: of the batch.
        scaler: the trainer's torch.amp.GradScaler, so that no gradient in float16 is too small; or None.
    """
    method.model = model
    scale = scaler.get_scale() if scaler is not None and scaler.is_enabled() else 1.0
    return method(inputs, labels, lean=True, loss_scale=scale)


def criterion_of(method: TrainingMethod) -> Any:
    """The user's criterion; None where the method has a loss of its own (ST*)."""
    found = getattr(method, "criterion", None)
    return None if found is None else innermost(found)


def main_loss(method: TrainingMethod, output: Any, labels: Any) -> Tensor:
    """The user's criterion of what the main network returned: for evaluation, comparable between methods."""
    losses = StepLosses(criterion_of(method), labels, classes_last=method.readout is not None)
    return losses.main(logits_of(output, method.readout))


def restore(method: TrainingMethod, state: Mapping[str, int]) -> None:
    """Continue where the state was taken, which is that of the first process.

    Raises:
        ValueError: it is none, or the first of several processes has a method with another seed.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        if dist.get_rank() == 0 and method.seed != state.get("seed"):
            raise ValueError(
                f"the method has seed {method.seed}, the checkpoint {state.get('seed')}; build it with that seed"
            )
        state = {**state, "seed": method.seed}  # processes may draw by seeds of their own
    method.load_state_dict(state)
