"""One training loop for every method; it does not know which one runs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from unloaf.batchnorm import Statistics
from unloaf.config import Config
from unloaf.data import Batch, Data
from unloaf.engine.devices import adding_gradients, total
from unloaf.engine.optimizer import clip_gradients
from unloaf.engine.setup import Evaluation, Training, check_weights, prepare
from unloaf.errors import NonFiniteLossError
from unloaf.evaluation import choose_subnets
from unloaf.methods.step import StepOutput
from unloaf.seeds import seed_step
from unloaf.stages import inner_module
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


def train_epoch(
    training: Training,
    *,
    on_step: Callable[[StepRow], None] | None = None,
    on_eval_batch: Callable[[], None] | None = None,
) -> EpochRow:
    """Trains the rest of the present epoch, validates if that is due, and continues to the next one.

    What `on_step` raises after a step leaves the run between two steps; what `on_eval_batch` raises before a batch
    leaves the epoch not validated.

    Raises:
        NonFiniteLossError: a loss became NaN or infinite and config.on_nan is stop, so that step was not made; or it is
            skip and no step of the epoch was made.
    """
    position = training.position
    training.model.train()
    start, finite, row = time.perf_counter(), False, None
    for batches in training.batches.epoch(position.epoch, start=position.step):
        row = train_step(training, batches)
        finite |= math.isfinite(row.loss)  # float16 that overflows in its first steps is as it should be
        now = time.perf_counter()
        position.seconds, start = position.seconds + now - start, now
        if on_step is not None:
            on_step(row)
    if row is not None and not finite and not position.made:
        raise NonFiniteLossError(
            f"epoch {position.epoch}: a loss was not finite in each of its {position.step} steps, so none was made and "
            f"nothing was learned; lower --lr {training.config.lr}, give --warmup-epochs, or look for images or labels "
            "that are not what they should be",
            terms=row.terms,
        )
    judged = EpochRow(
        epoch=position.epoch,
        steps=position.step,
        train_loss=position.mean_loss,
        eval=_validate(training, on_eval_batch),
        lr=position.lr,
        seconds=position.seconds,
    )
    position.next_epoch()
    return judged


def _validate(training: Training, on_batch: Callable[[], None] | None) -> Evaluation | None:
    config, epoch = training.config, training.position.epoch
    due = epoch % config.eval_interval == 0 or epoch == config.epochs
    if not (due and len(training.data.val)):
        return None
    chosen: list[Subnet] = []
    if config.eval_subnets:  # the first that is drawn is the main network, which is evaluated anyway
        chosen = choose_subnets(training.stages, config.eval_subnets + 1, seed=config.seed)[1:]
    return training.evaluate("val", subnets=chosen, on_batch=on_batch)


def train_step(training: Training, batches: Sequence[Batch]) -> StepRow:
    """One optimizer step on the batches whose gradients are added.

    Raises:
        NonFiniteLossError: a loss is NaN or infinite and config.on_nan is stop; the run is where it was before.
    """
    config, position = training.config, training.position
    position.whole = False
    # Dropout and drop path draw from here, differently on each process; a resumed run draws the same again.
    seed_step(training.device, config.seed, position.epoch, position.step, training.accelerator.process_index)
    lr, before = training.optimizer.param_groups[0]["lr"], training.method.state_dict()
    _forget_gradients(training)
    try:
        with Statistics(inner_module(training.model)).unless_raised():
            terms, subnets = _gradients(training, batches)
    except NonFiniteLossError as error:
        _forget_gradients(training)
        if config.on_nan == "stop":
            training.method.load_state_dict(before)
            position.whole = True
            raise
        terms, subnets, made = error.terms, (), False
    else:
        made = _update(training)
    loss = sum(terms.values())
    position.step += 1
    position.steps += 1
    position.skipped += not made
    position.made += made
    position.loss_sum += loss if made else 0.0
    position.lr = lr
    position.whole = True
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
    means = total(accelerator, summed) / (len(batches) * accelerator.num_processes)
    # Read once for all: on an accelerator each reading waits for the device.
    terms = dict(zip(names, means.tolist(), strict=True))
    bad = [name for name, value in terms.items() if not math.isfinite(value)]
    if bad:
        check_weights(training)
        raise NonFiniteLossError(
            f"{', '.join(bad)} is not finite in step {training.steps_done + 1} (epoch {training.position.epoch}); the "
            f"weights are those of the step before; lower --lr {training.config.lr} or give --warmup-epochs, "
            "or leave such steps out with --on-nan skip",
            terms=terms,
        )
    return terms, tuple(outputs[-1].subnets)


def _add_gradients(training: Training, batch: Batch, scale: Any) -> StepOutput:
    x, y = batch
    if training.config.channels_last and isinstance(x, Tensor):
        x = x.contiguous(memory_format=torch.channels_last)
    if not training.config.fsdp:
        with training.accelerator.autocast():
            return training.method.backward(x, y, loss_scale=scale)
    # Sharded weights are gathered by hooks on one whole graph, which the lean passes do not build.
    with training.accelerator.autocast():
        out = training.method(x, y)
    (out.loss * scale).backward()
    return out


def _forget_gradients(training: Training) -> None:
    training.optimizer.optimizer.zero_grad(set_to_none=True)


def _update(training: Training) -> bool:
    """The optimizer's step; False when float16 overflowed and it was left out."""
    clip_gradients(training.config, training.accelerator, training.model)
    if training.accelerator.scaler is None:
        training.optimizer.optimizer.step()  # accelerate's own step looks for packages on the disk, 0.2 ms each time
    else:
        # One value for the whole process: a Trainer that ended while it accumulated leaves it off, and no step is made.
        training.accelerator.sync_gradients = True
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
