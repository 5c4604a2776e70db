"""The FLOPs of a step for a first look: the network runs at few sizes of the input, whatever is drawn."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from unloaf.inputs import View
from unloaf.measure.flops import StepCounter
from unloaf.subnet import Subnet


class QuickCounter(StepCounter):
    """`unloaf.measure.flops.StepCounter` with subnets that are reckoned instead of run.

    A block that can be skipped keeps the shape, so the other blocks cost the same without it. What a smaller input
    costs is interpolated, in the square of the side, between the sides at which the network runs (`sides`).

    >>> import torch, unloaf
    >>> from torchvision.models import resnet18
    >>> model, x = resnet18(), torch.zeros(1, 3, 64, 64)
    >>> stages = unloaf.find_stages(model, x)
    >>> flops = QuickCounter(model, stages, x).mean(unloaf.StimulativeTraining(model, stages), x, range(20))
    >>> flops.common < flops.shared < flops.separate
    True
    """

    sides: Sequence[int] = ()

    def _events(self, subnet: Subnet, view: View) -> tuple[tuple[str, int], ...]:
        full = Subnet.full(self.stages)
        if subnet == full:
            known = view.side is None or view.side in self.sides
            return super()._events(subnet, view) if known else self._between(full, view)
        kept = subnet.modes(self.stages)
        return tuple(
            (path, flops) for path, flops in self.events(full, view) if path in kept or path not in self.blocks
        )

    def _between(self, full: Subnet, view: View) -> tuple[tuple[str, int], ...]:
        side = view.side
        assert side is not None
        at = bisect_left(self.sides, side)
        if not 0 < at < len(self.sides):
            return super()._events(full, view)
        low, high = self.sides[at - 1], self.sides[at]
        share = (side**2 - low**2) / (high**2 - low**2)
        below, above = self.events(full, View(low)), self.events(full, View(high))
        return tuple((path, round(a + share * (b - a))) for (path, a), (_, b) in zip(below, above, strict=True))
