"""Ground-truth training (ST*): the main network and its subnets learn from the targets, by any loss of any model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from unloaf.inputs import SmallerInputs, resize
from unloaf.methods.changed_inputs import ChangedInputs, InputRule
from unloaf.methods.step import TrainingMethod, Weight, check_count
from unloaf.methods.terms import Criterion
from unloaf.passes import Losses, SubnetPass, logits_of, tell_what_is_not_compiled
from unloaf.passes.containers import unchanged, with_tensors
from unloaf.sampling import InterStageSampler, Sampler, draw_generator
from unloaf.stages import Stage, call_model, inner_module
from unloaf.subnet import Subnet, check_stages

Loss = Callable[[nn.Module, Any], Tensor | Mapping[str, Tensor]]


class GroundTruthTraining(TrainingMethod):
    """Each step trains the main network and sampled subnets on the targets: detectors, dense heads, any model and loss.

    ``L = loss(model, batch) + subnet_weight * sum_i loss(subnet_i, shrink(batch))``

    The subnets may be those of a sub-module, a detector's backbone: ``find_stages(..., within="backbone.body")``. What
    lies before the first skipped block is computed once for all passes that see the same batch. All passes of a step
    begin with the same random state of torch and Python, not of numpy, so that what the loss draws (a detector's sample
    of boxes) is drawn alike.

    Args:
        model: the network, possibly wrapped by DistributedDataParallel.
        stages: from `find_stages`.
        loss: from (model, batch) to a loss of shape (), or a mapping of such losses, whose sum counts. It calls the
            model that it is given once; in the passes of subnets that runs as the subnet.
        sampler: the rule that draws subnets.
        num_subnets: subnets per step; their losses are summed.
        subnet_weight: 0 or above, or a function from the step, counted from 0, to such a number; in a step of weight 0
            no subnet is run.
        shrink: from (batch, generator) to a batch of smaller inputs and the targets that go with them, for subnets; all
            randomness comes from the generator, which is new for each subnet or, if the function has an attribute
            ``per = "step"``, for each step. None shows subnets the main network's batch, with which they share blocks.
        seed: of the draws.
        check_finite: refuse a loss that is no finite number. False is for a loop that looks at the terms itself: of
            several processes all must come to the end of a step before one may stop.

    Raises:
        ValueError: an argument out of range, stages of another model; in a step, a loss that is no finite number, or
            that called the model twice or never.

    Source: Ye et al. 2023 (ST++), fine-tuning of R50-ST*; for classifiers, ``CE_target`` of the published script.

    >>> import torch, unloaf
    >>> from torch.nn import functional as F
    >>> from torchvision.models import resnet18
    >>> model, batch = resnet18(num_classes=10), (torch.randn(2, 3, 64, 64), torch.tensor([1, 7]))
    >>> stages = unloaf.find_stages(model, batch[0])
    >>> loss = lambda model, batch: F.cross_entropy(model(batch[0]), batch[1])
    >>> out = unloaf.GroundTruthTraining(model, stages, loss).backward(batch)
    >>> list(out.terms)
    ['main', 'subnet0']
    """

    _gives_logits = False

    def __init__(
        self,
        model: nn.Module,
        stages: Sequence[Stage],
        loss: Loss,
        *,
        sampler: Sampler = InterStageSampler(),
        num_subnets: int = 1,
        subnet_weight: Weight = 1.0,
        shrink: InputRule | None = None,
        seed: int = 0,
        check_finite: bool = True,
    ) -> None:
        super().__init__(model, seed=seed)
        tell_what_is_not_compiled(model)
        check_stages(model, stages)
        if not callable(loss):
            raise ValueError(f"loss is {loss!r}; give a function of (model, batch)")
        if hasattr(loss, "_torchdynamo_orig_callable"):
            raise ValueError(
                "loss was compiled by torch.compile, whose graph would hold the blocks of one subnet; give the "
                "function itself, and compile the blocks of the model: unloaf.compile_blocks(model, stages)"
            )
        if shrink is not None and not callable(shrink):
            raise ValueError(f"shrink is {shrink!r}; give a function of (batch, generator), or None")
        self.stages, self.loss, self.sampler, self.shrink = tuple(stages), loss, sampler, shrink
        self.num_subnets, self._weight = check_count("num_subnets", num_subnets), subnet_weight
        self.check_finite = check_finite
        self.weight_at(0)
        self.sampler.sample(self.stages, draw_generator(seed, 0, 0))  # a space that does not fit is reported here

    def draw(self, examples: int = 0, side: int | None = None, *, step: int | None = None) -> list[SubnetPass]:
        """The subnet passes of a step, by default the next one, whatever the batch; none in a step of weight 0."""
        step = self.step if step is None else step
        count = self.num_subnets if self.weight_at(step) else 0
        generators = [draw_generator(self.seed, step, index) for index in range(count)]
        return self._passes([self.sampler.sample(self.stages, generator) for generator in generators], step)

    def _passes(self, subnets: Sequence[Subnet], step: int) -> list[SubnetPass]:
        if self.shrink is None:
            return [SubnetPass(subnet) for subnet in subnets]
        drawn = {"rule": self.shrink, "name": "shrink", "seed": self.seed, "step": step}
        return [SubnetPass(s, change=ChangedInputs.of(**drawn, index=index)) for index, s in enumerate(subnets)]

    def _requested(self, x: Any, y: Any, subnets: Sequence[Subnet] | None) -> tuple[Any, list[SubnetPass], Losses]:
        requests = self.draw() if subnets is None else self._passes(subnets, self.step)
        weight, parts = self.weight_at(self.step), {}

        def call(model: nn.Module, batch: Any) -> Tensor:
            found = _called_once(self.loss, model, batch)
            parts.update((name, part.detach()) for name, part in found.items())
            return sum(found.values(), start=next(iter(found.values())).new_zeros(()))

        def checked(loss: Tensor, of: str) -> Tensor:
            return _finite(loss, parts, of) if self.check_finite else loss

        def main(loss: Tensor) -> Tensor:
            return checked(loss, "the main network")

        def subnet(index: int, loss: Tensor, *_: Any) -> Tensor:
            return weight * checked(loss, f"subnet {requests[index].subnet}")

        return x if y is None else (x, y), requests, Losses(main, subnet, call, alike=True, observing=True)


def ground_truth_of_labels(
    model: nn.Module,
    stages: Sequence[Stage],
    *,
    criterion: Criterion | None = None,
    subnet_inputs: SmallerInputs | InputRule | None = None,
    **options: Any,
) -> GroundTruthTraining:
    """ST* of a classifier: its subnets learn from the labels, ``CE_target`` of the published script.

    Args:
        model: gives logits, (batch, ..., classes).
        stages: from `find_stages`.
        criterion: of logits and targets; default cross-entropy.
        subnet_inputs: smaller inputs for subnets, or a function from (inputs, generator) to inputs.
        options: of `GroundTruthTraining`.
    """
    measured = nn.CrossEntropyLoss() if criterion is None else criterion

    def loss(model: nn.Module, batch: Any) -> Tensor:
        x, y = batch
        return measured(logits_of(call_model(model, x)), y)

    shrink = None if subnet_inputs is None else _Shrunk(subnet_inputs)
    return GroundTruthTraining(model, stages, loss, shrink=shrink, **options)


class _Shrunk:
    """The inputs of a batch changed, its targets as they are."""

    def __init__(self, rule: SmallerInputs | InputRule) -> None:
        self._rule, self.per = rule, getattr(rule, "per", "subnet")

    def __call__(self, batch: Any, generator: torch.Generator) -> Any:
        x, y = batch
        if not isinstance(self._rule, SmallerInputs):
            return self._rule(x, generator), y
        return resize(x, self._rule.draw(min(x.shape[-2:]), generator)), y


def _called_once(loss: Loss, model: nn.Module, batch: Any) -> dict[str, Tensor]:
    """The losses by name ("" for one without a name); ValueError unless they are numbers, of one call of the model."""
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1
        if calls > 1:
            raise ValueError("loss called the model twice, but a pass is one call; join both inputs in one batch")

    handle = inner_module(model).register_forward_pre_hook(count)
    try:
        with unchanged(batch, "loss"):
            # Containers of its own: a loss may take the labels out of the batch.
            value = loss(model, with_tensors(batch, lambda tensor: tensor))
    finally:
        handle.remove()
    if not calls:
        raise ValueError("loss did not call the model that it was given; it must call it once: model(...)")
    found = dict(value) if isinstance(value, Mapping) else {"": value}
    for name, part in found.items():
        if not isinstance(part, Tensor) or part.ndim or not part.is_floating_point():
            what = f"shape {tuple(part.shape)} of {part.dtype}" if isinstance(part, Tensor) else type(part).__name__
            raise ValueError(
                f"loss returned {what}{f' under {name!r}' if name else ''}; it must return one number, a tensor of "
                "shape () with a gradient, or a mapping of such numbers to be summed"
            )
    if not found:
        raise ValueError("loss returned an empty mapping; it must return one number or a mapping of numbers")
    return found


def _finite(loss: Tensor, parts: Mapping[str, Tensor], of: str) -> Tensor:
    """The loss, or ValueError."""
    if loss.isfinite():
        return loss
    named = ", ".join(f"{name} {part.item()}" for name, part in parts.items() if name)
    raise ValueError(
        f"loss of {of} is {loss.detach().item()}{f' ({named})' if named else ''}; no gradient was added; look at the "
        "batch, leave it out, or lower the learning rate"
    )
