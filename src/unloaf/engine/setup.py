"""Everything a run needs between two steps, built from its configuration, and how good it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
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
from unloaf.data import SPLIT_SEED, Batch, Data, EvalBatches, ImageSet, TrainBatches, load_data
from unloaf.engine.devices import (
    check_same_on_all,
    find_devices,
    share_model,
    share_optimizer,
    shared_statistics,
    total,
)
from unloaf.engine.methods import build_method, check_classes
from unloaf.engine.optimizer import build_average, build_optimizer, build_schedule
from unloaf.errors import NonFiniteWeightsError, in_one_line
from unloaf.evaluation import Accuracy, SubnetRow, accuracy, evaluate_subnets
from unloaf.models.build import build_model, draw_head, form_comes_with_weights, leaves_heads_out, load_initial_weights
from unloaf.models.preprocessing import describe, with_preprocessing
from unloaf.passes import logits_of
from unloaf.stages import NoResidualBlocksError, Stage, evaluating, find_stages, inner_module
from unloaf.subnet import Subnet


@dataclass(frozen=True)
class Evaluation:
    """The networks of a run on a split: the main one, its moving average, its subnets.

    `main` has its running batch-norm statistics; beside subnets, whose statistics are re-estimated, `reestimated` is
    the main network evaluated as they are. `bad_images` are those that this process could not read and left out.
    """

    main: Accuracy
    average: Accuracy | None = None
    subnets: tuple[SubnetRow, ...] = ()
    bad_images: tuple[str, ...] = ()
    reestimated: SubnetRow | None = None


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
    best_top1: float = -1.0
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
        """Loss and accuracy on train, val or test, and of subnets, each with batch-norm statistics of its own.

        With subnets the main network is evaluated with such statistics too. `on_batch` is called before every batch.
        """
        add = partial(total, self.accelerator)
        models = [self.model] if self.average is None else [self.model, self.average.module]
        with shared_statistics(self.accelerator, self.config, *models):
            read = self.eval_batches(split)
            batches = _Watched(read, on_batch) if on_batch else read
            rows = self._judge_subnets(batches, subnets, add) if subnets else []
            both = rows.pop(0) if rows and rows[0].running else None  # the main network, evaluated both ways
            main = both.running if both else None
            main = main or accuracy(inner_module(self.model), batches, reduce=add)
            average = self.average and accuracy(self.average.module, batches, reduce=add)
        return Evaluation(main, average, tuple(rows), read.bad_images, both)

    def _judge_subnets(
        self, batches: Iterable[Any], subnets: Sequence[Subnet], add: Callable[[Tensor], Tensor]
    ) -> list[SubnetRow]:
        """Before them the main network, if it has statistics that can be re-estimated."""
        tracking = bool(tracking_norms(inner_module(self.model)))
        return evaluate_subnets(
            self.model,
            self.stages,
            batches,
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
        ValueError: the data are not there, the model is unknown or no classifier, or the method cannot train it.
    """
    accelerator = accelerator or find_devices(config)
    config, data, inputs = _with_data(config, data, accelerator, resumed=resumed)
    rank, world = accelerator.process_index, accelerator.num_processes
    batches = TrainBatches(data, config, device=accelerator.device, rank=rank, world=world)
    set_seed(config.seed, deterministic=config.deterministic)
    model, opening = _with_weights(config, data, model, resumed=resumed)
    example = torch.zeros(2, data.in_chans, data.img_size, data.img_size)
    stages = _stages(model, example, required=config.method != "common")
    _check_logits(model, example, config.model, data.num_classes)
    _check_training_side(model, data, config.model)
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
        data=data,
        batches=batches,
        model=model,
        stages=stages,
        method=build_method(
            config,
            model,
            stages,
            steps_per_epoch=batches.steps_per_epoch,
            batches_per_step=config.accumulation(world),
        ),
        optimizer=optimizer,
        schedule=build_schedule(config, optimizer.optimizer, steps_per_epoch=batches.steps_per_epoch),
        average=average,
        accelerator=accelerator,
        opening=(inputs, *opening),
    )


def _with_data(
    config: Config, data: Data | None, accelerator: Accelerator, *, resumed: bool
) -> tuple[Config, Data, str]:
    """The image set, the configuration with what its images are made into, and a line that says so."""
    source = ""
    if data is None:
        config, source = (config, "") if resumed else with_preprocessing(config)
        data = load_data(config)
    check_classes(config, data.num_classes)
    counts = {f"{split} images": len(getattr(data, split)) for split in ("train", "val", "test")}
    check_same_on_all(accelerator, {"classes": data.class_names, **counts})
    return config, data, describe(data, source)


def _with_weights(
    config: Config, data: Data, model: nn.Module | None, *, resumed: bool
) -> tuple[nn.Module, tuple[str, ...]]:
    """The model as a run begins with it, and what is to be said of its weights; of a resumed one only its form.

    Its weights are in its checkpoint, and the file or the server that it began with may be gone by then.
    """
    if resumed:
        pretrained = config.pretrained and form_comes_with_weights(config.model)
        config = replace(config, pretrained=pretrained, initial_checkpoint=None)
    lines: tuple[str, ...] = ()
    if model is None:
        model = _build(config, data)
        if leaves_heads_out(config.model):
            lines = (f"{config.model} is built without its auxiliary heads, which no loss here would train",)
    if config.initial_checkpoint is None:
        return model, lines
    taken = load_initial_weights(model, Path(config.initial_checkpoint), partial=config.partial_weights)
    return model, (*lines, *taken)


def _build(config: Config, data: Data) -> nn.Module:
    model = build_model(
        config.model,
        num_classes=data.num_classes,
        in_chans=data.in_chans,
        img_size=data.img_size,
        width=config.width,
        pretrained=config.pretrained,
        drop=config.drop,
        drop_path=config.drop_path,
        model_kwargs=config.model_arguments,
    )
    if config.head_init is not None:
        draw_head(model, num_classes=data.num_classes, std=config.head_init)
    return model


def _check_logits(model: nn.Module, example: Tensor, name: str, classes: int) -> None:
    with evaluating(model):
        shape = tuple(logits_of(model(example)).shape)
    if shape != (len(example), classes):
        raise ValueError(
            f"model {name}: of {len(example)} images its output has the shape {shape}, not {len(example), classes}; "
            "give a classifier of the data's classes"
        )


def _check_training_side(model: nn.Module, data: Data, name: str) -> None:
    """Blocks are looked for at the side of validation; a model for that side alone cannot be trained at another."""
    side = data.train_img_size
    if side == data.img_size:
        return
    try:
        with evaluating(model):
            model(torch.zeros(2, data.in_chans, side, side))
    except Exception as error:  # models refuse a side as they like, timm's with an AssertionError
        raise ValueError(
            f"train_img_size {side}: model {name} takes {data.img_size} pixels, not {side} ({in_one_line(error)}); "
            f"give --train-img-size {data.img_size}, or a model that takes both"
        ) from error


def _stages(model: nn.Module, example: Tensor, *, required: bool) -> tuple[Stage, ...]:
    try:
        return find_stages(model, example)
    except NoResidualBlocksError:
        if required:
            raise
        return ()
