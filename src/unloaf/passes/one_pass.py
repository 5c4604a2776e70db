"""A step of one pass, which has nothing to share."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from unloaf.batchnorm import Statistics
from unloaf.passes.guards import check_gradient, run_backward
from unloaf.passes.plan import SubnetPass
from unloaf.passes.terms import Losses, StepTerms
from unloaf.stages import Stage, inner_module
from unloaf.subnet import active_subnet


def one_pass(
    model: nn.Module,
    stages: Sequence[Stage],
    inputs: Any,
    passes: Sequence[SubnetPass],
    losses: Losses,
    *,
    scale: float | Tensor | None = None,
) -> StepTerms:
    """The main loss of the main network, or of the one subnet that is asked for.

    Args:
        model: the network, possibly wrapped by DistributedDataParallel.
        stages: its stages.
        inputs: the batch.
        passes: none, or one.
        losses: the main one counts.
        scale: add the gradient times this to ``.grad``; None leaves the graph.
    """
    active = active_subnet(model, stages, passes[0].subnet) if passes else nullcontext()
    with active, Statistics(inner_module(model)).unless_raised():
        output = losses.call(model, inputs)
        loss = losses.main(output)
        check_gradient(loss.requires_grad or (scale is None and not torch.is_grad_enabled()))
        if scale is not None:  # What the model checkpoints itself is recomputed here: by the same subnet.
            run_backward([loss * scale], [None])
            loss = loss.detach()
    return StepTerms(output.detach(), loss, [])
