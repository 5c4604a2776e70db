"""Losses over a large vocabulary: the logits of a few positions at a time, never those of all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unloaf.losses import at_least_float32, kl_loss

IGNORED = -100  # label of a position that counts in no loss, as torch has it
# Logits that are held at a time: 85 positions of 49,152 classes, 16 MiB in float32. A few such tensors are alive at
# once; below that the matrix products get slower, and the gradient of the head's weights is larger anyway.
_HELD = 1 << 22


def defer_head(head: nn.Module) -> None:
    """In training mode the head returns what it is given, the features, from which the losses here make logits.

    In evaluation mode it is as it was. Class, parameters and keys stay, and a ``copy.deepcopy`` does the same.

    Args:
        head: the last linear layer of a language model, between the final norm and the logits.

    Raises:
        ValueError: this is no linear layer, or its ``forward`` was replaced by something else.

    >>> head = nn.Linear(2, 5)
    >>> defer_head(head)
    >>> head.train()(torch.zeros(1, 2)).shape, head.eval()(torch.zeros(1, 2)).shape
    (torch.Size([1, 2]), torch.Size([1, 5]))
    """
    forward: Any = head.forward
    if not isinstance(head, nn.Linear) or not isinstance(forward, MethodType):
        raise ValueError(f"the head is a {type(head).__name__}; give the linear layer that makes the logits")
    if not hasattr(forward.__func__, "unloaf_defers"):
        head.__dict__["forward"] = MethodType(_deferring(forward.__func__), head)


def _deferring(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def run(head: nn.Module, features: Tensor) -> Tensor:
        return features if head.training else forward(head, features)

    run.__dict__["unloaf_defers"] = True
    return run


def deferred_head(model: nn.Module) -> nn.Linear | None:
    """The head of a model that `defer_head` was given; None where there is none.

    >>> deferred_head(nn.Linear(2, 5)) is None
    True
    """
    for module in model.modules():
        if hasattr(getattr(module.__dict__.get("forward"), "__func__", None), "unloaf_defers"):
            assert isinstance(module, nn.Linear)
            return module
    return None


@contextmanager
def giving_features(model: nn.Module) -> Iterator[None]:
    """Inside, a deferred head returns features in evaluation mode too."""
    head = deferred_head(model)
    before = None if head is None else head.training
    try:
        if head is not None:
            head.training = True
        yield
    finally:
        if head is not None and before is not None:
            head.training = before


@dataclass(frozen=True, eq=False)
class NextTokenLoss:
    """Mean cross-entropy of the tokens that come next, in nats, from features: the criterion of a deferred head.

    Positions whose label is ``ignore_index`` count for nothing, and get no gradient; where all are, the loss is 0.

    Attributes:
        head: the linear layer that makes the logits; its weights get their gradient here.
        ignore_index: the label that does not count.

    >>> loss = NextTokenLoss(nn.Linear(2, 4))
    >>> features, y = torch.zeros(1, 3, 2), torch.tensor([[1, 2, -100]])
    >>> _ = nn.init.zeros_(loss.head.bias)
    >>> loss(features, y).isclose(torch.tensor(4.0).log())
    tensor(True)
    """

    head: nn.Module
    ignore_index: int = IGNORED

    def __call__(self, features: Tensor, y: Tensor) -> Tensor:
        """The loss of features, (..., width), and labels, int64 (...)."""
        _check_labels(features, y)
        rows, labels = features.flatten(0, -2), y.flatten()
        piece = partial(_cross_entropy, ignored=self.ignore_index)
        counted = (labels != self.ignore_index).sum()
        return _summed(rows, self.head, piece, (labels,)) / counted.clamp(min=1)

    def summed(self, features: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The sum over the positions that count, and how many they are."""
        labels = y.flatten()
        piece = partial(_cross_entropy, ignored=self.ignore_index)
        return _summed(features.flatten(0, -2), self.head, piece, (labels,)), (labels != self.ignore_index).sum()


@dataclass(frozen=True, eq=False)
class NextTokenDistance:
    """A distance of two predictions, `unloaf.kl_loss` or the like, from their features: a ``subnet_loss``.

    Both have the same head. The teacher is taken as constant, its features and the head's part in its logits.

    Attributes:
        head: the linear layer that makes the logits; its weights get the student's gradient here.
        distance: of logits, (positions, classes) each, in the mean over positions.

    >>> distance = NextTokenDistance(nn.Linear(2, 4))
    >>> float(distance(torch.ones(1, 3, 2), torch.ones(1, 3, 2)).detach())
    0.0
    """

    head: nn.Module
    distance: Callable[..., Tensor] = kl_loss

    def __call__(self, student: Tensor, teacher: Tensor, *, counted: Tensor | None = None) -> Tensor:
        """The mean distance over the positions that count, bool (...); all of them where that is None."""
        if student.shape != teacher.shape:
            raise ValueError(f"the student's features have shape {tuple(student.shape)}, the teacher's "
                             f"{tuple(teacher.shape)}; both see the same tokens")  # fmt: skip
        rows, taught = student.flatten(0, -2), teacher.detach().flatten(0, -2)
        here = torch.ones(len(rows), dtype=torch.bool, device=rows.device) if counted is None else counted.flatten()
        total = _summed(rows, self.head, partial(_distance, distance=self.distance), (here,), taught)
        return total / here.sum().clamp(min=1)


def _cross_entropy(logits: Tensor, _: Tensor | None, labels: Tensor, *, ignored: int) -> Tensor:
    return F.cross_entropy(at_least_float32(logits), labels, ignore_index=ignored, reduction="sum")


def _distance(logits: Tensor, teacher: Tensor | None, counted: Tensor, *, distance: Callable[..., Tensor]) -> Tensor:
    assert teacher is not None
    logits, teacher = at_least_float32(logits), at_least_float32(teacher)
    # The teacher's logits where they do not count: no distance there, and no gradient.
    return distance(torch.where(counted[:, None], logits, teacher), teacher) * len(logits)


Piece = Callable[..., Tensor]  # of (logits, teacher's logits or None, further rows): a sum over rows


def _summed(
    rows: Tensor, head: nn.Module, piece: Piece, more: tuple[Tensor, ...], teacher: Tensor | None = None
) -> Tensor:
    weight, bias = head.weight, head.bias
    assert isinstance(weight, Tensor)
    assert bias is None or isinstance(bias, Tensor)
    device = rows.device.type
    low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    if not torch.is_grad_enabled():
        parts = [_logits_and_loss(part, weight, bias, piece, low)[1] for part in _parts(rows, teacher, more, weight)]
        return torch.stack(parts).sum()
    return _Summed.apply(rows, weight, bias, piece, more, teacher, low)


Part = tuple[slice, Tensor, Tensor | None, tuple[Tensor, ...]]


def _parts(rows: Tensor, teacher: Tensor | None, more: tuple[Tensor, ...], weight: Tensor) -> Iterator[Part]:
    """Rows, those of the teacher, and further tensors, so many positions at a time as logits are held."""
    size = max(1, _HELD // len(weight))
    for start in range(0, len(rows), size):
        at = slice(start, start + size)
        yield at, rows[at], None if teacher is None else teacher[at], tuple(tensor[at] for tensor in more)


def _logits_and_loss(
    part: Part, weight: Tensor, bias: Tensor | None, piece: Piece, low: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    """The logits of a part, as a leaf, and its loss."""
    _, rows, teacher, more = part
    logits = _linear(rows, weight, bias, low)
    if torch.is_grad_enabled():
        logits.requires_grad_()
    taught = None
    if teacher is not None:
        taught = _linear(teacher, weight, bias, low)
    return logits, piece(logits, taught, *more)


@torch.no_grad()
def _linear(rows: Tensor, weight: Tensor, bias: Tensor | None, low: torch.dtype | None) -> Tensor:
    """Logits in the precision in which the head itself computes them."""
    if low is None:
        return F.linear(rows.to(weight.dtype), weight, bias)
    return F.linear(rows.to(low), weight.to(low), None if bias is None else bias.to(low))


class _Summed(torch.autograd.Function):
    """The sum of a loss over all rows. The gradients are computed with it, part by part, while the logits are there."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        piece: Piece,
        more: tuple[Tensor, ...],
        teacher: Tensor | None,
        low: torch.dtype | None,
    ) -> Tensor:
        """The sum, shape ()."""
        sources = (rows, weight, bias)
        wanted: list[Tensor | None] = [
            torch.zeros_like(source) if needed and source is not None else None
            for source, needed in zip(sources, ctx.needs_input_grad, strict=False)
        ]
        total = torch.zeros((), dtype=torch.promote_types(rows.dtype, torch.float32), device=rows.device)
        with torch.autocast(rows.device.type, enabled=False):
            for part in _parts(rows, teacher, more, weight):
                with torch.enable_grad():
                    logits, loss = _logits_and_loss(part, weight, bias, piece, low)
                    (grad,) = torch.autograd.grad(loss, logits)
                total += loss.detach()
                _add_gradients(wanted, part, weight, grad)
        ctx.wanted = wanted
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        """The gradients, times what comes in. They are handed over, not kept: no second backward."""
        if ctx.wanted is None:
            raise RuntimeError("the gradients of a loss in parts are handed over once; compute the loss again")
        wanted, ctx.wanted = ctx.wanted, None
        return *(None if grad is None else grad.mul_(grad_outputs[0]) for grad in wanted), None, None, None, None


def _add_gradients(wanted: list[Tensor | None], part: Part, weight: Tensor, grad: Tensor) -> None:
    at, rows = part[0], part[1]
    of_rows, of_weight, of_bias = wanted
    if of_rows is not None:
        of_rows[at] = grad @ weight.to(grad.dtype)
    if of_weight is not None:
        of_weight.addmm_(grad.t().to(weight.dtype), rows.to(weight.dtype))
    if of_bias is not None:
        of_bias += grad.sum(0).to(of_bias.dtype)


def _check_labels(features: Tensor, y: Any) -> None:
    if not isinstance(y, Tensor) or y.shape != features.shape[:-1]:
        found = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(
            f"the features have shape {tuple(features.shape)}, y {found}; give a label for each position, "
            f"{tuple(features.shape[:-1])}, {IGNORED} where there is none"
        )
