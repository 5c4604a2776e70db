"""Common training: the baseline of every comparison."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from unloaf.methods.step import SinglePassTraining
from unloaf.methods.terms import Criterion
from unloaf.passes import Losses, Readout, SubnetPass
from unloaf.subnet import Subnet


class CommonTraining(SinglePassTraining):
    """Train the main network alone on the labels.

    Args:
        model: any network.
        criterion: from (logits, targets) to a loss of shape (); default cross-entropy, which also takes soft labels.
        readout: from the model's output to the tensor that the criterion gets, (batch, ..., classes); default the
            output itself, its ``logits`` or ``["logits"]``.

    >>> import torch, unloaf
    >>> method = unloaf.CommonTraining(torch.nn.Linear(4, 3))
    >>> out = method.backward(torch.randn(8, 4), torch.arange(8) % 3)
    >>> list(out.terms), out.subnets
    (['main'], ())
    """

    def __init__(self, model: nn.Module, *, criterion: Criterion | None = None, readout: Readout | None = None) -> None:
        super().__init__(model, criterion=criterion, readout=readout)

    def draw(self, examples: int, side: int | None = None, *, step: int | None = None) -> list[SubnetPass]:
        """No pass beside the main one."""
        return []

    def _requested(self, x: Any, y: Any, subnets: Sequence[Subnet] | None) -> tuple[Any, list[SubnetPass], Losses]:
        if subnets:
            raise ValueError(f"common training runs no subnets, but {len(subnets)} are given; leave subnets out")
        return super()._requested(x, y, subnets)
