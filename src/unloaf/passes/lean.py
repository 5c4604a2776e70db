"""Gradients of a step with one suffix alive at a time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unloaf.batchnorm import frozen_statistics
from unloaf.passes.plan import Run, SubnetPass
from unloaf.passes.replay import Session
from unloaf.stages import Stage

MainLoss = Callable[[Tensor], Tensor]
SubnetLoss = Callable[[int, Tensor, Tensor, Sequence[Tensor | None]], Tensor]


class LeanStep(NamedTuple):
    """What `lean_backward` returns: detached main logits, the main loss, and a loss for each request."""

    logits: Tensor
    main_loss: Tensor
    subnet_losses: list[Tensor]


def lean_backward(
    model: nn.Module,
    stages: Sequence[Stage],
    inputs: Any,
    passes: Sequence[SubnetPass],
    *,
    main_loss: MainLoss,
    subnet_loss: SubnetLoss,
    scale: float | Tensor = 1.0,
) -> LeanStep:
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
        scale: multiplies every gradient (1 / accumulation steps, a gradient scaler's factor), not the losses returned.
    """
    step = _LeanBackward(Session(model, stages, inputs, passes, detach=True), len(passes), subnet_loss, scale)
    session, main = step.session, step.session.plan.main
    with session.open():
        logits = session.forward(main)
        loss = main_loss(logits)
        step.main_logits = logits.detach()
        with frozen_statistics(session.inner), _parameters_replaced(session.inner) as standins:
            for run in session.plan.runs:
                step.advance(run)
    step.finish_main(loss, standins)
    losses = [loss for loss in step.losses if loss is not None]
    return LeanStep(step.main_logits, loss.detach(), losses)


class _LeanBackward:
    """State of one lean step: which logits and losses are known, which graphs are alive, gradients so far."""

    main_logits: Tensor

    def __init__(self, session: Session, requests: int, subnet_loss: SubnetLoss, scale: float | Tensor) -> None:
        self.session, self.subnet_loss, self.scale = session, subnet_loss, scale
        self.known: list[Tensor | None] = [None] * requests
        self.losses: list[Tensor | None] = [None] * requests
        self.alive: list[Run] = []

    def advance(self, run: Run) -> None:
        """Run one subnet, then finish all that can be finished, the latest first."""
        main = self.session.plan.main
        if run is not main:
            self.session.forward(run)
            self.alive.append(run)
        assert run.logits is not None
        for index in run.requests:
            self.known[index] = run.logits.detach()
        for waiting in reversed(self.alive):
            # A loss may read the logits of a request that comes later in depth-first order: its graph then waits.
            if all(child.done for child in waiting.children) and all(self.known[i] is not None for i in waiting.needs):
                self._differentiate(waiting)
        self.alive = [waiting for waiting in self.alive if not waiting.done]

    def _losses_of(self, run: Run) -> list[Tensor]:
        assert run.logits is not None
        losses = [self.subnet_loss(index, run.logits, self.main_logits, self.known) for index in run.requests]
        for index, loss in zip(run.requests, losses, strict=True):
            self.losses[index] = loss.detach()
        return losses

    def _roots(self, run: Run, losses: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Where the backward of a run begins: its losses, and its recorded outputs for which gradients came back."""
        roots = [(loss, torch.ones_like(loss) * self.scale) for loss in losses if loss.requires_grad]
        for record in run.records:
            roots += [(t, g) for t, g in zip(record.tensors, record.grads, strict=True) if g is not None]
        return [tensor for tensor, _ in roots], [grad for _, grad in roots]

    def _differentiate(self, run: Run) -> None:
        """Backward of a suffix: gradients arrive at its leaves and at the stand-ins of the parameters."""
        roots, root_grads = self._roots(run, self._losses_of(run))
        if roots:
            with _no_autocast(roots[0]):
                torch.autograd.backward(roots, root_grads)
            for record, index, leaf in run.leaves:
                if leaf.grad is not None:
                    before = record.grads[index]
                    record.grads[index] = leaf.grad if before is None else before + leaf.grad
        self.session.release(run)

    def finish_main(self, loss: Tensor, standins: Collection[tuple[nn.Parameter, nn.Parameter]]) -> None:
        """The backward of the main graph, which the gradients of the suffixes enter."""
        main = self.session.plan.main
        roots, root_grads = self._roots(main, [loss, *self._losses_of(main)])
        for parameter, standin in standins:
            grad = standin.grad
            if grad is not None and parameter._backward_hooks:  # they change gradients: they have to see the sum
                roots.append(parameter)
                root_grads.append(grad)
            elif grad is not None:
                parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)
        if roots:
            with _no_autocast(loss):
                torch.autograd.backward(roots, root_grads)
        self.session.release(main)


@contextmanager
def _parameters_replaced(model: nn.Module) -> Iterator[Collection[tuple[nn.Parameter, nn.Parameter]]]:
    """Pairs of a parameter and its stand-in, which shares its storage and collects the suffixes' gradients.

    Hooks on the parameters (a gradient mask, DistributedDataParallel's reducer) run once, on the sum, in the main
    backward; a gradient is added while it is warm in the cache; a step that fails has touched no ``.grad``.
    """
    pairs: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    originals = [(module._parameters, dict(module._parameters)) for module in model.modules() if module._parameters]
    try:
        for held, before in originals:
            for name, parameter in before.items():
                if parameter is not None and parameter.requires_grad:
                    if id(parameter) not in pairs:  # tied weights have one stand-in
                        pairs[id(parameter)] = parameter, nn.Parameter(parameter.detach())
                    held[name] = pairs[id(parameter)][1]
        yield pairs.values()
    finally:
        for held, before in originals:
            held.update(before)


@contextmanager
def _no_autocast(tensor: Tensor) -> Iterator[None]:
    """Backward passes run in the types of their forward passes; autocast around them is not supported by torch."""
    with torch.autocast(tensor.device.type, enabled=False):
        yield
