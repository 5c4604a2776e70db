"""One training loop for every method; it does not know which one runs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn

from unloaf.batchnorm import statistics_unless_raised
from unloaf.engine.config import Config
from unloaf.engine.data import Batch, Data, EvalBatches, TrainBatches, load_data
from unloaf.engine.devices import adding_gradients, find_devices, share_model, share_optimizer, shared_statistics, total
from unloaf.engine.errors import NonFiniteLossError
from unloaf.engine.methods import build_method
from unloaf.engine.models import build_model, load_initial_weights
from unloaf.engine.optimizer import build_average, build_optimizer, build_schedule, clip_gradients
from unloaf.engine.seeds import seed_step
from unloaf.evaluation import Accuracy, SubnetRow, accuracy, choose_subnets, evaluate_subnets
from unloaf.methods.step import StepOutput
from unloaf.stages import NoResidualBlocksError, Stage, find_stages, inner_module
from unloaf.subnet import Subnet


@contextmanager
def one_thread() -> Iterator[None]:
    """Inside, torch computes on one processor core.

    For networks so small that threads wait for each other longer than they compute: on two
    cores shared with other work, two threads took several times the processor time of one.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dataclass(frozen=True)
class Evaluation:
    """The networks of a run on a split: the main one, its moving average, its subnets."""

    main: Accuracy
    average: Accuracy | None = None
    subnets: tuple[SubnetRow, ...] = ()


@dataclass(frozen=True)
class EpochRow:
    """An epoch, counted from 1. `eval` is None when it was not due or no validation images are held out.

    `train_loss` sums the method's terms (nats, mean over steps), `lr` is that of the last
    step, `seconds` is the time spent training, evaluation not included.
    """

    epoch: int
    steps: int
    train_loss: float
    eval: Evaluation | None
    lr: float
    seconds: float


@dataclass(frozen=True)
class StepRow:
    """A step, counted from 1 over the whole run: the method's loss terms, in nats, and its subnets.

    `made` is False when the step was left out: a loss was not finite, or float16 overflowed.
    """

    step: int
    epoch: int
    loss: float
    terms: dict[str, float]
    subnets: tuple[Subnet, ...]
    lr: float
    made: bool


@dataclass
class Position:
    """How far a run is, in numbers alone: what a checkpoint keeps beside weights and optimizer.

    `epoch` is the one being trained, counted from 1, `step` the optimizer steps of it that were tried, `updates` those
    of the whole run that were made, `skipped` those that were left out; `loss_sum` and `seconds` are over this epoch.
    """

    epoch: int = 1
    step: int = 0
    updates: int = 0
    skipped: int = 0
    loss_sum: float = 0.0
    seconds: float = 0.0
    lr: float = 0.0
    best_top1: float = -1.0

    def next_epoch(self) -> None:
        """To the beginning of the next epoch."""
        self.epoch, self.step, self.loss_sum, self.seconds = self.epoch + 1, 0, 0.0, 0.0


@dataclass(frozen=True)
class Training:
    """Everything a run needs between two steps. The values are fixed, what they hold learns."""

    config: Config
    data: Data
    batches: TrainBatches
    model: nn.Module
    stages: tuple[Stage, ...]
    method: Any
    optimizer: Any
    schedule: Any
    average: Any | None
    accelerator: Accelerator
    position: Position = field(default_factory=Position)

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

    def eval_batches(self, split: str) -> EvalBatches:
        """This process's share of train, val or test, not augmented."""
        images = getattr(self.data, split)
        where = self.accelerator
        return EvalBatches(
            images, self.data, self.config, device=self.device, rank=where.process_index, world=where.num_processes
        )

    @property
    def steps_done(self) -> int:
        """Optimizer steps that were tried since the run began."""
        return (self.position.epoch - 1) * self.steps_per_epoch + self.position.step

    def evaluate(
        self,
        split: str,
        *,
        subnets: Sequence[Subnet] = (),
        on_batch: Callable[[], None] | None = None,
    ) -> Evaluation:
        """Loss and accuracy on train, val or test.

        Args:
            split: whose images.
            subnets: which ones to judge besides, each with batch-norm statistics of its own.
            on_batch: is called before every batch.
        """
        add = partial(total, self.accelerator)
        models = [self.model] if self.average is None else [self.model, self.average.module]
        with shared_statistics(self.accelerator, self.config, *models):
            batches = _Watched(self.eval_batches(split), on_batch) if on_batch else self.eval_batches(split)
            main, *average = (accuracy(inner_module(model), batches, reduce=add) for model in models)
            rows = self._judge_subnets(batches, subnets, add)
        return Evaluation(main, average[0] if average else None, rows)

    def _judge_subnets(
        self, batches: Iterable[Any], subnets: Sequence[Subnet], add: Callable[[Tensor], Tensor]
    ) -> tuple[SubnetRow, ...]:
        if not subnets:
            return ()
        rows = evaluate_subnets(
            self.model,
            self.stages,
            batches,
            subnets=subnets,
            calibration=self.calibration_batches(),
            reduce=add,
        )
        return tuple(rows)

    def calibration_batches(self) -> Iterable[Batch]:
        """The first training images, not augmented, the same on every process."""
        count = min(self.config.recalibrate, len(self.data.train))
        images = self.data.train.subset(torch.arange(count))
        return EvalBatches(images, self.data, self.config, device=self.device)


@dataclass(frozen=True)
class _Watched:
    """Batches, as often as one iterates over them, with something to do before each."""

    batches: Iterable[Batch]
    before: Callable[[], None]

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches:
            self.before()
            yield batch


def prepare(
    config: Config, *, data: Data | None = None, model: nn.Module | None = None, folder: Path | None = None
) -> Training:
    """Loads the data and builds model, method and optimizer; nothing is trained yet.

    Args:
        config: the run.
        data: the image set when it is loaded already.
        model: train this network instead of config.model.
        folder: where trackers write.

    Raises:
        ValueError: the data are not there, the model is unknown, or the method cannot train it.
    """
    accelerator = find_devices(config, folder=folder)
    data = data or load_data(config)
    rank, world = accelerator.process_index, accelerator.num_processes
    batches = TrainBatches(data, config, device=accelerator.device, rank=rank, world=world)
    set_seed(config.seed)
    model = model or _build(config, data)
    if config.initial_checkpoint is not None:
        load_initial_weights(model, Path(config.initial_checkpoint))
    example = torch.zeros(2, data.in_chans, data.img_size, data.img_size)
    stages = _stages(model, example, required=config.method != "common")
    if config.channels_last:
        model = model.to(memory_format=torch.channels_last)
    model = share_model(accelerator, config, model)
    average = build_average(config, inner_module(model))
    optimizer = share_optimizer(accelerator, build_optimizer(config, inner_module(model)))
    return Training(
        config=config,
        data=data,
        batches=batches,
        model=model,
        stages=stages,
        method=build_method(config, model, stages),
        optimizer=optimizer,
        schedule=build_schedule(config, optimizer.optimizer, steps_per_epoch=batches.steps_per_epoch),
        average=average,
        accelerator=accelerator,
    )


def _build(config: Config, data: Data) -> nn.Module:
    return build_model(
        config.model,
        num_classes=data.num_classes,
        in_chans=data.in_chans,
        img_size=data.img_size,
        width=config.width,
        pretrained=config.pretrained,
        drop=config.drop,
        drop_path=config.drop_path,
    )


def _stages(model: nn.Module, example: Tensor, *, required: bool) -> tuple[Stage, ...]:
    try:
        return find_stages(model, example)
    except NoResidualBlocksError:
        if required:
            raise
        return ()


def train_epoch(
    training: Training,
    *,
    on_step: Callable[[StepRow], None] | None = None,
    on_eval_batch: Callable[[], None] | None = None,
) -> EpochRow:
    """Trains the rest of the present epoch, validates if that is due, and goes on to the next one.

    Args:
        training: learns in place, its position included.
        on_step: is called after every step; what it raises leaves the run between two steps.
        on_eval_batch: is called before every batch of the validation; what it raises leaves the epoch not validated.

    Raises:
        NonFiniteLossError: a loss became NaN or infinite and config.on_nan is stop; that step was not made.
    """
    position = training.position
    training.model.train()
    start = time.perf_counter()
    for batches in training.batches.epoch(position.epoch, start=position.step):
        row = train_step(training, batches)
        now = time.perf_counter()
        position.seconds, start = position.seconds + now - start, now
        if on_step is not None:
            on_step(row)
    row = EpochRow(
        epoch=position.epoch,
        steps=position.step,
        train_loss=position.loss_sum / max(1, position.step),
        eval=_validate(training, on_eval_batch),
        lr=position.lr,
        seconds=position.seconds,
    )
    position.next_epoch()
    return row


def _validate(training: Training, on_batch: Callable[[], None] | None) -> Evaluation | None:
    config, epoch = training.config, training.position.epoch
    due = epoch % config.eval_interval == 0 or epoch == config.epochs
    if not (due and len(training.data.val)):
        return None
    chosen: list[Subnet] = []
    if config.eval_subnets:  # the first that is drawn is the whole network, which is judged anyway
        chosen = choose_subnets(training.stages, config.eval_subnets + 1, seed=config.seed)[1:]
    return training.evaluate("val", subnets=chosen, on_batch=on_batch)


def train_step(training: Training, batches: Sequence[Batch]) -> StepRow:
    """One optimizer step on the batches whose gradients are added.

    Raises:
        NonFiniteLossError: a loss is NaN or infinite and config.on_nan is stop; the run is where it was before.
    """
    config, position = training.config, training.position
    # Dropout and drop path draw from here, differently on each process; a resumed run draws the same again.
    seed_step(config.seed, position.epoch, position.step, training.accelerator.process_index)
    lr, before = training.optimizer.param_groups[0]["lr"], training.method.state_dict()
    training.optimizer.zero_grad(set_to_none=True)
    try:
        with statistics_unless_raised(inner_module(training.model)):
            terms, subnets = _gradients(training, batches)
    except NonFiniteLossError as error:
        training.optimizer.zero_grad(set_to_none=True)
        if config.on_nan == "stop":
            training.method.load_state_dict(before)
            raise
        terms, subnets, made = error.terms, (), False
    else:
        made = _update(training)
    loss = sum(terms.values())
    position.step += 1
    position.skipped += not made
    position.loss_sum += loss if made else 0.0
    position.lr = lr
    return StepRow(training.steps_done, position.epoch, loss, terms, subnets, lr, made)


def _gradients(training: Training, batches: Sequence[Batch]) -> tuple[dict[str, float], tuple[Subnet, ...]]:
    """Adds the gradients of all batches; gives the loss terms, means over batches and processes."""
    accelerator = training.accelerator
    scale: Any = 1 / len(batches)
    if accelerator.scaler is not None:
        scale = accelerator.scaler.scale(torch.tensor(scale, device=training.device))
    outputs = []
    for index, batch in enumerate(batches, start=1):
        with adding_gradients(accelerator, training.config, training.model, last=index == len(batches)):
            outputs.append(_add_gradients(training, batch, scale))
    names = list(outputs[0].terms)
    summed = torch.stack([torch.stack([out.terms[name].float() for name in names]) for out in outputs]).sum(0)
    # Read once for all: on an accelerator each reading waits for the device.
    values = (total(accelerator, summed) / (len(batches) * accelerator.num_processes)).tolist()
    terms = dict(zip(names, values, strict=True))
    bad = [name for name, value in terms.items() if not math.isfinite(value)]
    if bad:
        raise NonFiniteLossError(
            f"{', '.join(bad)} is not finite in step {training.steps_done + 1} (epoch {training.position.epoch}); the "
            f"weights are those of the step before; lower --lr {training.config.lr} or give --warmup-epochs, "
            "or leave such steps out with --on-nan skip",
            terms=terms,
        )
    return terms, tuple(outputs[-1].subnets)


def _add_gradients(training: Training, batch: Batch, scale: Any) -> StepOutput:
    x, y = batch
    if training.config.channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    if not training.config.fsdp:
        with training.accelerator.autocast():
            return training.method.backward(x, y, loss_scale=scale)
    # Sharded weights are gathered by hooks on one whole graph, which the lean passes do not build.
    with training.accelerator.autocast():
        out = training.method(x, y)
    (out.loss * scale).backward()
    return out


def _update(training: Training) -> bool:
    """The optimizer's step; False when float16 overflowed and it was left out."""
    clip_gradients(training.config, training.accelerator, training.model)
    training.optimizer.step()
    if training.optimizer.step_was_skipped:
        return False
    training.position.updates += 1
    training.schedule.step_update(training.position.updates)
    if training.average is not None:
        training.average.update(inner_module(training.model), step=training.position.updates)
    return True


def fit(
    config: Config,
    *,
    data: Data | None = None,
    on_step: Callable[[StepRow], None] | None = None,
    on_epoch: Callable[[EpochRow], None] | None = None,
) -> Training:
    """Trains a run from its first to its last epoch; writes no file.

    Raises:
        ValueError: see `prepare`.
        NonFiniteLossError: see `train_epoch`.
    """
    training = prepare(config, data=data)
    while not training.finished:
        row = train_epoch(training, on_step=on_step)
        if on_epoch is not None:
            on_epoch(row)
    return training
