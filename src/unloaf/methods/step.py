"""What every training method is: a model, a criterion, and one step that turns a batch into gradients."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from unloaf.inputs import batch_size, first_tensor, side_of
from unloaf.losses import is_binary, is_regression, of_this_library, takes_softmax
from unloaf.methods.terms import Criterion, Distance, StepLosses, innermost
from unloaf.passes import (
    Deferred,
    Losses,
    Readout,
    StepTerms,
    SubnetPass,
    advice_on_small_batches,
    call_for_logits,
    check_batch,
    lean_backward,
    one_graph,
    one_pass,
    tell_what_is_not_compiled,
)
from unloaf.sampling import check_seed
from unloaf.stages import Stage, inner_module
from unloaf.subnet import Subnet, check_stages

Weight = float | Callable[[int], float]
Form = Callable[[nn.Module, Sequence[Stage], Any, Sequence[SubnetPass], Losses], StepTerms]


class StepOutput(NamedTuple):
    """What a step returns.

    Attributes:
        loss: the sum of all terms, shape (); carries the graph after ``method(x, y)``, detached after ``backward``.
        logits: of the main network, detached, (batch, ..., classes); in stochastic depth, of the subnet that was drawn;
            None where the loss is the method's own business (`GroundTruthTraining`).
        terms: each loss term by name, as it enters the sum, detached, shape (): "main", of these logits and the labels,
            "subnet0" and so on for the subnets beside.
        subnets: the subnets that were trained, in the order of the terms.

    >>> from unloaf import StepOutput
    >>> StepOutput._fields
    ('loss', 'logits', 'terms', 'subnets')
    """

    loss: Tensor
    logits: Tensor | None
    terms: dict[str, Tensor]
    subnets: tuple[Subnet, ...]


class TrainingMethod(ABC):
    """One training step of a method, for any training loop. It knows no device, optimizer or file.

    ``backward(x, y)`` adds to ``.grad`` (lean in memory); ``method(x, y).loss.backward()`` and, lean too,
    ``method(x, y, lean=True).loss.backward()`` give the same gradients for loops that own the backward pass. Draws
    depend on (seed, step) alone; ``step`` counts the steps made.

    Logits are (batch, ..., classes). The default criterion, torch's cross-entropy, is the mean over all leading
    dimensions, of which the targets have the shape. A criterion of another class gets the logits as they are, right
    after the main pass; of more than two axes only with a `readout`, or targets that tell which axis holds the classes.

    Positions whose label is the criterion's ``ignore_index`` (an attribute, the default of an argument, or -100) count
    in no loss term. A batch without any other trains nothing, and its loss is 0. A subnet_loss of the caller's own gets
    the logits without these examples or, if it has an argument ``counted``, a bool mask of the labels' shape.
    """

    trains_main = True
    stages: tuple[Stage, ...] = ()
    readout: Readout | None = None
    _weight: Weight = 1.0
    _gives_logits = True

    def __init__(self, model: nn.Module, *, seed: int = 0) -> None:
        self.model = model
        self.seed = check_seed(seed)
        self.step = 0
        self._defer = Deferred()

    def __repr__(self) -> str:
        # The weight of the next step would ask a function of the caller's own.
        known = {**self.__dict__, "subnet_weight": self._weight}
        options = {name: known.get(name) for name in inspect.signature(type(self)).parameters if name != "model"}
        options["stages"] = len(self.stages) or None
        words = [f"{name}={_in_short(value)}" for name, value in options.items() if value is not None]
        return f"{type(self).__name__}({type(inner_module(self.model)).__name__}, {', '.join(words)})"

    def __call__(self, x: Any, y: Any = None, subnets: Sequence[Subnet] | None = None, **lean: Any) -> StepOutput:
        """See `forward`."""
        return self.forward(x, y, subnets, **lean)

    def forward(
        self,
        x: Any,
        y: Any = None,
        subnets: Sequence[Subnet] | None = None,
        *,
        lean: bool = False,
        loss_scale: float | Tensor = 1.0,
    ) -> StepOutput:
        """The step for loops that own the backward pass: the caller calls ``out.loss.backward()``.

        Args:
            x: a batch, as the model takes it.
            y: targets for the criterion: class indices or soft labels; None where x holds them, or none are needed.
            subnets: train these instead of drawing.
            lean: False leaves all passes in one autograd graph. True computes the gradients here, with the memory of
                `backward` and a copy of the gradients, and the backward of the loss hands them over, times what comes
                in there; it does so once, and before the next step.
            loss_scale: with lean, the factor of a gradient scaler, so that no gradient in float16 is too small:
                ``scaler.scale(method(x, y, lean=True, loss_scale=scaler.get_scale()).loss).backward()``. What is handed
                over is divided by it.
        """
        if not lean and (isinstance(loss_scale, Tensor) or loss_scale != 1):
            raise ValueError(
                f"loss_scale is {loss_scale}, which is for lean=True; without, multiply the loss before its backward: "
                "(method(x, y).loss * scale).backward()"
            )
        _check_scale(loss_scale, least=5e-324)
        deferred = lean and torch.is_grad_enabled()
        return self.step_in(self._form("deferred" if deferred else "one graph", loss_scale), x, y, subnets)

    def backward(
        self, x: Any, y: Any = None, subnets: Sequence[Subnet] | None = None, *, loss_scale: float | Tensor = 1.0
    ) -> StepOutput:
        """Add the gradients of the step to ``.grad``; peak memory is about that of the main network's graph.

        Args:
            x: a batch, as the model takes it.
            y: targets for the criterion: class indices or soft labels; None where x holds them, or none are needed.
            subnets: train these instead of drawing.
            loss_scale: multiplies the gradients of all terms, not the returned losses: ``1 / n`` to accumulate over n
                batches, ``scaler.get_scale()`` with a gradient scaler.
        """
        if not torch.is_grad_enabled():
            raise ValueError(
                "backward inside torch.no_grad() or torch.inference_mode() computes no gradient; leave it, or call "
                "method(x, y) inside torch.no_grad() for the loss alone"
            )
        _check_scale(loss_scale)
        return self.step_in(self._form("lean", loss_scale), x, y, subnets)

    def step_in(self, form: Form, x: Any, y: Any = None, subnets: Sequence[Subnet] | None = None) -> StepOutput:
        """One step in a form of `unloaf.passes`, such as `separate_backward`."""
        with advice_on_small_batches(x):
            inputs, requests, losses = self._requested(x, y, subnets)
            step = form(self.model, self.stages, inputs, requests, losses)
        values = [step.main_loss, *step.subnet_losses]
        names = ["main", *map(self._term_name, range(len(step.subnet_losses)))]
        terms = {n: value.detach() if value.requires_grad else value for n, value in zip(names, values, strict=True)}
        self.step += 1
        logits = step.logits if self._gives_logits else None
        return StepOutput(torch.stack(values).sum(), logits, terms, tuple(request.subnet for request in requests))

    def state_dict(self) -> dict[str, int]:
        """All that a resumed run needs to draw on: numbers only. The model's own state is not part of it."""
        return {"seed": self.seed, "step": self.step}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue where the state was taken."""
        if set(state) != {"seed", "step"}:
            raise ValueError(
                f"state has the keys {sorted(state)}; give a {type(self).__name__}.state_dict(): seed, step"
            )
        if not all(type(number) is int for number in state.values()) or state["step"] < 0:
            raise ValueError(f"state is {dict(state)}; seed and step are whole numbers, the step of at least 0")
        self.seed, self.step = state["seed"], state["step"]

    @abstractmethod
    def draw(self, examples: int, side: int | None = None, *, step: int | None = None) -> list[SubnetPass]:
        """The passes beside the main one that a step draws: a pure function of these and the seed.

        Args:
            examples: in the batch.
            side: the shorter one of its images, in pixels; None where it is no tensor of images.
            step: which one; default the next one.
        """

    @abstractmethod
    def _requested(self, x: Any, y: Any, subnets: Sequence[Subnet] | None) -> tuple[Any, list[SubnetPass], Losses]:
        """What the passes of the next step get, which there are beside the main one, and what is made of them."""

    def _form(self, kind: Literal["lean", "one graph", "deferred"], scale: float | Tensor) -> Form:
        if kind == "one graph":
            return one_graph
        return partial(lean_backward if kind == "lean" else self._defer, scale=scale)

    def weight_at(self, step: int) -> float:
        """Weight of a subnet's loss in a step, counted from 0.

        Raises:
            ValueError: the function that was given as weight returned no number from 0 up.
        """
        value = self._weight(step) if callable(self._weight) else self._weight
        try:
            if math.isfinite(value) and value >= 0:
                return float(value)
        except TypeError:  # no number
            pass
        found = f"subnet_weight({step}) returned" if callable(self._weight) else "subnet_weight is"
        raise ValueError(f"{found} {value!r}; give a finite number, 0 or above")

    def _term_name(self, index: int) -> str:
        """Of the loss of a subnet."""
        return f"subnet{index}"


class SinglePassTraining(TrainingMethod):
    """A method whose step is one pass, trained on the labels: lean as it is."""

    def __init__(
        self, model: nn.Module, *, criterion: Criterion | None, readout: Readout | None, seed: int = 0
    ) -> None:
        super().__init__(model, seed=seed)
        self.criterion, self.readout = criterion if criterion is not None else nn.CrossEntropyLoss(), readout

    def _form(self, kind: Literal["lean", "one graph", "deferred"], scale: float | Tensor) -> Form:
        return partial(one_pass, scale=scale if kind == "lean" else None)

    def _requested(self, x: Any, y: Any, subnets: Sequence[Subnet] | None) -> tuple[Any, list[SubnetPass], Losses]:
        check_batch(self.model, x, y)
        losses = StepLosses(self.criterion, y, classes_last=self.readout is not None)
        requests = self.draw(1) if subnets is None else [SubnetPass(subnet) for subnet in subnets]
        return x, requests, Losses(losses.main, call=partial(call_for_logits, readout=self.readout))


class SubnetTraining(TrainingMethod):
    """A method that trains the main network on the labels and subnets on what other passes know.

    `subnet_weight` is a number, or a function from the step, counted from 0, to one. A step of weight 0 draws no
    subnet: it is a step of common training, at its cost. Subnets that the caller gives are run at any weight.

    With a `subnet_batch_fraction` below 1 subnets are trained on the first examples of each batch, at least two, as
    they would be on a batch of these alone: with statistics of their own, so that they share blocks with each other but
    none with the main network. Where the fraction comes to the whole batch, it is as 1.
    """

    def __init__(
        self,
        model: nn.Module,
        stages: Sequence[Stage],
        *,
        criterion: Criterion | None,
        subnet_loss: Distance,
        readout: Readout | None,
        subnet_weight: Weight,
        subnet_batch_fraction: float,
        seed: int,
    ) -> None:
        super().__init__(model, seed=seed)
        self.criterion: Criterion = criterion if criterion is not None else nn.CrossEntropyLoss()
        self.subnet_loss, self.readout = subnet_loss, readout
        tell_what_is_not_compiled(model)
        _check_softmax(self.criterion, subnet_loss, readout)
        check_stages(model, stages)
        self.stages, self._weight = tuple(stages), subnet_weight
        self.weight_at(0)
        if not 0 < subnet_batch_fraction <= 1:
            raise ValueError(f"subnet_batch_fraction is {subnet_batch_fraction}; give a share above 0, up to 1")
        self.subnet_batch_fraction = subnet_batch_fraction

    @property
    def subnet_weight(self) -> float:
        """Weight of a subnet's loss in the next step."""
        return self.weight_at(self.step)

    def draw(self, examples: int, side: int | None = None, *, step: int | None = None) -> list[SubnetPass]:
        """The subnet passes of a step, by default the next one; none in a step of weight 0."""
        step = self.step if step is None else step
        return self._passes(self._draw_subnets(step), examples, side, step) if self.weight_at(step) else []

    @abstractmethod
    def _draw_subnets(self, step: int) -> list[Subnet]:
        """The subnets of a step: a pure function of (seed, step)."""

    @abstractmethod
    def _request(self, index: int, subnet: Subnet, side: int | None, step: int) -> SubnetPass:
        """The pass that trains a subnet on all examples of a batch of this side."""

    def _passes(self, subnets: Sequence[Subnet], examples: int, side: int | None, step: int) -> list[SubnetPass]:
        """The passes that train these subnets, each on as much of the batch as subnets see."""
        passes = [self._request(index, subnet, side, step) for index, subnet in enumerate(subnets)]
        seen = max(2, round(self.subnet_batch_fraction * examples))
        return passes if seen >= examples else [request._replace(examples=seen) for request in passes]

    def _requested(self, x: Any, y: Any, subnets: Sequence[Subnet] | None) -> tuple[Any, list[SubnetPass], Losses]:
        check_batch(self.model, x, y)
        examples = batch_size(x) if self.subnet_batch_fraction < 1 else len(first_tensor(x))
        side = side_of(x)
        requests = self.draw(examples, side) if subnets is None else self._passes(subnets, examples, side, self.step)
        # Whether soft labels are shares of classes is looked at once: it costs a wait for the device.
        known = {"classes_last": self.readout is not None, "shares_known": self.step > 0}
        losses = StepLosses(self.criterion, y, subnet_loss=self.subnet_loss, **known)
        subnet = partial(self._subnet_loss, losses, self.weight_at(self.step))
        call, own = partial(call_for_logits, readout=self.readout), not of_this_library(self.subnet_loss)
        return x, requests, Losses(losses.main, subnet, call, observing=own)

    def _subnet_loss(
        self,
        losses: StepLosses,
        weight: float,
        index: int,
        student: Tensor,
        main: Tensor,
        known: Sequence[Tensor | None],
    ) -> Tensor:
        seen = main if len(student) == len(main) else main[: len(student)]
        return losses.subnet(student, self.teacher_of(index, seen, known), weight)

    @abstractmethod
    def teacher_of(self, index: int, main: Tensor, known: Sequence[Tensor | None]) -> Tensor:
        """The logits that a pass learns from.

        Args:
            index: which pass.
            main: detached logits of the main network, of the examples that the pass was run on.
            known: detached logits of the passes known by then.
        """


def _check_softmax(criterion: Criterion, subnet_loss: Distance, readout: Readout | None) -> None:
    """Raise ValueError for a softmax over what the criterion takes for no classes, unless a readout makes them some."""
    inner = innermost(criterion)
    if readout is None and takes_softmax(subnet_loss) and (is_regression(inner) or is_binary(inner)):
        of = "a regression" if is_regression(inner) else "labels that are each yes or no"
        raise ValueError(
            f"criterion is a loss of {of}, but subnet_loss takes a softmax over the last axis of the outputs; "
            "give subnet_loss too (F.mse_loss for a regression, unloaf.bce_kl_loss for binary outputs) or, where that "
            "axis holds classes, say so: readout=lambda output: output"
        )


def _in_short(value: Any) -> str:
    """On one line, a function by its name."""
    if isinstance(value, partial):
        bound = [f"{name}={_in_short(word)}" for name, word in value.keywords.items()]
        return f"partial({', '.join([*map(_in_short, (value.func, *value.args)), *bound])})"
    text = getattr(value, "__name__", None) or repr(value)
    return text if "\n" not in text and len(text) <= 200 else f"{type(value).__name__}(...)"


def _check_scale(scale: float | Tensor, *, least: float = -math.inf) -> None:
    # A tensor is believed: to look at it would wait for the device.
    if not isinstance(scale, Tensor) and not (math.isfinite(scale) and scale >= least):
        allowed = "a finite number" if least < 0 else "a finite number above 0"
        raise ValueError(f"loss_scale is {scale}; give {allowed}, such as scaler.get_scale()")


def check_count(name: str, value: int) -> int:
    """A whole number of at least 1, or ValueError."""
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}; give a whole number of at least 1")
    return value
