"""Everything a run needs between two steps, built from its configuration, and how good it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from unloaf.activation_checkpointing import checkpoint_blocks
from unloaf.batchnorm import tracking_norms
from unloaf.compilation import compile_blocks
from unloaf.config import Config
from unloaf.data import SPLIT_SEED, Batch, Data, ImageSet
from unloaf.engine.devices import (
    check_same_on_all,
    find_devices,
    share_model,
    share_optimizer,
    shared_statistics,
    total,
)
from unloaf.engine.optimizer import build_average, build_optimizer, build_schedule
from unloaf.errors import NonFiniteWeightsError
from unloaf.evaluation import SubnetRow
from unloaf.export import export_subnet, parse_subnet
from unloaf.models.build import load_initial_weights
from unloaf.stages import Stage, inner_module
from unloaf.subnet import Subnet
from unloaf.tasks.table import task_of
from unloaf.tasks.task import EvaluationBatches, Task, TrainingBatches, Where


@dataclass(frozen=True)
class Evaluation:
    """The networks of a run on a split: the main one, its moving average, its subnets; the figures are the task's.

    `main` has its running batch-norm statistics; beside subnets, whose statistics are re-estimated, `reestimated` is
    the main network evaluated as they are. `bad_images` are those that this process could not read and left out.
    """

    main: Any
    average: Any | None = None
    subnets: tuple[SubnetRow, ...] = ()
    bad_images: tuple[str, ...] = ()
    reestimated: SubnetRow | None = None


NOTHING_YET = -1e300  # below any figure, R2 has no lowest one; a number, for JSON has no infinity


@dataclass
class Position:
    """How far a run is, in numbers alone: what a checkpoint keeps beside weights and optimizer.

    `epoch` is the one being trained, counted from 1, `step` the optimizer steps of it that were tried, `steps` those of
    the whole run, `updates` those that were made, `skipped` those that were left out; `made`, `loss_sum` and `seconds`
    are over this epoch. `whole` is False in the middle of a step, of which nothing may be saved.

    The schedule follows `updates`. Where a run continues with other steps per epoch, `step` and `updates` are what they
    were in shares of an epoch; `steps` only grows, and with it the numbers of the checkpoints.
    """

    epoch: int = 1
    step: int = 0
    steps: int = 0
    updates: int = 0
    skipped: int = 0
    made: int = 0
    loss_sum: float = 0.0
    seconds: float = 0.0
    lr: float = 0.0
    best: float = NOTHING_YET  # score of the task's decisive figure, on the validation images; see `Figures.score`
    whole: bool = True

    @property
    def mean_loss(self) -> float:
        """Of the steps that were made in this epoch; NaN before the first."""
        return self.loss_sum / self.made if self.made else math.nan

    def change_steps_per_epoch(self, before: int, now: int) -> None:
        """To the same share of the same epoch, where an epoch has other steps than before."""
        self.step = self.step * now // before
        self.updates = round(self.updates * now / before)

    def next_epoch(self) -> None:
        """To the beginning of the next epoch."""
        self.epoch, self.step, self.made, self.loss_sum, self.seconds = self.epoch + 1, 0, 0, 0.0, 0.0


@dataclass(frozen=True)
class Training:
    """Everything a run needs between two steps. The values are fixed, what they hold learns."""

    config: Config
    task: Task
    data: Data
    batches: TrainingBatches
    model: nn.Module
    stages: tuple[Stage, ...]
    method: Any
    optimizer: Any
    schedule: Any
    average: Any | None
    accelerator: Accelerator
    position: Position = field(default_factory=Position)
    opening: tuple[str, ...] = ()  # what is to be said before the first step

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch."""
        return self.batches.steps_per_epoch

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return self.accelerator.device

    @property
    def finished(self) -> bool:
        """Whether all epochs are trained."""
        return self.position.epoch > self.config.epochs

    def eval_batches(self, split: str) -> EvaluationBatches:
        """This process's share of train, val or test, not augmented."""
        return self.task.eval_batches(getattr(self.data, split), self.data, self.config, where(self.accelerator))

    @property
    def steps_done(self) -> int:
        """Optimizer steps that were tried since the run began."""
        return self.position.steps

    @property
    def steps_by_epochs(self) -> int:
        """The same if each epoch had had the steps that it has now."""
        return (self.position.epoch - 1) * self.steps_per_epoch + self.position.step

    def evaluate(
        self,
        split: str,
        *,
        subnets: Sequence[Subnet] = (),
        on_batch: Callable[[], None] | None = None,
    ) -> Evaluation:
        """The task's figures on train, val or test, and of subnets, each with batch-norm statistics of its own.

        With subnets the main network is evaluated with such statistics too. `on_batch` is called before every batch.
        """
        add = partial(total, self.accelerator)
        models = [self.model] if self.average is None else [self.model, self.average.module]
        with shared_statistics(self.accelerator, self.config, *models):
            read = self.eval_batches(split)
            batches = _Watched(read, on_batch) if on_batch else read
            rows = self._judge_subnets(batches, subnets, add) if subnets else []
            both = rows.pop(0) if rows and rows[0].running else None  # the main network, evaluated both ways
            # Of other tasks the row has the decisive figure alone.
            main = both.running if both and hasattr(both.running, self.task.figures.decisive) else None
            main = main or self.task.evaluate(self.model, batches, self.data, reduce=add)
            average = self.average and self.task.evaluate(self.average.module, batches, self.data, reduce=add)
        return Evaluation(main, average, tuple(rows), read.bad_images, both)

    def _judge_subnets(
        self, batches: Iterable[Any], subnets: Sequence[Subnet], add: Callable[[Tensor], Tensor]
    ) -> list[SubnetRow]:
        """Before them the main network, if it has statistics that can be re-estimated."""
        tracking = bool(tracking_norms(inner_module(self.model)))
        return self.task.evaluate_subnets(
            self.model,
            self.stages,
            batches,
            self.data,
            subnets=[*([Subnet.full(self.stages)] if tracking else []), *subnets],
            calibration=self.calibration_batches(),
            reduce=add,
        )

    @property
    def calibration_images(self) -> int:
        """From how many images a subnet's batch-norm statistics are estimated."""
        count = min(self.config.recalibrate, len(self.data.train))
        return count - (count % self.config.batch_size == 1)  # batch norm has no statistics of a single image

    def calibration_batches(self) -> Iterable[Batch]:
        """Some of the training images, not augmented, the same on every process and in every command."""
        everyone = torch.arange(len(self.data.train))
        if not isinstance(self.data.train, ImageSet):  # files lie class by class, sets in memory do not
            everyone = torch.randperm(len(everyone), generator=torch.Generator().manual_seed(SPLIT_SEED))
        images = self.data.train.subset(everyone[: self.calibration_images])
        return self.task.eval_batches(images, self.data, self.config, Where(self.device))


@dataclass(frozen=True)
class _Watched:
    """Batches, as often as one iterates over them, with something to do before each."""

    batches: Iterable[Batch]
    before: Callable[[], None]

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches:
            self.before()
            yield batch


def check_weights(training: Training) -> None:
    """Raises NonFiniteWeightsError if a weight is NaN or infinite.

    A finite loss can have a gradient that is not, such as that of sqrt at 0. Looking at all gradients in each step cost
    5 to 9 % of a step of 10 ms; so the weights are looked at before they are saved, and when a loss is not finite.
    """
    for name, weight in training.model.named_parameters():
        own = weight.to_local() if isinstance(weight, DTensor) else weight
        if not bool(own.isfinite().all()):
            raise NonFiniteWeightsError(
                f"{name} is not finite after step {training.steps_done}: a gradient was not, though its loss was; the "
                f"last checkpoint is from before that; train again with a lower --lr than {training.config.lr}"
            )


def where(accelerator: Accelerator) -> Where:
    """The device of this process, and which of how many it is."""
    return Where(accelerator.device, accelerator.process_index, accelerator.num_processes)


def prepare(
    config: Config,
    *,
    data: Data | None = None,
    model: nn.Module | None = None,
    accelerator: Accelerator | None = None,
    resumed: bool = False,
) -> Training:
    """Loads the data and builds model, method and optimizer; nothing is trained yet.

    Data, another network than config.model and what `find_devices` found may be there already; of a run that is resumed
    the weights will follow, so none are read to start from.

    Raises:
        ValueError: the data are not there, the model is unknown or does not fit the task, or the method cannot train
            it.
    """
    accelerator, task = accelerator or find_devices(config), task_of(config)
    config, data, inputs = _with_data(config, task, data, accelerator, resumed=resumed)
    batches = task.train_batches(data, config, where(accelerator))
    set_seed(config.seed, deterministic=config.deterministic)
    model, opening = _with_weights(config, task, data, model, resumed=resumed)
    stages = task.find_stages(config, model, data)
    if config.depths is not None:
        model = export_subnet(model, stages, parse_subnet(stages, config.depths))
        stages = task.find_stages(config, model, data)
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    model = share_model(accelerator, config, model)
    average = build_average(config, inner_module(model))
    if config.torchcompile:
        compile_blocks(model, stages)
    if config.grad_checkpointing:
        checkpoint_blocks(model, stages)
    optimizer = share_optimizer(accelerator, build_optimizer(config, inner_module(model)))
    return Training(
        config=config,
        task=task,
        data=data,
        batches=batches,
        model=model,
        stages=stages,
        method=task.method(
            config,
            model,
            stages,
            steps_per_epoch=batches.steps_per_epoch,
            batches_per_step=config.accumulation(accelerator.num_processes),
        ),
        optimizer=optimizer,
        schedule=build_schedule(config, optimizer.optimizer, steps_per_epoch=batches.steps_per_epoch),
        average=average,
        accelerator=accelerator,
        opening=(inputs, *opening),
    )


def _with_data(
    config: Config, task: Task, data: Data | None, accelerator: Accelerator, *, resumed: bool
) -> tuple[Config, Data, str]:
    """The data of the run, the configuration with what its inputs are made into, and a line that says so."""
    if data is None:
        config, data, line = task.load(config, resumed=resumed)
    else:
        line = task.describe(data)
    task.check(config, data)
    counts = {f"{split} images": len(getattr(data, split)) for split in ("train", "val", "test")}
    check_same_on_all(accelerator, {"classes": data.class_names, **counts})
    return config, data, line


def _with_weights(
    config: Config, task: Task, data: Data, model: nn.Module | None, *, resumed: bool
) -> tuple[nn.Module, tuple[str, ...]]:
    """The model as a run begins with it, and what is to be said of its weights; of a resumed one only its form.

    Its weights are in its checkpoint, and the file or the server that it began with may be gone by then.
    """
    lines: tuple[str, ...] = ()
    if model is None:
        model, lines = task.network(config, data, resumed=resumed)
    if config.initial_checkpoint is None or resumed:
        return model, lines
    taken = load_initial_weights(model, Path(config.initial_checkpoint), partial=config.partial_weights)
    return model, (*lines, *taken)
