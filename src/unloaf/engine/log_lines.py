"""What a run says: its epochs as lines of summary.csv; steps, epochs and continuing as lines of text."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from unloaf.config import Config
from unloaf.config.figures import FIGURES, Figures
from unloaf.engine.checkpoint import Checkpoint, steps_per_epoch
from unloaf.engine.loop import EpochRow, StepRow, Training
from unloaf.engine.setup import Evaluation


def summary(row: EpochRow, config: Config) -> dict[str, Any]:
    """An epoch as a line of summary.csv; which columns there are depends on the configuration alone."""
    figures, found = FIGURES[config.task], row.eval
    values: dict[str, Any] = {
        "epoch": row.epoch,
        "time": round(row.seconds, 3),
        "train_loss": None if math.isnan(row.train_loss) else row.train_loss,
        **_columns("eval", figures, found and found.main),
        "lr": row.lr,
    }
    if config.model_ema:
        values |= _columns("ema", figures, found and found.average)
    if config.eval_subnets:
        tops, name = _tops(found, figures) if found else [], figures.decisive
        values |= {
            f"subnets_{name}_mean": sum(tops) / len(tops) if tops else None,
            f"subnets_{name}_{figures.worst_of}": figures.worst(tops) if tops else None,
            f"main_{name}_reestimated": figures.decide(found.reestimated) if found and found.reestimated else None,
        }
    return values


def tracked(row: EpochRow, config: Config, values: Mapping[str, Any], *, seconds: float) -> dict[str, float]:
    """An epoch as trackers have it: its line of summary.csv, each evaluated subnet, and the training time so far.

    Args:
        row: the epoch.
        config: of the run.
        values: its line of summary.csv.
        seconds: of training until its end.
    """
    figures = FIGURES[config.task]
    judged = row.eval.subnets if row.eval else ()
    subnets = {f"subnets_{figures.decisive}/{one.subnet}": figures.decide(one) for one in judged}
    return {name: value for name, value in {**values, **subnets, "train_seconds": seconds}.items() if value is not None}


def _columns(of: str, figures: Figures, found: Any | None) -> dict[str, Any]:
    return {f"{of}_{column.name}": found and getattr(found, column.name) for column in figures.columns}


def _tops(found: Evaluation, figures: Figures) -> list[float]:
    values = [figures.decide(judged) for judged in found.subnets]
    return [value for value in values if value is not None]


def step_line(row: StepRow, training: Training, seconds: float) -> str:
    """A step as a line of text; seconds are for one step, images per second over all devices."""
    config, position = training.config, training.position
    world = training.accelerator.num_processes
    rate = config.batch_size * world * config.accumulation(world) / seconds
    told = f"{rate:.0f}" if rate >= 10 else f"{rate:.2g}"
    return (
        f"train {row.epoch}/{config.epochs} [{position.step}/{training.steps_per_epoch}]  "
        f"loss {row.loss:.4f} ({position.mean_loss:.4f})  lr {row.lr:.3g}  "
        f"{seconds:.3f} s/step  {told} {training.data.unit}/s"
    )


def epoch_line(row: EpochRow, config: Config) -> str:
    """An epoch as a line of text."""
    parts, figures = [f"epoch {row.epoch}/{config.epochs}", f"train loss {row.train_loss:.4f}"], FIGURES[config.task]
    chief, found = figures.chief, row.eval
    if found is not None:
        main = [column for column in figures.columns if column.name in figures.brief]
        parts += [f"val {column.text(getattr(found.main, column.name))}" for column in main]
        if found.average is not None:
            parts.append(f"EMA {chief.text(getattr(found.average, chief.name))}")
        if found.subnets:
            tops = _tops(found, figures)
            parts.append(f"subnets {figures.cell(min(tops))} to {chief.form.format(max(tops))}")
        if found.reestimated is not None:
            parts.append(f"main re-estimated {chief.form.format(figures.decide(found.reestimated))}")
    return "  ".join([*parts, f"lr {row.lr:.2g}", f"{row.seconds:.1f} s"])


def resumed_lines(training: Training, checkpoint: Checkpoint) -> list[str]:
    """Where a resumed run continues, and what becomes of its schedule if an epoch has other steps now."""
    lines = [f"resumed at step {training.steps_done} (epoch {training.position.epoch})"]
    position: Any = checkpoint.state["position"]
    before, now = steps_per_epoch(position, checkpoint.step), training.steps_per_epoch
    if before is not None and before != now:
        lines.append(
            f"an epoch has {now} steps now, it had {before}: run and schedule continue at the same share of epoch "
            f"{training.position.epoch}, after {training.position.step} of {now} steps ({position['step']} of {before} "
            f"before), and the numbers of steps only grow"
        )
    then = json.loads(checkpoint.metadata.get("unloaf_config", "{}")).get("epochs", training.config.epochs)
    return lines + _longer(training, then) if then < training.config.epochs else lines


def _longer(training: Training, before: int) -> list[str]:
    """What it means for a run that it is to have more epochs than its checkpoint knows of."""
    config, position = training.config, training.position
    told = [f"longer: {config.epochs} epochs instead of {before}, from epoch {position.epoch} on"]
    if config.sched in ("constant", "step", "multistep"):
        told.append(f"--sched {config.sched} continues as it was: it does not look at the number of epochs")
    else:
        now = training.optimizer.param_groups[0]["lr"]
        told.append(
            f"--sched {config.sched} is that of {config.epochs} epochs from here on: the learning rate was "
            f"{position.lr:.3g} and is {now:.3g} now; a run of {config.epochs} epochs from the beginning would have "
            "had another until here"
        )
    if config.subnet_schedule != "constant":
        told.append(f"--subnet-schedule {config.subnet_schedule} is that of {config.epochs} epochs from here on, too")
    return told
