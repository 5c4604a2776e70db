"""When the losses of a step are called: each as soon as what it reads is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from unloaf.passes.plan import Run

MainLoss = Callable[[Tensor], Tensor]
SubnetLoss = Callable[[int, Tensor, Tensor, Sequence[Tensor | None]], Tensor]


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

    def __init__(self, requests: int, main_loss: MainLoss, subnet_loss: SubnetLoss) -> None:
        self._main_loss, self._subnet_loss = main_loss, subnet_loss
        self.known: list[Tensor | None] = [None] * requests
        self.losses: list[Tensor | None] = [None] * requests
        self._waiting: list[Run] = []

    def begin(self, main: Run) -> None:
        """After the main pass: the main loss, and those of requests for the main network."""
        assert main.logits is not None
        self.main_logits = main.logits.detach()
        self.main_loss = self._main_loss(main.logits)
        self.add(main)

    def add(self, run: Run) -> None:
        """After a pass: all losses that can be called."""
        assert run.logits is not None
        for index in run.requests:
            self.known[index] = run.logits.detach()
        self._waiting.append(run)
        for ready in [waiting for waiting in self._waiting if all(self.known[i] is not None for i in waiting.needs)]:
            assert ready.logits is not None
            for index in ready.requests:
                self.losses[index] = self._subnet_loss(index, ready.logits, self.main_logits, self.known)
            self._waiting.remove(ready)

    def of(self, run: Run) -> list[Tensor] | None:
        """The losses of a run's requests; None if they were not called yet."""
        return None if run in self._waiting else [loss for i in run.requests if (loss := self.losses[i]) is not None]

    def detach(self, run: Run) -> None:
        """Let go of the graphs of a run's losses."""
        for index in run.requests:
            loss = self.losses[index]
            self.losses[index] = None if loss is None else loss.detach()

    def finish(self, main: Run) -> None:
        """Let go of the graph of the main pass."""
        self.detach(main)
        self.main_loss = self.main_loss.detach()

    def result(self) -> StepTerms:
        """All of them."""
        return StepTerms(self.main_logits, self.main_loss, [loss for loss in self.losses if loss is not None])


def check_gradient(has_one: bool) -> None:
    """Raise ValueError unless a loss of the step has a gradient."""
    if not has_one:
        raise ValueError(
            "no loss of this step has a gradient: all parameters are frozen, or the losses are cut off from them; "
            "set requires_grad_(True) for those to train"
        )
