"""One training loop for every method; it does not know which one runs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LinearLR, LRScheduler, SequentialLR

from unloaf.engine.config import Config
from unloaf.engine.data import Data, EvalBatches, load_data, train_batches
from unloaf.engine.errors import NonFiniteLossError
from unloaf.engine.memory import keep_freed_memory
from unloaf.engine.methods import build_method
from unloaf.engine.models import build_model
from unloaf.methods.step import Criterion
from unloaf.stages import NoResidualBlocksError, Stage, find_stages
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
class Accuracy:
    """Loss in nats per image; top-1 and top-5 in percent."""

    loss: float
    top1: float
    top5: float


@dataclass(frozen=True)
class EpochRow:
    """An epoch, counted from 1. `eval` is None when no validation images are held out.

    `train_loss` sums the method's terms (nats, mean over steps), `lr` is that of the last
    step, `seconds` is the time spent training, evaluation not included.
    """

    epoch: int
    steps: int
    train_loss: float
    eval: Accuracy | None
    lr: float
    seconds: float


@dataclass(frozen=True)
class StepRow:
    """A step, counted from 1 over the whole run: the method's loss terms, in nats, and its subnets."""

    step: int
    epoch: int
    loss: float
    terms: dict[str, float]
    subnets: tuple[Subnet, ...]
    lr: float


@dataclass(frozen=True)
class Training:
    """Everything a run needs between two steps. The values are fixed, what they hold learns."""

    config: Config
    data: Data
    model: nn.Module
    stages: tuple[Stage, ...]
    method: Any
    optimizer: Optimizer
    scheduler: LRScheduler
    device: torch.device

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch."""
        return len(self.data.train) // self.config.batch_size

    def evaluate(self, split: str) -> Accuracy:
        """Loss and accuracy of the main network on train, val or test, batch norm with its running statistics."""
        images = getattr(self.data, split)
        batches = EvalBatches(images, self.data.normalise, self.config.batch_size, self.device)
        return evaluate(self.model, batches, criterion=self.method.criterion)


def prepare(config: Config, *, data: Data | None = None) -> Training:
    """Loads the data and builds model, method and optimizer; nothing is trained yet.

    Args:
        config: the run.
        data: the image set when it is loaded already.

    Raises:
        ValueError: the data are not there, the model is unknown, or the method cannot train it.
    """
    data = data or load_data(
        config.dataset,
        data_dir=config.data_dir,
        val_fraction=config.val_fraction,
        augment=config.augment,
        img_size=config.img_size,
    )
    steps = len(data.train) // config.batch_size
    if steps == 0:
        raise ValueError(f"batch_size {config.batch_size} exceeds the {len(data.train)} training images of {data.name}")
    accelerator = Accelerator(cpu=config.device == "cpu")
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    set_seed(config.seed)
    model = build_model(
        config.model,
        num_classes=data.num_classes,
        in_chans=data.in_chans,
        img_size=data.img_size,
        width=config.width,
        pretrained=config.pretrained,
    )
    example = torch.zeros(2, data.in_chans, data.img_size, data.img_size)
    stages = _stages(model, example, required=config.method != "common")
    model, optimizer = accelerator.prepare(model, _optimizer(config, model))
    return Training(
        config=config,
        data=data,
        model=model,
        stages=stages,
        method=build_method(config, model, stages),
        optimizer=optimizer,
        scheduler=_scheduler(config, optimizer, steps_per_epoch=steps),
        device=accelerator.device,
    )


def _stages(model: nn.Module, example: Tensor, *, required: bool) -> tuple[Stage, ...]:
    try:
        return find_stages(model, example)
    except NoResidualBlocksError:
        if required:
            raise
        return ()


def _optimizer(config: Config, model: nn.Module) -> Optimizer:
    if config.opt == "adamw":
        return AdamW(model.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    return SGD(
        model.parameters(),
        lr=config.lr,
        momentum=config.momentum,
        nesterov=config.momentum > 0,
        weight_decay=config.weight_decay,
    )


def _scheduler(config: Config, optimizer: Any, *, steps_per_epoch: int) -> LRScheduler:
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper steps the schedule per process
    warmup = config.warmup_epochs * steps_per_epoch
    rest = config.epochs * steps_per_epoch - warmup
    if config.sched == "constant":
        main: LRScheduler = LambdaLR(optimizer, lambda step: 1.0)
    else:
        main = CosineAnnealingLR(optimizer, T_max=rest)
    if warmup == 0:
        return main
    rise = LinearLR(optimizer, start_factor=0.01, total_iters=warmup)
    return SequentialLR(optimizer, [rise, main], milestones=[warmup])


def train_epoch(training: Training, epoch: int, *, on_step: Callable[[StepRow], None] | None = None) -> EpochRow:
    """Trains one epoch and validates.

    Args:
        training: learns in place.
        epoch: counted from 1; decides order, crops and flips together with the seed.
        on_step: is called after every step.

    Raises:
        NonFiniteLossError: a loss became NaN or infinite; that step was not made.
    """
    config = training.config
    batches = train_batches(
        training.data, batch_size=config.batch_size, seed=config.seed, epoch=epoch, device=training.device
    )
    training.model.train()
    total, lr, start = 0.0, 0.0, time.perf_counter()
    for index, (x, y) in enumerate(batches, start=1):
        row = _step(training, x, y, epoch=epoch, step=(epoch - 1) * training.steps_per_epoch + index)
        total, lr = total + row.loss, row.lr
        if on_step is not None:
            on_step(row)
    seconds = time.perf_counter() - start
    accuracy = training.evaluate("val") if len(training.data.val) else None
    steps = training.steps_per_epoch
    return EpochRow(epoch, steps, train_loss=total / steps, eval=accuracy, lr=lr, seconds=seconds)


def _step(training: Training, x: Tensor, y: Tensor, *, epoch: int, step: int) -> StepRow:
    training.optimizer.zero_grad(set_to_none=True)
    out = training.method.backward(x, y)
    loss = float(out.loss)
    terms = {name: float(value) for name, value in out.terms.items()}
    if not math.isfinite(loss):
        bad = ", ".join(name for name, value in terms.items() if not math.isfinite(value)) or "loss"
        raise NonFiniteLossError(
            f"{bad} is not finite in step {step} (epoch {epoch}); the weights are those of the step before; "
            f"lower --lr {training.config.lr} or give --warmup-epochs"
        )
    lr = training.optimizer.param_groups[0]["lr"]
    training.optimizer.step()
    training.scheduler.step()
    return StepRow(step, epoch, loss, terms, tuple(out.subnets), lr)


@torch.inference_mode()
def evaluate(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], *, criterion: Criterion) -> Accuracy:
    """Loss and accuracy of the main network, in evaluation mode; the mode is put back afterwards.

    Args:
        model: gives logits, (B, classes).
        batches: images and labels, (B, C, H, W) and (B,).
        criterion: from logits and labels to the mean loss.
    """
    was_training = model.training
    model.eval()
    count, loss, top1, top5 = 0, 0.0, 0, 0
    for x, y in batches:
        logits = model(x).float()
        ranked = logits.topk(min(5, logits.shape[1])).indices == y[:, None]
        count += len(y)
        loss += float(criterion(logits, y)) * len(y)
        top1 += int(ranked[:, 0].sum())
        top5 += int(ranked.any(dim=1).sum())
    model.train(was_training)
    return Accuracy(loss / count, 100 * top1 / count, 100 * top5 / count)


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
    for epoch in range(1, config.epochs + 1):
        row = train_epoch(training, epoch, on_step=on_step)
        if on_epoch is not None:
            on_epoch(row)
    return training
