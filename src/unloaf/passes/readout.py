"""What a pass gives: the logits in what the model returns, where a method says nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from unloaf.inputs import rows_of
from unloaf.passes.guards import refuse_auxiliary
from unloaf.stages import call_model

Readout = Callable[[Any], Tensor]
Call = Callable[[nn.Module, Any], Tensor]  # of a model on what a pass sees of the batch: what the losses read


def call_for_logits(model: nn.Module, inputs: Any, *, readout: Readout | None = None) -> Tensor:
    """`logits_of` what the model returns for a batch.

    Raises:
        ValueError: also where the readout gave another number of rows than the batch has examples.
    """
    logits = logits_of(call_model(model, inputs), readout)
    examples = None if readout is None else rows_of(inputs)
    if examples is not None and (not logits.ndim or len(logits) != examples):
        raise ValueError(
            f"readout returned shape {tuple(logits.shape)} for a batch of {examples} examples; give a row for each, "
            "(batch, ..., classes)"
        )
    return logits


def logits_of(output: Any, readout: Readout | None = None) -> Tensor:
    """The logits in a model's output: the output itself, its ``logits`` attribute (transformers) or ``["logits"]``.

    Args:
        output: what the model returned.
        readout: takes them out of any other output.

    Raises:
        ValueError: there are none, or the readout gave no tensor.
    """
    if readout is not None:
        logits = readout(output)
        if not isinstance(logits, Tensor):
            raise ValueError(f"readout returned {type(logits).__name__}; give a tensor, (batch, ..., classes)")
        return logits
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if logits is None and isinstance(output, Mapping):
        logits = output.get("logits")
    if not isinstance(logits, Tensor):
        held = f" with the keys {', '.join(map(str, output))}" if isinstance(output, Mapping) else ""
        raise ValueError(
            f"the model returned {type(output).__name__}{held}; it must return its logits as a tensor, or an output "
            'with .logits, or give readout, a function from its output to the logits: lambda output: output["out"]'
        )
    if not isinstance(output, Tensor):
        refuse_auxiliary(output, logits)
    return logits
