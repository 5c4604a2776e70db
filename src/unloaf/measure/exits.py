"""What the exits of a cascade give and cost, and the threshold that an accuracy or a budget asks for."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unloaf.anytime import Anytime, scores
from unloaf.inputs import to_device
from unloaf.measure.flops import counting_flops

UNREADABLE = -100  # label of images that are left out
_MOST_TRIED = 1000  # thresholds, quantiles of the confidences that were met


@dataclass(frozen=True)
class ExitRecords:
    """Each exit on each of some images, as if none had left.

    Attributes:
        confidences: (exits, images); on which images leave.
        correct: (exits, images), whether the exit's class is the label.
        gmacs: billions of multiply-adds of an image that leaves at each exit, all earlier ones included.
    """

    confidences: Tensor
    correct: Tensor
    gmacs: tuple[float, ...]


@dataclass(frozen=True)
class AnytimePoint:
    """A cascade at one threshold.

    Attributes:
        threshold: at which images leave.
        top1: accuracy in percent.
        gmacs: billions of multiply-adds for an image, on average.
        shares: of the images that left at each exit; their sum is 1.
        images: how many they were.

    >>> from unloaf import AnytimePoint
    >>> point = AnytimePoint(threshold=0.9, top1=98.2, gmacs=0.6, shares=(0.8, 0.2), images=1_000)
    >>> round(point.images * point.shares[0])  # left at the first exit
    800
    """

    threshold: float
    top1: float
    gmacs: float
    shares: tuple[float, ...]
    images: int


@dataclass(frozen=True)
class Target:
    """What a threshold is to reach on validation images; one of the three.

    Attributes:
        max_drop: points of accuracy that may be lost against the last exit.
        min_top1: accuracy in percent.
        max_gmacs: billions of multiply-adds for an image, on average.

    Raises:
        ValueError: none or several are given, or one is out of range.

    >>> Target(max_drop=-1)
    Traceback (most recent call last):
    ValueError: max_drop -1: give a number of at least 0
    """

    max_drop: float | None = None
    min_top1: float | None = None
    max_gmacs: float | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) != 1:
            raise ValueError(f"{' and '.join(given) or 'nothing'} given; give one of {', '.join(vars(self))}")
        for name, value in given.items():
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} {value}: give a number of at least 0")

    def __str__(self) -> str:
        if self.max_gmacs is not None:
            return f"at most {self.max_gmacs:.4g} GMACs"
        if self.min_top1 is not None:
            return f"a top-1 of at least {self.min_top1:.2f} %"
        return f"at most {self.max_drop:.2f} points below the last exit"


def exit_gmacs(anytime: Anytime, image: Tensor) -> tuple[float, ...]:
    """Billions of multiply-adds of an image that leaves at each exit, what all exits before it have cost included.

    Counted while the cascade runs, by torch's flop counter: convolutions, linear layers, attention.

    >>> import torch, unloaf
    >>> from torchvision.models import resnet18
    >>> model, x = resnet18(num_classes=10).eval(), torch.randn(1, 3, 32, 32)
    >>> stages = unloaf.find_stages(model, x)
    >>> chain = [unloaf.Subnet.from_depths(stages, depths) for depths in [(2, 2, 2, 1), (2, 2, 2, 2)]]
    >>> [round(1000 * gmacs, 1) for gmacs in exit_gmacs(unloaf.Anytime(model, stages, chain), x)]  # million
    [32.3, 37.0]
    """
    totals: list[int] = []
    with counting_flops() as counter:
        anytime.all_exits(image[:1], on_exit=lambda: totals.append(counter.get_total_flops()))
    return tuple(total / 2e9 for total in totals)


def record_exits(anytime: Anytime, loader: Iterable[tuple[Any, Tensor]]) -> ExitRecords:
    """All exits on all images of a loader, whose batches are ``(x, y)`` with class indices y, (batch,).

    Raises:
        ValueError: there is no image, or an exit gives NaN or infinity: of such a network nothing can be said.
    """
    device = next(anytime.model.parameters(), torch.empty(0)).device
    confidences, correct, image = [], [], None
    for x, y in loader:
        x, y = to_device(x, device), to_device(y, device)
        image = x[:1] if image is None else image
        known = y != UNREADABLE
        before, sure, right = None, [], []
        for index, logits in enumerate(anytime.all_exits(x)):
            if not bool(logits.isfinite().all()):
                raise ValueError(
                    f"exit {index} ({anytime.subnets[index]}) gives logits that are not finite, so that nothing can be "
                    "said about its confidence; look at its weights and batch-norm statistics (recalibrate)"
                )
            now = scores(logits, anytime.confidence)
            sure.append(now.confidence(before, anytime.confidence))
            right.append(now.predicted == y)
            before = now
        confidences.append(torch.stack(sure)[:, known].cpu())
        correct.append(torch.stack(right)[:, known].cpu())
    if image is None:
        raise ValueError("the loader yielded no image; give at least one batch (x, y)")
    return ExitRecords(torch.cat(confidences, 1), torch.cat(correct, 1), exit_gmacs(anytime, image))


def at_thresholds(records: ExitRecords, thresholds: Sequence[float]) -> list[AnytimePoint]:
    """The cascade at each of these thresholds, the same for all exits.

    >>> records = ExitRecords(torch.tensor([[0.9, 0.6], [0.8, 0.7]]), torch.tensor([[1, 0], [1, 1]]).bool(), (1.0, 3.0))
    >>> at_thresholds(records, [0.7])[0]
    AnytimePoint(threshold=0.7, top1=100.0, gmacs=2.0, shares=(0.5, 0.5), images=2)
    """
    exits, images = records.confidences.shape
    costs = torch.tensor(records.gmacs, dtype=torch.float64)
    points = []
    for threshold in thresholds:
        leaves = records.confidences >= threshold
        leaves[-1] = True
        chosen = leaves.int().argmax(0)  # the first of the highest
        shares = torch.bincount(chosen, minlength=exits).double() / images
        right = int(records.correct.gather(0, chosen[None]).sum())
        points.append(
            AnytimePoint(threshold, 100 * right / images, float(shares @ costs), tuple(shares.tolist()), images)
        )
    return points


def pick_threshold(records: ExitRecords, target: Target, *, most: int = _MOST_TRIED) -> AnytimePoint:
    """The cheapest threshold with an accuracy, or the most accurate within a budget of mean GMACs.

    Args:
        records: of validation images.
        target: what is asked for.
        most: thresholds that are tried, quantiles of the confidences.

    Raises:
        ValueError: no threshold does it; the message names the nearest.

    >>> records = ExitRecords(torch.tensor([[0.9, 0.6], [0.8, 0.7]]), torch.tensor([[1, 0], [1, 1]]).bool(), (1.0, 3.0))
    >>> pick_threshold(records, Target(max_drop=0)).gmacs, pick_threshold(records, Target(max_gmacs=1.5)).top1
    (2.0, 50.0)
    """
    points = at_thresholds(records, thresholds_to_try(records.confidences, most))
    if target.max_gmacs is not None:
        within = [point for point in points if point.gmacs <= target.max_gmacs]
        if not within:
            least = min(point.gmacs for point in points)
            raise ValueError(f"max_gmacs {target.max_gmacs}: the cascade needs {least:.4g} GMACs at least; give more")
        return max(within, key=lambda point: (point.top1, -point.gmacs))
    last = 100 * float(records.correct[-1].double().mean())
    wanted = target.min_top1 if target.min_top1 is not None else last - (target.max_drop or 0.0)
    good = [point for point in points if point.top1 >= wanted - 1e-9]
    if not good:
        best = max(point.top1 for point in points)
        raise ValueError(f"no threshold has a top-1 of at least {wanted:.2f} %; the best has {best:.2f} %")
    return min(good, key=lambda point: (point.gmacs, -point.top1))


def calibrate_anytime(
    anytime: Anytime,
    loader: Iterable[tuple[Any, Tensor]],
    *,
    max_drop: float | None = None,
    min_top1: float | None = None,
    max_gmacs: float | None = None,
) -> AnytimePoint:
    """The threshold that an accuracy or a budget asks for, set on validation images; the cascade stays as it is.

    Args:
        anytime: with its statistics (`Anytime.recalibrate`).
        loader: batches ``(x, y)`` of validation images: never the test images that judge it.
        max_drop: points of accuracy that may be lost against the last exit; or ...
        min_top1: accuracy in percent that is to be reached; or ...
        max_gmacs: billions of multiply-adds that an image may cost on average.

    Returns:
        an `AnytimePoint`: the threshold for `Anytime.set_threshold`, and what it gives on these images.

    Raises:
        ValueError: none or several of them are given, no threshold reaches it, or an exit gives NaN or infinity.

    >>> import torch, unloaf
    >>> from torchvision.models import resnet18
    >>> model, x = resnet18(num_classes=10).eval(), torch.randn(8, 3, 32, 32)
    >>> stages = unloaf.find_stages(model, x)
    >>> chain = [unloaf.Subnet.from_depths(stages, depths) for depths in [(2, 2, 2, 1), (2, 2, 2, 2)]]
    >>> anytime = unloaf.Anytime(model, stages, chain)
    >>> point = unloaf.calibrate_anytime(anytime, [(x, torch.arange(8))], max_drop=0.5)
    >>> anytime.set_threshold(point.threshold)
    >>> round(sum(point.shares), 3), point.images
    (1.0, 8)
    """
    target = Target(max_drop, min_top1, max_gmacs)
    return pick_threshold(record_exits(anytime, loader), target)


def thresholds_to_try(confidences: Tensor, most: int) -> list[float]:
    """Quantiles of the confidences of all exits but the last, and a threshold at which hardly any image leaves early.

    >>> thresholds_to_try(torch.tensor([[0.5, 0.75], [0.9, 0.9]]), 10)
    [0.5, 0.75, 1.0]
    """
    met = confidences[:-1].flatten().unique()
    met = met[(met >= 0) & (met <= 1)]
    if len(met) > most:
        met = met[torch.linspace(0, len(met) - 1, most).round().long()]
    values = [value for value in met.tolist() if not math.isnan(value)]
    return [*values, *([] if values and values[-1] == 1.0 else [1.0])]
