"""Gradients of a step with one suffix alive at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from unloaf.passes.guards import check_gradient, shared_graphs_explained
from unloaf.passes.plan import Move, Pass, SubnetPass
from unloaf.passes.readout import Call, call_for_logits
from unloaf.passes.replay import Session
from unloaf.passes.standins import StandIn, parameters_replaced, undone_where_passes_met
from unloaf.passes.terms import MainLoss, StepTerms, SubnetLoss, Terms
from unloaf.stages import Stage


def lean_backward(
    model: nn.Module,
    stages: Sequence[Stage],
    inputs: Any,
    passes: Sequence[SubnetPass],
    *,
    main_loss: MainLoss,
    subnet_loss: SubnetLoss,
    call: Call = call_for_logits,
    alike: bool = False,
    scale: float | Tensor = 1.0,
) -> StepTerms:
    """Add the gradient of ``main_loss + sum of subnet losses`` to ``.grad``, one suffix alive at a time.

    Prefixes are shared. A suffix starts from detached leaves of recorded outputs, and its backward returns their
    gradients; they enter the one backward through the main graph at the end. That backward alone runs through the
    model's wrapper, so under DistributedDataParallel gradients are reduced once, and hooks on parameters run once, on
    the sum. If anything raises before it, ``.grad`` is as it was, and whenever it raises, so are the buffers.

    Args:
        model: the network, possibly wrapped by DistributedDataParallel.
        stages: its stages.
        inputs: a batch, (batch, channels, height, width) if a request names a side.
        passes: the subnets to run.
        main_loss: from what the main pass gave to a loss of shape ().
        subnet_loss: from (index of the request, what its pass gave, the same of the main pass and of all requests that
            are known by then, detached) to a loss of shape ().
        call: from (model, what a pass sees of the batch) to what it gives, a tensor; default the model's logits.
        alike: let all passes draw alike in modules too; else only what the model's own forward is seen to draw.
        scale: multiplies every gradient (1 / accumulation steps, a gradient scaler's factor), not the losses returned.
    """
    session = Session(model, stages, inputs, passes, detach=True, call=call, alike=alike)
    step = _LeanStep(session, Terms(len(passes), main_loss, subnet_loss), scale)
    first, *moves, last = session.plan.moves()
    with session.statistics.unless_raised():
        with session.open():
            step.forward(first)
            with session.beside_main(), parameters_replaced(session.inner) as standins:
                for move in moves:
                    if move.kind == "forward":
                        step.forward(move)
                    else:
                        step.backward(move)
        step.main_backward(last, standins)
    return step.terms.result()


class _LeanStep:
    """Executes the moves of a plan; each graph is gone once its pass has gone backward."""

    def __init__(self, session: Session, terms: Terms, scale: float | Tensor) -> None:
        self.session, self.terms, self.scale = session, terms, scale
        self.has_gradient = False

    def forward(self, move: Move) -> None:
        self.terms.add(move, self.session.forward(move.of))

    def _backward(self, roots: Sequence[Tensor], grads: Sequence[Tensor]) -> None:
        if roots:
            with _no_autocast(roots[0]), shared_graphs_explained():
                torch.autograd.backward(roots, grads)

    def _roots(self, one: Pass) -> tuple[list[Tensor], list[Tensor]]:
        """Where the backward of a pass begins: its losses, and its recorded outputs for which gradients came back."""
        roots = [(loss, torch.ones_like(loss) * self.scale) for loss in self.terms.hand_over(one) if loss.requires_grad]
        for record in self.session.traces[one].records.values():
            roots += [(t, g) for t, g in zip(record.tensors, record.grads, strict=True) if g is not None]
        self.has_gradient = self.has_gradient or bool(roots)
        return [tensor for tensor, _ in roots], [grad for _, grad in roots]

    def backward(self, move: Move) -> None:
        """Of a suffix: gradients arrive at its leaves and at the stand-ins of the parameters."""
        self._backward(*self._roots(move.of))
        for record, index, leaf in self.session.traces[move.of].leaves:
            if leaf.grad is not None:
                before = record.grads[index]
                record.grads[index] = leaf.grad if before is None else before + leaf.grad
        self.session.release(move.of)

    def main_backward(self, move: Move, standins: Collection[StandIn]) -> None:
        """Of the main graph, which the gradients of the suffixes enter."""
        roots, root_grads = self._roots(move.of)
        check_gradient(self.has_gradient)
        with undone_where_passes_met(standins):
            for standin in standins:
                parameter, grad = standin.parameter, standin.gradient()
                if grad is not None and parameter._backward_hooks:  # they change gradients: they have to see the sum
                    roots.append(parameter)
                    root_grads.append(grad)
                elif grad is not None:
                    parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)
            self._backward(roots, root_grads)
        self.session.release(move.of)


@contextmanager
def _no_autocast(tensor: Tensor) -> Iterator[None]:
    """Backward passes run in the types of their forward passes; autocast around them is not supported by torch."""
    with torch.autocast(tensor.device.type, enabled=False):
        yield
