"""The losses of a step: each is called as soon as what it reads is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from unloaf.passes.plan import Move, Pass
from unloaf.passes.readout import Call, call_for_logits

_MAIN = -1


class Losses(NamedTuple):
    """What a step makes of its passes.

    Attributes:
        main: from what the main pass gave to a loss of shape ().
        subnet: from (index of the request, what its pass gave, the same of the main pass and of all requests that are
            known by then, detached) to a loss of shape (); None where no subnet is run.
        call: from (model, what a pass sees of the batch) to what it gives, a tensor; default the model's logits.
        alike: let all passes draw alike in modules too; else only what the model's own forward is seen to draw.
        observing: a loss may read what modules keep of a pass, or what hooks in them saw: calls of modules that do so
            are computed in each pass.
    """

    main: Callable[[Tensor], Tensor]
    subnet: Callable[[int, Tensor, Tensor, Sequence[Tensor | None]], Tensor] | None = None
    call: Call = call_for_logits
    alike: bool = False
    observing: bool = False

    def of_subnet(self, index: int, output: Tensor, main: Tensor, known: Sequence[Tensor | None]) -> Tensor:
        """The loss of a request; ValueError where there is none."""
        if self.subnet is None:
            raise ValueError("a subnet was run, but losses.subnet is None; give a loss for it, or run no subnet")
        return self.subnet(index, output, main, known)


class StepTerms(NamedTuple):
    """Detached main logits, the main loss, and a loss for each request."""

    logits: Tensor
    main_loss: Tensor
    subnet_losses: list[Tensor]


class Terms:
    """The losses of a step. A loss is called right after its pass, or after the last of those whose logits it reads.

    So it finds what a model keeps of its latest pass (a feature that a hook stored) as after a pass of its own, in a
    lean step and in one graph alike.
    """

    def __init__(self, requests: int, losses: Losses) -> None:
        self._losses = losses
        self._known: list[Tensor | None] = [None] * requests
        self._values: dict[int, Tensor] = {}
        self._waiting: dict[Pass, Tensor] = {}

    def add(self, move: Move, logits: Tensor) -> None:
        """After a pass has gone forward: call the losses that can be called."""
        if move.of.number == 0:
            self.main_logits, self._values[_MAIN] = logits.detach(), self._losses.main(logits)
        for index in move.of.requests:
            self._known[index] = logits.detach()
        self._waiting[move.of] = logits
        for ready in move.losses:
            logits = self._waiting.pop(ready)
            for index in ready.requests:
                self._values[index] = self._losses.of_subnet(index, logits, self.main_logits, self._known)

    def hand_over(self, one: Pass) -> list[Tensor]:
        """The losses of a pass, for its backward; without their graphs they stay."""
        indices = [*([_MAIN] if one.number == 0 else []), *one.requests]
        losses = [self._values[index] for index in indices]
        self._values.update((index, loss.detach()) for index, loss in zip(indices, losses, strict=True))
        return losses

    def result(self) -> StepTerms:
        """All of them."""
        return StepTerms(self.main_logits, self._values[_MAIN], [self._values[i] for i in range(len(self._known))])
