"""The least arithmetic a step needs: each distinct block application once."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from unloaf.inputs import View, batch_size, first_examples, side_of, to_device
from unloaf.methods import TrainingMethod
from unloaf.passes import Readout, SubnetPass, logits_of
from unloaf.stages import Stage, between_blocks, call_model, copy_of, evaluating, inner_module
from unloaf.subnet import check_stages


def _attention(query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query, *(_with_heads_of(query, shape) for shape in (key, value)))


def _attention_backward(
    grad: torch.Size, query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any
) -> int:
    return sdpa_backward_flop_count(grad, query, *(_with_heads_of(query, shape) for shape in (key, value)))


def _with_heads_of(query: torch.Size, shape: torch.Size) -> tuple[int, ...]:
    """A head of keys may serve several of the queries: as many products, which torch 2.11 refuses to count."""
    return (shape[0], query[1], *shape[2:])


# The counter of torch 2.11 leaves out the fused attention that CPUs compute with; later ones count it the same way.
_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


def counting_flops() -> FlopCounterMode:
    """Torch's flop counter: convolutions, linear layers, attention.

    >>> with counting_flops() as counter:
    ...     _ = nn.functional.scaled_dot_product_attention(*torch.zeros(3, 1, 2, 50, 16))
    >>> counter.get_total_flops() == 2 * 2 * (2 * 50 * 16 * 50)  # two heads, two products: 50x16 by 16x50, and back
    True
    """
    return FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION)


class StepFlops(NamedTuple):
    """FLOPs of one example in a step, forward and backward (a multiply-add counts as two)."""

    common: float  # of common training
    shared: float  # with exact prefix sharing, the least possible
    separate: float  # with a complete pass for each subnet


def method_flops(method: TrainingMethod, x: Any, steps: Iterable[int]) -> StepFlops:
    """Mean `StepFlops` of a method over the draws of the given steps; its step counter is left as it is.

    The batch is of the size that is trained; the network runs on its first example.
    """
    return StepCounter(method.model, method.stages, x, readout=method.readout).mean(method, x, steps)


_Events = tuple[tuple[str, int], ...]  # calls of blocks and of modules between them, FLOPs since the call before


def forward_events(model: nn.Module, modules: Mapping[str, nn.Module], inputs: Any) -> _Events:
    """The calls of these modules in a forward pass, in their order, each with the FLOPs since the call before.

    The last one is "output": what is computed behind them.
    """
    events: list[tuple[str, int]] = []
    with evaluating(model), counting_flops() as counter, ExitStack() as hooks:

        def record(path: str) -> None:
            events.append((path, counter.get_total_flops() - sum(flops for _, flops in events)))

        for path, module in modules.items():
            hooks.enter_context(module.register_forward_hook(lambda *_, path=path: record(path)))
        call_model(model, inputs)
        record("output")
    return tuple(events)


class StepCounter:
    """Counts `StepFlops` of steps, on forward passes of the main network, one for each side of the input.

    Counted by torch's flop counter, independently of the shared passes; a backward costs twice its forward, but for the
    first layer, whose input needs no gradient. Subnets do not run: a block that can be skipped keeps the shape, so the
    other blocks cost the same without it.

    Args:
        model: any network with these stages, whose blocks are not compiled; a copy of it runs.
        stages: from `find_stages`.
        x: a batch of the size that is trained.
        readout: from the model's output to the logits.
        sides: those at which it runs, whatever is drawn: between them the cost is interpolated in the square of the
            side. Default: it runs at every side that is drawn.
        data: False to run without data, if the model can, in a fraction of the time. The backward of fused attention,
            which computes more than the plain one, is then counted as the plain one.

    >>> import torch, unloaf
    >>> from torchvision.models import resnet18
    >>> from unloaf.passes import SubnetPass
    >>> model, x = resnet18(), torch.randn(1, 3, 64, 64)
    >>> stages = unloaf.find_stages(model, x)
    >>> count = StepCounter(model, stages, x)
    >>> flops = count([SubnetPass(unloaf.Subnet.from_depths(stages, (2, 2, 1, 2)))], main=True)
    >>> round(flops.shared / flops.common, 2), round(flops.separate / flops.common, 2)
    (1.23, 1.87)
    """

    def __init__(
        self,
        model: nn.Module,
        stages: Sequence[Stage],
        x: Any,
        *,
        readout: Readout | None = None,
        sides: Sequence[int] = (),
        data: bool = True,
    ) -> None:
        self.stages, self.sides, self.readout = stages, sides, readout
        one, self.batch_size = first_examples(x, 1), batch_size(x)
        try:
            places = (model, one) if data else (copy_of(inner_module(model)).to("meta"), to_device(one, "meta"))
            self._begin(*places)
        except Exception:  # whatever a model raises that looks at values, or makes tensors of its own
            if data:
                raise
            self._begin(model, one)

    def _begin(self, model: nn.Module, one: Any) -> None:
        self.model, self.one = copy_of(inner_module(model)), one
        self.blocks = check_stages(self.model, self.stages)
        self.between = dict(between_blocks(self.model, self.blocks))
        self.main = cache(self._main)
        forward = sum(flops for _, flops in self.main(View()))
        self.saved = 1 - self._forward_and_backward() / (3 * forward)  # share that the first layer's backward spares

    def __call__(self, passes: Sequence[SubnetPass], *, main: bool) -> StepFlops:
        """FLOPs of one example in a step with these subnets and, with ``main``, the main network."""
        seen: set[tuple[Any, ...]] = set()
        common = 3 * sum(flops for _, flops in self.main(View())) * (1 - self.saved)
        shared = self._new(View(), self.main(View()), seen) if main else 0.0
        separate = common if main else 0.0
        for request in passes:
            kept = request.subnet.modes(self.stages)
            events = self.main(request.view._replace(examples=None))
            events = tuple((path, flops) for path, flops in events if path in kept or path not in self.blocks)
            shared += self._new(request.view, events, seen)
            separate += self._new(request.view, events, set())
        return StepFlops(common, shared, separate)

    def mean(self, method: TrainingMethod, x: Any, steps: Iterable[int]) -> StepFlops:
        """Mean over what the method draws in these steps for such a batch."""
        counted = [self(method.draw(batch_size(x), side_of(x), step=step), main=method.trains_main) for step in steps]
        return StepFlops(*(sum(column) / len(counted) for column in zip(*counted, strict=True)))

    def _new(self, view: View, events: _Events, seen: set[tuple[Any, ...]]) -> float:
        """FLOPs of what follows the longest prefix seen before."""
        prefix: tuple[Any, ...] = (view,)
        fresh = prefix not in seen
        seen.add(prefix)
        total = 0
        for path, flops in events:
            prefix = (*prefix, path)
            total += 0 if prefix in seen else flops
            seen.add(prefix)
        share = 1 if view.examples is None else view.examples / self.batch_size
        return 3 * total * share * ((1 - self.saved) if fresh else 1)

    def _main(self, view: View) -> _Events:
        """Of the main network that sees this of the input."""
        side = view.side
        at = len(self.sides) if side is None or side in self.sides else bisect_left(self.sides, side)
        if side is not None and 0 < at < len(self.sides):
            low, high = self.sides[at - 1], self.sides[at]
            share = (side**2 - low**2) / (high**2 - low**2)
            both = zip(self.main(View(low)), self.main(View(high)), strict=True)
            return tuple((path, round(below + share * (above - below))) for (path, below), (_, above) in both)
        return forward_events(self.model, self.blocks | self.between, view.of(self.one))

    def _forward_and_backward(self) -> int:
        with evaluating(self.model), torch.enable_grad(), counting_flops() as counter:
            logits: Tensor = logits_of(call_model(self.model, self.one), self.readout)
            weights = [p for p in self.model.parameters() if p.requires_grad]
            torch.autograd.grad(logits.sum(), weights, allow_unused=True)
            return counter.get_total_flops()
