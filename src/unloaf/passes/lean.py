"""Gradients of a step with one suffix alive at a time."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from unloaf.passes.guards import check_gradient, run_backward
from unloaf.passes.plan import Pass, SubnetPass
from unloaf.passes.replay import Session
from unloaf.passes.standins import StandIn, parameters_replaced, undone_where_passes_met
from unloaf.passes.terms import Losses, StepTerms
from unloaf.stages import Stage


def lean_backward(
    model: nn.Module,
    stages: Sequence[Stage],
    inputs: Any,
    passes: Sequence[SubnetPass],
    losses: Losses,
    *,
    scale: float | Tensor = 1.0,
) -> StepTerms:
    """Add the gradient of the main loss and all subnet losses to ``.grad``, one suffix alive at a time.

    Prefixes are shared. A suffix starts from detached leaves of recorded outputs, and its backward returns their
    gradients; they enter the one backward through the main graph at the end. That backward alone runs through the
    model's wrapper, so under DistributedDataParallel gradients are reduced once, and hooks on parameters run once, on
    the sum. If anything raises before it, ``.grad`` is as it was, and whenever it raises, so are the buffers.

    Args:
        model: the network, possibly wrapped by DistributedDataParallel.
        stages: its stages.
        inputs: a batch, (batch, channels, height, width) if a request names a side.
        passes: the subnets to run.
        losses: of the main network and of subnets.
        scale: multiplies every gradient (1 / accumulation steps, a gradient scaler's factor), not the losses returned.
    """
    session = Session(model, stages, inputs, passes, losses, detach=True)
    first, *moves, last = session.plan.moves()
    with session.statistics.unless_raised():
        with session.open():
            session.forward(first)
            with session.statistics.frozen() as session.rewind, parameters_replaced(session.inner) as standins:
                for move in moves:
                    if move.kind == "forward":
                        session.forward(move)
                    else:
                        _suffix_backward(session, move.of, scale)
        _main_backward(session, last.of, scale, standins)
    return session.terms.result()


def _suffix_backward(session: Session, one: Pass, scale: float | Tensor) -> None:
    """Gradients arrive at the leaves, where the main backward finds them, and at the stand-ins of the parameters."""
    run_backward(*_roots(session, one, scale))
    for record, index, leaf in session.traces[one].leaves:
        if leaf.grad is not None:
            before = record.grads[index]
            record.grads[index] = leaf.grad if before is None else before + leaf.grad
    session.release(one)


def _main_backward(session: Session, main: Pass, scale: float | Tensor, standins: Collection[StandIn]) -> None:
    """Of the main graph, which the gradients of the suffixes enter."""
    roots, grads = _roots(session, main, scale)
    suffixes = [(standin.parameter, grad) for standin in standins if (grad := standin.gradient()) is not None]
    check_gradient(bool(roots or suffixes))
    with undone_where_passes_met(standins):
        for parameter, grad in suffixes:
            if parameter._backward_hooks:  # they change gradients: they have to see the sum
                roots.append(parameter)
                grads.append(grad)
            else:
                parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)
        run_backward(roots, grads)
    session.release(main)


def _roots(session: Session, one: Pass, scale: float | Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Where the backward of a pass begins: its losses, and its recorded outputs for which gradients came back."""
    roots = [(loss, torch.ones_like(loss) * scale) for loss in session.terms.hand_over(one) if loss.requires_grad]
    for record in session.traces[one].records.values():
        roots += [(t, g) for t, g in zip(record.tensors, record.grads, strict=True) if g is not None]
    return [tensor for tensor, _ in roots], [grad for _, grad in roots]
