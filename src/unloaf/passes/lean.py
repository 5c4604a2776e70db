"""Gradients of a step with one suffix alive at a time."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from unloaf.batchnorm import frozen_statistics
from unloaf.passes.plan import Run, SubnetPass
from unloaf.passes.replay import Readout, Session
from unloaf.passes.terms import MainLoss, StepTerms, SubnetLoss, Terms, check_gradient
from unloaf.stages import Stage


def lean_backward(
    model: nn.Module,
    stages: Sequence[Stage],
    inputs: Any,
    passes: Sequence[SubnetPass],
    *,
    main_loss: MainLoss,
    subnet_loss: SubnetLoss,
    readout: Readout | None = None,
    scale: float | Tensor = 1.0,
) -> StepTerms:
    """Add the gradient of ``main_loss + sum of subnet losses`` to ``.grad``, one suffix alive at a time.

    Prefixes are shared. A suffix starts from detached leaves of recorded outputs, and its backward returns their
    gradients; they enter the one backward through the main graph at the end. That backward alone runs through the
    model's wrapper, so under DistributedDataParallel gradients are reduced once, and hooks on parameters run once, on
    the sum. If anything raises before it, ``.grad`` is as it was.

    Args:
        model: the network, possibly wrapped by DistributedDataParallel.
        stages: its stages.
        inputs: a batch, (batch, channels, height, width) if a request names a side.
        passes: the subnets to run.
        main_loss: from the main logits to a loss of shape ().
        subnet_loss: from (index of the request, its logits, detached main logits, detached logits of all requests
            that are known by then) to a loss of shape ().
        readout: from the model's output to the logits; default as `logits_of`.
        scale: multiplies every gradient (1 / accumulation steps, a gradient scaler's factor), not the losses returned.
    """
    session = Session(model, stages, inputs, passes, detach=True, readout=readout)
    step = _LeanBackward(session, Terms(len(passes), main_loss, subnet_loss), scale)
    with session.open():
        session.forward(session.plan.main)
        step.terms.begin(session.plan.main)
        with frozen_statistics(session.inner), _parameters_replaced(session.inner) as standins:
            for run in session.plan.runs:
                if run is not session.plan.main:
                    step.advance(run)
    step.finish_main(standins)
    return step.terms.result()


class _LeanBackward:
    """State of one lean step: which losses are known, which graphs are alive, gradients so far."""

    def __init__(self, session: Session, terms: Terms, scale: float | Tensor) -> None:
        self.session, self.terms, self.scale = session, terms, scale
        self.alive: list[Run] = []
        self.has_gradient = False

    def advance(self, run: Run) -> None:
        """Run one subnet, then finish all that can be finished, the latest first."""
        self.session.forward(run)
        self.terms.add(run)
        self.alive.append(run)
        for waiting in reversed(self.alive):
            # A loss may read the logits of a request that comes later in depth-first order: its graph then waits.
            losses = self.terms.of(waiting)
            if losses is not None and all(child.done for child in waiting.children):
                self._differentiate(waiting, losses)
        self.alive = [waiting for waiting in self.alive if not waiting.done]

    def _roots(self, run: Run, losses: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Where the backward of a run begins: its losses, and its recorded outputs for which gradients came back."""
        roots = [(loss, torch.ones_like(loss) * self.scale) for loss in losses if loss.requires_grad]
        for record in run.records:
            roots += [(t, g) for t, g in zip(record.tensors, record.grads, strict=True) if g is not None]
        return [tensor for tensor, _ in roots], [grad for _, grad in roots]

    def _differentiate(self, run: Run, losses: Sequence[Tensor]) -> None:
        """Backward of a suffix: gradients arrive at its leaves and at the stand-ins of the parameters."""
        roots, root_grads = self._roots(run, losses)
        if roots:
            self.has_gradient = True
            with _no_autocast(roots[0]), _shared_graphs_explained():
                torch.autograd.backward(roots, root_grads)
            for record, index, leaf in run.leaves:
                if leaf.grad is not None:
                    before = record.grads[index]
                    record.grads[index] = leaf.grad if before is None else before + leaf.grad
        self.terms.detach(run)
        self.session.release(run)

    def finish_main(self, standins: Collection[StandIn]) -> None:
        """The backward of the main graph, which the gradients of the suffixes enter."""
        main = self.session.plan.main
        losses = self.terms.of(main)
        assert losses is not None
        roots, root_grads = self._roots(main, [self.terms.main_loss, *losses])
        check_gradient(self.has_gradient or bool(roots))
        with _undone_where_passes_met(standins):
            for standin in standins:
                parameter, grad = standin.parameter, standin.gradient()
                if grad is not None and parameter._backward_hooks:  # they change gradients: they have to see the sum
                    roots.append(parameter)
                    root_grads.append(grad)
                elif grad is not None:
                    parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)
            if roots:
                with _no_autocast(roots[0]), _shared_graphs_explained():
                    torch.autograd.backward(roots, root_grads)
        self.terms.finish(main)
        self.session.release(main)


@dataclass(eq=False)
class StandIn:
    """A parameter and what takes its place in the suffixes: it shares the storage and collects their gradients.

    Attributes:
        parameter: of the model.
        replacement: its stand-in.
        before: the gradient that the parameter had before the step.
        strayed: a gradient of a suffix that came to the parameter itself: through a part of the main graph that the
            suffix should not have reached, or a reference that is not among the module's parameters.
    """

    parameter: nn.Parameter
    replacement: nn.Parameter
    before: Tensor | None
    strayed: Tensor | None = None

    def gradient(self) -> Tensor | None:
        """Of all suffixes."""
        found = [grad for grad in (self.replacement.grad, self.strayed) if grad is not None]
        return found[0] + found[1] if len(found) == 2 else found[0] if found else None


@contextmanager
def _parameters_replaced(model: nn.Module) -> Iterator[Collection[StandIn]]:
    """The parameters with a gradient, replaced by their stand-ins for the time of the suffixes.

    Hooks on the parameters (a gradient mask, DistributedDataParallel's reducer) run once, on the sum, in the main
    backward; a gradient is added while it is warm in the cache; a step that fails has touched no ``.grad``.
    """
    standins: dict[int, StandIn] = {}
    originals = [(module._parameters, dict(module._parameters)) for module in model.modules() if module._parameters]
    try:
        for held, before in originals:
            for name, parameter in before.items():
                if parameter is not None and parameter.requires_grad:
                    if id(parameter) not in standins:  # tied weights have one stand-in
                        replacement = nn.Parameter(parameter.detach())
                        standins[id(parameter)] = StandIn(parameter, replacement, parameter.grad)
                        parameter.grad = None
                    held[name] = standins[id(parameter)].replacement
        yield standins.values()
    finally:
        for held, before in originals:
            held.update(before)
        for standin in standins.values():
            standin.strayed, standin.parameter.grad = standin.parameter.grad, standin.before


@contextmanager
def _undone_where_passes_met(standins: Collection[StandIn]) -> Iterator[None]:
    """Gradients as before the step if the main backward fails because a suffix ran through a part of its graph.

    Whether one did is known by then, so that nothing has to be kept in other steps.
    """
    kept = []
    if any(standin.strayed is not None for standin in standins):
        kept = [(s.parameter, None if s.before is None else s.before.clone()) for s in standins]
    try:
        yield
    except BaseException:
        for parameter, grad in kept:
            parameter.grad = grad
        raise


@contextmanager
def _shared_graphs_explained() -> Iterator[None]:
    """What to do where one backward of the step met the graph of another."""
    try:
        yield
    except RuntimeError as error:
        if "backward through the graph a second time" not in str(error):
            raise
        raise ValueError(
            "a subnet's loss reaches into the graph of another pass on a way that no module returned: a feature that a "
            "hook or an attribute hands over, or parametrize.cached(); use method(x, y).loss.backward()"
        ) from error


@contextmanager
def _no_autocast(tensor: Tensor) -> Iterator[None]:
    """Backward passes run in the types of their forward passes; autocast around them is not supported by torch."""
    with torch.autocast(tensor.device.type, enabled=False):
        yield
