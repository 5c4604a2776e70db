"""A step without sharing: what the other forms do faster. Read this first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from unloaf.batchnorm import Statistics
from unloaf.passes.guards import run_backward
from unloaf.passes.plan import SubnetPass
from unloaf.passes.terms import Losses, StepTerms
from unloaf.stages import Stage, inner_module
from unloaf.subnet import active_subnet


def separate_backward(
    model: nn.Module,
    stages: Sequence[Stage],
    inputs: Any,
    passes: Sequence[SubnetPass],
    losses: Losses,
    *,
    scale: float | Tensor = 1.0,
) -> StepTerms:
    """As `lean_backward`, with a complete pass forward and backward for each subnet: slow, obvious, the reference."""
    inner, statistics = inner_module(model), Statistics(inner_module(model))
    main = losses.call(model, inputs)
    values = {-1: losses.main(main)}
    run_backward([values[-1] * scale], [None])
    known: list[Tensor | None] = [None] * len(passes)
    waiting: dict[int, Tensor] = {}
    with statistics.frozen() as begin:  # subnets find the buffers as the main pass did, and move none
        for index, request in enumerate(passes):
            begin()
            with active_subnet(inner, stages, request.subnet):
                waiting[index] = losses.call(inner, request.view.of(inputs))
            known[index] = waiting[index].detach()
            for ready in [i for i in waiting if all(known[needed] is not None for needed in passes[i].needs)]:
                values[ready] = losses.of_subnet(ready, waiting.pop(ready), main.detach(), known)
                run_backward([values[ready] * scale], [None])
    return StepTerms(main.detach(), values[-1].detach(), [values[i].detach() for i in range(len(passes))])
