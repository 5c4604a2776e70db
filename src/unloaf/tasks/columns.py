"""Tasks whose targets are rows of numbers, by the networks of classification: several labels, and regression."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from unloaf.config import Config
from unloaf.config.figures import FIGURES
from unloaf.data import Batch, Data
from unloaf.data.own_sets import columns_of, load_columns
from unloaf.evaluation import Reduction
from unloaf.losses import bce_kl_loss
from unloaf.methods.step import Criterion, TrainingMethod
from unloaf.methods.table import METHODS
from unloaf.methods.terms import Distance
from unloaf.models.preprocessing import describe, with_preprocessing
from unloaf.passes import logits_of
from unloaf.stages import Stage, evaluating, inner_module
from unloaf.tasks.classification import Classification
from unloaf.tasks.methods import method_options

_UNKNOWN = float("nan")


@dataclass(frozen=True)
class LabelScores:
    """How well labels are told that an image may have several of; NaN throughout where a network gives NaN.

    Attributes:
        loss: mean binary cross-entropy of all labels of all images, in nats.
        map: mean over the labels of average precision, the area under precision over recall in steps, in percent; a
            label that no image has is left out.
    """

    loss: float
    map: float


@dataclass(frozen=True)
class ValueScores:
    """How well numbers are told; NaN throughout where a network gives NaN.

    Attributes:
        loss: mean squared error, in the square of the targets' units, also where training takes the absolute one.
        mae: mean absolute error over all numbers of all images, in the targets' units.
        r2: mean over the columns of the share of the variance that is explained: 1 is perfect, 0 no better than the
            mean of these images, and there is no lowest value; NaN where a column does not vary.
    """

    loss: float
    mae: float
    r2: float


class _Columns(Classification):
    """What both tasks share."""

    def load(self, config: Config, *, resumed: bool) -> tuple[Config, Data, str]:
        """See `Task.load`."""
        config, source = (config, "") if resumed else with_preprocessing(config)
        data = load_columns(config)
        return config, data, describe(data, source)

    def check(self, config: Config, data: Data) -> None:
        """Any number of columns can be trained."""

    @abstractmethod
    def losses(self, config: Config) -> tuple[Criterion, Distance]:
        """The loss on the targets, and that of a subnet against its teacher."""

    def method(
        self,
        config: Config,
        model: nn.Module,
        stages: tuple[Stage, ...],
        *,
        steps_per_epoch: int | None = None,
        batches_per_step: int = 1,
    ) -> TrainingMethod:
        """The methods of classification with the losses of this task; ST++ has no directions of logits here."""
        criterion, distance = self.losses(config)
        options = method_options(
            config, model, stages, criterion, steps_per_epoch=steps_per_epoch, batches_per_step=batches_per_step
        )
        if "subnet_loss" in options:
            options |= {"subnet_loss": distance, "criterion": criterion}
        if "main_logits" in options:
            options["main_logits"] = "raw"
        return METHODS[config.method].factory(model, stages, **options)


class Multilabel(_Columns):
    """Labels that an image may have several of; evaluated by mean average precision."""

    figures = FIGURES["multilabel"]

    def losses(self, config: Config) -> tuple[Criterion, Distance]:
        """Binary cross-entropy; KL of binary predictions."""
        return nn.BCEWithLogitsLoss(), bce_kl_loss

    def usage(self, data: Data) -> tuple[str, ...]:
        """See `Task.usage`."""
        return ()

    def evaluate(self, model: nn.Module, batches: Iterable[Batch], data: Data, *, reduce: Reduction | None) -> Any:
        """See `label_scores`."""
        return label_scores(model, batches)


class Regression(_Columns):
    """Numbers; evaluated by mean absolute error and the share of variance that is explained."""

    figures = FIGURES["regression"]

    def losses(self, config: Config) -> tuple[Criterion, Distance]:
        """Mean squared or absolute error; the squared distance to the main network's output."""
        return (nn.L1Loss() if config.regression_loss == "l1" else nn.MSELoss()), F.mse_loss

    def evaluate(self, model: nn.Module, batches: Iterable[Batch], data: Data, *, reduce: Reduction | None) -> Any:
        """See `value_scores`."""
        centre = columns_of(data.train).mean(0)
        return value_scores(model, batches, centre, reduce=reduce)


def _counted(model: nn.Module, batches: Iterable[Batch]) -> Iterator[tuple[Tensor, Tensor]]:
    """Outputs and targets of the images that count, float64 on the CPU, (n, columns) both."""
    network = inner_module(model)
    with evaluating(network):
        for x, y in batches:
            found = logits_of(network(x)).double().cpu()
            y = y.double().cpu()
            kept = ~y.isnan().any(1)
            yield found[kept], y[kept]


def label_scores(model: nn.Module, batches: Iterable[Batch]) -> LabelScores:
    """The figures over the images of all processes; the modes of the modules are put back.

    Args:
        model: from a batch to logits, (B, labels).
        batches: pairs (x, y), y float (B, labels) of 0 and 1, NaN throughout for an image that does not count.

    Raises:
        ValueError: no image counts.

    >>> x = torch.tensor([[2.0], [1.0], [0.0]])
    >>> found = label_scores(nn.Identity(), [Batch(x, torch.tensor([[1.0], [0.0], [1.0]]))])
    >>> round(found.loss, 4), round(found.map, 2)
    (0.7111, 83.33)
    """
    pairs = list(_counted(model, batches))
    parts = [torch.cat(columns) for columns in zip(*pairs, strict=True)] if pairs else []
    logits, truth = (torch.cat(whole) for whole in zip(*_everywhere(parts), strict=True))
    if len(truth) == 0:
        raise ValueError("there is no image to evaluate on; give at least one that can be read")
    if not bool(logits.isfinite().all()):
        return LabelScores(_UNKNOWN, _UNKNOWN)
    loss = F.binary_cross_entropy_with_logits(logits, truth)
    return LabelScores(float(loss), 100 * mean_average_precision(logits, truth))


def mean_average_precision(scores: Tensor, truth: Tensor) -> float:
    """Of labels that some image has; NaN where there is none.

    >>> mean_average_precision(torch.tensor([[3.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 0.0], [1.0, 0.0]]))
    0.5
    """
    from sklearn.metrics import average_precision_score

    there = truth.sum(0) > 0
    if not bool(there.any()):
        return math.nan
    return float(average_precision_score(truth[:, there].numpy(), scores[:, there].numpy(), average="macro"))


def _everywhere(parts: list[Tensor]) -> list[list[Tensor]]:
    """What each process has; an average precision is no sum over images."""
    if not (dist.is_available() and dist.is_initialized()):
        return [parts]
    states: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(states, parts)
    return [state for state in states if state]


def value_scores(
    model: nn.Module,
    batches: Iterable[Batch],
    centre: Tensor,
    *,
    reduce: Reduction | None = None,
) -> ValueScores:
    """The figures over the images of all processes; the modes of the modules are put back.

    Args:
        model: from a batch to numbers, (B, columns).
        batches: pairs (x, y), y float (B, columns), NaN throughout for an image that does not count.
        centre: numbers near the targets, (columns,): their squares are summed less these, which saves digits.
        reduce: adds a tensor over processes.

    Raises:
        ValueError: no image counts.

    >>> x = torch.tensor([[1.0], [2.0], [4.0]])
    >>> found = value_scores(nn.Identity(), [Batch(x, torch.tensor([[1.0], [3.0], [5.0]]))], torch.tensor([3.0]))
    >>> round(found.loss, 4), round(found.mae, 4), found.r2
    (0.6667, 0.6667, 0.75)
    """
    columns = len(centre)
    sums = torch.zeros(5, columns, dtype=torch.float64)  # images, |error|, error^2, target, target^2
    for found, y in _counted(model, batches):
        error, shifted = found - y, y - centre
        sums += torch.stack([torch.ones_like(y), error.abs(), error**2, shifted, shifted**2]).sum(1)
    if reduce is not None:
        device = next((p.device for p in inner_module(model).parameters()), torch.device("cpu"))
        sums = reduce(sums.to(device)).cpu()
    count, absolute, squared, total, squares = sums
    if not float(count[0]):
        raise ValueError("there is no image to evaluate on; give at least one that can be read")
    if not bool(squared.isfinite().all()):
        return ValueScores(_UNKNOWN, _UNKNOWN, _UNKNOWN)
    mae, mse = (float((part / count).mean()) for part in (absolute, squared))
    variance = squares - total**2 / count
    # Below rounding of the sums a column is constant.
    explained = torch.where(variance > 1e-12 * squares, 1 - squared / variance, torch.nan)
    return ValueScores(mse, mae, float(explained.mean()))
