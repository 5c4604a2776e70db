"""The lean form for training loops that own the backward pass: gradients are kept until the loss goes backward."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from unloaf.passes.containers import tensors_in
from unloaf.passes.lean import lean_backward
from unloaf.passes.plan import SubnetPass
from unloaf.passes.standins import parameters_replaced
from unloaf.passes.terms import Losses, StepTerms
from unloaf.stages import Stage, inner_module


class Deferred:
    """`lean_backward` inside the call; the backward of the main loss that it returns hands the gradients over.

    Each is multiplied by the gradient that comes in there, which may hold a scaler's factor or 1 / accumulation steps.
    Only then do hooks on parameters run, DistributedDataParallel's among them. Costs one more copy of the gradients.
    """

    def __init__(self) -> None:
        self._last: _Kept | None = None
        self._told = False

    def __call__(
        self,
        model: nn.Module,
        stages: Sequence[Stage],
        inputs: Any,
        passes: Sequence[SubnetPass],
        losses: Losses,
        *,
        scale: float | Tensor = 1.0,
    ) -> StepTerms:
        """As `lean_backward`; gradients are computed times `scale`, and handed over without it."""
        _check_wrapper(model)
        self._tell_if_lost()
        apart = _Apart(inner_module(model))
        seen = losses._replace(
            main=lambda output: apart.seen(losses.main(output), of_main=True),
            # What lies below the output belongs to the model, and was seen with the main loss; a loss that calls the
            # model itself is the output.
            subnet=lambda index, output, *others: apart.seen(
                losses.of_subnet(index, output, *others), None if losses.alike else output
            ),
        )
        passes = [one if one.change is None else one._replace(change=_Watched(one.change, apart)) for one in passes]
        with apart.opened(), _float16_seen(inner_module(model), stages) as float16:
            step = lean_backward(model, stages, inputs, passes, seen, scale=scale)
        self._last = _Kept(apart.gradients, scale, any(float16))
        loss = _HandOver.apply(step.main_loss, self._last, *(leaf for leaf, _ in apart.gradients))
        return step._replace(main_loss=loss)

    def _tell_if_lost(self) -> None:
        if self._last is not None and self._last.gradients is not None and not self._told:
            self._told = True
            warnings.warn(
                "the loss of an earlier step with lean=True has not gone backward before this one: its gradients, a "
                "copy of the size of the model, are kept or lost; call out.loss.backward() after each step",
                stacklevel=6,
            )


class _Kept:
    """Gradients that wait for the backward of a loss."""

    def __init__(self, gradients: list[tuple[Tensor, Tensor]], scale: float | Tensor, float16: bool) -> None:
        self.gradients: list[Tensor] | None = [gradient for _, gradient in gradients]
        self.scale, self.float16 = scale, float16


class _HandOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, kept: _Kept, *leaves: Tensor) -> Tensor:
        ctx.kept = kept
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        kept: _Kept = ctx.kept
        [incoming] = grad_outputs
        if torch.is_grad_enabled():  # create_graph=True
            raise ValueError(
                "the gradients of a step with lean=True have no graph of their own (create_graph=True), so that a loss "
                "of gradients would teach nothing; call method(x, y) without lean=True for it"
            )
        if kept.gradients is None:
            raise ValueError(
                "the loss of a step with lean=True went backward twice; its gradients were handed over the first time: "
                "call method(x, y, lean=True) again, or method(x, y) with retain_graph=True"
            )
        if kept.float16 and isinstance(kept.scale, float | int) and kept.scale == 1 and incoming > 1:
            raise ValueError(
                f"the loss of a step with lean=True went backward times {incoming.item()}, but its gradients were "
                "computed in float16 without that factor, where small ones are 0; give the scaler's factor too: "
                "method(x, y, lean=True, loss_scale=scaler.get_scale())"
            )
        gradients, kept.gradients = kept.gradients, None
        factor = incoming.detach() / kept.scale
        return None, None, *(gradient.mul_(factor.to(gradient.device)) for gradient in gradients)


class _Apart:
    """Gradients of a step that reach no ``.grad``: of the model's parameters, and of all else that losses depend on."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.gradients: list[tuple[Tensor, Tensor]] = []
        self._others: list[tuple[Tensor, Tensor | None]] = []  # leaves, and what their .grad was

    @contextmanager
    def opened(self) -> Iterator[None]:
        """For the time of the step."""
        try:
            with parameters_replaced(self.model) as standins:
                self._known = {id(standin.parameter) for standin in standins}
                yield
            self.gradients = [(s.parameter, grad) for s in standins if (grad := s.gradient()) is not None]
            self.gradients += [(leaf, leaf.grad) for leaf, _ in self._others if leaf.grad is not None]
        finally:
            for leaf, before in self._others:
                leaf.grad = before

    def seen(self, loss: Tensor, output: Tensor | None = None, *, of_main: bool = False) -> Tensor:
        """The loss, once the leaves are known that it depends on beside the model's parameters: of a criterion, say."""
        # The whole graph of a subnet begins at leaves of the step's own, too, which are no parameters.
        every = of_main or output is not None
        found = [leaf for leaf in _leaves_of(loss, output) if every or isinstance(leaf, nn.Parameter)]
        self.keep(found)
        return loss

    def keep(self, found: Iterable[Tensor]) -> None:
        """Let the gradients of these leaves wait, too."""
        leaves = {id(leaf): leaf for leaf in found}
        if leaves.keys() - self._known:
            self._known.update(map(id, self.model.parameters()))  # those that stand in for them now
        for key in leaves.keys() - self._known:
            self._known.add(key)
            self._others.append((leaves[key], leaves[key].grad))
            leaves[key].grad = None


@dataclass(frozen=True)
class _Watched:
    """What makes other inputs for a subnet, and may depend on parameters outside the model."""

    change: Callable[[Any], Any]
    apart: _Apart = field(compare=False)

    def __call__(self, inputs: Any) -> Any:
        made = self.change(inputs)
        for tensor in tensors_in(made):
            self.apart.keep(_leaves_of(tensor, None))
        return made


def _leaves_of(loss: Tensor, output: Tensor | None) -> Iterator[Tensor]:
    """The leaves of the graph of a loss, without those that it depends on through the output alone."""
    waiting: list[Any] = [loss.grad_fn]
    seen: set[Any] = {None, None if output is None else output.grad_fn}
    if loss.grad_fn is None and loss.requires_grad:
        yield loss
    while waiting:
        node = waiting.pop()
        if node not in seen:
            seen.add(node)
            waiting += [following for following, _ in node.next_functions]
            if type(node).__name__ == "AccumulateGrad":
                yield node.variable


@contextmanager
def _float16_seen(model: nn.Module, stages: Sequence[Stage]) -> Iterator[list[bool]]:
    """Whether blocks ran in float16: autocast may be around the step, or in the model's own forward."""
    seen: list[bool] = []
    device = next(model.parameters(), torch.empty(0)).device.type

    def see(*_: Any) -> None:
        seen.append(torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16)

    handles = [model.get_submodule(stage.blocks[0]).register_forward_pre_hook(see) for stage in stages]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _check_wrapper(model: nn.Module) -> None:
    model = getattr(model, "_orig_mod", model)
    if isinstance(model, nn.parallel.DistributedDataParallel) and (model.find_unused_parameters or model.static_graph):
        raise ValueError(
            f"DistributedDataParallel has find_unused_parameters={model.find_unused_parameters} and "
            f"static_graph={model.static_graph}, and would look for the parameters in a graph that is gone when the "
            "loss goes backward; a step uses all of them: wrap the model without these options, or leave out lean=True"
        )
