"""Parameters of the suffixes: each has a stand-in that collects its gradient."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor, nn


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
def parameters_replaced(model: nn.Module) -> Iterator[Collection[StandIn]]:
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
def undone_where_passes_met(standins: Collection[StandIn]) -> Iterator[None]:
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
