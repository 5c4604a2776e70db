"""What a function of the caller's own makes of the main network's batch for a subnet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from unloaf.inputs import rows_of
from unloaf.passes.containers import unchanged
from unloaf.sampling import draw_generator

InputRule = Callable[[Any, torch.Generator], Any]


@dataclass(frozen=True)
class ChangedInputs:
    """What one subnet of one step sees of a batch: a pure function of the batch and these numbers.

    Attributes:
        rule: from (batch, generator) to a new batch of as many examples. One with an attribute ``per = "step"`` is
            called once for all subnets of a step, which then share what they have in common.
        name: of the argument that the rule was given as, for errors.
        seed: of the method.
        step: counted from 0.
        index: of the subnet in the step.

    >>> rule = lambda batch, generator: batch[..., : int(torch.randint(1, 4, (), generator=generator))]
    >>> seen = ChangedInputs(rule, "subnet_inputs", seed=0, step=7, index=1)
    >>> torch.equal(seen(torch.arange(8.0).view(2, 4)), seen(torch.arange(8.0).view(2, 4)))
    True
    """

    rule: InputRule = field(compare=False)
    name: str
    seed: int
    step: int
    index: int

    @classmethod
    def of(cls, rule: InputRule, name: str, *, seed: int, step: int, index: int) -> ChangedInputs:
        """For this subnet, or for all of the step where the rule says so."""
        return cls(rule, name, seed, step, 0 if getattr(rule, "per", "subnet") == "step" else index)

    def __call__(self, inputs: Any) -> Any:
        """The batch that the rule makes of a batch.

        Raises:
            ValueError: it returned nothing, or another number of examples, or changed what it was given.
        """
        with unchanged(inputs, self.name):
            seen = self.rule(inputs, draw_generator(self.seed, self.step, self.index, purpose="inputs"))
        given, found = rows_of(inputs), rows_of(seen)
        if seen is None or (given is not None and given != found):
            what = type(seen).__name__ if found is None else f"a batch of {found} examples"
            raise ValueError(
                f"{self.name} returned {what} for a batch{'' if given is None else f' of {given}'}; give a function of "
                "(batch, generator) that returns a batch of as many examples"
            )
        return seen
