"""What a subnet learns from its teacher: KL divergence, KL- (of directions), KL of binary predictions."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Norm = Literal["layer_norm", "l2"]
_REACHABLE = 0.999
# The layer norm of two logits that differ by 2 d is d / sqrt(d^2 + eps), and minus that: a sign where eps is small,
# with a gradient near d = 0 alone. Of 1e-7, 1e-5, 1e-3, 0.01, 0.03, 0.1, 0.3, 1 and 3, tried with amplitudes 1 and
# "auto" on 256 separable examples (two layers, the last one as torch initialises it and 10 and 30 times as large, 200
# steps of SGD, five seeds), 0.1 is the first that learned them in every run: 97 % at least; 0.03 has runs at 50 %.
_LEAST_EPS_OF_TWO_CLASSES = 0.1
# Logits beyond it are made smaller before their length is taken, so that no square overflows in float32. Directions do
# not change by it, and next to such a length no eps counts.
_SAFE_LOGIT = 2.0**40


def kl_loss(student: Tensor, teacher: Tensor, *, temperature: float = 1.0, counted: Tensor | None = None) -> Tensor:
    """KL divergence from the teacher's softened prediction to the student's.

    Args:
        student: logits, (..., classes); gradients flow here. Half precision is computed in float32.
        teacher: logits, (..., classes); taken as constant.
        temperature: > 0.
        counted: bool, (...): the positions that count; None for all. The others get no gradient.

    Returns:
        Summed over classes, averaged over the leading dimensions (the positions that count; 0 if none does), in nats,
        times temperature squared; shape ().

    Raises:
        ValueError: the shapes differ, fewer than two classes, or a temperature that is not positive.

    Source: Hinton et al. 2015, section 2; Ye et al. 2022 (ST), equation 2, with temperature 1.

    >>> import torch, unloaf
    >>> unloaf.kl_loss(torch.zeros(1, 2), torch.tensor([[3.0, 1.0]]).log())
    tensor(0.1308)
    """
    _check_logits(student, teacher, temperature)
    student, teacher = at_least_float32(student), at_least_float32(teacher.detach())
    if counted is not None:
        student = _teacher_elsewhere(student, teacher, counted)
    if temperature != 1:
        student, teacher = student / temperature, teacher / temperature
    log_p, log_q = (F.log_softmax(logits, dim=-1).flatten(0, -2) for logits in (teacher, student))
    loss = F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
    if temperature != 1:
        loss = loss * temperature**2
    return loss if counted is None else loss * all_over_counted(counted, loss.dtype)


def bce_kl_loss(student: Tensor, teacher: Tensor, *, temperature: float = 1.0, counted: Tensor | None = None) -> Tensor:
    """KL divergence between independent yes-or-no predictions: for several labels at a time, or a single output.

    ``p log(p / q) + (1 - p) log((1 - p) / (1 - q))`` with ``p = sigmoid(teacher)``, ``q = sigmoid(student)``, for each
    logit. It goes with ``criterion=nn.BCEWithLogitsLoss()``, which takes the mean over all logits as well.

    Args:
        student: logits, (..., labels); gradients flow here. Half precision is computed in float32.
        teacher: logits, the same shape; taken as constant.
        temperature: > 0.
        counted: bool, (...): the positions that count; None for all. The others get no gradient.

    Returns:
        Averaged over labels and leading dimensions (the positions that count; 0 if none does), in nats, times
        temperature squared; shape ().

    Raises:
        ValueError: the shapes differ, or a temperature that is not positive.

    >>> import torch, unloaf
    >>> unloaf.bce_kl_loss(torch.zeros(1, 1), torch.tensor([[3.0]]).log())  # 3/4 against 1/2
    tensor(0.1308)
    """
    _check_shapes(student, teacher, temperature)
    student, teacher = at_least_float32(student), at_least_float32(teacher.detach())
    if counted is not None:
        student = _teacher_elsewhere(student, teacher, counted)
    if temperature != 1:
        student, teacher = student / temperature, teacher / temperature
    yes, no = (F.logsigmoid(sign * teacher) for sign in (1, -1))
    loss = (yes.exp() * (yes - F.logsigmoid(student)) + no.exp() * (no - F.logsigmoid(-student))).mean()
    if temperature != 1:
        loss = loss * temperature**2
    return loss if counted is None else loss * all_over_counted(counted, loss.dtype)


def _teacher_elsewhere(student: Tensor, teacher: Tensor, counted: Tensor) -> Tensor:
    """The student's logits; the teacher's where they do not count: no distance there, and no gradient.

    Rows are not picked out, because then the device would have to be asked how many there are.
    """
    if counted.shape != student.shape[:-1]:
        raise ValueError(
            f"counted has shape {tuple(counted.shape)}, the logits {tuple(student.shape)}; "
            f"it must be {tuple(student.shape[:-1])}"
        )
    return torch.where(counted.unsqueeze(-1), student, teacher)


def all_over_counted(counted: Tensor, dtype: torch.dtype) -> Tensor:
    """What turns a mean over all positions, 0 where they do not count, into one over those that count.

    >>> all_over_counted(torch.tensor([True, True, False]), torch.float32)
    tensor(1.5000)
    """
    return counted.numel() / counted.sum(dtype=dtype).clamp(min=1)


def at_least_float32(logits: Tensor) -> Tensor:
    """The logits in float32 if they are in half precision: their squares, and sums over classes, need it.

    >>> at_least_float32(torch.zeros(1, dtype=torch.float16)).dtype, at_least_float32(torch.zeros(1).double()).dtype
    (torch.float32, torch.float64)
    """
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def direction_kl_loss(
    student: Tensor,
    teacher: Tensor,
    *,
    amplitude: float | Literal["auto"] = "auto",
    norm: Norm = "layer_norm",
    temperature: float = 1.0,
    eps: float = 1e-7,
    counted: Tensor | None = None,
) -> Tensor:
    """KL-: the KL divergence of the two logits' directions, whatever their magnitude.

    ``kl_loss(amplitude * direction(student), amplitude * direction(teacher))``.

    Args:
        student: logits, (..., classes); gradients flow here.
        teacher: logits, (..., classes); taken as constant.
        amplitude: scale of the directions. "auto" is the smallest one (at least 1) that lets the softmax reach
            0.999; the published runs used 1, with which 10 classes reach only 0.757 and training stalls.
        norm: "layer_norm", as in the published runs, or "l2", as in the text of the paper.
        temperature: > 0.
        eps: added to the variance (layer_norm) or bounding the length from below (l2); a larger one tames the gradients
            of small logits early in training. Two classes under layer_norm need 0.1 at least.
        counted: bool, (...): the positions that count; None for all. The others get no gradient.

    Returns:
        Averaged over the leading dimensions (the positions that count; 0 if none does), in nats, times temperature
        squared; shape ().

    Raises:
        ValueError: as `kl_loss`; an amplitude that is not positive; an unknown norm; two classes under layer_norm with
            an eps that lets no gradient through.

    Source: Ye et al. 2023 (ST++), knowledge distillation without magnitude.

    >>> import torch, unloaf
    >>> z = torch.tensor([[1.0, 2.0, 6.0]])
    >>> round(float(unloaf.direction_kl_loss(5 * z, z)), 6)
    0.0
    """
    _check_logits(student, teacher, temperature)
    scale = resolve_amplitude(amplitude, student.shape[-1], norm)
    check_two_classes(student.shape[-1], norm, eps)
    directions = (scale * direction(logits, norm=norm, eps=eps) for logits in (student, teacher))
    return kl_loss(*directions, temperature=temperature, counted=counted)


def direction(logits: Tensor, *, norm: Norm = "layer_norm", eps: float = 1e-7) -> Tensor:
    """Logits without their magnitude: ``layer_norm`` (length sqrt(classes)) or ``l2`` (length 1) over the last axis.

    Args:
        logits: (..., classes).
        norm: the form of the direction.
        eps: guards against logits that are all alike.

    Returns:
        The same shape, in float32 for half precision; of logits of any magnitude.

    >>> import torch
    >>> from unloaf.losses import direction
    >>> direction(torch.tensor([3.0, 4.0]), norm="l2")
    tensor([0.6000, 0.8000])
    """
    _check_norm(norm)
    logits = at_least_float32(logits)
    highest = torch.linalg.vector_norm(logits.detach(), math.inf, dim=-1, keepdim=True)
    logits = logits * (_SAFE_LOGIT / highest).clamp(max=1)
    if norm == "layer_norm":
        return F.layer_norm(logits, logits.shape[-1:], eps=eps)
    return F.normalize(logits, dim=-1, eps=eps)


def resolve_amplitude(amplitude: float | Literal["auto"], classes: int, norm: Norm = "layer_norm") -> float:
    """The amplitude as a number; "auto" is the smallest (at least 1) that lets the softmax reach 0.999.

    The softmax of a direction is highest when all other logits are alike; the gap is then ``C / sqrt(C - 1)`` for
    layer_norm and ``sqrt(C / (C - 1))`` for l2, and the probability ``1 / (1 + (C - 1) exp(-amplitude * gap))``.

    >>> from unloaf.losses import resolve_amplitude
    >>> round(resolve_amplitude("auto", 10), 2), round(resolve_amplitude("auto", 1000), 2)
    (2.73, 1.0)
    """
    _check_norm(norm)
    if amplitude == "auto":
        gap = classes / math.sqrt(classes - 1) if norm == "layer_norm" else math.sqrt(classes / (classes - 1))
        return max(1.0, math.log((classes - 1) * _REACHABLE / (1 - _REACHABLE)) / gap)
    if isinstance(amplitude, str) or not amplitude > 0:
        raise ValueError(f"amplitude is {amplitude!r}; give a positive number or 'auto'")
    return amplitude


def check_two_classes(classes: int, norm: Norm, eps: float) -> None:
    """Raise ValueError if directions of so many classes cannot be trained: two of them under layer_norm are a sign.

    >>> from unloaf.losses import check_two_classes
    >>> check_two_classes(2, "l2", 1e-7), check_two_classes(2, "layer_norm", 1.0)
    (None, None)
    """
    if classes == 2 and norm == "layer_norm" and not eps >= _LEAST_EPS_OF_TWO_CLASSES:
        raise ValueError(
            f"two classes have only a sign under layer_norm: with eps {eps} hardly any gradient gets through; "
            f"give norm='l2', or a larger eps such as 1.0 ({_LEAST_EPS_OF_TWO_CLASSES} at least)"
        )


def label_loss(
    criterion: Callable[[Tensor, Any], Tensor], logits: Tensor, y: Any, *, classes_last: bool = False
) -> Tensor:
    """``criterion(logits, y)``, with the classes of the logits on the last axis for torch's cross-entropy as well.

    Of logits with more than two axes ``nn.CrossEntropyLoss`` takes the classes from the second one, where `kl_loss` and
    evaluation take them from the last: it is given rows of classes, in float32 at least. Any other criterion gets the
    logits as they are.

    Args:
        criterion: from (logits, targets) to a loss.
        logits: (..., classes).
        y: for ``nn.CrossEntropyLoss`` class indices, (...), or shares of the classes, (..., classes).
        classes_last: the caller said that the classes are last: rows also for ``F.cross_entropy`` and classes that
            inherit from ``nn.CrossEntropyLoss``.

    Raises:
        ValueError: the targets of torch's cross-entropy have another shape; the classes may be on another axis.

    >>> import torch
    >>> from unloaf.losses import label_loss
    >>> label_loss(torch.nn.CrossEntropyLoss(), torch.zeros(2, 5, 7, 4), torch.ones(2, 5, 7, dtype=torch.long))
    tensor(1.3863)
    """
    if isinstance(criterion, nn.CrossEntropyLoss) and is_cross_entropy(criterion) and criterion.weight is None:
        logits = at_least_float32(logits)
    by_rows = is_cross_entropy(criterion) if classes_last else type(criterion) is nn.CrossEntropyLoss
    if logits.ndim > 2 and by_rows and isinstance(y, Tensor):
        wanted = logits.shape if y.is_floating_point() else logits.shape[:-1]
        if y.shape != wanted:
            raise ValueError(
                f"the logits have shape {tuple(logits.shape)}, y has {tuple(y.shape)} instead of {tuple(wanted)}; "
                "logits must be (..., classes): move the class axis last, readout=lambda output: output.movedim(1, -1)"
            )
        logits, y = logits.flatten(0, -2), y.flatten(0, -2) if y.is_floating_point() else y.flatten()
    return criterion(logits, y)


def is_cross_entropy(criterion: Callable[..., Any]) -> bool:
    """Whether this is torch's cross-entropy: the class, one that inherits its ``forward``, or the function.

    >>> is_cross_entropy(nn.CrossEntropyLoss()), is_cross_entropy(partial(F.cross_entropy, ignore_index=255))
    (True, True)
    """
    function = criterion.func if isinstance(criterion, partial) else criterion
    return function is F.cross_entropy or getattr(type(criterion), "forward", None) is nn.CrossEntropyLoss.forward


def is_regression(criterion: Callable[..., Any]) -> bool:
    """Whether this is one of torch's losses between numbers, as a class or a function.

    >>> is_regression(nn.MSELoss()), is_regression(F.l1_loss), is_regression(nn.BCEWithLogitsLoss())
    (True, True, False)
    """
    functions = (F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss)
    return isinstance(criterion, (nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss)) or (
        _unbound(criterion) in functions
    )


def is_binary(criterion: Callable[..., Any]) -> bool:
    """Whether this is one of torch's losses of several labels, each yes or no, as a class or a function.

    >>> is_binary(nn.BCEWithLogitsLoss()), is_binary(F.binary_cross_entropy_with_logits), is_binary(nn.MSELoss())
    (True, True, False)
    """
    functions = (F.binary_cross_entropy_with_logits, F.multilabel_soft_margin_loss)
    return isinstance(criterion, (nn.BCEWithLogitsLoss, nn.MultiLabelSoftMarginLoss)) or (
        _unbound(criterion) in functions
    )


def of_this_library(loss: Callable[..., Any]) -> bool:
    """Whether this is one of the distances here, with or without arguments bound: it changes nothing in place.

    >>> of_this_library(partial(kl_loss, temperature=4.0)), of_this_library(F.mse_loss)
    (True, False)
    """
    return _unbound(loss) in (kl_loss, direction_kl_loss, bce_kl_loss)


def takes_softmax(loss: Callable[..., Any]) -> bool:
    """Whether this distance is known to take a softmax over the last axis.

    >>> takes_softmax(partial(direction_kl_loss, norm="l2")), takes_softmax(bce_kl_loss)
    (True, False)
    """
    return _unbound(loss) in (kl_loss, direction_kl_loss)


def _unbound(loss: Callable[..., Any]) -> Callable[..., Any]:
    return loss.func if isinstance(loss, partial) else loss


def _check_norm(norm: Norm) -> None:
    if norm not in ("layer_norm", "l2"):
        raise ValueError(f"norm is {norm!r}; give 'layer_norm' or 'l2'")


def _check_shapes(student: Tensor, teacher: Tensor, temperature: float) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"student logits have shape {tuple(student.shape)}, teacher logits {tuple(teacher.shape)}; "
            "both must be (..., classes) of the same batch"
        )
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}; give a number above 0")


def _check_logits(student: Tensor, teacher: Tensor, temperature: float) -> None:
    _check_shapes(student, teacher, temperature)
    if student.ndim < 2 or student.shape[-1] < 2:
        raise ValueError(
            f"logits have shape {tuple(student.shape)}; give (..., classes) with at least 2 classes, or another "
            "subnet_loss: unloaf.bce_kl_loss for binary outputs, F.mse_loss for a regression"
        )
