"""The losses of a step: which positions count, where the classes are, and what a criterion may not change."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from unloaf.losses import (
    Norm,
    all_over_counted,
    check_two_classes,
    direction,
    is_cross_entropy,
    is_regression,
    label_loss,
    of_this_library,
    resolve_amplitude,
    takes_softmax,
)

Criterion = Callable[[Tensor, Any], Tensor]
Distance = Callable[..., Tensor]
_IGNORED = -100  # of torch; as a class index it has no other meaning


@dataclass(frozen=True)
class DirectionCriterion:
    """A criterion on the direction of the logits, over the last axis, scaled as in `direction_kl_loss`."""

    criterion: Criterion
    amplitude: float | Literal["auto"] = "auto"
    norm: Norm = "layer_norm"
    eps: float = 1e-7

    def __call__(self, logits: Tensor, y: Any) -> Tensor:
        """The criterion of (amplitude * direction(logits), y)."""
        scale = resolve_amplitude(self.amplitude, logits.shape[-1], self.norm)
        check_two_classes(logits.shape[-1], self.norm, self.eps)
        logits = scale * direction(logits, norm=self.norm, eps=self.eps)
        return label_loss(self.criterion, logits, y, classes_last=True)


class StepLosses:
    """The loss terms of one step, each from logits.

    Positions whose label is the criterion's ``ignore_index`` count in no term. They are found once, before a loss is
    called, and the device is asked for no number, unless a distance of the caller's own cannot be told of them.

    Args:
        criterion: from (logits, targets) to a loss.
        y: the targets.
        subnet_loss: from (student logits, teacher logits) to a loss; None where no subnet is taught.
        classes_last: the caller said so, with a readout.
        shares_known: earlier targets were seen to be shares of classes; to look once more costs a wait for the device.
    """

    def __init__(
        self,
        criterion: Criterion,
        y: Any,
        *,
        subnet_loss: Distance | None = None,
        classes_last: bool = False,
        shares_known: bool = False,
    ) -> None:
        self.criterion, self.y, self.subnet_loss, self.classes_last = criterion, y, subnet_loss, classes_last
        self.shares_known = shares_known
        self.counted: Tensor | None = None
        self._all_count: bool | None = None
        self._shared: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] = {}

    def main(self, logits: Tensor) -> Tensor:
        """The criterion of the logits and the targets; 0, without gradient, where no position counts."""
        own = not is_cross_entropy(innermost(self.criterion))
        if self.y is None and not own:
            raise ValueError(
                "y is None, but the criterion is a cross-entropy; give targets or, where the batch holds them and the "
                "model or a function of yours makes the loss, use unloaf.GroundTruthTraining"
            )
        over_classes = not own or isinstance(self.criterion, DirectionCriterion)
        if over_classes and (logits.ndim < 2 or logits.shape[-1] < 2):
            raise ValueError(
                f"the model's logits have shape {tuple(logits.shape)}; training needs at least 2 classes, or a "
                "criterion and a subnet_loss for other outputs, such as nn.BCEWithLogitsLoss() and unloaf.bce_kl_loss"
            )
        if is_regression(self.criterion) and isinstance(self.y, Tensor) and self.y.shape != logits.shape:
            raise ValueError(
                f"the outputs have shape {tuple(logits.shape)}, y {tuple(self.y.shape)}: the criterion would compare "
                "each with each; give y the shape of the outputs, or the outputs that of y, with readout (.squeeze(-1))"
            )
        self._check_class_axis(logits)
        self.counted = positions_that_count(self.criterion, logits, self.y)
        some = None if self.counted is None else self.counted.any()
        if own:
            # A criterion of the caller's own may change what it gets in place, and may divide by no label at all.
            logits = logits.clone() if some is None else torch.where(some, logits, logits.detach())
        loss = one_number(label_loss(self.criterion, logits, self.y, classes_last=self.classes_last), "the criterion")
        return loss if some is None else torch.where(some, loss, torch.zeros_like(loss))

    def subnet(self, student: Tensor, teacher: Tensor, weight: float) -> Tensor:
        """The weighted distance of a student, of the batch's first examples, to its teacher."""
        assert self.subnet_loss is not None
        if not of_this_library(self.subnet_loss):
            counted = None if self.counted is None else self.counted[: len(student)]
            loss = self._own_distance(self.subnet_loss, student.clone(), teacher.clone(), counted)
            return weight * one_number(loss, "subnet_loss")
        if self.counted is None or student.shape != teacher.shape:
            return weight * self.subnet_loss(student, teacher)
        # As with the argument `counted`, but what all subnets have in common is computed once.
        key = len(student), student.dtype
        if key not in self._shared:
            counted = self.counted if len(student) == len(self.counted) else self.counted[: len(student)]
            ratio = all_over_counted(counted, torch.promote_types(student.dtype, torch.float32))
            self._shared[key] = counted.unsqueeze(-1), weight * ratio
        here, factor = self._shared[key]
        return self.subnet_loss(torch.where(here, student, teacher), teacher) * factor

    def _own_distance(self, distance: Distance, student: Tensor, teacher: Tensor, counted: Tensor | None) -> Tensor:
        if counted is None:
            return distance(student, teacher)
        if _has_parameter(distance, "counted"):
            return distance(student, teacher, counted=counted)
        if self._all_count is None:
            assert self.counted is not None
            self._all_count = bool(self.counted.all())
        if self._all_count:
            return distance(student, teacher)
        if student.ndim > 2:  # rows alone would not be what the function takes
            raise ValueError(
                f"some of the {tuple(self.y.shape)} labels are {ignore_index_of(self.criterion)} and do not count, but "
                "subnet_loss cannot know which; give it a third argument, counted (bool, the shape of the labels), "
                "and hand it on: unloaf.kl_loss(student, teacher, counted=counted)"
            )
        student = student[counted]
        return distance(student, teacher[counted]) if len(student) else student.sum()

    def _check_class_axis(self, logits: Tensor) -> None:
        """Raise ValueError where a softmax over the last axis of the logits may be one over anything but classes."""
        criterion, shape = innermost(self.criterion), tuple(self.y.shape) if isinstance(self.y, Tensor) else None
        if self.subnet_loss is None or self.classes_last or type(criterion) is nn.CrossEntropyLoss:
            return  # the last checks its shapes
        softmax = takes_softmax(self.subnet_loss) or isinstance(self.criterion, DirectionCriterion)
        if logits.ndim < 3:
            if softmax and not is_cross_entropy(criterion) and isinstance(self.y, Tensor):
                self._check_columns(logits, self.y)
            return
        last, second = shape == logits.shape[:-1], shape == (*logits.shape[:1], *logits.shape[2:])
        # Without a softmax it may be a regression with a distance of its own.
        known = not second if (last or second) and not self.y.is_floating_point() else not softmax
        if known:
            return
        advice = "" if second and not last else "output (classes last) or "
        raise ValueError(
            f"the logits have shape {tuple(logits.shape)}, y {shape or type(self.y).__name__}: with a criterion of "
            "your own it is not known on which axis the classes are; say it with "
            f"readout=lambda output: {advice}output.movedim(1, -1) (classes second); "
            "criterion and subnet_loss then get (batch, ..., classes)"
        )

    def _check_columns(self, logits: Tensor, y: Tensor) -> None:
        """The same for rows of outputs: their columns may be quantities of different meaning, or several labels."""
        if y.shape == logits.shape:
            known = self.shares_known or _are_shares(y)
        else:
            known = not y.is_floating_point() and y.numel() == len(logits)
        if not known:
            raise ValueError(
                f"the outputs have shape {tuple(logits.shape)}, y {tuple(y.shape)} of {y.dtype}, neither class indices "
                "nor shares of classes that add up to 1, but subnet_loss takes a softmax over the columns; give "
                "subnet_loss too (F.mse_loss for a regression, unloaf.bce_kl_loss for binary outputs) or, where the "
                "columns are classes, say so: readout=lambda output: output"
            )


def _are_shares(y: Tensor) -> bool:
    """Whether each row is shares of classes; rows of zeros count for nothing."""
    total = y.sum(-1, dtype=torch.float32)
    return bool(((y >= 0).all(-1) & (((total - 1).abs() < 0.01) | (total == 0))).all())


def positions_that_count(criterion: Criterion, logits: Tensor, y: Any) -> Tensor | None:
    """Bool, the shape of the logits without their last axis; None where every position does.

    Labels that are class indices of positions, or of examples, and not the criterion's ``ignore_index``.
    """
    ignored = ignore_index_of(criterion)
    if ignored is None or not isinstance(y, Tensor) or y.is_floating_point() or logits.ndim < 2 or logits.shape[-1] < 2:
        return None
    positions = logits.shape[:-1]
    if not y.ndim or y.shape != positions[: y.ndim] or (y.dtype == torch.uint8 and ignored < 0):
        return None
    counted = y != ignored
    if y.ndim == len(positions):
        return counted
    return counted.reshape(*y.shape, *[1] * (len(positions) - y.ndim)).expand(positions)


def ignore_index_of(criterion: Criterion) -> int | None:
    """The label that does not count: an attribute, the default of an argument, or else that of torch."""
    criterion = innermost(criterion)
    if hasattr(criterion, "ignore_index"):
        return getattr(criterion, "ignore_index")  # noqa: B009
    if isinstance(criterion, nn.Module):  # a user-defined loss around one of torch's
        held = {getattr(part, "ignore_index") for part in criterion.modules() if hasattr(part, "ignore_index")}  # noqa: B009
        if len(held) == 1:
            return held.pop()
    found = _parameters(criterion).get("ignore_index")
    return _IGNORED if found is None or found.default is inspect.Parameter.empty else found.default


def innermost(criterion: Criterion) -> Criterion:
    """The criterion that one of this library passes logits on to, or itself."""
    return criterion.criterion if isinstance(criterion, DirectionCriterion) else criterion


def one_number(loss: Tensor, source: str) -> Tensor:
    """The loss, or ValueError where it is not of shape ()."""
    if loss.ndim:
        raise ValueError(f"{source} returned shape {tuple(loss.shape)}; it must return one number (reduction='mean')")
    return loss


def _has_parameter(function: Callable[..., Any], name: str) -> bool:
    return name in _parameters(function)


def _parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    try:
        return dict(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # written in C
        return {}
