"""The logits in what a model returns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from unloaf.passes.guards import refuse_auxiliary

Readout = Callable[[Any], Tensor]


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
        refuse_auxiliary(output)
    return logits
