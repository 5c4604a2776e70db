"""What a task is to the engine: data, network, method and figures of a run. The engine knows no task by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from unloaf.config import Config
from unloaf.config.figures import Figures
from unloaf.data import Batch, Data, Images
from unloaf.evaluation import Accuracy, Reduction, SubnetRow, rows_of
from unloaf.methods.step import TrainingMethod
from unloaf.models.preprocessing import describe
from unloaf.stages import Stage
from unloaf.subnet import Subnet

_UNKNOWN = float("nan")


class TrainingBatches(Protocol):
    """The batches of one process; see `unloaf.data.TrainBatches`."""

    steps_per_epoch: int

    @property
    def bad_images(self) -> tuple[str, ...]:
        """Names of the images skipped so far."""
        ...

    def epoch(self, epoch: int, *, start: int = 0) -> Iterator[list[Batch]]:
        """The batches of each step of an epoch."""
        ...

    def close(self) -> None:
        """Ends the workers."""


class EvaluationBatches(Protocol):
    """Images and targets of one process, as often as one iterates over them; see `unloaf.data.EvalBatches`."""

    @property
    def bad_images(self) -> tuple[str, ...]:
        """Names of the images left out so far."""
        ...

    def __iter__(self) -> Iterator[Batch]: ...


class Where(NamedTuple):
    """The device of a process, and which process of how many it is."""

    device: torch.device
    rank: int = 0
    world: int = 1


class Task(ABC):
    """Data, network, method and figures of a run, made of its configuration.

    A batch is a pair (x, y) that the method's ``backward`` takes. An evaluation is a value whose attributes are those
    that `figures` names.
    """

    figures: Figures

    @abstractmethod
    def load(self, config: Config, *, resumed: bool) -> tuple[Config, Data, str]:
        """The configuration with what its inputs are made into, the data, and a line that says how inputs are made.

        Raises:
            ValueError: files are missing, or do not fit each other or the configuration.
        """

    def describe(self, data: Data) -> str:
        """A line that says how inputs are made of data that were loaded already."""
        return describe(data, "")

    @abstractmethod
    def check(self, config: Config, data: Data) -> None:
        """Raises ValueError if what this configuration trains cannot be trained on these data."""

    @abstractmethod
    def network(self, config: Config, data: Data, *, resumed: bool) -> tuple[nn.Module, tuple[str, ...]]:
        """The network as a run begins with it, and what is to be said of its weights; of a resumed run only its form,
        whose weights are in a checkpoint.
        """

    @abstractmethod
    def example(self, data: Data, count: int) -> Any:
        """A batch of so many blank inputs, on the CPU, of which costs are counted."""

    @abstractmethod
    def noise(self, data: Data, count: int, seed: int) -> Any:
        """Random inputs, on the CPU, on which two forms of a network are compared."""

    def architecture(self, config: Config, data: Data) -> dict[str, Any] | None:
        """What `unloaf.load_subnet` builds the main network from; None where it is built by name, as classifiers are.

        The entry ``builder`` names the function that builds it.
        """
        return None

    def preprocessing(self, data: Data) -> dict[str, Any] | None:
        """How an input is made, as plain values; None where it is an image."""
        return None

    def accompany(self, folder: Path, data: Data) -> tuple[str, ...]:
        """Writes what else an exported network needs, and says what."""
        return ()

    def finished(self, network: nn.Module) -> nn.Module:
        """A network as it is handed on: without what only training needs."""
        return network

    def usage(self, data: Data) -> tuple[str, ...]:
        """Lines of the model card on inputs and outputs; () where those of a classifier are right."""
        return ()

    def inputs_of(self, batch: Batch) -> Sequence[Any]:
        """The inputs of a batch of evaluation in the parts in which the network takes them."""
        return [batch.x]

    @abstractmethod
    def find_stages(self, config: Config, model: nn.Module, data: Data) -> tuple[Stage, ...]:
        """The stages whose blocks are skipped; () where there are none and common training needs none.

        Raises:
            ValueError: the model does not fit task and data, or has no stages.
        """

    @abstractmethod
    def train_batches(self, data: Data, config: Config, where: Where) -> TrainingBatches:
        """The augmented training batches of a process."""

    @abstractmethod
    def eval_batches(self, images: Images, data: Data, config: Config, where: Where) -> EvaluationBatches:
        """A process's share of some images, not augmented."""

    @abstractmethod
    def method(
        self,
        config: Config,
        model: nn.Module,
        stages: tuple[Stage, ...],
        *,
        steps_per_epoch: int | None = None,
        batches_per_step: int = 1,
    ) -> TrainingMethod:
        """What turns a batch into gradients."""

    @abstractmethod
    def evaluate(self, model: nn.Module, batches: Iterable[Batch], data: Data, *, reduce: Reduction | None) -> Any:
        """The figures of a network; `reduce` adds a tensor over processes."""

    def evaluate_subnets(
        self,
        model: nn.Module,
        stages: Sequence[Stage],
        batches: Iterable[Batch],
        data: Data,
        *,
        subnets: Sequence[Subnet],
        calibration: Iterable[Batch],
        reduce: Reduction | None = None,
        on_row: Callable[[SubnetRow], None] | None = None,
    ) -> list[SubnetRow]:
        """A row of each subnet, with batch-norm statistics of its own; of other tasks than classification the figure
        that decides is its `metric`.
        """

        def measured(network: nn.Module) -> Accuracy:
            found = self.evaluate(network, batches, data, reduce=reduce)
            if isinstance(found, Accuracy):
                return found
            loss = getattr(found, "loss", _UNKNOWN)
            return Accuracy(loss, _UNKNOWN, _UNKNOWN, metric=self.figures.decide(found))

        rows = rows_of(model, stages, subnets, measured, calibration=_Parts(self, calibration), on_row=on_row)
        if self.figures.of_rows == "top1":
            return rows
        unknown: dict[str, Any] = {"top1": None, "top5": None}
        if all(figure.name != "loss" for figure in self.figures.columns):
            unknown["loss"] = None
        if self.figures.of_rows == "loss":
            unknown["metric"] = None
        return [replace(row, **unknown) for row in rows]


@dataclass(frozen=True)
class _Parts:
    """The inputs of batches as the network takes them, as often as one iterates over them."""

    task: Task
    batches: Iterable[Batch]

    def __iter__(self) -> Iterator[tuple[Any]]:
        return ((x,) for batch in self.batches for x in self.task.inputs_of(batch))
